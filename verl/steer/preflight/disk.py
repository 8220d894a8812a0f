# SPDX-License-Identifier: Apache-2.0
"""Free disk against what a run's checkpoints need."""

from __future__ import annotations

import shutil
from pathlib import Path

from omegaconf import DictConfig
from verl.steer.data_files import row_count
from verl.steer.preflight.memory import Size, critic_of, model_of, weight_bytes
from verl.steer.preflight.rows import GIB
from verl.trainer.ppo.utils import need_critic


def training_steps(config: DictConfig) -> int:
    """Steps of the run; fewer if verl leaves prompts out for their length.

    Raises:
        ValueError: if neither `trainer.total_training_steps` nor the data tell.
    """
    rows, most = row_count(config, "train_files"), config.trainer.total_training_steps
    if rows is None and not most:
        raise ValueError(
            "trainer.total_training_steps=null: expected a number, since not all of data.train_files are parquet files "
            "of this machine, whose rows are counted"
        )
    steps = most if rows is None else rows // config.data.train_batch_size * config.trainer.total_epochs
    return min(steps, most or steps)


def most_checkpoints(trainer: DictConfig, steps: int) -> int:
    """The most checkpoints of a run that lie on disk at once, one that is to replace another included."""
    if trainer.val_only:
        return 0
    first = max(1, min(trainer.get("save_after", 0), steps))

    def due(frequency: int) -> int:
        return sum(step % frequency == 0 or step == steps for step in range(first, steps + 1)) if frequency > 0 else 0

    best_only, keep = trainer.get("save_best_only", False), trainer.max_actor_ckpt_to_keep or 0
    best = due(trainer.test_freq) if best_only or trainer.get("best_metric_key") else 0
    if trainer.get("delete_old_best_checkpoint"):
        best = min(best, 2)
    total = best + (0 if best_only else due(trainer.save_freq))
    # the best one stays beside the latest
    return min(total, keep + 1 + bool(best)) if keep > 0 else total


def _numbers(size: Size) -> dict[str, int]:
    """The numbers in the large parts of a model's checkpoint: AdamW has two moments of each trained weight."""
    return {"model": size.parameters, "optimizer": 2 * size.trained, "hf_model": size.parameters}


def checkpoint_bytes(config: DictConfig) -> int:
    """Bytes of a checkpoint: of the actor, and of the critic where there is one."""
    actor = config.actor_rollout_ref.actor
    saved = [(_numbers(model_of(config)), actor.fsdp_config, actor.checkpoint)]
    if need_critic(config):
        saved.append((_numbers(critic_of(config)), config.critic.fsdp, config.critic.checkpoint))
    return sum(
        weight_bytes(fsdp) * sum(count.get(part, 0) for part in checkpoint.save_contents)
        for count, fsdp, checkpoint in saved
    )


def check_disk(config: DictConfig) -> str:
    """Whether `trainer.default_local_dir` has room for the checkpoints beside those that it holds."""
    folder = Path(config.trainer.default_local_dir).absolute()
    count = most_checkpoints(config.trainer, training_steps(config))
    count = max(count - len(list(folder.glob("global_step_*"))), min(count, 1))
    needed = count * checkpoint_bytes(config) / GIB
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free / GIB
    found = f"{count} checkpoints of this run take {needed:,.1f} GiB, {free:,.1f} GiB are free in {folder}"
    if needed > free:
        raise ValueError(f"{found}: set trainer.max_actor_ckpt_to_keep=2, or OUTPUT_DIR to a larger disk")
    return found
