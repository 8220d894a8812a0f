# SPDX-License-Identifier: Apache-2.0
"""Attributes of verl's modules that this fork replaces, by these two calls only; `verl_steer.REPLACED` lists them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch.distributed.fsdp import CPUOffloadPolicy
from verl.steer.engine import jagged_rows
from verl.steer.validation_metrics import bootstrap_metric
from verl.utils.device import get_device_name
from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions


def replace_in_worker() -> None:
    """The replacements in a training worker's process."""
    jagged_rows.replace_row_functions()
    if get_device_name() == "cpu":
        # verl offloads a reference model to pinned memory, which only an accelerator has.
        transformer_impl: Any = import_module("verl.workers.engine.fsdp.transformer_impl")
        transformer_impl.CPUOffloadPolicy = lambda pin_memory: CPUOffloadPolicy(pin_memory=False)


def replace_in_trainer(batched: bool) -> None:
    """The replacements in the trainer's process.

    Args:
        batched: whether rollouts are generated in whole batches, by servers without a load balancer.
    """
    trainer_base: Any = import_module("verl.trainer.ppo.v1.trainer_base")
    metric_utils: Any = import_module("verl.trainer.ppo.metric_utils")
    metric_utils.bootstrap_metric = bootstrap_metric
    trainer_base.get_seqlen_balanced_partitions = balanced_partitions
    if batched:
        from verl.steer.rollout import vllm_batched

        vllm_batched.register()
        trainer_base.LLMServerManager = vllm_batched.BatchedLLMServerManager


def balanced_partitions(workloads: list[int], k_partitions: int, equal_size: bool) -> list[list[int]]:
    """verl's `get_seqlen_balanced_partitions`, which searches long even for a single partition.

    Args:
        workloads: one for each sequence.
        k_partitions: number of partitions, one for each data-parallel rank.
        equal_size: whether all partitions have the same number of sequences.

    Returns:
        The ascending sequence indices of each partition.
    """
    if k_partitions == 1:
        return [list(range(len(workloads)))]
    return get_seqlen_balanced_partitions(workloads, k_partitions=k_partitions, equal_size=equal_size)
