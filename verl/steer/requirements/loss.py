# SPDX-License-Identifier: Apache-2.0
"""What a policy loss and an advantage estimator need of engine and trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from omegaconf import DictConfig, open_dict
from verl.steer.methods.advantages import SCORES, estimator_fields
from verl.steer.methods.registry import (
    POLICY_LOSSES,
    base_loss_of,
    fields_needed,
)
from verl.steer.rollout.checks import BATCHED_MANAGER, is_batched
from verl.trainer.distillation import is_distillation_enabled
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

#: Engines that return the current policy's entropies from the update's forward pass.
ENTROPY_STRATEGIES = ("fsdp", "fsdp2", "megatron", "veomni", "torchtitan", "automodel")

#: Strategies of this fork's own engine, which has sums over the vocabulary and the range of a whole mini-batch.
FSDP_STRATEGIES = ("fsdp", "fsdp2")

#: Losses that read `actor.clip_ratio_c`, and the value that it must exceed: all of this fork, and some of verl's.
CLIP_RATIO_C_ABOVE = {"vanilla": 1, "bypass_mode": 1, "dppo_tv": 0, "dppo_kl": 0} | dict.fromkeys(POLICY_LOSSES, 1)

#: Averages by which the trainer's `actor/entropy` is a mean over tokens.
MEANS = ("token-mean", "seq-mean-token-mean")


def bypasses_old_log_prob(config: DictConfig) -> bool:
    """Whether the rollout's log-probs serve as the old policy's, verl's bypass mode."""
    return (config.algorithm.get("rollout_correction") or {}).get("bypass_mode", False)


def has_old_entropy(config: DictConfig) -> bool:
    """Whether the trainer computes the old policy's entropies and keeps them in the batch."""
    skips = bypasses_old_log_prob(config) or config.trainer.get("skip_old_log_prob", False)
    return config.trainer.use_v1 and not skips


def inputs_needed(config: DictConfig, policy_loss: Any) -> set[str]:
    """Fields of `LossInputs` that the loss needs; without the old policy's entropies the current policy's."""
    known = [*POLICY_LOSSES, *(name for name in POLICY_LOSS_REGISTRY if name not in POLICY_LOSSES)]
    if policy_loss.loss_mode not in known:
        close = get_close_matches(str(policy_loss.loss_mode), known) or known
        raise ValueError(f"policy_loss.loss_mode={policy_loss.loss_mode}: expected one of {', '.join(close)}")
    needed = fields_needed(policy_loss)
    return needed if has_old_entropy(config) or "entropys" not in needed else needed | {"current_entropys"}


def switch_on(config: DictConfig, needed: set[str]) -> None:
    """Switch on what the engine computes on request only.

    Args:
        config: the resolved configuration, changed in place.
        needed: fields of `LossInputs` that the loss needs.
    """
    actor = config.actor_rollout_ref.actor
    with open_dict(actor):
        # Without the pass for the old log-probs the trainer's `actor/entropy` is the update's.
        wanted = "current_entropys" in needed or config.trainer.get("skip_old_log_prob", False)
        actor.calculate_entropy = actor.calculate_entropy or wanted
        if "sum_pi_squared" in needed:
            actor.calculate_sum_pi_squared = actor.fsdp_config.one_pass_reductions = True
        if "nucleus_entropys" in needed:
            actor.fsdp_config.one_pass_reductions = True


def _reader_of_sums(policy_loss: Any) -> str:
    """The option that needs the sums over the vocabulary."""
    steer = policy_loss.loss_mode == "entropy_control"
    return "entropy_change_estimator=exact" if steer else f"loss_mode={policy_loss.loss_mode}"


def check_engine(config: DictConfig, policy_loss: Any, needed: set[str]) -> None:
    """Check that the engine computes the fields that the loss needs.

    Raises:
        ValueError: if another engine is configured.
    """
    strategy = config.actor_rollout_ref.actor.strategy
    for field, strategies, reason in (
        (
            "current_entropys",
            ENTROPY_STRATEGIES,
            f"loss_mode={policy_loss.loss_mode} needs the current policy's entropies, which others do not return",
        ),
        ("sum_pi_squared", FSDP_STRATEGIES, f"{_reader_of_sums(policy_loss)} needs sums over the vocabulary"),
        ("nucleus_entropys", FSDP_STRATEGIES, f"loss_mode={policy_loss.loss_mode} needs a nucleus"),
        ("change_range", FSDP_STRATEGIES, f"token_weight_normalizer={policy_loss.token_weight_normalizer}"),
        ("token_weights", FSDP_STRATEGIES, f"token_weight_map={policy_loss.token_weight_map}"),
    ):
        if field in needed and strategy not in strategies:
            raise ValueError(f"actor.strategy={strategy}: expected one of {', '.join(strategies)}: {reason}")
    if {"sum_pi_squared", "nucleus_entropys"} & needed and config.actor_rollout_ref.model.use_fused_kernels:
        raise ValueError(
            f"model.use_fused_kernels=true: expected false with {_reader_of_sums(policy_loss)}, which reads logits"
        )


