# SPDX-License-Identifier: Apache-2.0
"""What a policy loss or an advantage estimator needs that not every run computes: switched on or refused."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict
from verl.steer.audit.scores import AuditOptions
from verl.steer.methods.advantages import SCORES, fields_read
from verl.steer.task_runner import BATCHED_MANAGER, is_batched
from verl.trainer.ppo.core_algos import PPO_CLIPPED_LOSSES, base_loss_of, get_policy_loss_fn
from verl.trainer.ppo.utils import need_critic
from verl.workers.utils.losses import statistics_taken

#: Engines that return the current policy's entropies from the update's forward pass.
ENTROPY_STRATEGIES = ("fsdp", "fsdp2", "megatron", "veomni", "torchtitan", "automodel")

#: Strategies of this fork's own engine, which has sums over the vocabulary and the range of a whole mini-batch.
FSDP_STRATEGIES = ("fsdp", "fsdp2")

#: Losses with a coefficient that this fork's trainer sets step by step.
LOSSES_OF_THE_TRAINER = ("adaptive_entropy",)

#: Losses that read `actor.clip_ratio_c`, and what it must be above: PPO's dual clip cuts ratios of more than 1, DPPO
#: truncates all ratios.
CLIP_RATIO_C_ABOVE = {**dict.fromkeys((*PPO_CLIPPED_LOSSES, "dynamic_clip"), 1), "dppo_tv": 0, "dppo_kl": 0}

#: File inside a checkpoint's folder while the checkpoint is under way.
UNFINISHED = ".unfinished"

#: Keys below `trainer` that this fork's trainer reads, with the values that ask for nothing.
KEYS_OF_THE_TRAINER = {
    "save_after": 0,
    "save_best_only": False,
    "delete_old_best_checkpoint": False,
    "best_metric_key": None,
}

#: Averages by which the trainer's `actor/entropy` is a mean over tokens.
MEANS = ("token-mean", "seq-mean-token-mean")


@dataclass
class Requirements:
    """What a run's loss and estimator need.

    Args:
        sums: the sums over the vocabulary that the estimator `exact` reads.
        range: the range of a whole mini-batch, for STEER's normalizers.
        current_entropy: the current policy's entropies.
        coefficient: one that the trainer sets by the entropy that it measures.
        fields: those of the batch that the trainer hands to the advantage estimator beside upstream's.
    """

    sums: bool
    range: bool
    current_entropy: bool
    coefficient: bool
    fields: tuple[str, ...]


def has_old_entropy(config: DictConfig) -> bool:
    """Whether the trainer computes the old policy's entropies and keeps them in the batch."""
    rollout_correction = config.algorithm.get("rollout_correction") or {}
    return config.trainer.use_v1 and not rollout_correction.get("bypass_mode", False)


def requirements_of(config: DictConfig, policy_loss: Any) -> Requirements:
    """From the configuration and its `policy_loss` as a dataclass.

    Raises:
        ValueError: if there is no policy loss of that name.
    """
    taken = statistics_taken(get_policy_loss_fn(policy_loss.loss_mode))
    steer = policy_loss.loss_mode == "entropy_control"
    exact = steer and policy_loss.entropy_change_estimator == "exact"
    instead_of_old = "entropys" in taken and not has_old_entropy(config)
    return Requirements(
        sums=exact,
        range=steer and policy_loss.token_weight_normalizer != "micro_batch",
        current_entropy=exact or instead_of_old or ("current_entropys" in taken and not steer),
        coefficient=policy_loss.loss_mode in LOSSES_OF_THE_TRAINER,
        fields=fields_read(config.algorithm),
    )


def provide(config: DictConfig, policy_loss: Any) -> None:
    """Switch on `actor`'s keys that the loss needs.

    Args:
        config: the resolved configuration; `actor.calculate_entropy`, `actor.calculate_sum_pi_squared` and
            `actor.fsdp_config.one_pass_reductions` are set.
        policy_loss: its `actor.policy_loss` as a dataclass.

    Raises:
        ValueError: if what is needed can't be had.
    """
    needed = requirements_of(config, policy_loss)
    _check_engine(config, policy_loss, needed)
    _check_trainer(config, policy_loss, needed)
    actor = config.actor_rollout_ref.actor
    with open_dict(actor):
        actor.calculate_entropy = actor.calculate_entropy or needed.current_entropy
        if needed.sums:
            actor.calculate_sum_pi_squared = actor.fsdp_config.one_pass_reductions = True


