# SPDX-License-Identifier: Apache-2.0
"""The trainer's process, which starts the others beside it; verl's task runner starts one after another.

Each process imports torch, verl and more before it can work.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import ray
import transfer_queue as tq
from omegaconf import DictConfig
from verl.steer.ray_resources import warn_of_few_cpus
from verl.steer.rollout.checks import devices_of_server, is_batched
from verl.steer.rollout.server_actor import start_servers


@ray.remote
class SteerTaskRunner:
    """verl's task runner, with this fork's trainer and workers."""

    def run(self, config: DictConfig) -> None:
        """Train or evaluate."""
        warn_of_few_cpus(config)
        config.transfer_queue.enable = True
        batched = is_batched(config)
        with ThreadPoolExecutor(max_workers=1) as executor:
            # verl's runner finds the queue already there.
            queue = executor.submit(tq.init, config.transfer_queue)
            # On several nodes, used or not, Ray might start a server on another node than its workers'.
            if batched and sum(node["Alive"] for node in ray.nodes()) == 1:
                devices = devices_of_server(config.actor_rollout_ref.rollout)
                self.servers = start_servers(config.trainer.n_gpus_per_node // devices)
            # The imports take seconds, in which the queue and the servers start.
            from verl.steer import trainer  # noqa: F401 - registers trainer_mode=steer
            from verl.steer.replacements import replace_in_trainer
            from verl.steer.worker import give_steer_workers
            from verl.trainer.main_ppo import TaskRunnerV1

            give_steer_workers(config.trainer.v1.trainer_mode)
            replace_in_trainer(batched)
            queue.result()
        TaskRunnerV1.__ray_metadata__.modified_class().run(config)  # type: ignore[attr-defined] # Ray's
