# SPDX-License-Identifier: Apache-2.0
"""Configuration dataclasses that the YAML files name by `_target_`: verl's, with this fork's options."""

from __future__ import annotations

import math
from dataclasses import dataclass

from verl.steer.entropy_control import EntropyControlOptions, check_control
from verl.steer.methods.adaptive_entropy import AdaptiveEntropyOptions
from verl.steer.methods.aepo import AEPOOptions
from verl.steer.methods.archer import ArcherOptions
from verl.steer.methods.bapo import BapoOptions, check_bapo
from verl.steer.methods.ce_gppo import CeGppoOptions
from verl.steer.methods.clip_b_v import ClipBOptions, ClipVOptions
from verl.steer.methods.dynamic_clip import DynamicClipOptions
from verl.steer.methods.entrocraft import EntrocraftOptions
from verl.steer.methods.entropic import EntroPICOptions
from verl.steer.methods.entropy_shaped_advantage import EntropyShapedAdvantageOptions
from verl.steer.methods.gtpo import EntropyRewardOptions
from verl.steer.methods.high_entropy_tokens import HighEntropyOptions
from verl.steer.methods.opefo import OpefoOptions
from verl.steer.methods.positive_advantage import PositiveAdvantageOptions
from verl.steer.methods.quadrant import QuadrantOptions
from verl.steer.methods.registry import base_loss_of
from verl.steer.methods.sample_reinforcement import ReinforceOptions
from verl.steer.methods.siren import SirenOptions
from verl.steer.methods.unlikeliness import UnlikelinessOptions
from verl.steer.options import Option, option, resolve_options
from verl.trainer.ppo import core_algos
from verl.workers import config as verl_config

#: verl's own numbers in `policy_loss`, which verl does not check.
VERL_OPTIONS = {
    "clip_cov_ratio": Option(above=0.0, at_most=1.0),
    "clip_cov_lb": Option(at_least=-math.inf),
    "clip_cov_ub": Option(at_most=math.inf),
    "kl_cov_ratio": Option(above=0.0, at_most=1.0),
    "ppo_kl_coef": Option(),
    "dro_beta": Option(),
}


@dataclass
class SteerOptions:
    """STEER's keys below `policy_loss`, for `loss_mode=entropy_control`.

    Args:
        token_weight_min: weight of the token with the largest estimated entropy change; by default 0.8, and 0 in the
            maps `target` and `band`.
        token_weight_max: largest weight: by default 1.2 in the linear map, 2 in `target` and `band`, and 1.0, which is
            its maximum, in the others (but the exponential one with `asymmetric`).
        linear: the linear map from estimate to weight, else the exponential one.
        token_weight_map: one of core_algos.TOKEN_WEIGHT_MAPS or CONTROL_MAPS; by default as `linear` says.
        token_weight_quantile: the threshold map reduces the weight of tokens whose estimate exceeds this quantile, by
            default 0.8; the normalizer `winsorised` ends its range there, by default at 0.95.
        token_weight_normalizer: one of core_algos.TOKEN_WEIGHT_NORMALIZERS: estimates are measured by the range of the
            micro-batch, by their rank in it, by its range up to a quantile, by the range of the whole mini-batch, or by
            a running range over mini-batches.
        token_weight_ema_decay: weight of the past in the running range.
        entropy_change_estimator: one of core_algos.ENTROPY_CHANGE_ESTIMATORS, or `influence`.
        entropy_control_mode: one of core_algos.ENTROPY_CONTROL_MODES: weights fall with the magnitude of the change, or
            with the fall of the entropy, so that updates that raise it have the largest weights.
        base_loss: the loss that STEER weights, one of core_algos.BASE_LOSSES; the estimators in
            core_algos.PPO_CLIPPED_ESTIMATORS work with `vanilla` only.
    """

    token_weight_min: float = option(at_least=0.0)
    token_weight_max: float = option(above=0.0)
    linear: bool = option(True, choices=(True, False))
    token_weight_map: str | None = option(choices=(*core_algos.TOKEN_WEIGHT_MAPS, *core_algos.CONTROL_MAPS))
    token_weight_quantile: float = option(at_least=0.0, at_most=1.0)
    token_weight_normalizer: str = option("micro_batch", choices=core_algos.TOKEN_WEIGHT_NORMALIZERS)
    token_weight_ema_decay: float = option(0.9, at_least=0.0, at_most=1.0)
    entropy_change_estimator: str = option(
        "released", choices=(*core_algos.ENTROPY_CHANGE_ESTIMATORS, core_algos.INFLUENCE)
    )
    entropy_control_mode: str = option("symmetric", choices=core_algos.ENTROPY_CONTROL_MODES)
    base_loss: str = option("vanilla", choices=core_algos.BASE_LOSSES)


