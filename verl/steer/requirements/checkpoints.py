# SPDX-License-Identifier: Apache-2.0
"""The checks of a run's checkpoints and of the results that it writes."""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, open_dict
from verl.steer.checkpoint_ledger import UNFINISHED, CheckpointLedger, step_of
from verl.steer.data_files import column_values, data_files
from verl.steer.options import from_config, option, resolve_options
from verl.steer.rollout.checks import ROLLOUT_TIMEOUT
from verl.steer.run_settings import check_settings
from verl.trainer.ppo.utils import need_critic

logger = logging.getLogger(__name__)

#: Keys below `trainer` that only this fork's trainer reads, with the values that leave all as it is.
TRAINER_KEYS = {
    "save_after": 0,
    "save_best_only": False,
    "delete_old_best_checkpoint": False,
    "best_metric_key": None,
    "skip_old_log_prob": False,
    "rollout_timeout": ROLLOUT_TIMEOUT,
}


#: Values of `trainer.resume_mode`.
RESUME_MODES = ("auto", "disable", "resume_path")
#: Parts of a checkpoint.
CONTENTS = ("model", "optimizer", "extra", "hf_model")


@dataclass
class CheckpointOptions:
    """Keys below `trainer` that decide when this fork's trainer saves and deletes.

    Hydra's `no` and `off` are texts, which Python takes for true.
    """

    save_after: int = option(0, at_least=0, integer=True)
    save_best_only: bool = option(False, choices=(True, False))
    delete_old_best_checkpoint: bool = option(False, choices=(True, False))
    save_freq: int = option(-1, integer=True)
    test_freq: int = option(-1, integer=True)
    max_actor_ckpt_to_keep: int | None = option(integer=True)

    def __post_init__(self) -> None:
        resolve_options(self, "trainer")


def check_checkpoints(config: DictConfig) -> None:
    """Check that a run saves the checkpoints that its keys ask for, and resumes from a complete one.

    Args:
        config: the configuration; a null among `CheckpointOptions` becomes the default, and the path of a checkpoint
            loses its last slash, with which verl finds no step in it.

    Raises:
        ValueError: if it would not.
    """
    trainer = config.trainer
    if not trainer.default_local_dir:
        raise ValueError(f"trainer.default_local_dir={trainer.default_local_dir}: expected a folder")
    _check_resumed(trainer)
    _check_ranks(config)
    _check_contents(config.actor_rollout_ref.actor.checkpoint, trainer)
    if trainer.val_only:
        if not trainer.val_before_train:
            raise ValueError("trainer.val_before_train=false: expected true with trainer.val_only=true, or verl trains")
        return
    if trainer.use_v1 and trainer.v1.trainer_mode == "steer":
        _check_checkpoints_of_steer(config)
        check_settings(config)
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


def _check_resumed(trainer: DictConfig) -> None:
    if trainer.resume_mode not in RESUME_MODES:
        raise ValueError(f"trainer.resume_mode={trainer.resume_mode}: expected one of {', '.join(RESUME_MODES)}")
    if trainer.resume_mode != "resume_path":
        return
    named = f"trainer.resume_from_path={trainer.resume_from_path}"
    path = Path(str(trainer.resume_from_path))
    if not path.is_dir() or step_of(path) is None:
        raise ValueError(f"{named}: expected the folder global_step_N of a checkpoint")
    if (path / UNFINISHED).exists():
        raise ValueError(f"{named}: expected a complete checkpoint; the run that wrote this one was killed meanwhile")
    trainer.resume_from_path = str(path)


def _check_ranks(config: DictConfig) -> None:
    """verl's FSDP engine loads the part of each rank, and only those of as many ranks as saved it."""
    trainer, ranks = config.trainer, config.trainer.nnodes * config.trainer.n_gpus_per_node
    if trainer.resume_mode == "disable" or config.model_engine != "dp":
        return
    path: Path | None = Path(str(trainer.resume_from_path))
    if trainer.resume_mode == "auto":
        path = CheckpointLedger.checkpoint_to_resume(Path(trainer.default_local_dir))
    if path is None:
        return
    parts = [re.fullmatch(r"model_world_size_(\d+)_rank_\d+\.pt", file.name) for file in path.glob("actor/*.pt")]
    saved = sorted({int(part[1]) for part in parts if part})
    if saved and ranks not in saved:
        raise ValueError(
            f"trainer.n_gpus_per_node={trainer.n_gpus_per_node}, trainer.nnodes={trainer.nnodes}: expected {saved[0]} "
            f"ranks in all, which saved {path}"
        )


def _check_contents(checkpoint: DictConfig, trainer: DictConfig) -> None:
    """verl skips unknown parts, and resumes a checkpoint without `model` with the start model's weights."""
    for key in ("save_contents", "load_contents"):
        parts = checkpoint[key]
        if not isinstance(parts, ListConfig):
            raise ValueError(f"actor.checkpoint.{key}={_yaml(parts)}: expected a list of {', '.join(CONTENTS)}")
        parts = list(parts)
        for part in parts:
            if part not in CONTENTS:
                raise ValueError(f"actor.checkpoint.{key}={parts}: expected some of {', '.join(CONTENTS)}")
        lacks = [part for part in ("optimizer", "extra") if part not in parts]
        if lacks and trainer.resume_mode != "disable" and not trainer.val_only:
            logger.warning(
                "actor.checkpoint.%s=%s: without %s a resumed run begins with new moments or learning rates",
                key, parts, " and ".join(lacks),
            )  # fmt: skip
        if "model" not in parts and trainer.resume_mode != "disable":
            raise ValueError(
                f"actor.checkpoint.{key}={parts}: expected model among them, or trainer.resume_mode=disable: a resumed "
                "run would begin with other weights"
            )


def _yaml(value: Any) -> str:
    """A value as a YAML file writes it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _check_checkpoints_of_steer(config: DictConfig) -> None:
    trainer, checkpoint = config.trainer, config.actor_rollout_ref.actor.checkpoint
    with open_dict(trainer):
        trainer.update(vars(from_config(CheckpointOptions, trainer)))
    _check_best(config)
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


def _check_best(config: DictConfig) -> None:
    """The metric of best checkpoints would be looked up at the first validation."""
    trainer, key = config.trainer, config.trainer.best_metric_key
    if not trainer.save_best_only and key is None:
        if trainer.delete_old_best_checkpoint:
            raise ValueError(
                "trainer.delete_old_best_checkpoint=true: expected false without trainer.save_best_only=true or a "
                "trainer.best_metric_key: no checkpoint is the best"
            )
        return
    if trainer.test_freq <= 0:
        why = "trainer.save_best_only=true" if trainer.save_best_only else f"trainer.best_metric_key={key}"
        raise ValueError(
            f"trainer.test_freq={trainer.test_freq}: expected at least 1 with {why}, which saves after validations only"
        )
    sources = sorted({str(source) for _, source in column_values(config, "val_files", "data_source")})
    example = f"val-core/{sources[0]}/acc/mean@{config.actor_rollout_ref.rollout.val_kwargs.n}" if sources else ""
    if key is None and len(sources) > 1:
        raise ValueError(
            f"trainer.best_metric_key=null: expected a metric, such as {example}: data.val_files have "
            f"{len(sources)} data sources, {', '.join(sources)}"
        )
    known = [f"val-{kind}/{source}/" for kind in ("core", "aux") for source in sources]
    if key is not None and key.startswith("val-") and known and not key.startswith(tuple(known)):
        raise ValueError(
            f"trainer.best_metric_key={key}: expected a metric of a data source of data.val_files, such as {example}"
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
