# SPDX-License-Identifier: Apache-2.0
"""Configuration dataclasses that the YAML files name by `_target_`: verl's, with this fork's options."""

from __future__ import annotations

import math
from dataclasses import dataclass

from verl.steer.methods.adaptive_entropy import AdaptiveEntropyOptions
from verl.steer.methods.dynamic_clip import DynamicClipOptions
from verl.steer.methods.entropy_shaped_advantage import EntropyShapedAdvantageOptions
from verl.steer.methods.gtpo import EntropyRewardOptions
from verl.steer.methods.high_entropy_tokens import HighEntropyOptions
from verl.steer.methods.quadrant import QuadrantOptions
from verl.steer.methods.registry import base_loss_of
from verl.steer.methods.sample_reinforcement import ReinforceOptions
from verl.steer.methods.unlikeliness import UnlikelinessOptions
from verl.steer.options import Option, option, resolve_options
from verl.trainer.ppo import core_algos
from verl.workers import config as verl_config

#: verl's own numbers in `policy_loss`, which verl does not check.
VERL_OPTIONS = {
    "clip_cov_ratio": Option(above=0.0),
    "clip_cov_lb": Option(at_least=-math.inf, at_most=math.inf),
    "clip_cov_ub": Option(at_least=-math.inf, at_most=math.inf),
    "kl_cov_ratio": Option(above=0.0),
    "ppo_kl_coef": Option(),
    "dro_beta": Option(),
}


@dataclass
class SteerOptions:
    """STEER's keys below `policy_loss`, for `loss_mode=entropy_control`.

    Args:
        token_weight_min: weight of the token with the largest estimated entropy change.
        token_weight_max: largest weight: by default 1.2 in the linear map and 1.0, which is its maximum, in the others.
        linear: the linear map from estimate to weight, else the exponential one.
        token_weight_map: one of core_algos.TOKEN_WEIGHT_MAPS; by default as `linear` says.
        token_weight_quantile: the threshold map reduces the weight of tokens whose estimate exceeds this quantile.
        token_weight_normalizer: one of core_algos.TOKEN_WEIGHT_NORMALIZERS: estimates are measured by the range of the
            micro-batch, of the whole mini-batch, or by a running range over mini-batches.
        token_weight_ema_decay: weight of the past in the running range.
        entropy_change_estimator: one of core_algos.ENTROPY_CHANGE_ESTIMATORS.
        base_loss: the loss that STEER weights, one of core_algos.BASE_LOSSES; the estimators in
            core_algos.PPO_CLIPPED_ESTIMATORS work with `vanilla` only.
    """

    token_weight_min: float = option(0.8, above=0.0)
    token_weight_max: float | None = option(above=0.0)
    linear: bool = option(True, choices=(True, False))
    token_weight_map: str | None = option(choices=core_algos.TOKEN_WEIGHT_MAPS)
    token_weight_quantile: float = option(0.8, at_least=0.0, at_most=1.0)
    token_weight_normalizer: str = option("micro_batch", choices=core_algos.TOKEN_WEIGHT_NORMALIZERS)
    token_weight_ema_decay: float = option(0.9, at_least=0.0, at_most=1.0)
    entropy_change_estimator: str = option("released", choices=core_algos.ENTROPY_CHANGE_ESTIMATORS)
    base_loss: str = option("vanilla", choices=core_algos.BASE_LOSSES)


@dataclass
class PolicyLossConfig(
    SteerOptions,
    AdaptiveEntropyOptions,
    DynamicClipOptions,
    EntropyShapedAdvantageOptions,
    HighEntropyOptions,
    QuadrantOptions,
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
        if base_loss_of(self) == "dro" and not (self.dro_beta or 0) > 0:
            raise ValueError(
                f"policy_loss.dro_beta={self.dro_beta}: expected a finite number above 0 with the loss dro"
            )
        self._resolve_map()
        self._check_estimator()

    def _resolve_map(self) -> None:
        mapping = self.token_weight_map or ("linear" if self.linear else "exponential")
        low, high = self.token_weight_min, self.token_weight_max
        if high is None:
            high = 1.2 if mapping == "linear" else 1.0
        object.__setattr__(self, "token_weight_map", mapping)
        object.__setattr__(self, "token_weight_max", high)
        if low > high:
            raise ValueError(f"policy_loss.token_weight_min={low}: expected at most token_weight_max={high}")
        if mapping != "linear" and high > 1:
            raise ValueError(f"policy_loss.token_weight_max={high}: expected at most 1 in the {mapping} map")

    def _check_estimator(self) -> None:
        estimator, normalizer = self.entropy_change_estimator, self.token_weight_normalizer
        if estimator in core_algos.PPO_CLIPPED_ESTIMATORS and self.base_loss != "vanilla":
            raise ValueError(
                f"policy_loss.base_loss={self.base_loss!r}: expected vanilla with entropy_change_estimator="
                f"{estimator}, which is 0 where PPO's clip removes the gradient"
            )
        if estimator == "exact" and normalizer != "micro_batch":
            raise ValueError(
                f"policy_loss.token_weight_normalizer={normalizer!r}: expected micro_batch with "
                "entropy_change_estimator=exact: the batch has no sums over the vocabulary for the old policy"
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
ADVANTAGE_OPTIONS = (ReinforceOptions, UnlikelinessOptions, EntropyRewardOptions)
