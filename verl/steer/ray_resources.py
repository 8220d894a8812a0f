# SPDX-License-Identifier: Apache-2.0
"""The options of the Ray that a run starts, and the GPUs and CPUs that it needs, without which it fails or waits."""

from __future__ import annotations

import logging

import ray
import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from ray._private import services
from ray._private.utils import get_num_cpus
from verl.single_controller.ray.base import ResourcePoolManager
from verl.trainer.distillation import is_distillation_enabled

logger = logging.getLogger(__name__)

#: A standalone rollout server reserves these with each GPU; `RolloutReplica.init_standalone` has the number.
STANDALONE_CPUS = 2

#: Options of `ray_kwargs.ray_init` that Ray refuses where a run joins a running Ray.
OWN_RAY_OPTIONS = ("num_cpus", "num_gpus", "_system_config")


def device_pools(config: DictConfig) -> dict[str, DictConfig]:
    """The sections with `n_gpus_per_node` and `nnodes` of verl's placement groups, by their key."""
    trainer, reward_model = config.trainer, config.reward.reward_model
    pools = {"trainer": trainer}
    if reward_model.enable_resource_pool:
        pools["reward.reward_model"] = reward_model
    if is_distillation_enabled(config.get("distillation")):
        pools["distillation"] = config.distillation
    if trainer.use_v1 and trainer.v1.trainer_mode == "separate_async":
        pools["rollout"] = config.actor_rollout_ref.rollout
    return pools


def reserved_cpus(config: DictConfig) -> dict[str, int]:
    """CPUs that verl's placement groups and actors keep for the whole run, by the key that sets their number.

    Actors without a number of CPUs of their own keep none. A task takes one while it runs, so one is left for tasks.
    """
    trainer, reward = config.trainer, config.reward
    reserved = {
        f"{key}.n_gpus_per_node={pool.n_gpus_per_node} on {pool.nnodes} node(s)": (
            (STANDALONE_CPUS if key == "rollout" else ResourcePoolManager.max_colocate_count)
            * pool.n_gpus_per_node
            * pool.nnodes
        )
        for key, pool in device_pools(config).items()
    }
    backend = config.transfer_queue.backend
    if trainer.use_v1 and backend.storage_backend == "SimpleStorage":
        units = backend.SimpleStorage.num_data_storage_units
        reserved[f"transfer_queue.backend.SimpleStorage.num_data_storage_units={units}"] = units
    if trainer.use_v1:
        reserved["the TransferQueue's controller"] = 1
    if reward.reward_manager.name == "remote":
        # Each of the workers starts as many again to compute rewards.
        reserved[f"reward.num_workers={reward.num_workers}, squared"] = reward.num_workers**2
    return reserved | {"tasks": 1}


def quote_variables(config: DictConfig) -> None:
    """Turn numbers among the workers' environment variables into texts, which alone Ray takes.

    Raises:
        ValueError: if a variable is neither a text nor a number.
    """
    key = "ray_kwargs.ray_init.runtime_env.env_vars"
    variables = OmegaConf.select(config, key)
    if variables is None:
        return
    if not isinstance(variables, DictConfig):
        raise ValueError(f"{key}={variables}: expected a section of variables")
    for name in map(str, variables):
        value = variables[name]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(f"{key}.{name}={value}: expected a text, such as '{key}.{name}=\"1\"'")
        variables[name] = str(value)


def joins_running_ray(config: DictConfig) -> bool:
    """Whether the run will use a Ray that runs already, such as one of several nodes."""
    address = config.ray_kwargs.get("ray_init", {}).get("address")
    if ray.is_initialized() or address not in (None, "local"):
        return True
    return address is None and services.canonicalize_bootstrap_address(None) is not None


def check_gpus(config: DictConfig) -> None:
    """Check that the Ray that this run starts on its machine has the GPUs of the run.

    Raises:
        ValueError: if it has not.
    """
    if config.trainer.device != "cuda" or joins_running_ray(config):
        return
    given = config.ray_kwargs.get("ray_init", {}).get("num_gpus")
    has = torch.cuda.device_count() if given is None else given
    needed = {
        f"{key}.n_gpus_per_node={pool.n_gpus_per_node} on {pool.nnodes} node(s)": pool.n_gpus_per_node * pool.nnodes
        for key, pool in device_pools(config).items()
    }
    if sum(needed.values()) > has:
        raise ValueError(
            f"{', '.join(needed)}: expected at most {has} GPUs, those of this machine, or a Ray of several nodes that "
            "runs already"
        )


def warn_of_few_cpus(config: DictConfig) -> None:
    """Log a warning if the Ray to which this process is connected lacks CPUs that the run reserves.

    It may still get them, as one that starts nodes on demand does; else the run waits for ever.
    """
    reserved = reserved_cpus(config)
    has, needed = int(ray.cluster_resources().get("CPU", 0)), sum(reserved.values())
    if has < needed:
        parts = ", ".join(f"{cpus} for {key}" for key, cpus in reserved.items())
        logger.warning("Ray has %d CPUs: the run waits until it has %d: %s", has, needed, parts)


def check_cpus(config: DictConfig) -> None:
    """Check that the Ray that this run starts on its machine has the CPUs that the run reserves.

    Where the run joins a running Ray this is left to `warn_of_few_cpus`, and the options that only a Ray of its own
    takes are removed: `hardware=cpu` sets some.

    Raises:
        ValueError: if it has not.
    """
    options = config.ray_kwargs.get("ray_init", {})
    if joins_running_ray(config):
        with open_dict(options):
            for key in OWN_RAY_OPTIONS:
                options.pop(key, None)
        return
    reserved, given = reserved_cpus(config), options.get("num_cpus")
    has, needed = int(get_num_cpus(True) if given is None else given), sum(reserved.values())
    if has < needed:
        parts = ", ".join(f"{cpus} for {key}" for key, cpus in reserved.items())
        raise ValueError(
            f"ray_kwargs.ray_init.num_cpus={'null' if given is None else given}: Ray would have {has} CPUs, and the "
            f"run would wait for ever; expected at least {needed}: {parts}. They are reserved, not used: the number "
            "may exceed the machine's"
        )
