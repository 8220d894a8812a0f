# SPDX-License-Identifier: Apache-2.0
"""The check of a run's model before Ray starts: its folder or name, its dimensions and its chat template."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from omegaconf import DictConfig, OmegaConf
from verl.trainer.ppo.utils import need_critic

MODEL = "actor_rollout_ref.model.path"


def check_model(config: DictConfig) -> None:
    """Check that the model is there, has positions for a response, heads for the parallel sizes and a chat template.

    Raises:
        ValueError: if not.
    """
    path = str(config.actor_rollout_ref.model.path)
    if config.actor_rollout_ref.model.path is None:
        raise ValueError(f"{MODEL}=null: expected the folder of a model, or a name on the Hugging Face Hub")
    if "://" in path or os.environ.get("VERL_USE_MODELSCOPE", "").lower() == "true":
        return  # verl fetches it
    found = _dimensions(_configuration_file(path, MODEL))
    _check_positions(config, found)
    _check_heads(config, found)
    _check_fused_kernels(config, found)
    _check_chat_template(config)


def check_critic_model(config: DictConfig) -> None:
    """Check that the model of a run's critic is there.

    Raises:
        ValueError: if not.
    """
    path = str(config.critic.model.path)
    if need_critic(config) and not config.trainer.val_only and "://" not in path:
        _configuration_file(path, "critic.model.path")


def _is_folder(path: str) -> bool:
    """Whether a path means a folder, there or not, rather than a name on the Hugging Face Hub, AUTHOR/MODEL."""
    return path.startswith(("/", ".", "~")) or path.count("/") > 1 or Path(path).is_dir()


def _configuration_file(path: str, key: str) -> Path:
    """The model's `config.json`; of a name on the Hugging Face Hub from its cache or from there."""
    if _is_folder(path):
        if not Path(path, "config.json").is_file():
            raise ValueError(
                f"{key}={path}: expected the folder of a model, with its config.json, or a name on the Hugging Face Hub"
            )
        return Path(path, "config.json")
    try:
        return Path(hf_hub_download(path, "config.json"))
    except OSError as error:  # of a missing name, a missing right, or no connection
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{key}={path}: expected a folder, or a name on the Hugging Face Hub: {reason}") from error


def _dimensions(file: Path) -> dict[str, Any]:
    """The model's configuration; of a model for more than text, with the part for text in place of the whole."""
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, the configuration of a model: {error}") from error
    return found | found.get("text_config", {})


def _check_positions(config: DictConfig, found: dict[str, Any]) -> None:
    """vLLM cuts responses at the model's last position, and verl refuses a greater limit after Ray's start.

    A model whose configuration names no number of positions is not checked.
    """
    model, key = config.actor_rollout_ref.model, "max_position_embeddings"
    overrides = model.override_config.get("model_config", model.override_config)
    positions = overrides.get(key, found.get(key))
    name, length = "rollout.max_model_len", config.actor_rollout_ref.rollout.max_model_len
    if length is None:
        name = "data.max_prompt_length + data.max_response_length"
        length = config.data.max_prompt_length + config.data.max_response_length
    if positions is not None and length > positions:
        raise ValueError(f"{name}={length}: expected at most {positions}, the model's {key}")


def _check_heads(config: DictConfig, found: dict[str, Any]) -> None:
    """vLLM and verl's sequence parallelism give each rank the same number of heads, after the model is loaded."""
    heads = found.get("num_attention_heads")
    if not heads:
        return
    groups = found.get("num_key_value_heads") or heads
    root = config.actor_rollout_ref
    sizes = [("rollout.tensor_model_parallel_size", root.rollout.tensor_model_parallel_size)]
    if config.model_engine == "dp" and not config.trainer.val_only:
        sizes.append(("actor.ulysses_sequence_parallel_size", root.actor.ulysses_sequence_parallel_size))
    for key, size in sizes:
        if heads % size or groups % size and size % groups:
            raise ValueError(
                f"{key}={size}: expected a divisor of the model's {heads} attention heads that divides its {groups} "
                "heads of keys and values or is a multiple of them"
            )


def _check_fused_kernels(config: DictConfig, found: dict[str, Any]) -> None:
    """verl's fused kernels read the weights of a last layer that FSDP2 has sharded by itself."""
    root = config.actor_rollout_ref
    untied = found.get("tie_word_embeddings") is False
    if root.model.use_fused_kernels and root.actor.strategy == "fsdp2" and untied and not config.trainer.val_only:
        raise ValueError(
            "model.use_fused_kernels=true: expected false, or actor.strategy=fsdp, with a model whose "
            "tie_word_embeddings is false"
        )


def _check_chat_template(config: DictConfig) -> None:
    """Without a template verl takes every prompt for too long, and fails with an empty data set.

    Only folders are read, and no tokenizer whose code is the model's own.
    """
    model = config.actor_rollout_ref.model
    template = str(model.custom_chat_template or "")
    if template and "{{" not in template and "{%" not in template:
        raise ValueError(
            f"actor_rollout_ref.model.custom_chat_template={template}: expected a template itself, not the name of "
            "its file"
        )
    named = str(model.tokenizer_path or model.path)
    folder = Path(named)
    if "://" not in named and _is_folder(named) and not folder.is_dir():
        raise ValueError(f"actor_rollout_ref.model.tokenizer_path={folder}: expected the folder of a tokenizer")
    own_data = OmegaConf.select(config, "data.custom_cls.path")
    if not folder.is_dir() or model.custom_chat_template or model.trust_remote_code or own_data:
        return
    settings = folder / "tokenizer_config.json"
    if any(folder.glob("chat_template*")) or any(folder.glob("additional_chat_templates/*")):
        return
    if settings.is_file() and not json.loads(settings.read_text()).get("chat_template"):
        raise ValueError(
            f"{folder}: no chat template, in chat_template.jinja or tokenizer_config.json: expected a model for chats, "
            "or a template as actor_rollout_ref.model.custom_chat_template"
        )
