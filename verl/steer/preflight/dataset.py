# SPDX-License-Identifier: Apache-2.0
"""The data files: their columns, and the lengths of their prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from omegaconf import DictConfig
from transformers import AutoTokenizer

#: Columns that verl's reward loop reads, beside the prompt.
COLUMNS = ("data_source", "reward_model")

#: Prompts of a file that are tokenized; the shortest and the longest, by characters, are among them.
SAMPLE = 1000


def files_of(config: DictConfig, key: str) -> list[Path]:
    """The files of `data.train_files` or `data.val_files`."""
    files = config.data[key] or []
    return [Path(str(file)) for file in ([files] if isinstance(files, str) else files)]


def check_files(config: DictConfig, key: str) -> str:
    """Columns, number of rows and lengths of the prompts of one key's files.

    Raises:
        ValueError: if a file or a column is missing, or verl would refuse its prompts.
    """
    data, path = config.data, config.actor_rollout_ref.model.path
    tokenizer = AutoTokenizer.from_pretrained(
        config.actor_rollout_ref.model.tokenizer_path or path, trust_remote_code=data.get("trust_remote_code", False)
    )
    return "; ".join(_check_file(file, key, data, tokenizer) for file in files_of(config, key)) or "none"


def _check_file(file: Path, key: str, data: DictConfig, tokenizer: Any) -> str:
    if not file.is_file():
        raise ValueError(
            f"data.{key}: {file}: no such file: make it (datasets/README.md), or set DATA_DIR or data.{key}"
        )
    with pq.ParquetFile(file) as parquet:
        names = parquet.schema_arrow.names
        if missing := [name for name in (data.prompt_key, *COLUMNS) if name not in names]:
            raise ValueError(
                f"data.{key}: {file}: no column {', '.join(missing)}: add it; the README describes the columns"
            )
        prompts = parquet.read(columns=[data.prompt_key])[data.prompt_key].to_pylist()
    if not prompts:
        raise ValueError(f"data.{key}: {file}: no rows")
    prompts.sort(key=lambda messages: len(str(messages)))
    sample = [
        prompts[index] for index in np.linspace(0, len(prompts) - 1, min(SAMPLE, len(prompts))).round().astype(int)
    ]
    options = data.get("apply_chat_template_kwargs") or {}
    lengths = [
        len(tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=True, return_dict=False, **options))
        for p in sample
    ]
    limit = data.max_prompt_length
    found = f"{file.name}: {len(prompts)} rows, prompts of {min(lengths)} to {max(lengths)} tokens (limit {limit})"
    if min(lengths) > limit or (
        max(lengths) > limit and not data.filter_overlong_prompts and data.truncation == "error"
    ):
        raise ValueError(f"data.{key}: {found}: raise data.max_prompt_length")
    return found
