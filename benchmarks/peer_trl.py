# SPDX-License-Identifier: Apache-2.0
"""Step times of this fork's GRPO and of TRL's GRPOTrainer on the same work, on a CPU: `bash benchmarks/peer_trl.sh`.

Both sides have the same model, data, chat template, reward function, sampling (temperature 1), rollouts and optimizer
updates a step, clip, learning rate and AdamW, in float32, without KL. Each runs as its users run it: here Ray, vLLM
and FSDP2 by run/run_grpo.sh, there one process with Hugging Face generation. They run one after the other, in turn
where `--repeats` is above 1, and never at the same time.

    laptop-128, laptop-512   the quickstart's model and problems, 128 rollouts and 4 updates a step, or 512 and 8
    wide-128                 a random model of 50 M parameters whose chance to end is about 1/64 at every token:
                             lengths from 1 to 256, most of them short; 128 rollouts and 4 updates a step

A step is one batch of rollouts and all updates on it. The table gives medians after the first steps, and for this
fork where the time goes, by verl's own timers. Each run leaves a JSON file in `--out`/results; `--table` only shows
what is there.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
SIDES = ("steer", "trl")
GROUP = 8  # rollouts of a prompt
PARTS = ("gen", "old_log_prob", "adv", "update_actor", "update_weights")


@dataclass(frozen=True)
class Workload:
    """One step's work, the same on both sides.

    Args:
        task: folder within the tasks' folder, with `train.parquet`, `test.parquet` and `model/`.
        rollouts: a step.
        updates: optimizer updates a step, on an equal share of the rollouts each, in one forward and backward pass.
        response_length: most tokens of a response.
        learning_rate: constant.
        steps: by default, the first `skip` of which are not counted.
    """

    task: str
    rollouts: int
    updates: int
    response_length: int
    learning_rate: float
    steps: int
    skip: int


WORKLOADS = {
    "laptop-128": Workload("laptop_task", 128, 4, 48, 2e-4, steps=30, skip=10),
    "laptop-512": Workload("laptop_task", 512, 8, 48, 2e-4, steps=15, skip=5),
    # So small a learning rate leaves the lengths as they are.
    "wide-128": Workload("wide_task", 128, 4, 256, 1e-6, steps=3, skip=1),
}


def make_laptop_task(folder: Path) -> None:
    program = REPOSITORY / "scripts" / "make_laptop_task.py"
    subprocess.run([sys.executable, program, "--quiet", "--out", folder], check=True)


def make_wide_task(folder: Path, laptop_task: Path) -> None:
    """The laptop task's prompts and tokenizer with a wider model that writes at random.

    The answer expected is none at all: a response is right unless it has an answer marker near its end, so that
    rewards vary and so do advantages.
    """
    import pandas as pd
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    if (folder / "model" / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = pd.read_parquet(laptop_task / f"{split}.parquet")
        rows["reward_model"] = [{**row, "ground_truth": ""} for row in rows["reward_model"]]
        rows.to_parquet(folder / f"{split}.parquet")
    tokenizer = AutoTokenizer.from_pretrained(laptop_task / "model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=13,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config).float()
    give_constant_end_logit(model, tokenizer.eos_token_id, probability=1 / 64)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    tokenizer.save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    print(f"made {folder}: a model of {sum(weights.numel() for weights in model.parameters()) / 1e6:.1f} M parameters")


def give_constant_end_logit(model, end: int, probability: float) -> None:
    """Let the token `end` have about this probability everywhere: lengths are then geometric.

    Every embedding has the same large first component, which survives to the last hidden state; only the row of `end`
    in the head reads it.
    """
    import torch

    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 8.0
        head = model.lm_head.weight
        head[:, 0] = 0.0
        head[end] = 0.0
        hidden = model.model(torch.randint(head.shape[0], (8, 64))).last_hidden_state
        others = (hidden @ head.T).logsumexp(-1).mean()
        odds = torch.tensor(probability / (1 - probability))
        head[end, 0] = (odds.log() + others) / hidden[..., 0].mean()


def run_steer(
    workload: Workload, task: Path, folder: Path, threads: int, overrides: list[str]
) -> dict[str, list[float]]:
    """Train with this fork; what its metrics say of each step."""
    share = workload.rollouts // workload.updates
    command = [
        *("bash", REPOSITORY / "run" / "run_grpo.sh", "task=arithmetic", "hardware=cpu"),
        f"data.train_batch_size={workload.rollouts // GROUP}",
        f"data.max_response_length={workload.response_length}",
        f"actor_rollout_ref.actor.optim.lr={workload.learning_rate}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={share // GROUP}",
        f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={share}",
        f"actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu={share}",
        f"actor_rollout_ref.rollout.n={GROUP}",
        f"actor_rollout_ref.rollout.max_model_len={workload.response_length + 48}",
        f"trainer.total_training_steps={workload.steps}",
        *("trainer.val_before_train=false", "trainer.test_freq=-1", "trainer.resume_mode=disable"),
        f"trainer.default_local_dir={folder}",
        *overrides,
    ]
    environment = {"TASK_DIR": str(task)}
    if threads > 1:  # Ray's default is one
        # Threads that wait look for work some 0.1 ms long before they sleep, or operators would wait for them.
        environment |= {"OMP_NUM_THREADS": str(threads), "ROLLOUT_OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "30000"}
    call(command, folder / "train.log", environment)
    lines = [json.loads(line)["data"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "timing_s/step" in line]
    names = {"timing_s/step": "step_seconds", "response_length/mean": "response_length"}
    names |= {f"timing_s/{part}": part for part in PARTS}
    return {names[key]: [step[key] for step in steps] for key in names if key in steps[0]}


def run_trl(
    workload: Workload, task: Path, folder: Path, python: Path, threads: int, options: list[str]
) -> dict[str, list[float]]:
    """Train with TRL in its own environment; what `peer_trl_side.py` measured of each step."""
    result = folder / "steps.json"
    settings = json.dumps(asdict(workload) | {"group": GROUP})
    command = [python, REPOSITORY / "benchmarks" / "peer_trl_side.py", "--workload", settings, "--task", task]
    call([*command, "--out", result, *options], folder / "train.log", {"OMP_NUM_THREADS": str(threads)})
    return json.loads(result.read_text())


def call(command: list[object], log: Path, environment: dict[str, str]) -> None:
    """Run a program with its output in a file, or exit with the file's last lines."""
    with log.open("w") as output:
        done = subprocess.run(
            [str(word) for word in command], env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT
        )
    if done.returncode != 0:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        sys.exit(f"{last}\npeer_trl: exit status {done.returncode}; the whole log: {log}")