def _check_engine(config: DictConfig, policy_loss: Any, needed: Requirements) -> None:
    strategy = config.actor_rollout_ref.actor.strategy

    def expect_strategy(strategies: tuple[str, ...], reason: str) -> None:
        if strategy not in strategies:
            raise ValueError(f"actor.strategy={strategy}: expected one of {', '.join(strategies)}: {reason}")

    if needed.current_entropy:
        expect_strategy(
            ENTROPY_STRATEGIES,
            f"loss_mode={policy_loss.loss_mode} needs the current policy's entropies, which others do not return",
        )
    if needed.sums:
        expect_strategy(FSDP_STRATEGIES, "entropy_change_estimator=exact needs sums over the vocabulary")
        if config.actor_rollout_ref.model.use_fused_kernels:
            raise ValueError(
                "model.use_fused_kernels=true: expected false with entropy_change_estimator=exact, which reads logits"
            )
    if needed.range:
        expect_strategy(FSDP_STRATEGIES, f"token_weight_normalizer={policy_loss.token_weight_normalizer}")


def _check_trainer(config: DictConfig, policy_loss: Any, needed: Requirements) -> None:
    actor, trainer = config.actor_rollout_ref.actor, config.trainer
    normalizer = f"policy_loss.token_weight_normalizer={policy_loss.token_weight_normalizer}"
    loss_mode = f"policy_loss.loss_mode={policy_loss.loss_mode}"
    adv_estimator = f"algorithm.adv_estimator={config.algorithm.adv_estimator}"
    if not has_old_entropy(config):
        for needs, key, expected in (
            (needed.range, normalizer, "micro_batch"),
            (needed.coefficient, loss_mode, "another"),
            ("entropy" in needed.fields, adv_estimator, "another"),
        ):
            if needs:
                raise ValueError(
                    f"{key}: expected {expected} where the trainer computes no entropies of the old policy, as in "
                    "bypass mode"
                )
    if needed.coefficient and actor.loss_agg_mode not in MEANS:
        raise ValueError(
            f"actor.loss_agg_mode={actor.loss_agg_mode}: expected one of {', '.join(MEANS)} with {loss_mode}, which "
            "needs a mean entropy"
        )
    use_kl = ", algorithm.use_kl_in_reward=true" if SCORES in needed.fields else ""
    for needs, key in (
        (needed.coefficient, loss_mode),
        (bool(needed.fields), adv_estimator + use_kl),
        (needed.sums, "policy_loss.entropy_change_estimator=exact"),
        (is_batched(config), f"rollout.agent.agent_loop_manager_class={BATCHED_MANAGER} (null: upstream's manager)"),
    ):
        if needs and not trainer.use_v1:
            raise ValueError(f"trainer.use_v1={trainer.use_v1}: expected true with {key}")
        if needs and trainer.v1.trainer_mode != "steer":
            raise ValueError(f"trainer.v1.trainer_mode={trainer.v1.trainer_mode}: expected steer with {key}")


