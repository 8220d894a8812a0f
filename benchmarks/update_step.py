# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of a training step on given rollouts: STEER against GRPO, in this fork's FSDP engine.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/update_step.py --vocab 32000 --responses 32 --length 64

A step is the old log-probs with their entropies, then the updates of four mini-batches: all that the methods differ in.
Generation, which is the same in all, is left out, so that the ratios are upper bounds of those of a whole step. The
methods take turns, on the same model and rollouts, and the order changes from round to round. Memory is the allocator's
peak above what the model and its optimizer hold, in a step of one micro-batch, since a further one takes no more.

    grpo, verl's reductions   upstream's loss, and its functions for log-prob and entropy
    grpo                      upstream's loss, the logits read once
    steer                     STEER's loss, the logits read once
    steer, exact              the estimator `exact`, which asks for two more sums over the vocabulary
    influence                 weights by the tokens' influence on the entropy (docs/control.md)
    influence, refresh 4      the same, four mini-batches of a step with one direction
    influence, head           the same through the last layer alone
    pi, released              a plain controller of the entropy on STEER's estimate
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from measure import peak_extra_bytes, seconds
from rich.console import Console
from rich.table import Table
from tensordict import TensorDict
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("VERL_PLATFORM", "cpu")
for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29411"}.items():
    os.environ.setdefault(name, value)

from verl.steer import main as entry_point  # noqa: E402, F401 - puts verl's configurations on Hydra's path
from verl.steer.engine import fsdp  # noqa: E402, F401 - registers the engine
from verl.steer.loss import ppo_loss  # noqa: E402
from verl.steer.replacements import replace_in_worker  # noqa: E402
from verl.steer.requirements import check_and_complete  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.utils.config import omega_conf_to_dataclass  # noqa: E402
from verl.workers.engine import EngineRegistry  # noqa: E402
from verl.workers.utils.padding import response_from_nested  # noqa: E402

import verl_steer  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]

#: Way -> configuration and overrides.
WAYS = {
    "grpo, verl's reductions": ("grpo", ["actor_rollout_ref.actor.fsdp_config.one_pass_reductions=false"]),
    "grpo": ("grpo", []),
    "steer": ("steer_exp", []),
    "steer, exact": ("steer_exp", ["actor_rollout_ref.actor.policy_loss.entropy_change_estimator=exact"]),
    "influence": ("influence_target", []),
    "influence, refresh 4": ("influence_target", ["actor_rollout_ref.actor.policy_loss.influence_refresh=4"]),
    "influence, head": ("influence_target", ["actor_rollout_ref.actor.policy_loss.influence_way=head"]),
    "pi, released": ("pi_released", []),
}

#: Updates of a step, so that ways that reuse something from one to the next show it.
MINI_BATCHES = 4


def random_model(arguments: argparse.Namespace, folder: str) -> None:
    """A model of random weights with the laptop task's tokenizer, whose tokens are the vocabulary's first."""
    AutoTokenizer.from_pretrained(arguments.tokenizer).save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=arguments.vocab,
        hidden_size=arguments.hidden,
        intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def configuration(way: str, model: str, arguments: argparse.Namespace):
    """The actor's configuration as a run of this way has it, and the whole of it."""
    name, overrides = WAYS[way]
    with initialize_config_dir(str(verl_steer.OVERLAY / "trainer/config"), version_base=None):
        config = compose(
            "steer",
            [
                f"method={name}",
                f"hardware={'cpu' if DEVICE == 'cpu' else 'gpu1'}",
                f"actor_rollout_ref.model.path={model}",
                f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={arguments.micro_batch}",
                "actor_rollout_ref.actor.optim.lr=1e-9",
                *overrides,
            ],
        )
    check_and_complete(config)
    return omega_conf_to_dataclass(config.actor_rollout_ref.actor), config


