# SPDX-License-Identifier: Apache-2.0
"""The files that `data.train_files` and `data.val_files` name, and what those of this machine tell before a run."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf


def data_files(config: DictConfig, key: str) -> list[str]:
    """The files that `data.train_files` or `data.val_files` names."""
    named = config.data[key] or []
    return [str(file) for file in ([named] if isinstance(named, str) else named)]


def present_files(config: DictConfig, key: str) -> list[str]:
    """The same with the files that match in place of a pattern; paths such as hdfs:// are not looked up.

    Raises:
        ValueError: if one is missing.
    """
    named = [(file, _matches(file)) for file in data_files(config, key)]
    if missing := [file for file, matches in named if not matches]:
        raise ValueError(
            f"data.{key}: no file {', '.join(missing)}: expected one of datasets/make_datasets.py, in the folder "
            "DATA_DIR, or of scripts/make_laptop_task.py, in the folder TASK_DIR"
        )
    return [match for _, matches in named for match in matches]


def _matches(file: str) -> list[str]:
    return [file] if "://" in file or Path(file).exists() else sorted(glob.glob(file))


def is_readable(file: str) -> bool:
    """Whether a check reads this file: a parquet file on this machine."""
    return "://" not in file and file.endswith(".parquet")


def metadata(file: str, key: str) -> pq.FileMetaData:
    """The metadata of a parquet file.

    Raises:
        ValueError: if the file is broken, a folder or not readable.
    """
    try:
        return pq.read_metadata(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"data.{key}: {file}: expected a whole parquet file: {error}") from error


def row_count(config: DictConfig, key: str) -> int | None:
    """Rows of all files together; None if a check doesn't read one of them.

    Raises:
        ValueError: if a file is missing or broken.
    """
    files = present_files(config, key)
    return sum(metadata(file, key).num_rows for file in files) if all(map(is_readable, files)) else None


def check_columns(config: DictConfig, key: str) -> None:
    """Check that each file that a check reads has verl's columns, with chat messages and a right answer in them.

    verl would take a prompt of plain text for messages without content. A data set of the user's own
    (`data.custom_cls`) may have any columns.

    Raises:
        ValueError: if a file is missing or broken, or lacks a column or what is expected in it.
    """
    if OmegaConf.select(config, "data.custom_cls.path"):
        return
    prompt = config.data.prompt_key
    for file in filter(is_readable, present_files(config, key)):
        types = {field.name: field.type for field in metadata(file, key).schema.to_arrow_schema()}
        if missing := [name for name in (prompt, "data_source", "reward_model") if name not in types]:
            raise ValueError(f"data.{key}: {file}: no column {', '.join(missing)}: add it as the README describes")
        if "extra_info" in types and not _may_be_extra_info(types["extra_info"]):
            raise ValueError(
                f"data.{key}: {file}: column extra_info of type {types['extra_info']}: expected a struct or nothing"
            )
        for name, check, expected in (
            (prompt, _has_messages, "a list of chat messages, structs with role and content"),
            ("reward_model", _has_ground_truth, "a struct with ground_truth"),
        ):
            if not check(types[name]):
                raise ValueError(f"data.{key}: {file}: column {name} of type {types[name]}: expected {expected}")


def _has_messages(type_: pa.DataType) -> bool:
    if not (pa.types.is_list(type_) or pa.types.is_large_list(type_)):
        return False
    message = type_.value_type
    return pa.types.is_struct(message) and {"role", "content"} <= {field.name for field in message}


def _may_be_extra_info(type_: pa.DataType) -> bool:
    return pa.types.is_struct(type_) or pa.types.is_null(type_)


def _has_ground_truth(type_: pa.DataType) -> bool:
    return pa.types.is_struct(type_) and type_.get_field_index("ground_truth") >= 0


def column_values(config: DictConfig, key: str, column: str) -> Iterator[tuple[str, Any]]:
    """Each file that a check reads with each different value of its column; files that lack the column are left out.

    Raises:
        ValueError: if a file is broken, or its column has lists or structs.
    """
    for file in (match for named in data_files(config, key) for match in _matches(named)):
        if is_readable(file) and column in metadata(file, key).schema.to_arrow_schema().names:
            values = pq.read_table(file, columns=[column])[column]
            if pa.types.is_nested(values.type):
                raise ValueError(f"data.{key}: {file}: column {column} of type {values.type}: expected texts")
            for value in values.unique().to_pylist():
                yield file, value
