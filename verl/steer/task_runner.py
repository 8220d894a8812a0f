# SPDX-License-Identifier: Apache-2.0
"""The trainer's process, which starts others beside it; upstream's start one after another.

Each process imports torch, verl and more before it can do anything.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import ray
import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf
from verl.steer.rollout.server_actor import start_servers

BATCHED_MANAGER = "verl.steer.rollout.batched_manager.BatchedAgentLoopManager"


def is_batched(config: DictConfig) -> bool:
    """Whether rollouts are generated a batch at a time, by the servers of `vllm_batched`."""
    return config.actor_rollout_ref.rollout.agent.get("agent_loop_manager_class") == BATCHED_MANAGER


@ray.remote
class SteerTaskRunner:
    """Upstream's task runner for `trainer.v1.trainer_mode=steer`."""

    def run(self, config: DictConfig) -> None:
        """Train or evaluate."""
        config.transfer_queue.enable = True
        OmegaConf.resolve(config)
        with ThreadPoolExecutor(max_workers=1) as executor:
            # Upstream's runner finds the queue that is there.
            queue = executor.submit(tq.init, config.transfer_queue)
            if is_batched(config):
                # On several nodes Ray might start a server on another one than its workers'.
                if config.trainer.nnodes == 1:
                    tensor_parallel = config.actor_rollout_ref.rollout.tensor_model_parallel_size
                    self.servers = start_servers(config.trainer.n_gpus_per_node // tensor_parallel)
                import_module("verl.steer.rollout.vllm_batched")
            queue.result()

        from verl.trainer.main_ppo import TaskRunnerV1

        TaskRunnerV1.__ray_metadata__.modified_class().run(config)