def rollouts(arguments: argparse.Namespace, count: int) -> TensorDict:
    """Prompts of 16 tokens and responses of random tokens, between a quarter of the length and all of it."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(arguments.length // 4, arguments.length + 1, (count,), generator=generator).tolist()

    def nested(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    prompts = [torch.randint(arguments.vocab, (16,), generator=generator) for _ in range(count)]
    responses = [torch.randint(arguments.vocab, (length,), generator=generator) for length in lengths]
    advantages = torch.randn(count, generator=generator)
    return TensorDict(
        {
            "prompts": nested(prompts),
            "responses": nested(responses),
            "input_ids": nested([torch.cat(pair) for pair in zip(prompts, responses, strict=True)]),
            "position_ids": nested([torch.arange(16 + length) for length in lengths]),
            "response_mask": nested([torch.ones(length, dtype=torch.long) for length in lengths]),
            "loss_mask": nested([torch.ones(length, dtype=torch.long) for length in lengths]),
            "advantages": nested([a.expand(n) for a, n in zip(advantages, lengths, strict=True)]),
        },
        batch_size=count,
    )


class Step:
    """One way's engine and its training step."""

    def __init__(self, way: str, model: str, arguments: argparse.Namespace) -> None:
        self.actor, config = configuration(way, model, arguments)
        self.rollouts = rollouts(arguments, arguments.responses)
        self.micro_batch = rollouts(arguments, arguments.micro_batch)
        model_config = omega_conf_to_dataclass(config.actor_rollout_ref.model)
        self.actor.engine.use_remove_padding = model_config.use_remove_padding
        self.engine = EngineRegistry.new(
            model_type="language_model",
            backend=self.actor.strategy,
            model_config=model_config,
            engine_config=self.actor.engine,
            optimizer_config=self.actor.optim,
            checkpoint_config=self.actor.checkpoint,
        )
        self.engine.initialize()
        self.flags = {
            "use_remove_padding": model_config.use_remove_padding,
            "use_dynamic_bsz": False,
            "micro_batch_size_per_gpu": arguments.micro_batch,
            "temperature": 1.0,
            "global_batch_size": arguments.responses // MINI_BATCHES,
        }

    def __call__(self) -> None:
        self.update(self.score(self.rollouts))

    def on_one_micro_batch(self) -> None:
        self.update(self.score(self.micro_batch), 1)

    def score(self, data: TensorDict) -> TensorDict:
        """The rollouts with the old policy's log-probs and entropies."""
        batch = data.clone()
        tu.assign_non_tensor(batch, **self.flags, calculate_entropy=True, compute_loss=False)
        with self.engine.eval_mode():
            output = self.engine.infer_batch(batch)["model_output"]
        scored = data.clone()
        scored["old_log_probs"] = response_from_nested(output["log_probs"], data["response_mask"])
        scored["entropy"] = response_from_nested(output["entropy"], data["response_mask"])
        return scored

    def update(self, batch: TensorDict, mini_batches: int = MINI_BATCHES) -> None:
        tu.assign_non_tensor(
            batch,
            **self.flags,
            calculate_entropy=self.actor.calculate_entropy,
            calculate_sum_pi_squared=self.actor.calculate_sum_pi_squared,
        )
        with self.engine.train_mode():
            for mini_batch in tu.chunk_tensordict(batch, mini_batches):
                self.engine.train_batch(mini_batch, partial(ppo_loss, config=self.actor))
        self.engine.lr_scheduler_step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--responses", type=int, default=32)
    parser.add_argument("--length", type=int, default=64, help="longest response, tokens")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokenizer", type=Path, default=REPOSITORY / "outputs/laptop_task/model")
    arguments = parser.parse_args()
    if not arguments.tokenizer.is_dir():
        parser.error(
            f"--tokenizer {arguments.tokenizer}: no such folder; expected a tokenizer's, such as the one that "
            "scripts/make_laptop_task.py makes"
        )
    torch.set_num_threads(arguments.threads)
    replace_in_worker()
    torch.distributed.init_process_group("gloo" if DEVICE == "cpu" else "cpu:gloo,cuda:nccl")
    with tempfile.TemporaryDirectory() as model:
        random_model(arguments, model)
        steps = {way: Step(way, model, arguments) for way in arguments.ways}
    memory = {}
    for way, step in steps.items():
        step()
        memory[way] = peak_extra_bytes(step.on_one_micro_batch, DEVICE)
    times: dict[str, list[float]] = {way: [] for way in steps}
    for number in range(arguments.rounds):
        for way in list(steps) if number % 2 else reversed(list(steps)):
            times[way].append(seconds(steps[way], DEVICE))
    table = Table(
        "step", "ms", "x grpo", "extra MiB", "x grpo ",
        title=f"{arguments.responses} responses to {arguments.length} tokens, vocabulary {arguments.vocab:,}",
    )  # fmt: skip
    ours = "grpo" if "grpo" in steps else next(iter(steps))
    base = statistics.median(times[ours])
    for way in steps:
        # The ratio of neighbours in time: whatever else the machine does meets both.
        ratio = statistics.median(a / b for a, b in zip(times[way], times[ours], strict=True))
        table.add_row(
            way,
            f"{statistics.median(times[way]) * 1e3:,.0f}",
            f"{ratio:.3f}",
            f"{memory[way] / 2**20:,.1f}",
            f"{memory[way] / memory[ours]:.3f}",
        )
    Console(width=120).print(table)
    print(f"medians of {arguments.rounds} rounds; the ratio's base takes {base * 1e3:,.0f} ms")


if __name__ == "__main__":
    main()
