# SPDX-License-Identifier: Apache-2.0
"""The checks of a run's checkpoints and of the results that it writes."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from verl.steer.checkpoint_ledger import UNFINISHED
from verl.steer.data_files import data_files
from verl.trainer.ppo.utils import need_critic

#: Keys below `trainer` that only this fork's trainer reads, with the values that switch them off.
TRAINER_KEYS = {
    "save_after": 0,
    "save_best_only": False,
    "delete_old_best_checkpoint": False,
    "best_metric_key": None,
    "skip_old_log_prob": False,
}


def check_checkpoints(config: DictConfig) -> None:
    """Check that a run saves the checkpoints that its keys ask for, and resumes from a complete one.

    Raises:
        ValueError: if it would not.
    """
    trainer = config.trainer
    if trainer.resume_mode == "resume_path" and Path(str(trainer.resume_from_path), UNFINISHED).exists():
        raise ValueError(
            f"trainer.resume_from_path={trainer.resume_from_path}: expected a complete checkpoint; the run that "
            "wrote this one was killed meanwhile"
        )
    if trainer.val_only:
        return
    if trainer.use_v1 and trainer.v1.trainer_mode == "steer":
        _check_checkpoints_of_steer(config)
        return
    other = f"trainer.v1.trainer_mode={trainer.v1.trainer_mode} and trainer.use_v1={str(trainer.use_v1).lower()}"
    for key, off in TRAINER_KEYS.items():
        value = trainer.get(key, off)
        if value != off:
            raise ValueError(f"trainer.{key}={_yaml(value)}: expected {_yaml(off)} with {other}, which ignores it")
    marks = Path(trainer.default_local_dir).glob(f"global_step_*/{UNFINISHED}")
    unfinished = sorted(mark.parent.name for mark in marks)
    if unfinished:
        raise ValueError(
            f"trainer.default_local_dir={trainer.default_local_dir}: {', '.join(unfinished)} is unfinished: delete it, "
            f"because a run with {other} would resume from it"
        )


def _yaml(value: Any) -> str:
    """A value as a YAML file writes it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _check_checkpoints_of_steer(config: DictConfig) -> None:
    trainer, checkpoint = config.trainer, config.actor_rollout_ref.actor.checkpoint
    if trainer.save_best_only and trainer.test_freq <= 0:
        raise ValueError(
            f"trainer.test_freq={trainer.test_freq}: expected at least 1 with trainer.save_best_only=true, which saves "
            "after validations only"
        )
    actor, critic = trainer.max_actor_ckpt_to_keep, trainer.max_critic_ckpt_to_keep
    if actor != critic and need_critic(config):
        raise ValueError(
            f"trainer.max_critic_ckpt_to_keep={critic}: expected trainer.max_actor_ckpt_to_keep={actor}: one "
            "folder holds a step's actor and critic"
        )
    if trainer.get("remove_previous_ckpt_in_save"):
        raise ValueError(
            "trainer.remove_previous_ckpt_in_save=true: expected trainer.max_actor_ckpt_to_keep=1 instead, which "
            "spares the best checkpoint"
        )
    if checkpoint.get("async_save"):
        raise ValueError(
            "actor.checkpoint.async_save=true: expected false: the trainer counts a checkpoint as complete "
            "once its save has returned"
        )


def check_evaluation(config: DictConfig) -> None:
    """Check the names of the validation files, by which this fork's trainer keeps their results.

    Raises:
        ValueError: if two files have one name, or the folder has results of that name already.
    """
    trainer = config.trainer
    if not (trainer.val_only and trainer.use_v1 and trainer.v1.trainer_mode == "steer"):
        return
    by_name = defaultdict(list)
    for file in data_files(config, "val_files"):
        by_name[Path(file).stem].append(file)
    for name, same in by_name.items():
        if len(same) > 1:
            raise ValueError(f"data.val_files: {', '.join(same)}: expected one file named {name}, like its results")
        results = Path(trainer.validation_data_dir or "", name)
        empty = not results.exists() or results.is_dir() and not any(results.iterdir())
        if trainer.validation_data_dir and not empty:
            raise ValueError(
                f"trainer.validation_data_dir={trainer.validation_data_dir}: {name} in it holds results: expected "
                f"another folder, or none of {same[0]} among data.val_files"
            )
