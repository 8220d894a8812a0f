# SPDX-License-Identifier: Apache-2.0
"""Upstream's names, without importing vLLM before one is used: every FSDP worker imports this module."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from verl.utils.device import is_npu_available


def get_version(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


vllm_version = get_version("vllm")
#: vLLM's sleep level while the policy is updated: 2 also frees the weights, which Ascend devices can't.
VLLM_SLEEP_LEVEL = 1 if is_npu_available or vllm_version is None else 2


def __getattr__(name: str) -> Any:
    modules = {"LLM": "vllm", "parallel_state": "vllm.distributed"}
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(modules[name]), name)
