# SPDX-License-Identifier: Apache-2.0
"""TRL's side of `peer_trl.py`, run in TRL's own environment: trains, and writes what each step took as JSON."""

import argparse
import json
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

# There is no verl in this environment: the grader, which needs nothing of it, comes from this repository's folder.
sys.path.append(str(Path(__file__).resolve().parents[1]))
from verl.steer.tasks.arithmetic import compute_score  # noqa: E402


class StepTimer(TrainerCallback):
    """Seconds from one step's last optimizer update to the next step's, and the mean length of its responses."""

    def __init__(self, updates: int) -> None:
        self.updates = updates
        self.step_seconds: list[float] = []
        self.response_length: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.last = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.updates == 0:
            now = time.perf_counter()
            self.step_seconds.append(now - self.last)
            self.last = now

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "completions/mean_length" in logs:
            self.response_length.append(logs["completions/mean_length"])


def reward(completions: list[list[dict[str, str]]], ground_truth: list[str], **columns: object) -> list[float]:
    return [
        float(compute_score(completion[0]["content"], truth)["score"])
        for completion, truth in zip(completions, ground_truth, strict=True)
    ]


def training_data(task: Path) -> Dataset:
    rows = pd.read_parquet(task / "train.parquet")
    return Dataset.from_dict(
        {
            "prompt": [list(prompt) for prompt in rows["prompt"]],
            "ground_truth": [row["ground_truth"] for row in rows["reward_model"]],
        }
    )


def grpo_config(workload: dict, folder: Path, options: list[str]) -> GRPOConfig:
    """GRPO as in verl/trainer/config/steer.yaml: no KL, clip 0.2 and 0.28, the mean over all tokens of an update."""
    values = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": workload["rollouts"] // workload["updates"],
        "gradient_accumulation_steps": 1,
        "steps_per_generation": workload["updates"],
        "num_generations": workload["group"],
        "num_iterations": 1,
        "max_steps": workload["steps"] * workload["updates"],
        "max_completion_length": workload["response_length"],
        "temperature": 1.0,
        "beta": 0.0,
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "loss_type": "dapo",
        "learning_rate": workload["learning_rate"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "logging_steps": workload["updates"],
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 42,
    }
    for option in options:
        key, _, value = option.partition("=")
        values[key] = json.loads(value)
    return GRPOConfig(**values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", type=json.loads, required=True, help="JSON: peer_trl.Workload and the group size")
    parser.add_argument("--task", type=Path, required=True, help="folder of train.parquet and model/")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("options", nargs="*", metavar="KEY=JSON", help="of GRPOConfig")
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(
        arguments.task / "model", dtype=torch.float32, attn_implementation="sdpa"
    )
    timer = StepTimer(arguments.workload["updates"])
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=grpo_config(arguments.workload, arguments.out.parent / "trainer", arguments.options),
        train_dataset=training_data(arguments.task),
        processing_class=AutoTokenizer.from_pretrained(arguments.task / "model"),
        callbacks=[timer],
    )
    trainer.train()
    steps = {"step_seconds": timer.step_seconds, "response_length": timer.response_length}
    arguments.out.write_text(json.dumps(steps) + "\n")


if __name__ == "__main__":
    main()
