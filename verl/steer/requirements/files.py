# SPDX-License-Identifier: Apache-2.0
"""The check of a run's files before Ray starts: its data, and the folder of its model."""

from __future__ import annotations

import glob
from pathlib import Path

import pyarrow.parquet as pq
from omegaconf import DictConfig


def data_files(config: DictConfig, key: str) -> list[str]:
    """The files that `data.train_files` or `data.val_files` names."""
    named = config.data[key] or []
    return [str(file) for file in ([named] if isinstance(named, str) else named)]


def present_files(config: DictConfig, key: str) -> list[str]:
    """The same with the files that match in place of a pattern; paths such as hdfs:// are not looked up.

    Raises:
        ValueError: if one is missing.
    """
    named = data_files(config, key)
    found = [[file] if "://" in file or Path(file).exists() else sorted(glob.glob(file)) for file in named]
    if missing := [file for file, matches in zip(named, found, strict=True) if not matches]:
        raise ValueError(
            f"data.{key}: no file {', '.join(missing)}: expected one of datasets/make_datasets.py, in the folder "
            "DATA_DIR, or of scripts/make_laptop_task.py, in the folder TASK_DIR"
        )
    return [file for matches in found for file in matches]


def is_readable(file: str) -> bool:
    """Whether a check reads this file: a parquet file on this machine."""
    return "://" not in file and file.endswith(".parquet")


def row_count(files: list[str]) -> int | None:
    """Rows of all files together; None if a check doesn't read one of them."""
    return sum(pq.read_metadata(file).num_rows for file in files) if all(map(is_readable, files)) else None


def check_data_and_model(config: DictConfig) -> None:
    """Check that data and model are there, and the data suffice for a step.

    Raises:
        ValueError: if not.
    """
    present_files(config, "val_files")
    _check_rows(config, present_files(config, "train_files"))
    path = str(config.actor_rollout_ref.model.path)
    # A name on the Hugging Face Hub is AUTHOR/MODEL.
    is_local = path.startswith(("/", ".", "~")) or path.count("/") > 1 and "://" not in path
    if is_local and not Path(path, "config.json").is_file():
        raise ValueError(
            f"actor_rollout_ref.model.path={path}: expected the folder of a model, with its config.json, or a name on "
            "the Hugging Face Hub"
        )


def _check_rows(config: DictConfig, files: list[str]) -> None:
    """verl drops a batch that is not whole, and finds out after Ray's start that there is no other."""
    rows, most = row_count(files), config.data.train_max_samples
    if config.trainer.val_only or rows is None:
        return
    rows = min(rows, most) if most > 0 else rows
    name = "gen_batch_size" if config.data.gen_batch_size else "train_batch_size"
    if rows < config.data[name]:
        raise ValueError(f"data.{name}={config.data[name]}: expected at most {rows}, the rows of data.train_files")
