# SPDX-License-Identifier: Apache-2.0
"""The trainer of this fork, `trainer.v1.trainer_mode=steer`: upstream's synchronous one and what runs here need."""

from __future__ import annotations

import os
from pathlib import Path

from omegaconf import DictConfig, open_dict
from verl.experimental.agent_loop import AgentLoopManager
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

BATCHED_MANAGER = "verl.trainer.ppo.v1.agent_loop_batched.BatchedAgentLoopManager"

#: Seconds between two looks whether a step's rollouts are there; upstream waits 2, half of a small model's step.
POLL_INTERVAL = 0.05


@register_trainer("steer")
class SteerTrainer(PPOTrainerSync):
    """Upstream's synchronous trainer, quick to notice finished rollouts, with whole batches for the batched manager."""

    def __init__(self, config: DictConfig) -> None:
        # Upstream compares the mode's name with "sync" to tell synchronous trainers.
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"
        super().__init__(config)
        if config.actor_rollout_ref.rollout.agent.get("agent_loop_manager_class") == BATCHED_MANAGER:
            from verl.workers.rollout.vllm_rollout import vllm_batched

            vllm_batched.register()

    def fit(self, agent_loop_manager: AgentLoopManager) -> None:
        """Train; the loggers that write files do so in `trainer.default_local_dir` unless the environment says else."""
        folder = Path(self.config.trainer.default_local_dir).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        # Upstream's file logger empties its file, so a resumed run gets one of its own.
        resumed = f"_from_{self.global_steps}" if self.global_steps else ""
        os.environ.setdefault("VERL_FILE_LOGGER_PATH", str(folder / f"metrics{resumed}.jsonl"))
        os.environ.setdefault("TENSORBOARD_DIR", str(folder / "tensorboard"))
        super().fit(agent_loop_manager)

    def _build_replay_buffer(self) -> ReplayBuffer:
        replay_buffer = super()._build_replay_buffer()
        replay_buffer.poll_interval = POLL_INTERVAL
        return replay_buffer
