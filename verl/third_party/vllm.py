# SPDX-License-Identifier: Apache-2.0
"""What verl reads of the installed vLLM, without importing it: every FSDP worker imports this module."""

from __future__ import annotations

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
#: How deep vLLM sleeps while the policy is updated: 2 lets the weights go too, which Ascend devices can't.
VLLM_SLEEP_LEVEL = 1 if is_npu_available or vllm_version is None else 2


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from vllm import LLM

        return LLM
    if name == "parallel_state":
        from vllm.distributed import parallel_state

        return parallel_state
    raise AttributeError(name)