def measure(name: str, side: str, repeat: int, workload: Workload, arguments: argparse.Namespace) -> None:
    """Run one side once and keep its result."""
    laptop_task = arguments.task or arguments.out / "laptop_task"
    task = laptop_task if workload.task == "laptop_task" else arguments.out / workload.task
    folder = arguments.out / "runs" / f"{name}-{side}-{repeat}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.monotonic()
    if side == "steer":
        steps = run_steer(workload, task, folder, arguments.threads, arguments.override)
    else:
        steps = run_trl(workload, task, folder, arguments.trl_python, arguments.trl_threads, arguments.trl_option)
    results = arguments.out / "results"
    results.mkdir(exist_ok=True)
    record = {"workload": asdict(workload), "side": side, "wall_seconds": time.monotonic() - start, "steps": steps}
    (results / f"{name}-{side}-{repeat}.json").write_text(json.dumps(record, indent=1) + "\n")
    counted = steps["step_seconds"][workload.skip :]
    print(f"{name}, {side}: median {statistics.median(counted):.2f} s a step over {len(counted)} steps", flush=True)


def collect(folder: Path, name: str, side: str) -> tuple[dict[str, list[float]], float] | None:
    """Every counted step of all runs of one side, and the median wall time of a run; None where there is no run."""
    records = [json.loads(file.read_text()) for file in sorted((folder / "results").glob(f"{name}-{side}-*.json"))]
    if not records:
        return None
    steps: dict[str, list[float]] = {}
    for record in records:
        for key, values in record["steps"].items():
            steps.setdefault(key, []).extend(values[record["workload"]["skip"] :])
    return steps, statistics.median(record["wall_seconds"] for record in records)


