# SPDX-License-Identifier: Apache-2.0
"""Digests of the weights that deterministic runs on the laptop task end with.

    python benchmarks/determinism.py --out outputs/determinism

A change of structure leaves every digest as it was. Each run takes two steps in full float32 on the CPU with
`full_determinism`; a run of the list is a launcher's configuration, the number of ranks and further overrides.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]

#: Name -> configuration, ranks and overrides.
RUNS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "steer_exp": ("steer_exp", 1, ()),
    "steer_exp_audited": ("steer_exp", 1, ("trainer.entropy_audit.freq=1",)),
    "steer_linear_two_ranks": ("steer_linear", 2, ()),
    "steer_ema_two_ranks": ("steer_ema", 2, ()),
    "steer_exact": ("steer_exact", 1, ()),
    "gtpo": ("gtpo", 1, ()),
    "unlikeliness": ("unlikeliness", 1, ()),
    "psr": ("psr", 1, ()),
    "adaptive_entropy": ("adaptive_entropy", 1, ()),
    "quadrant": ("quadrant", 1, ()),
    "high_entropy_tokens": ("high_entropy_tokens", 1, ()),
}

OVERRIDES = (
    "task=arithmetic",
    "hardware=cpu",
    "data.seed=42",
    "data.train_batch_size=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16",
    "actor_rollout_ref.rollout.full_determinism=true",
    "trainer.resume_mode=disable",
    "trainer.total_training_steps=2",
    "trainer.save_freq=2",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
)


def digest_of_weights(folder: Path) -> str:
    """SHA-256 of a Hugging Face folder's weights: names, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        for name, weight in sorted(load_file(file).items()):
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.numpy().tobytes())
    return digest.hexdigest()[:16]


def train(name: str, task: Path, out: Path) -> str:
    """Train one of `RUNS` in a folder of its own and return the digest of its last checkpoint's weights.

    Raises:
        subprocess.CalledProcessError: if the run fails; `train.log` in its folder tells why.
    """
    configuration, ranks, overrides = RUNS[name]
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    command = ["bash", str(ROOT / "run/launch.sh"), configuration, *OVERRIDES, *overrides]
    command += [f"trainer.n_gpus_per_node={ranks}", f"trainer.default_local_dir={folder}"]
    environment = {**os.environ, "PYTHON": sys.executable, "TASK_DIR": str(task)}
    with (folder / "train.log").open("w") as log:
        subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True)
    return digest_of_weights(folder / "global_step_2/actor/huggingface")


def main() -> None:
    """Make the task, train, and print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/determinism", help="folder of the runs")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="runs to make (all)")
    arguments = parser.parse_args()
    task = arguments.out / "task"
    program = ROOT / "scripts/make_laptop_task.py"
    size = ("--quiet", "--steps", "20", "--train-size", "64")
    subprocess.run([sys.executable, str(program), "--out", str(task), *size], check=True)
    print(f"{'start':<24}{digest_of_weights(task / 'model')}", flush=True)
    for name in arguments.runs:
        print(f"{name:<24}{train(name, task, arguments.out)}", flush=True)


if __name__ == "__main__":
    main()
