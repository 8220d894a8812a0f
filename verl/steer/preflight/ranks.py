# SPDX-License-Identifier: Apache-2.0
"""The checks of the training ranks; torchrun starts `python -m verl.steer.preflight.ranks FOLDER` for each."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.steer.engine import fsdp  # noqa: F401 - registers the engine
from verl.steer.engine.vocab_reductions import vocab_reductions
from verl.steer.preflight.processes import TOKENS, write_row
from verl.steer.preflight.rows import GIB, run_check
from verl.steer.replacements import replace_in_worker
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.device import get_device_name, get_nccl_backend
from verl.workers.engine import EngineRegistry
from verl.workers.utils.padding import response_from_nested

#: Largest differences, in the arithmetic of the logits: for float32 rounding alone, and for bfloat16 a few units of its
#: last of 8 bits at logits of about 10. Wrong weights differ by whole nats.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}

#: The checks in their order; the first is called by the name of the backend.
CHECKS = ("collectives", "attention", "kernels", "log-probs", "checkpoint")


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two tensors, NaN if either has one."""
    return float((ours.double() - theirs.double()).abs().max())


class Rank:
    """One rank's model and checks."""

    def __init__(self, folder: Path, config: DictConfig) -> None:
        self.folder, self.config, self.device = folder, config, get_device_name()
        self.dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        self.rank, self.ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def collectives(self) -> str:
        """The sum of the ranks' numbers over the backend of the device."""
        backend = get_nccl_backend()
        if self.device != "cpu":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # gloo for what lies in the machine's memory, as in verl.
        dist.init_process_group("cpu:gloo" if self.device == "cpu" else f"cpu:gloo,{self.device}:{backend}")
        total, expected = (
            torch.full((1 << 20,), float(self.rank), device=self.device),
            self.ranks * (self.ranks - 1) / 2,
        )
        dist.all_reduce(total)
        if not (total == expected).all():
            raise ValueError(
                f"{backend}: a sum over {self.ranks} ranks is {total[0]}: set NCCL_DEBUG=INFO and see the log"
            )
        return f"{backend}, {self.ranks} ranks"

    def attention(self) -> str:
        """Packed sequences by the configured attention, against each alone by transformers' plain one."""
        name = self.config.actor_rollout_ref.model.override_config.get("attn_implementation") or "flash_attention_2"
        torch.manual_seed(0)
        size = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
        # Weights large enough for attention to matter.
        options = Qwen2Config(vocab_size=97, num_hidden_layers=1, initializer_range=0.2, **size)
        plain = Qwen2ForCausalLM._from_config(options, attn_implementation="eager").to(self.device, self.dtype)
        model = Qwen2ForCausalLM._from_config(options, attn_implementation=name).to(self.device, self.dtype)
        model.load_state_dict(plain.state_dict())
        rows = [torch.randint(97, (1, length), device=self.device) for length in (5, 9)]
        places = torch.cat([torch.arange(row.shape[1], device=self.device) for row in rows]).unsqueeze(0)
        with torch.no_grad():
            alone = torch.cat([plain(row, use_cache=False).logits for row in rows], 1)
            packed = model(torch.cat(rows, 1), position_ids=places, use_cache=False).logits
        share = difference(packed, alone) / float(alone.abs().max())
        if not share < TOLERANCE[self.dtype]:
            raise ValueError(
                f"{name}: {share:.1%} off: set +actor_rollout_ref.model.override_config.attn_implementation=packed_sdpa"
            )
        flash = "" if find_spec("flash_attn") else ", flash-attn is not installed"
        return f"{name}, within {share:.1e} of plain attention{flash}"

    def kernels(self) -> str:
        """The one pass over the vocabulary and its gradient, against torch's functions in float64."""
        logits = (3 * torch.randn(32, 50_000, device=self.device)).to(self.dtype).requires_grad_()
        labels = torch.randint(50_000, (32,), device=self.device)
        ours = vocab_reductions(logits, labels, with_squares=True)
        log_pi = torch.log_softmax(logits.double(), -1)
        log_prob = log_pi.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        pi = log_pi.exp()
        entropy, squares = -(pi * log_pi).sum(-1), (pi * pi * log_pi).sum(-1)
        gradients = [
            torch.autograd.grad((a + b).sum(), logits)[0] for a, b in ((ours[0], ours[1]), (log_prob, entropy))
        ]
        pairs = {"log_prob": (ours[0], log_prob), "entropy": (ours[1], entropy), "squares": (ours[3], squares)}
        found = {name: difference(*pair) for name, pair in pairs.items()} | {"gradient": difference(*gradients)}
        wrong = [f"{name} by {value:.1e}" for name, value in found.items() if not value < 1e-2]
        if wrong:
            raise ValueError(
                f"{', '.join(wrong)} off: set actor_rollout_ref.actor.fsdp_config.one_pass_reductions=false"
            )
        return f"within {max(found.values()):.1e} of torch, {logits.dtype} on {self.device}"

    @cached_property
    def engine(self) -> Any:
        """The run's FSDP engine; its checkpoints leave out the optimizer, which has no state yet, and the export."""
        replace_in_worker()
        ref = self.config.actor_rollout_ref
        ref.actor.checkpoint.save_contents = ref.actor.checkpoint.load_contents = ["model", "extra"]
        actor, model = omega_conf_to_dataclass(ref.actor), omega_conf_to_dataclass(ref.model)
        actor.engine.use_remove_padding = model.use_remove_padding
        built = EngineRegistry.new(
            model_type="language_model",
            backend=actor.strategy,
            model_config=model,
            engine_config=actor.engine,
            optimizer_config=actor.optim,
            checkpoint_config=actor.checkpoint,
        )
        built.initialize()
        return built

    @cached_property
    def tokens(self) -> dict[str, list]:
        """What vLLM sampled."""
        if not (self.folder / TOKENS).exists():
            raise ValueError("vLLM gave no tokens to compare with: repair vLLM first")
        return json.loads((self.folder / TOKENS).read_text())

    def engine_log_probs(self, prompt: list[int], response: list[int]) -> Tensor:
        """The engine's log-probs of a response, (tokens,)."""

        def nested(values: list[int] | range) -> Tensor:
            return torch.nested.as_nested_tensor([torch.tensor(list(values))], layout=torch.jagged)

        count = len(prompt) + len(response)
        rows = {"prompts": prompt, "responses": response, "input_ids": prompt + response, "position_ids": range(count)}
        rows |= {"response_mask": [1] * len(response), "loss_mask": [1] * len(response)}
        batch = TensorDict({name: nested(values) for name, values in rows.items()}, batch_size=1)
        batch = batch.to(self.device)
        packed = self.config.actor_rollout_ref.model.use_remove_padding
        flags = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 1, "temperature": 1.0, "global_batch_size": 1}
        tu.assign_non_tensor(batch, use_remove_padding=packed, calculate_entropy=False, compute_loss=False, **flags)
        with self.engine.eval_mode():
            output = self.engine.infer_batch(batch)["model_output"]["log_probs"]
        return response_from_nested(output.cpu(), batch["response_mask"].cpu()).values().float()

    def log_probs(self) -> str:
        """FSDP's log-probs of vLLM's tokens, against vLLM's."""
        theirs = torch.tensor(self.tokens["log_probs"])
        off = (self.engine_log_probs(self.tokens["prompt"], self.tokens["response"]) - theirs).abs()
        found = (
            f"vLLM and FSDP differ by {off.max():.1e} nats at most, {off.mean():.1e} on average, on {len(off)} tokens"
        )
        if not off.mean() < TOLERANCE[self.dtype]:
            raise ValueError(
                f"{found}: expected the mean below {TOLERANCE[self.dtype]}: check model.path and both dtypes"
            )
        return found

    def checkpoint(self) -> str:
        """The trained weights, written where the run's checkpoints go, wiped and read back."""
        place, probe = Path(self.config.trainer.default_local_dir) / "preflight_checkpoint", ([1, 2], [3, 4, 5])
        before = self.engine_log_probs(*probe)
        start = time.monotonic()
        self.engine.save_checkpoint(str(place))
        seconds = time.monotonic() - start
        size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        with torch.no_grad():
            for parameter in self.engine.module.parameters():
                parameter.zero_()
        self.engine.load_checkpoint(str(place))
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(place)
        if not torch.equal(self.engine_log_probs(*probe), before):
            raise ValueError(f"{place}: other weights were read than were written: check the file system")
        return f"{size / GIB:.2f} GiB written in {seconds:.1f} s and read back, in {place.parent}"


def main() -> None:
    """All checks of this rank, each a row in its file."""
    folder = Path(sys.argv[1])
    rank = Rank(folder, OmegaConf.load(folder / "config.yaml"))
    for name in CHECKS:
        write_row(folder, "ranks", rank.rank, run_check(name, getattr(rank, name.replace("-", "_"))))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