@dataclass
class PolicyLossConfig(
    SteerOptions,
    EntropyControlOptions,
    AdaptiveEntropyOptions,
    ArcherOptions,
    BapoOptions,
    CeGppoOptions,
    ClipVOptions,
    DynamicClipOptions,
    EntroPICOptions,
    EntropyShapedAdvantageOptions,
    HighEntropyOptions,
    OpefoOptions,
    PositiveAdvantageOptions,
    QuadrantOptions,
    SirenOptions,
    verl_config.PolicyLossConfig,
):
    """`actor.policy_loss`: verl's options, STEER's and those of the other losses.

    Raises:
        ValueError: if a value is out of range or two options exclude each other; the message has the key, the value and
            what was expected.
    """

    def __post_init__(self) -> None:
        resolve_options(self, "policy_loss")
        for name, bounds in VERL_OPTIONS.items():
            bounds.check(f"policy_loss.{name}", getattr(self, name))
        low, high = self.clip_cov_lb, self.clip_cov_ub
        if None not in (low, high) and low >= high:
            raise ValueError(f"policy_loss.clip_cov_lb={low}: expected a number below clip_cov_ub={high}")
        if base_loss_of(self) == "dro" and not (self.dro_beta or 0) > 0:
            raise ValueError(
                f"policy_loss.dro_beta={self.dro_beta}: expected a finite number above 0 with the loss dro"
            )
        self._resolve_map()
        self._check_estimator()
        check_control(self)
        check_bapo(self)

    def _resolve_map(self) -> None:
        mapping = self.token_weight_map or ("linear" if self.linear else "exponential")
        controlled = mapping in core_algos.CONTROL_MAPS
        defaults = {
            "token_weight_map": mapping,
            "token_weight_min": 0.0 if controlled else 0.8,
            "token_weight_max": 2.0 if controlled else 1.2 if mapping == "linear" else 1.0,
            "token_weight_quantile": 0.95 if self.token_weight_normalizer == "winsorised" else 0.8,
        }
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        low, high = self.token_weight_min, self.token_weight_max
        if low > high:
            raise ValueError(f"policy_loss.token_weight_min={low}: expected at most token_weight_max={high}")
        if controlled:
            if low > 1 or high < 1:
                key, value = ("token_weight_min", low) if low > 1 else ("token_weight_max", high)
                raise ValueError(f"policy_loss.{key}={value}: expected bounds on both sides of 1 in the map {mapping}")
            return
        if low == 0:
            raise ValueError(
                f"policy_loss.token_weight_min={low}: expected a finite number above 0 in the {mapping} map"
            )
        if mapping != "linear" and high > 1 and (mapping, self.entropy_control_mode) != ("exponential", "asymmetric"):
            raise ValueError(f"policy_loss.token_weight_max={high}: expected at most 1 in the {mapping} map")
        quantile, normalizer = self.token_weight_quantile, self.token_weight_normalizer
        if mapping == "threshold" and normalizer in core_algos.RESCALING_NORMALIZERS:
            raise ValueError(
                f"policy_loss.token_weight_normalizer={normalizer!r}: expected another in the threshold map, which "
                "reads no more than the order of the estimates"
            )
        if normalizer == "rank" and (mapping, self.entropy_control_mode) == ("exponential", "asymmetric"):
            raise ValueError(
                "policy_loss.token_weight_normalizer='rank': expected another, or linear=true, with "
                "entropy_control_mode=asymmetric: ranks do not tell a rise of the entropy from a fall"
            )
        if normalizer == "winsorised" and self.entropy_control_mode == "asymmetric":
            raise ValueError(
                "policy_loss.token_weight_normalizer='winsorised': expected another with "
                "entropy_control_mode=asymmetric, whose range has large estimates at both ends"
            )
        if mapping == "threshold" and quantile == 1 and normalizer in core_algos.MICRO_BATCH_NORMALIZERS:
            raise ValueError(
                f"policy_loss.token_weight_quantile={quantile}: expected a number of at least 0 and below 1 in the "
                "threshold map, since no estimate exceeds the largest one"
            )

    def _check_estimator(self) -> None:
        estimator, normalizer = self.entropy_change_estimator, self.token_weight_normalizer
        if estimator in core_algos.PPO_CLIPPED_ESTIMATORS and self.base_loss != "vanilla":
            raise ValueError(
                f"policy_loss.base_loss={self.base_loss!r}: expected vanilla with entropy_change_estimator="
                f"{estimator}, which is 0 where PPO's clip removes the gradient"
            )
        if estimator == "exact" and normalizer in core_algos.RANGE_NORMALIZERS:
            raise ValueError(
                f"policy_loss.token_weight_normalizer={normalizer!r}: expected one of "
                f"{', '.join(core_algos.MICRO_BATCH_NORMALIZERS)} with entropy_change_estimator=exact: the batch has "
                "no sums over the vocabulary for the old policy"
            )
        if core_algos.weighs_mini_batches(self) and normalizer != "micro_batch":
            raise ValueError(
                f"policy_loss.token_weight_normalizer={normalizer!r}: expected micro_batch (the default) with "
                f"entropy_change_estimator={estimator} and token_weight_map={self.token_weight_map}, whose weights are "
                "those of the whole mini-batch"
            )


@dataclass
class FSDPEngineConfig(verl_config.FSDPEngineConfig):
    """`fsdp_config`: verl's options and one more.

    Args:
        one_pass_reductions: log-prob and entropy from one reading of the logits (verl.steer.engine.vocab_reductions) in
            place of verl's separate functions, whose options `entropy_from_logits_with_chunking` and
            `entropy_checkpointing` then have no effect.
    """

    one_pass_reductions: bool = False


#: The options of advantage estimators, keys below `algorithm`.
ADVANTAGE_OPTIONS = (
    ReinforceOptions,
    UnlikelinessOptions,
    EntropyRewardOptions,
    ClipBOptions,
    EntrocraftOptions,
    AEPOOptions,
)