def show(folder: Path, names: list[str]) -> None:
    times = Table("workload", "side", "steps", "s a step", "min", "max", "× trl", "tokens a response", "whole run, s")
    parts = Table("workload", *PARTS, "the rest", title="STEER on verl, s a step", title_justify="left")
    for name in names:
        sides = {side: found for side in SIDES if (found := collect(folder, name, side)) is not None}
        medians = {side: statistics.median(steps["step_seconds"]) for side, (steps, _) in sides.items()}
        for side, (steps, wall) in sides.items():
            seconds = steps["step_seconds"]
            times.add_row(
                name,
                side,
                str(len(seconds)),
                f"{medians[side]:.2f}",
                f"{min(seconds):.2f}",
                f"{max(seconds):.2f}",
                f"{medians[side] / medians['trl']:.2f}" if "trl" in medians else "",
                f"{statistics.fmean(steps['response_length']):.1f}",
                f"{wall:.0f}",
            )
        if "steer" in sides:
            steps = sides["steer"][0]
            known = {part: statistics.median(steps[part]) for part in PARTS if part in steps}
            cells = [f"{known[part]:.2f}" if part in known else "" for part in PARTS]
            parts.add_row(name, *cells, f"{medians['steer'] - sum(known.values()):.2f}")
    console = Console(width=120)
    console.print(times)
    if parts.rows:
        console.print(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of models, logs and results")
    parser.add_argument("--side", default="both", choices=[*SIDES, "both"])
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=1, help="runs of each side, in turn")
    parser.add_argument("--steps", type=int, help="in place of each workload's own")
    parser.add_argument("--skip", type=int, help="first steps not counted, in place of each workload's own")
    parser.add_argument("--task", type=Path, help="a laptop task that is there already")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of this fork's worker; vLLM has one")
    parser.add_argument("--trl-python", type=Path, default=sys.executable, help="interpreter of TRL's environment")
    parser.add_argument("--trl-threads", type=int, default=os.cpu_count(), help="CPU threads of TRL's one process")
    parser.add_argument(
        "--trl-option", action="append", default=[], metavar="KEY=VALUE", help="of TRL's GRPOConfig, the value as JSON"
    )
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="Hydra's, for this fork")
    parser.add_argument("--table", action="store_true", help="run nothing, show the results that are there")
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()

    sides = SIDES if arguments.side == "both" else (arguments.side,)
    if not arguments.table:
        for name in arguments.workloads:
            values = asdict(WORKLOADS[name])
            values["steps"] = arguments.steps or values["steps"]
            values["skip"] = values["skip"] if arguments.skip is None else arguments.skip
            workload = Workload(**values)
            if workload.skip >= workload.steps:
                parser.error(f"--skip {workload.skip}: expected less than the {workload.steps} steps of {name}")
            laptop_task = arguments.task or arguments.out / "laptop_task"
            if arguments.task is None:
                make_laptop_task(laptop_task)
            if workload.task == "wide_task":
                make_wide_task(arguments.out / "wide_task", laptop_task)
            for old in (file for side in sides for file in (arguments.out / "results").glob(f"{name}-{side}-*.json")):
                old.unlink()
            for repeat in range(arguments.repeats):
                for side in sides:
                    measure(name, side, repeat, workload, arguments)
    show(arguments.out, arguments.workloads)


if __name__ == "__main__":
    main()
