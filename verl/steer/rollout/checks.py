# SPDX-License-Identifier: Apache-2.0
"""The batched manager's name, and checks of the rollout options before Ray starts."""

from __future__ import annotations

import math
from importlib.util import find_spec

from omegaconf import DictConfig
from verl.steer.data_files import column_values
from verl.steer.options import Option
from verl.trainer.distillation import is_distillation_enabled

BATCHED_MANAGER = "verl.steer.rollout.batched_manager.BatchedAgentLoopManager"

#: Default of `trainer.rollout_timeout`, in seconds: more than a chunk of long responses takes.
ROLLOUT_TIMEOUT = 3600.0

#: Column of a batch of prompts with a temperature for each, which only the batched manager reads.
TEMPERATURE = "__temperature__"

#: The agent loop that the batched manager serves.
AGENT_LOOP = "single_turn_agent"

#: Keys below `rollout` whose product is the number of a server's devices.
PARALLEL_SIZES = ("tensor_model_parallel_size", "data_parallel_size", "pipeline_model_parallel_size")

#: `rollout.seed` where each rollout's seed is made from it.
SEED = Option(42, at_least=0, integer=True)

SEPARATE = "trainer.v1.trainer_mode=separate_async"

ONLY_SINGLE_TURN = (
    f"the batched manager serves text-only prompts of {AGENT_LOOP}; expected "
    "rollout.agent.agent_loop_manager_class=null, upstream's"
)


def is_batched(config: DictConfig) -> bool:
    """Whether the configuration names the batched manager."""
    return config.actor_rollout_ref.rollout.agent.get("agent_loop_manager_class") == BATCHED_MANAGER


def check_rollouts(config: DictConfig) -> None:
    """Check `trainer.rollout_timeout`, and whether the batched manager, if configured, serves the options and the data.

    Raises:
        ValueError: if not.
    """
    timeout = config.trainer.get("rollout_timeout")
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0):
        raise ValueError(f"trainer.rollout_timeout={timeout}: expected seconds, more than 0, or null for no limit")
    rollout = config.actor_rollout_ref.rollout
    if not is_batched(config):
        if rollout.name in ("vllm", "sglang") and find_spec(rollout.name) is None:
            raise ValueError(f"rollout.name={rollout.name}: expected an engine that is installed")
        return
    if rollout.full_determinism:
        SEED.check("rollout.seed", rollout.seed)
    if rollout.name != "vllm":
        raise ValueError(
            f"rollout.name={rollout.name}: expected vllm with rollout.agent.agent_loop_manager_class={BATCHED_MANAGER}"
        )
    for key, value, served in (
        ("rollout.agent.default_agent_loop", rollout.agent.default_agent_loop, AGENT_LOOP),
        ("rollout.enable_rollout_routing_replay", rollout.enable_rollout_routing_replay, False),
        ("distillation.enabled", is_distillation_enabled(config.get("distillation")), False),
    ):
        if value != served:
            raise ValueError(f"{key}={value}: {ONLY_SINGLE_TURN}")
    for key in ("train_files", "val_files"):
        for file, name in column_values(config, key, "agent_name"):
            if name != AGENT_LOOP:
                raise ValueError(f"data.{key}: {file} has rows with agent_name={name}: {ONLY_SINGLE_TURN}")


def devices_of_server(rollout: DictConfig) -> int:
    """The number of devices that one server of rollouts takes."""
    return math.prod(rollout[kind] for kind in PARALLEL_SIZES)


def _check_separate(config: DictConfig) -> None:
    """verl asserts these once Ray runs."""
    rollout, sync = config.actor_rollout_ref.rollout, config.trainer.v1.separate_async.parameter_sync_step
    wanted = sync * config.actor_rollout_ref.actor.ppo_mini_batch_size
    if config.data.train_batch_size != wanted:
        raise ValueError(
            f"data.train_batch_size={config.data.train_batch_size}: expected {wanted}, "
            f"trainer.v1.separate_async.parameter_sync_step={sync} times actor.ppo_mini_batch_size, with {SEPARATE}"
        )
    for key in ("nnodes", "n_gpus_per_node"):
        if not rollout[key] > 0:
            raise ValueError(f"rollout.{key}={rollout[key]}: expected at least 1 with {SEPARATE}")
    if rollout.checkpoint_engine.backend == "naive":
        raise ValueError(f"rollout.checkpoint_engine.backend=naive: expected another, such as nccl, with {SEPARATE}")


def check_servers(config: DictConfig) -> None:
    """Check the devices of the servers.

    Raises:
        ValueError: if those of a server do not divide the number of all, or lie on two nodes in part.
    """
    trainer, rollout = config.trainer, config.actor_rollout_ref.rollout
    devices = trainer.nnodes * trainer.n_gpus_per_node
    if trainer.use_v1 and trainer.v1.trainer_mode == "separate_async":
        _check_separate(config)
        return
    size, of_node = devices_of_server(rollout), trainer.n_gpus_per_node
    sizes = ", ".join(f"rollout.{kind}={rollout[kind]}" for kind in PARALLEL_SIZES)
    if devices % size:
        raise ValueError(f"{sizes}: expected sizes whose product divides the {devices} devices")
    if size % of_node and of_node % size:
        raise ValueError(
            f"{sizes}: expected sizes whose product divides trainer.n_gpus_per_node={of_node} or is a multiple of it: "
            "verl would give devices of two nodes to a server of one"
        )
