# SPDX-License-Identifier: Apache-2.0
"""What of a run's rollouts can be refused before Ray starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
from omegaconf import DictConfig
from verl.steer.task_runner import is_batched
from verl.trainer.distillation import is_distillation_enabled

#: The agent loop that the batched manager serves.
AGENT_LOOP = "single_turn_agent"

ONLY_SINGLE_TURN = (
    f"the batched manager serves text-only prompts of {AGENT_LOOP}; expected "
    "rollout.agent.agent_loop_manager_class=null, upstream's"
)


def check_rollouts(config: DictConfig) -> None:
    """Check the time limit, and that the batched manager, where it is named, can serve what is asked of it.

    Raises:
        ValueError: if not.
    """
    timeout = config.trainer.get("rollout_timeout")
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0):
        raise ValueError(f"trainer.rollout_timeout={timeout}: expected seconds, more than 0, or null for no limit")
    if not is_batched(config):
        return
    rollout = config.actor_rollout_ref.rollout
    for key, value, served in (
        ("rollout.agent.default_agent_loop", rollout.agent.default_agent_loop, AGENT_LOOP),
        ("rollout.enable_rollout_routing_replay", rollout.enable_rollout_routing_replay, False),
        ("distillation.enabled", is_distillation_enabled(config.get("distillation")), False),
    ):
        if value != served:
            raise ValueError(f"{key}={value}: {ONLY_SINGLE_TURN}")
    for key in ("train_files", "val_files"):
        for file in _parquet_files(config.data[key]):
            for name in _agent_names(file):
                if name != AGENT_LOOP:
                    raise ValueError(f"data.{key}: {file} has rows with agent_name={name}: {ONLY_SINGLE_TURN}")


def _parquet_files(files: str | list[str] | None) -> Iterator[Path]:
    """Those at hand: what must be downloaded first, and what is not there, is the data set's to tell."""
    for file in [files] if isinstance(files, str) else files or []:
        if str(file).endswith(".parquet") and Path(file).is_file():
            yield Path(file)


def _agent_names(file: Path) -> list[str]:
    with pq.ParquetFile(file) as parquet:
        if "agent_name" not in parquet.schema_arrow.names:
            return []
        return parquet.read(columns=["agent_name"])["agent_name"].unique().to_pylist()
