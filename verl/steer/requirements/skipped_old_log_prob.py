# SPDX-License-Identifier: Apache-2.0
"""The check of `trainer.skip_old_log_prob`."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig
from verl.steer.methods.advantages import estimator_fields
from verl.steer.requirements.allowed import refuse_others
from verl.steer.requirements.loss import ENTROPY_STRATEGIES, bypasses_old_log_prob
from verl.trainer.distillation import is_distillation_enabled
from verl.trainer.ppo.core_algos import weighs_mini_batches


def check_skipped_old_log_prob(config: DictConfig, policy_loss: Any) -> None:
    """Check `trainer.skip_old_log_prob`: the update computes the old log-probs, and nothing reads them before it.

    Raises:
        ValueError: if a step has several updates, or something else reads the old log-probs.
    """
    skips = config.trainer.get("skip_old_log_prob", False)
    if not isinstance(skips, bool):
        raise ValueError(f"trainer.skip_old_log_prob={skips}: expected true or false")
    if not skips:
        return
    algorithm, actor, rollout = config.algorithm, config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    refuse_others(
        [
            ("actor.ppo_mini_batch_size", actor.ppo_mini_batch_size, (config.data.train_batch_size,)),
            ("actor.ppo_epochs", actor.ppo_epochs, (1,)),
            ("actor.strategy", actor.strategy, ENTROPY_STRATEGIES),
            ("rollout.calculate_log_probs", rollout.calculate_log_probs, (False,)),
            ("algorithm.rollout_correction.bypass_mode", bypasses_old_log_prob(config), (False,)),
            ("algorithm.use_kl_in_reward", algorithm.use_kl_in_reward, (False,)),
            ("distillation.enabled", is_distillation_enabled(config.get("distillation")), (False,)),
        ],
        "trainer.skip_old_log_prob=true",
    )
    estimator = algorithm.adv_estimator
    if {"old_log_probs", "entropy"} & set(estimator_fields(algorithm)) or "optimal_token_baseline" in estimator:
        raise ValueError(
            f"algorithm.adv_estimator={estimator}: expected another with trainer.skip_old_log_prob=true: it reads what "
            "the left out pass computes"
        )
    if weighs_mini_batches(policy_loss):
        raise ValueError(
            f"policy_loss.token_weight_map={policy_loss.token_weight_map}, entropy_change_estimator="
            f"{policy_loss.entropy_change_estimator}: expected trainer.skip_old_log_prob=false with weights of the "
            "whole mini-batch, which are computed before its update"
        )