def check_trainer(config: DictConfig, policy_loss: Any, needed: set[str]) -> None:
    """Check that the trainer and the rollout give what the loss and the advantage estimator need.

    Raises:
        ValueError: if another trainer or rollout is configured.
    """
    actor, trainer = config.actor_rollout_ref.actor, config.trainer
    normalizer = f"policy_loss.token_weight_normalizer={policy_loss.token_weight_normalizer}"
    loss_mode = f"policy_loss.loss_mode={policy_loss.loss_mode}"
    adv_estimator = f"algorithm.adv_estimator={config.algorithm.adv_estimator}"
    has_coefficient, fields = "entropy_coeff" in needed, estimator_fields(config.algorithm)
    aepo = config.algorithm.adv_estimator == "aepo"  # it reads `actor/entropy` of the last step
    if policy_loss.loss_mode in POLICY_LOSSES and is_distillation_enabled(config.get("distillation")):
        raise ValueError(f"distillation.enabled=true: expected false with {loss_mode}")
    for needs, key, expected in (
        ("change_range" in needed, normalizer, "micro_batch"),
        (has_coefficient, loss_mode, "another"),
        ("entropy" in fields, adv_estimator, "another"),
    ):
        if needs and not has_old_entropy(config):
            raise ValueError(
                f"{key}: expected {expected} where the trainer computes no entropies of the old policy, as in bypass "
                "mode or with trainer.skip_old_log_prob=true"
            )
    if aepo and bypasses_old_log_prob(config):
        raise ValueError(f"{adv_estimator}: expected another in bypass mode, without entropies of the old policy")
    if aepo and not is_batched(config):
        manager = config.actor_rollout_ref.rollout.agent.get("agent_loop_manager_class")
        raise ValueError(
            f"rollout.agent.agent_loop_manager_class={manager}: expected {BATCHED_MANAGER} with {adv_estimator}, whose "
            "prompts have temperatures of their own"
        )
    if (has_coefficient or aepo) and actor.loss_agg_mode not in MEANS:
        reader = loss_mode if has_coefficient else adv_estimator
        raise ValueError(
            f"actor.loss_agg_mode={actor.loss_agg_mode}: expected one of {', '.join(MEANS)} with {reader}, which "
            "needs a mean entropy"
        )
    if has_coefficient and actor.entropy_coeff:
        raise ValueError(
            f"actor.entropy_coeff={actor.entropy_coeff}: expected 0 with {loss_mode}, which has one of its own"
        )
    use_kl = ", algorithm.use_kl_in_reward=true" if SCORES in fields else ""
    needs_steer = (
        (has_coefficient, loss_mode),
        (bool(fields), adv_estimator + use_kl),
        ("sum_pi_squared" in needed, f"policy_loss.{_reader_of_sums(policy_loss)}"),
        ("nucleus_entropys" in needed, loss_mode),
        ("token_weights" in needed, f"policy_loss.token_weight_map={policy_loss.token_weight_map}"),
        (is_batched(config), f"rollout.agent.agent_loop_manager_class={BATCHED_MANAGER} (null: verl's manager)"),
    )
    for needs, key in (*needs_steer, (policy_loss.loss_mode in POLICY_LOSSES, loss_mode)):
        if needs and not trainer.use_v1:
            raise ValueError(f"trainer.use_v1={trainer.use_v1}: expected true with {key}")
    for needs, key in needs_steer:
        if needs and trainer.v1.trainer_mode != "steer":
            raise ValueError(f"trainer.v1.trainer_mode={trainer.v1.trainer_mode}: expected steer with {key}")


def check_clip(config: DictConfig, policy_loss: Any) -> None:
    """Check `actor.clip_ratio*`: a worker would accept a bad value as a clip that never or always cuts, or crash.

    Raises:
        ValueError: if a value is not a number in the loss's range.
    """
    actor, loss = config.actor_rollout_ref.actor, base_loss_of(policy_loss)

    def check(name: str, allowed: Callable[[float], bool], expected: str) -> None:
        value = actor[name]
        number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
        if not number or not allowed(value):
            raise ValueError(f"actor.{name}={value}: expected a number {expected}")

    for name in ("clip_ratio_low", "clip_ratio_high"):
        check("clip_ratio" if actor[name] is None else name, lambda value: value >= 0, "of at least 0")
    if loss in CLIP_RATIO_C_ABOVE:
        bound = CLIP_RATIO_C_ABOVE[loss]
        check("clip_ratio_c", lambda value: value > bound, f"above {bound} with the loss {loss}")
