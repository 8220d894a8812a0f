# SPDX-License-Identifier: Apache-2.0
"""Warnings of options that a run sets and that its loss and its advantage estimator do not read.

They are not errors: comparisons give the same overrides to runs of several methods.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from verl.steer.audit.scores import AuditOptions
from verl.steer.config import ADVANTAGE_OPTIONS, PolicyLossConfig, SteerOptions
from verl.steer.entropy_control import EntropyControlOptions
from verl.steer.methods.advantages import ESTIMATORS
from verl.steer.methods.registry import POLICY_LOSSES, base_loss_of
from verl.trainer.ppo.core_algos import CONTROL_MAPS, INFLUENCE

logger = logging.getLogger(__name__)

#: Keys of one method's module that other losses read as well.
SHARED = {
    "target_entropy": ("adaptive_entropy", "entropic", "entropy_control"),
    "target_kp": ("entropic", "entropy_control"),
    "target_ki": ("entropic", "entropy_control"),
}

#: verl's own keys below `policy_loss`, and the loss that reads them.
VERLS = {
    **dict.fromkeys(("clip_cov_ratio", "clip_cov_lb", "clip_cov_ub"), "clip_cov"),
    **dict.fromkeys(("kl_cov_ratio", "ppo_kl_coef"), "kl_cov"),
    "dro_beta": "dro",
}

#: verl's default of the KL terms' coefficients.
KL = 0.001

#: How rollouts for training are sampled by default.
SAMPLING = {"temperature": 1.0, "top_p": 1, "top_k": -1}


def warn_of_unread(config: DictConfig, policy_loss: Any) -> None:
    """Log each option that is set and not read, with the choice that leaves it unread."""
    section, algorithm = config.actor_rollout_ref.actor.policy_loss, config.algorithm
    unread = [f"policy_loss.{key}={section[key]} with {why}" for key, why in _unread_by_loss(section, policy_loss)]
    estimator = ESTIMATORS.get(algorithm.adv_estimator)
    unread += [
        f"algorithm.{key}={algorithm[key]} with adv_estimator={algorithm.adv_estimator}"
        for options in ADVANTAGE_OPTIONS
        if estimator is None or options.__module__ != estimator.compute.__module__
        for key in _set_in(algorithm, options)
    ]
    audit = config.trainer.get("entropy_audit") or DictConfig({})
    if not audit.get("freq"):
        unread += [
            f"trainer.entropy_audit.{key}={audit[key]} with freq=0"
            for key in _set_in(audit, AuditOptions)
            if key != "freq"
        ]
    actor = config.actor_rollout_ref.actor
    coefficients = (
        ("actor.kl_loss_coef", actor.kl_loss_coef, actor.use_kl_loss, "actor.use_kl_loss=false"),
        (
            "algorithm.kl_ctrl.kl_coef", algorithm.kl_ctrl.kl_coef, algorithm.use_kl_in_reward,
            "algorithm.use_kl_in_reward=false",
        ),
    )  # fmt: skip
    unread += [f"{key}={value} with {why}" for key, value, read, why in coefficients if not read and value != KL]
    if (batches := OmegaConf.select(algorithm, "filter_groups.max_num_gen_batches", default=0) or 0) > 0:
        unread.append(
            f"algorithm.filter_groups.max_num_gen_batches={batches} with trainer.use_v1=true, whose trainers generate "
            "until a batch is full; max_inflight_gen_batches bounds how many batches they ask for at once"
        )
    if (steps := OmegaConf.select(actor, "optim.total_training_steps") or 0) > 0:
        unread.append(f"actor.optim.total_training_steps={steps} with trainer.total_training_steps, which replaces it")
    if config.trainer.val_only:
        rollout = config.actor_rollout_ref.rollout
        unread += [
            f"rollout.{key}={rollout[key]} with trainer.val_only=true, which reads rollout.val_kwargs.{key}"
            for key, default in SAMPLING.items()
            if rollout[key] not in (default, rollout.val_kwargs[key])
        ]
    for one in unread:
        logger.warning("without effect: %s", one)


def warn_of_late_steps(config: DictConfig, total_steps: int) -> None:
    """Log each option that names a step after the run's last one.

    Args:
        config: the resolved configuration.
        total_steps: the number of the run's steps, known once the data are loaded.
    """
    keys = ("trainer.entropy_audit.freq", "actor_rollout_ref.actor.optim.lr_warmup_steps")
    for key in keys if not config.trainer.val_only else ():
        step = OmegaConf.select(config, key) or 0
        if step > total_steps:
            logger.warning("%s=%d: the run has %d steps", key, step, total_steps)


def _set_in(section: DictConfig, options: type) -> list[str]:
    return [field.name for field in fields(options) if section.get(field.name) is not None]


def _unread_by_loss(section: DictConfig, options: Any) -> Iterator[tuple[str, str]]:
    name = options.loss_mode
    *owners, verls = PolicyLossConfig.__bases__
    for key, reader in VERLS.items():
        if section[key] != getattr(verls, key) and base_loss_of(options) != reader:
            yield key, f"loss_mode={name}"
    module = POLICY_LOSSES[name].compute.__module__ if name in POLICY_LOSSES else None
    for owner in owners:
        of_steer = owner in (SteerOptions, EntropyControlOptions)
        for key in _set_in(section, owner):
            readers = SHARED.get(key, ())
            if name not in readers and (name != "entropy_control" if of_steer else owner.__module__ != module):
                yield key, f"loss_mode={name}"
            elif name == "entropy_control" and (choice := _unread_by_steer(key, options)):
                yield key, choice


def _unread_by_steer(key: str, options: Any) -> str | None:
    """The choice among STEER's maps, normalizers and estimators that leaves one of its options unread."""
    mapping, normalizer = options.token_weight_map, options.token_weight_normalizer
    controller, estimator, target = options.target_controller, options.entropy_change_estimator, mapping == "target"
    by_map, by_normalizer = f"token_weight_map={mapping}", f"token_weight_normalizer={normalizer}"
    by_controller = f"target_controller={controller}" if target else by_map
    by_estimator = f"entropy_change_estimator={estimator}"
    read = {
        "linear": (options.linear == (mapping == "linear"), by_map),
        "token_weight_quantile": (mapping == "threshold" or normalizer == "winsorised", f"{by_map}, {by_normalizer}"),
        "token_weight_ema_decay": (normalizer == "ema", by_normalizer),
        "entropy_control_mode": (mapping not in CONTROL_MAPS, by_map),
        "entropy_band": (mapping == "band", by_map),
        "influence_way": (estimator == INFLUENCE, by_estimator),
        "influence_refresh": (estimator == INFLUENCE, by_estimator),
        "target_entropy": (target, by_map),
        "target_controller": (target, by_map),
        "target_gain": (target and controller == "solve", by_controller),
        "target_kp": (target and controller == "pi", by_controller),
        "target_ki": (target and controller == "pi", by_controller),
    }
    is_read, choice = read.get(key, (True, None))
    return None if is_read else choice
