# SPDX-License-Identifier: Apache-2.0
"""Free disk against what a run's checkpoints need."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
from omegaconf import DictConfig
from verl.steer.preflight.dataset import files_of
from verl.steer.preflight.memory import ModelSize, master_bytes
from verl.steer.preflight.rows import GIB

#: Tensors of the model's size, in the trained weights' dtype, in each part of a checkpoint: AdamW has two moments, and
#: verl exports the trained weights as they are.
TENSORS = {"model": 1, "optimizer": 2, "hf_model": 1}


def checkpoint_bytes(parameters: int, config: DictConfig) -> int:
    """Bytes of one checkpoint, of all ranks together."""
    actor = config.actor_rollout_ref.actor
    return parameters * master_bytes(actor) * sum(TENSORS.get(part, 0) for part in actor.checkpoint.save_contents)


def training_steps(config: DictConfig) -> int:
    """Steps of the run, at most: prompts that are too long may leave fewer."""
    rows = sum(pq.read_metadata(file).num_rows for file in files_of(config, "train_files"))
    steps = rows // config.data.train_batch_size * config.trainer.total_epochs
    return min(steps, config.trainer.total_training_steps or steps)


def most_checkpoints(config: DictConfig, steps: int) -> int:
    """The largest number of checkpoints that the run has on disk at once, one that replaces another included."""
    trainer = config.trainer
    if trainer.val_only:
        return 0
    first = max(1, min(trainer.get("save_after", 0), steps))

    def due(frequency: int) -> int:
        return sum(step % frequency == 0 or step == steps for step in range(first, steps + 1)) if frequency > 0 else 0

    best_only = trainer.get("save_best_only", False)
    best = due(trainer.test_freq) if best_only or trainer.get("best_metric_key") is not None else 0
    if trainer.get("delete_old_best_checkpoint"):
        best = min(best, 2)
    latest, keep = 0 if best_only else due(trainer.save_freq), trainer.max_actor_ckpt_to_keep or 0
    return best + (min(latest, keep + 1) if keep > 0 else latest)


def check_disk(config: DictConfig) -> str:
    """Whether the disk of `trainer.default_local_dir` has room for the checkpoints that are still to be written.

    Raises:
        ValueError: if not.
    """
    folder = Path(config.trainer.default_local_dir).absolute()
    present = len(list(folder.glob("global_step_*")))
    count = most_checkpoints(config, training_steps(config))
    count = max(count - present, min(count, 1))
    one = checkpoint_bytes(ModelSize.of(config).parameters, config)
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    needed = f"{count * one / GIB:,.1f} GiB for {count} checkpoints of {one / GIB:,.2f} GiB, {free / GIB:,.1f} GiB free"
    if count * one > free:
        raise ValueError(f"{needed} in {folder}: set trainer.max_actor_ckpt_to_keep=2, or OUTPUT_DIR to a larger disk")
    return needed
