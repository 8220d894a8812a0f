# SPDX-License-Identifier: Apache-2.0
"""verl's entry point, with this fork's configurations on Hydra's search path and its checks before Ray starts."""

from __future__ import annotations

import sys

import hydra
import ray
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.errors import InstantiationException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, open_dict
from verl.plugin.platform import get_platform
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.losses import takes_entropys

import verl_steer

_upstream = verl_steer.upstream(globals())

#: Engines that return the current policy's entropies from the update's forward pass.
ENTROPY_STRATEGIES = ("fsdp", "fsdp2", "megatron", "veomni", "torchtitan", "automodel")


class UpstreamConfigs(SearchPathPlugin):
    """Makes the installed verl's configurations known to Hydra beside this fork's, which `main` names."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("verl", "pkg://verl.trainer.config")


Plugins.instance().register(UpstreamConfigs)


def prepare(config: DictConfig) -> None:
    """Check STEER's part of a run's configuration, and see to it that a loss that takes entropies gets them.

    Args:
        config: the resolved configuration; `actor.calculate_entropy` is switched on where the trainer drops or never
            computes the old policy's entropies.

    Raises:
        ValueError: if a value is out of range or no entropies can be had.
    """
    platform = get_platform().device_name
    if (platform == "cpu") != (config.trainer.device == "cpu"):
        remedy = "hardware=cpu" if platform == "cpu" else "VERL_PLATFORM=cpu in the environment, or another hardware"
        raise ValueError(
            f"trainer.device={config.trainer.device}: verl's platform here is {platform}; expected {remedy}"
        )
    _check_log_prob_micro_batches(config)
    actor = config.actor_rollout_ref.actor
    try:
        policy_loss = omega_conf_to_dataclass(actor.policy_loss)
    except InstantiationException as error:
        raise ValueError(str(error.__cause__)) from error
    if not takes_entropys(get_policy_loss_fn(policy_loss.loss_mode)):
        return
    rollout_correction = config.algorithm.get("rollout_correction") or {}
    if not config.trainer.use_v1 or rollout_correction.get("bypass_mode", False):
        if actor.strategy not in ENTROPY_STRATEGIES:
            raise ValueError(
                f"actor.strategy={actor.strategy}: expected one of {', '.join(ENTROPY_STRATEGIES)}: "
                f"loss_mode={policy_loss.loss_mode} needs entropies, which bypass mode drops and others do not return"
            )
        with open_dict(actor):
            actor.calculate_entropy = True


def _check_log_prob_micro_batches(config: DictConfig) -> None:
    """Upstream checks the micro-batches of the update only; those of the log-probs would stop a worker later."""
    rollout, trainer = config.actor_rollout_ref.rollout, config.trainer
    size = rollout.log_prob_micro_batch_size_per_gpu
    if trainer.val_only or rollout.log_prob_use_dynamic_bsz or size is None:
        return
    ranks = trainer.nnodes * trainer.n_gpus_per_node // config.actor_rollout_ref.actor.ulysses_sequence_parallel_size
    rollouts = config.data.train_batch_size * rollout.n // ranks
    if rollouts % size:
        raise ValueError(
            f"rollout.log_prob_micro_batch_size_per_gpu={size}: expected a divisor of the {rollouts} rollouts of a "
            f"rank (data.train_batch_size={config.data.train_batch_size} * rollout.n={rollout.n} / {ranks} ranks)"
        )


@hydra.main(config_path="config", config_name="ppo_trainer", version_base=None)
def main(config: DictConfig) -> None:
    """Train or evaluate by a Hydra configuration; `--config-name steer_exp` and its kin are this fork's."""
    verl_steer.check()
    try:
        prepare(config)
    except ValueError as error:
        sys.exit(f"steer-verl: {error}")
    try:
        _upstream.main.__wrapped__(config)
    except ray.exceptions.RayTaskError as error:
        # Its package imports the trainers, which this process does without.
        from verl.trainer.ppo.v1.checkpoint_ledger import UnknownMetric

        if not isinstance(error.cause, UnknownMetric):
            raise
        sys.exit(f"steer-verl: {error.cause}")


if __name__ == "__main__":
    main()
