# SPDX-License-Identifier: Apache-2.0
"""Driver, GPUs, their memory, and the attention that training uses."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib import import_module

import psutil
import torch
from omegaconf import DictConfig
from verl.steer.preflight.rows import GIB
from verl.steer.requirements.hardware import FLASH_ATTENTION


def gpus() -> list[tuple[str, str, int, int]]:
    """Name, driver, and MiB of memory and of memory in use, of the GPUs of CUDA_VISIBLE_DEVICES, else of all.

    By nvidia-smi: torch would take memory on each.
    """
    if shutil.which("nvidia-smi") is None:
        raise ValueError("nvidia-smi not found: install NVIDIA's driver, or give --cpu on a machine without GPUs")
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.used", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query.append(f"--id={visible}")
    found = subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if found.returncode:
        raise ValueError(f"nvidia-smi: {found.stdout.strip()}: repair the driver")
    lines = (line.split(", ") for line in found.stdout.splitlines())
    return [(name, driver, int(total), int(used)) for name, driver, total, used in lines]


def device_memory(config: DictConfig) -> float:
    """Bytes of the smallest GPU; on a CPU the machine's free memory, for each rank."""
    if config.trainer.device == "cpu":
        return psutil.virtual_memory().available / config.trainer.n_gpus_per_node
    return float(min(total for _, _, total, _ in gpus()) * 2**20)


def check_gpus(config: DictConfig) -> str:
    """Driver, number of GPUs, and whether their memory is free."""
    wanted = config.trainer.n_gpus_per_node
    if config.trainer.device == "cpu":
        free = psutil.virtual_memory().available / GIB
        return f"the platform is the CPU: {wanted} logical, {os.cpu_count()} cores, {free:.1f} GiB of memory free"
    found, problems = gpus(), []
    (name, driver, total, _), cuda = found[0], torch.version.cuda
    if not torch.cuda.is_available():
        problems.append(f"torch's CUDA {cuda} cannot use driver {driver}: install a newer one, or run/setup.sh gpu")
    if len(found) < wanted:
        problems.append(f"{len(found)} of {wanted} GPUs: set trainer.n_gpus_per_node={len(found)}")
    if busy := [str(index) for index, (*_, used) in enumerate(found) if used > 1024]:
        problems.append(f"memory in use on GPU {', '.join(busy)}: end the processes that nvidia-smi lists")
    if problems:
        raise ValueError("; ".join(problems))
    return f"{len(found)} of {name}, {total / 1024:.1f} GiB each; driver {driver}, CUDA {cuda}"


def check_attention(config: DictConfig) -> str:
    """Whether flash-attn works if the configuration names it; the comparison of log-probs covers all attentions."""
    name = config.actor_rollout_ref.model.override_config.get("attn_implementation", FLASH_ATTENTION)
    if name != FLASH_ATTENTION:
        return f"{name}, in place of flash-attn"
    try:
        return f"flash-attn {import_module('flash_attn').__version__}"
    except ImportError as error:
        raise ValueError(f"flash-attn: {error}: uninstall it, and torch's attention takes its place") from error
