# SPDX-License-Identifier: Apache-2.0
"""verl's entry point, with this fork's configurations on Hydra's search path and its checks before Ray starts."""

from __future__ import annotations

import sys
from typing import Any

import hydra
import ray
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.errors import InstantiationException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, open_dict
from verl.plugin.platform import get_platform
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.entropy_advantages import OLD_POLICY_FIELDS, AdvantageOptions
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.losses import statistics_taken

import verl_steer

_upstream = verl_steer.upstream(globals())

#: Engines that return the current policy's entropies from the update's forward pass.
ENTROPY_STRATEGIES = ("fsdp", "fsdp2", "megatron", "veomni", "torchtitan", "automodel")

#: Strategies of this fork's own engine: sums over the vocabulary, and the range of a whole mini-batch.
FSDP_STRATEGIES = ("fsdp", "fsdp2")

#: Losses whose coefficient this fork's trainer sets.
LOSSES_OF_THE_TRAINER = ("adaptive_entropy",)


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
    actor = config.actor_rollout_ref.actor
    try:
        policy_loss = omega_conf_to_dataclass(actor.policy_loss)
    except InstantiationException as error:
        raise ValueError(str(error.__cause__)) from error
    AdvantageOptions.of(config.algorithm)
    _provide_statistics(config, policy_loss)


def _provide_statistics(config: DictConfig, policy_loss: Any) -> None:
    """Switch on what the policy loss takes of the model; refuse what nobody would compute."""
    actor, trainer, algorithm = config.actor_rollout_ref.actor, config.trainer, config.algorithm
    taken = statistics_taken(get_policy_loss_fn(policy_loss.loss_mode))
    steer = policy_loss.loss_mode == "entropy_control"
    exact = steer and policy_loss.entropy_change_estimator == "exact"
    whole_mini_batch = steer and policy_loss.token_weight_normalizer != "micro_batch"
    old_entropy = trainer.use_v1 and not (algorithm.get("rollout_correction") or {}).get("bypass_mode", False)
    current_entropy = exact or not steer and "current_entropys" in taken or "entropys" in taken and not old_entropy
    of_this_trainer = policy_loss.loss_mode in LOSSES_OF_THE_TRAINER or algorithm.adv_estimator in OLD_POLICY_FIELDS
    averages = ("token-mean", "seq-mean-token-mean")

    def one_of(names: tuple[str, ...]) -> str:
        return f"expected {names[0]}" if len(names) == 1 else f"expected one of {', '.join(names)}"

    strategy, mode = f"actor.strategy={actor.strategy}", f"loss_mode={policy_loss.loss_mode}"
    refusals = [
        (
            current_entropy and actor.strategy not in ENTROPY_STRATEGIES,
            f"{strategy}: {one_of(ENTROPY_STRATEGIES)}: {mode} needs the current policy's entropies, which others do "
            "not return",
        ),
        (
            exact and actor.strategy not in FSDP_STRATEGIES,
            f"{strategy}: {one_of(FSDP_STRATEGIES)} with entropy_change_estimator=exact",
        ),
        (
            exact and config.actor_rollout_ref.model.use_fused_kernels,
            "model.use_fused_kernels=True: expected false with entropy_change_estimator=exact, which reads the logits",
        ),
        (
            whole_mini_batch and actor.strategy not in FSDP_STRATEGIES,
            f"{strategy}: {one_of(FSDP_STRATEGIES)} with token_weight_normalizer={policy_loss.token_weight_normalizer}",
        ),
        (
            whole_mini_batch and not old_entropy,
            f"policy_loss.token_weight_normalizer={policy_loss.token_weight_normalizer!r}: expected micro_batch where "
            "the trainer has no entropies of the old policy, as in bypass mode",
        ),
        (
            "entropy" in OLD_POLICY_FIELDS.get(algorithm.adv_estimator, ()) and not old_entropy,
            f"algorithm.adv_estimator={algorithm.adv_estimator}: expected another where the trainer has no entropies "
            "of the old policy, as in bypass mode",
        ),
        (
            policy_loss.loss_mode in LOSSES_OF_THE_TRAINER and not old_entropy,
            f"policy_loss.{mode}: expected another where the trainer doesn't measure the entropy, as in bypass mode",
        ),
        (
            policy_loss.loss_mode in LOSSES_OF_THE_TRAINER and actor.loss_agg_mode not in averages,
            f"actor.loss_agg_mode={actor.loss_agg_mode}: {one_of(averages)} with {mode}, which needs a mean entropy",
        ),
        (
            of_this_trainer and not (trainer.use_v1 and trainer.v1.trainer_mode == "steer"),
            f"trainer.v1.trainer_mode={trainer.v1.trainer_mode}: expected steer, and trainer.use_v1=true, with {mode} "
            f"and algorithm.adv_estimator={algorithm.adv_estimator}",
        ),
    ]
    for refused, message in refusals:
        if refused:
            raise ValueError(message)
    with open_dict(actor):
        actor.calculate_entropy = actor.calculate_entropy or current_entropy
        if exact:
            actor.calculate_sum_pi_squared = actor.fsdp_config.one_pass_reductions = True


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
