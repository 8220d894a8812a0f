# SPDX-License-Identifier: Apache-2.0
"""The check of a run's data before Ray starts."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf
from verl.steer.data_files import check_columns, data_files, present_files, row_count

#: Endings of the files that verl's data set reads.
FORMATS = (".parquet", ".json", ".jsonl")


def check_data(config: DictConfig, key: str) -> None:
    """Check the files of `data.train_files` or `data.val_files`: they have verl's columns, and rows for a step.

    Raises:
        ValueError: if not.
    """
    if not data_files(config, key) and not OmegaConf.select(config, "data.custom_cls.path"):
        raise ValueError(f"data.{key}={config.data[key]}: expected a file at least; verl reads both")
    for file in present_files(config, key):
        if not file.endswith(FORMATS) and not OmegaConf.select(config, "data.custom_cls.path"):
            raise ValueError(f"data.{key}: {file}: expected a file whose name ends with {', '.join(FORMATS)}")
    rows = row_count(config, key)
    if key == "train_files":
        _check_rows(config, rows)
    check_columns(config, key)


def _check_rows(config: DictConfig, rows: int | None) -> None:
    """verl drops a batch that is not whole, and finds out after Ray's start that there is no other.

    It counts an epoch's steps by `train_batch_size`, and loads by `gen_batch_size` where that is set.
    """
    if config.trainer.val_only or rows is None:
        return
    most = config.data.train_max_samples
    rows = min(rows, most) if most > 0 else rows
    for name in ("train_batch_size", *(() if _loads_single_prompts(config) else ("gen_batch_size",))):
        if rows < (config.data[name] or 0):
            raise ValueError(f"data.{name}={config.data[name]}: expected at most {rows}, the rows of data.train_files")
    loaded, wanted = config.data.gen_batch_size, config.data.train_batch_size
    if loaded and wanted % loaded and not _loads_single_prompts(config):
        raise ValueError(f"data.gen_batch_size={loaded}: expected a divisor of data.train_batch_size={wanted}")


def _loads_single_prompts(config: DictConfig) -> bool:
    """Whether verl sets `data.gen_batch_size` to 1 whatever it is, so that it can ask for any number of prompts."""
    trainer, filter_groups = config.trainer, config.algorithm.get("filter_groups") or {}
    if not trainer.use_v1:
        return False
    refills = OmegaConf.select(trainer, "v1.sampler.sync_refill_failed_groups")
    return bool(trainer.v1.trainer_mode not in ("steer", "sync") or filter_groups.get("enable") or refills)
