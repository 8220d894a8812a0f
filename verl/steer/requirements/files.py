# SPDX-License-Identifier: Apache-2.0
"""The check of a run's files before Ray starts: its data, and the folder of its model."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from verl.steer.data_files import check_columns, data_files, row_count


def check_data_and_model(config: DictConfig) -> None:
    """Check that data and model are there, the data have their columns and suffice for a step, and the model has
    positions for a response.

    Raises:
        ValueError: if not.
    """
    for key in ("train_files", "val_files"):
        if not data_files(config, key) and not OmegaConf.select(config, "data.custom_cls.path"):
            raise ValueError(f"data.{key}={config.data[key]}: expected a file at least; verl reads both")
    row_count(config, "val_files")
    _check_rows(config, row_count(config, "train_files"))
    for key in ("train_files", "val_files"):
        check_columns(config, key)
    path = str(config.actor_rollout_ref.model.path)
    # A name on the Hugging Face Hub is AUTHOR/MODEL.
    is_local = path.startswith(("/", ".", "~")) or path.count("/") > 1 and "://" not in path or Path(path).is_dir()
    if is_local and not Path(path, "config.json").is_file():
        raise ValueError(
            f"actor_rollout_ref.model.path={path}: expected the folder of a model, with its config.json, or a name on "
            "the Hugging Face Hub"
        )
    if is_local:
        _check_positions(config)


def _check_positions(config: DictConfig) -> None:
    """vLLM cuts responses at the model's last position, and verl refuses a greater limit after Ray's start.

    A model whose configuration names no number of positions is not checked.
    """
    model, key = config.actor_rollout_ref.model, "max_position_embeddings"
    file = Path(model.path, "config.json")
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, the configuration of a model: {error}") from error
    overrides = model.override_config.get("model_config", model.override_config)
    positions = overrides.get(key, found.get(key, found.get("text_config", {}).get(key)))
    name, length = "rollout.max_model_len", config.actor_rollout_ref.rollout.max_model_len
    if length is None:
        name = "data.max_prompt_length + data.max_response_length"
        length = config.data.max_prompt_length + config.data.max_response_length
    if positions is not None and length > positions:
        raise ValueError(f"{name}={length}: expected at most {positions}, the model's {key}")


def _check_rows(config: DictConfig, rows: int | None) -> None:
    """verl drops a batch that is not whole, and finds out after Ray's start that there is no other.

    It counts an epoch's steps by `train_batch_size`, and loads by `gen_batch_size` where that is set.
    """
    if config.trainer.val_only or rows is None:
        return
    most = config.data.train_max_samples
    rows = min(rows, most) if most > 0 else rows
    for name in ("train_batch_size", "gen_batch_size"):
        if rows < (config.data[name] or 0):
            raise ValueError(f"data.{name}={config.data[name]}: expected at most {rows}, the rows of data.train_files")
    loaded, wanted = config.data.gen_batch_size, config.data.train_batch_size
    if loaded and wanted % loaded and config.trainer.v1.trainer_mode != "separate_async":
        raise ValueError(f"data.gen_batch_size={loaded}: expected a divisor of data.train_batch_size={wanted}")
