# SPDX-License-Identifier: Apache-2.0
"""The training workers: verl's, with this fork's engine and loss, on a CPU too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import ray
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.single_controller.base.decorator import Dispatch, register
from verl.steer.engine import fsdp  # noqa: F401 - registers the engine
from verl.steer.loss import ppo_loss
from verl.steer.replacements import replace_in_worker
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY, PPOTrainer
from verl.utils.device import get_device_name
from verl.utils.distributed import initialize_global_process_group_ray
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
from verl.workers.utils.losses import ppo_loss as verl_ppo_loss


class SteerTrainingWorker(TrainingWorker):
    """verl's worker of one model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # verl names a backend for the CPU and one for the device, which torch refuses if the device is the CPU. It
        # leaves a process group alone that exists.
        if get_device_name() == "cpu":
            initialize_global_process_group_ray(backend="cpu:gloo")
        replace_in_worker()
        super().__init__(*args, **kwargs)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[attr-defined] # verl makes the members at run time
    def set_loss_fn(self, loss_fn: Callable[..., Any]) -> None:
        """Set the loss; `verl.steer.loss.ppo_loss` in place of verl's."""
        if isinstance(loss_fn, partial) and loss_fn.func is verl_ppo_loss:
            loss_fn = partial(ppo_loss, **loss_fn.keywords)
        super().set_loss_fn(loss_fn)


class SteerActorRolloutRefWorker(ActorRolloutRefWorker):
    """verl's worker of actor, rollout and reference model."""

    actor_worker_cls = ref_worker_cls = SteerTrainingWorker


class SteerDetachActorWorker(DetachActorWorker):
    """verl's worker of the trainer mode `separate_async`."""

    actor_worker_cls = ref_worker_cls = SteerTrainingWorker


#: verl's workers -> this fork's.
WORKERS = {
    TrainingWorker: SteerTrainingWorker,
    ActorRolloutRefWorker: SteerActorRolloutRefWorker,
    DetachActorWorker: SteerDetachActorWorker,
}


class SteerWorkers(PPOTrainer):
    """A trainer that starts this fork's workers."""

    role_worker_mapping: dict[Role, Any]

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role, actor in self.role_worker_mapping.items():
            worker = actor.__ray_metadata__.modified_class.__ray_actor_class__
            self.role_worker_mapping[role] = ray.remote(WORKERS[worker])


def give_steer_workers(trainer_mode: str) -> None:
    """Have the trainer that is registered for a mode, such as verl's asynchronous ones, start this fork's workers."""
    trainer = TRAINER_REGISTRY.get(trainer_mode)
    if trainer is not None and not issubclass(trainer, SteerWorkers):
        TRAINER_REGISTRY[trainer_mode] = type(trainer.__name__, (SteerWorkers, trainer), {})
