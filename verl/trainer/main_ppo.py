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
from omegaconf import DictConfig
from verl.plugin.platform import get_platform
from verl.steer import requirements
from verl.steer.methods.advantages import AdvantageOptions
from verl.steer.rollout.checks import check_rollouts
from verl.steer.run_ending import ActorsDied, WatchedRunner, reason_of
from verl.steer.task_runner import SteerTaskRunner
from verl.utils.config import omega_conf_to_dataclass

import verl_steer

_upstream = verl_steer.upstream(globals())


class UpstreamConfigs(SearchPathPlugin):
    """Makes the installed verl's configurations known to Hydra beside this fork's, which `main` names."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("verl", "pkg://verl.trainer.config")


Plugins.instance().register(UpstreamConfigs)


def prepare(config: DictConfig) -> None:
    """Check this fork's part of a run's configuration, and see to it that losses get the statistics that they take.

    Args:
        config: the resolved configuration. `actor.calculate_entropy`, `actor.calculate_sum_pi_squared` and
            `actor.fsdp_config.one_pass_reductions` are switched on where the policy loss needs them.

    Raises:
        ValueError: if a value is out of range, or if what the loss or the advantage estimator needs can't be had.
    """
    platform = get_platform().device_name
    if (platform == "cpu") != (config.trainer.device == "cpu"):
        remedy = "hardware=cpu" if platform == "cpu" else "VERL_PLATFORM=cpu in the environment, or another hardware"
        raise ValueError(
            f"trainer.device={config.trainer.device}: verl's platform here is {platform}; expected {remedy}"
        )
    _check_log_prob_micro_batches(config)
    check_rollouts(config)
    actor = config.actor_rollout_ref.actor
    try:
        policy_loss = omega_conf_to_dataclass(actor.policy_loss)
    except InstantiationException as error:
        raise ValueError(str(error.__cause__)) from error
    AdvantageOptions.of(config.algorithm)
    requirements.check_clip(config, policy_loss)
    requirements.provide(config, policy_loss)
    requirements.check_entropy_audit(config)
    requirements.check_checkpoints(config)
    requirements.check_evaluation(config)


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
    if config.trainer.v1.trainer_mode == "steer":
        _upstream.TaskRunnerV1 = WatchedRunner(SteerTaskRunner)
    try:
        _upstream.main.__wrapped__(config)
    except (ray.exceptions.RayError, ActorsDied) as error:
        # Its package imports the trainers, which this process does without.
        from verl.steer.checkpoint_ledger import UnknownMetric
        from verl.steer.rollout.wait import RolloutsFailed

        reason = reason_of(error, told_by=(UnknownMetric, RolloutsFailed))
        if reason is None:
            raise
        # Before the line, which is then the last: workers' output is passed on until Ray has ended.
        ray.shutdown()
        sys.exit(f"steer-verl: {reason}")


if __name__ == "__main__":
    main()
