# SPDX-License-Identifier: Apache-2.0
"""The data files: their columns, and the lengths of their prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf
from transformers import AutoTokenizer
from verl.steer.data_files import is_readable, present_files
from verl.steer.requirements.files import check_data

#: Prompts of a file that are tokenized, evenly over all of them ordered by characters.
SAMPLE = 1000


def check_files(config: DictConfig, key: str) -> str:
    """Columns, rows and lengths of prompts; a ValueError names the key, the file and what it lacks."""
    check_data(config, key)
    model = config.actor_rollout_ref.model
    if OmegaConf.select(config, "data.custom_cls.path"):
        return "not read: a data set of its own reads its files"
    path = model.tokenizer_path or model.path
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    if model.custom_chat_template:
        tokenizer.chat_template = model.custom_chat_template
    found = (
        _check_file(Path(file), key, config.data, tokenizer)
        if is_readable(file)
        else f"{file}: not read, since it is no parquet file of this machine"
        for file in present_files(config, key)
    )
    return "; ".join(found) or "none"


def _check_file(file: Path, key: str, data: DictConfig, tokenizer: Any) -> str:
    prompts = pq.read_table(file, columns=[data.prompt_key])[data.prompt_key].to_pylist()
    if not prompts:
        raise ValueError(f"data.{key}: {file}: no rows: make it again")
    prompts.sort(key=lambda messages: len(str(messages)))
    sample = {round(index * (len(prompts) - 1) / (SAMPLE - 1)) for index in range(SAMPLE)}
    template = {"add_generation_prompt": True, "return_dict": False} | dict(
        data.get("apply_chat_template_kwargs") or {}
    )
    lengths = [len(tokenizer.apply_chat_template(prompts[index], **template)) for index in sample]
    shortest, longest, limit = min(lengths), max(lengths), data.max_prompt_length
    found = f"{file.name}: {len(prompts)} rows, prompts of {shortest} to {longest} tokens (limit {limit})"
    if shortest > limit:
        raise ValueError(f"data.{key}: {found}: raise data.max_prompt_length")
    return found
