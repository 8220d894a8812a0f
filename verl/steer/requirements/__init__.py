# SPDX-License-Identifier: Apache-2.0
"""The checks of a run's configuration before Ray starts, and the keys that its loss needs switched on."""

from __future__ import annotations

import verl.steer.methods  # noqa: F401 - registers the losses and estimators
from omegaconf import DictConfig
from verl.steer.config import ADVANTAGE_OPTIONS
from verl.steer.options import from_config
from verl.steer.ray_resources import check_cpus, check_gpus, quote_variables
from verl.steer.requirements.checkpoints import check_checkpoints, check_evaluation
from verl.steer.requirements.entropy_control import check_entropy_audit, check_entropy_control
from verl.steer.requirements.hardware import (
    check_attention,
    check_cpu,
    check_micro_batches,
    check_model_engine,
    check_platform,
)
from verl.steer.requirements.ignored import check_ignored
from verl.steer.requirements.loss import check_clip, check_engine, check_trainer, inputs_needed, switch_on
from verl.steer.requirements.own_code import check_own_code
from verl.steer.requirements.rewards import (
    check_code_rewards,
    check_data_sources,
    check_reward_function,
    check_reward_manager,
    check_reward_model,
)
from verl.steer.requirements.skipped_old_log_prob import check_skipped_old_log_prob
from verl.steer.requirements.unread import warn_of_unread
from verl.steer.requirements.verl_values import as_dataclass, check_verl_values
from verl.steer.rollout.checks import check_rollouts, check_servers


def check_and_complete(config: DictConfig) -> None:
    """Check a run's configuration, and switch on the keys that its policy loss needs.

    Args:
        config: the resolved configuration. `actor.calculate_entropy`, `actor.calculate_sum_pi_squared`,
            `actor.fsdp_config.one_pass_reductions` and, without flash-attn, the attention are set, and numbers among
            the workers' environment variables become texts.

    Raises:
        ValueError: if a value is out of range, or the loss or the advantage estimator needs something that this run
            does not compute.
    """
    check_platform(config)
    check_verl_values(config)
    check_ignored(config)
    check_own_code(config)
    check_gpus(config)
    check_cpus(config)
    quote_variables(config)
    check_model_engine(config)
    check_attention(config)
    check_micro_batches(config)
    check_servers(config)
    check_rollouts(config)
    policy_loss = as_dataclass(config, "policy_loss")
    for options in ADVANTAGE_OPTIONS:
        from_config(options, config.algorithm)
    check_clip(config, policy_loss)
    needed = inputs_needed(config, policy_loss)
    check_engine(config, policy_loss, needed)
    check_entropy_control(config, policy_loss)
    check_trainer(config, policy_loss, needed)
    check_skipped_old_log_prob(config, policy_loss)
    switch_on(config, needed)
    check_entropy_audit(config, policy_loss)
    warn_of_unread(config, policy_loss)
    check_checkpoints(config)
    check_evaluation(config)
    check_reward_manager(config)
    check_reward_function(config)
    check_data_sources(config)
    check_code_rewards(config)
    check_reward_model(config)
    check_cpu(config)
