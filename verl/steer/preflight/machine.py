# SPDX-License-Identifier: Apache-2.0
"""Driver, GPUs and their memory."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import NamedTuple

import psutil
import torch
from omegaconf import DictConfig
from verl.steer.preflight.rows import GIB

#: Memory in use on an idle GPU, GiB: the driver's own is well below.
IDLE = 1.0


class GPU(NamedTuple):
    """One line of nvidia-smi; memory in GiB."""

    name: str
    driver: str
    total: float
    used: float


def gpus() -> list[GPU]:
    """The GPUs that CUDA_VISIBLE_DEVICES names, else all; without touching them, since that takes memory on each.

    Raises:
        ValueError: if nvidia-smi is missing or fails.
    """
    if shutil.which("nvidia-smi") is None:
        raise ValueError("nvidia-smi: not found: install NVIDIA's driver, or use --cpu on a machine without GPUs")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.used", "--format=csv,noheader,nounits"]
    found = subprocess.run([*query, *([f"--id={visible}"] if visible else [])], capture_output=True, text=True)
    if found.returncode:
        raise ValueError(f"nvidia-smi: {(found.stdout + found.stderr).strip()}: repair the driver")
    lines = [[cell.strip() for cell in line.split(",")] for line in found.stdout.splitlines()]
    return [GPU(name, driver, float(total) / 1024, float(used) / 1024) for name, driver, total, used in lines]


def on_cpu(config: DictConfig) -> bool:
    """Whether the run is one of `hardware=cpu`."""
    return config.trainer.device == "cpu"


def device_memory(config: DictConfig) -> float:
    """Bytes of the smallest GPU; on a CPU the machine's free memory for each rank."""
    if on_cpu(config):
        return psutil.virtual_memory().available / config.trainer.n_gpus_per_node
    return min(gpu.total for gpu in gpus()) * GIB


def check_driver(config: DictConfig) -> str:
    """The driver, and whether torch can use it."""
    if on_cpu(config):
        return f"not needed: the platform is the CPU; torch {torch.__version__}"
    driver = gpus()[0].driver
    if not torch.cuda.is_available():
        raise ValueError(
            f"driver {driver}: torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it: install a newer "
            "driver, or make the environment by `bash run/setup.sh gpu`"
        )
    return f"{driver}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def check_gpus(config: DictConfig) -> str:
    """Whether the node has the GPUs that the run takes of it."""
    wanted = config.trainer.n_gpus_per_node
    if on_cpu(config):
        return f"{wanted} logical, on {os.cpu_count()} cores"
    found = gpus()
    if len(found) < wanted:
        raise ValueError(f"{len(found)} of {wanted}: set trainer.n_gpus_per_node={len(found)}, or CUDA_VISIBLE_DEVICES")
    return f"{len(found)}, {wanted} needed: {', '.join(sorted({gpu.name for gpu in found}))}"


def check_free_memory(config: DictConfig) -> str:
    """Whether other processes leave the GPUs' memory free; on a CPU the machine's free memory."""
    if on_cpu(config):
        memory = psutil.virtual_memory()
        return f"{memory.available / GIB:.1f} GiB of {memory.total / GIB:.1f} GiB free"
    found = gpus()
    if busy := [f"{index} ({gpu.used:.1f} GiB)" for index, gpu in enumerate(found) if gpu.used > IDLE]:
        raise ValueError(f"in use on GPU {', '.join(busy)}: end the processes that nvidia-smi lists")
    return f"{min(gpu.total for gpu in found):.1f} GiB each, at most {max(gpu.used for gpu in found):.1f} GiB in use"