def check_clip(config: DictConfig, policy_loss: Any) -> None:
    """`actor.clip_ratio*`: a worker would take a bad value for a clip that never or always cuts, or stop at it.

    Raises:
        ValueError: if a value is not a number of the range that the loss takes.
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


def check_entropy_audit(config: DictConfig) -> None:
    """An audit measures what this fork's own engine computes, at the request of this fork's own trainer."""
    options, trainer, actor = AuditOptions.of(config.trainer), config.trainer, config.actor_rollout_ref.actor
    bypass = (config.algorithm.get("rollout_correction") or {}).get("bypass_mode", False)
    needs = [
        ("trainer.use_v1", trainer.use_v1, (True,)),
        ("trainer.v1.trainer_mode", trainer.v1.trainer_mode, ("steer",)),
        ("actor.strategy", actor.strategy, FSDP_STRATEGIES),
        ("actor.fsdp_config.one_pass_reductions", actor.fsdp_config.get("one_pass_reductions"), (True,)),
        ("model.use_fused_kernels", config.actor_rollout_ref.model.use_fused_kernels, (False,)),
        ("algorithm.rollout_correction.bypass_mode", bypass, (False,)),
    ]
    for key, value, taken in needs:
        if options.freq and value not in taken:
            expected = " or ".join(str(one).lower() for one in taken)
            raise ValueError(f"{key}={value}: expected {expected} with trainer.entropy_audit.freq={options.freq}")


def check_checkpoints(config: DictConfig) -> None:
    """A run that is asked for checkpoints saves some, and goes on from a whole one.

    Raises:
        ValueError: if it would save none, or not as its keys say, or go on from an unfinished one.
    """
    trainer = config.trainer
    if trainer.resume_mode == "resume_path" and Path(str(trainer.resume_from_path), UNFINISHED).exists():
        raise ValueError(
            f"trainer.resume_from_path={trainer.resume_from_path}: expected a whole checkpoint; the run that wrote "
            "this one was killed meanwhile"
        )
    if trainer.val_only:
        return
    if trainer.use_v1 and trainer.v1.trainer_mode == "steer":
        _check_checkpoints_of_the_trainer(config)
        return
    other = f"trainer.v1.trainer_mode={trainer.v1.trainer_mode} and trainer.use_v1={str(trainer.use_v1).lower()}"
    for key, off in KEYS_OF_THE_TRAINER.items():
        value = trainer.get(key, off)
        if value != off:
            shown, expected = (str(one).lower() if isinstance(one, bool) else one for one in (value, off))
            raise ValueError(f"trainer.{key}={shown}: expected {expected} with {other}, where nothing reads it")
    marks = Path(trainer.default_local_dir).glob(f"global_step_*/{UNFINISHED}")
    unfinished = sorted(mark.parent.name for mark in marks)
    if unfinished:
        raise ValueError(
            f"trainer.default_local_dir={trainer.default_local_dir}: {', '.join(unfinished)} is unfinished: delete it, "
            f"for a run with {other} would take it for whole"
        )


def _check_checkpoints_of_the_trainer(config: DictConfig) -> None:
    trainer, checkpoint = config.trainer, config.actor_rollout_ref.actor.checkpoint
    if trainer.save_best_only and trainer.test_freq <= 0:
        raise ValueError(
            f"trainer.test_freq={trainer.test_freq}: expected at least 1 with trainer.save_best_only=true, which saves "
            "after validations only"
        )
    actor, critic = trainer.max_actor_ckpt_to_keep, trainer.max_critic_ckpt_to_keep
    if actor != critic and need_critic(config):
        raise ValueError(
            f"trainer.max_critic_ckpt_to_keep={critic}: expected trainer.max_actor_ckpt_to_keep={actor}, for one "
            "folder holds a step's actor and critic"
        )
    if trainer.get("remove_previous_ckpt_in_save"):
        raise ValueError(
            "trainer.remove_previous_ckpt_in_save=true: expected trainer.max_actor_ckpt_to_keep=1 instead, which "
            "spares the best checkpoint"
        )
    if checkpoint.get("async_save"):
        raise ValueError(
            "actor.checkpoint.async_save=true: expected false, for the trainer counts a checkpoint as whole once it "
            "has been saved"
        )


def check_evaluation(config: DictConfig) -> None:
    """This fork's trainer evaluates one validation file after another and keeps their results by the files' names.

    Raises:
        ValueError: if two files have one name, or if there are results of that name already.
    """
    trainer, files = config.trainer, config.data.val_files
    if not (trainer.val_only and trainer.use_v1 and trainer.v1.trainer_mode == "steer"):
        return
    by_name = defaultdict(list)
    for file in [files] if isinstance(files, str) else files:
        by_name[Path(file).stem].append(file)
    for name, same in by_name.items():
        if len(same) > 1:
            raise ValueError(f"data.val_files: {', '.join(same)}: expected one file named {name}, as its results are")
        results = Path(trainer.validation_data_dir or "", name)
        empty = not results.exists() or results.is_dir() and not any(results.iterdir())
        if trainer.validation_data_dir and not empty:
            raise ValueError(
                f"trainer.validation_data_dir={trainer.validation_data_dir}: {name} in it holds results: expected "
                f"another folder, or none of {same[0]} among data.val_files"
            )
