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
    """The files that `data.train_files` or `data.val_files` names; paths such as hdfs:// are not looked up.

    Raises:
        ValueError: if one is missing.
    """
    files = data_files(config, key)
    if missing := [file for file in files if "://" not in file and not Path(file).exists() and not glob.glob(file)]:
        raise ValueError(
            f"data.{key}: no file {', '.join(missing)}: expected one of datasets/make_datasets.py, in the folder "
            "DATA_DIR, or of scripts/make_laptop_task.py, in the folder TASK_DIR"
        )
    return files


def check_files(config: DictConfig) -> None:
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
    most = config.data.train_max_samples
    if config.trainer.val_only or not all(file.endswith(".parquet") and Path(file).is_file() for file in files):
        return
    rows = sum(pq.read_metadata(file).num_rows for file in files)
    rows = min(rows, most) if most > 0 else rows
    name = "gen_batch_size" if config.data.gen_batch_size else "train_batch_size"
    if rows < config.data[name]:
        raise ValueError(f"data.{name}={config.data[name]}: expected at most {rows}, the rows of data.train_files")
