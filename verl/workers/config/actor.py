# SPDX-License-Identifier: Apache-2.0
"""verl's actor configuration, with the options of this fork's policy losses in `policy_loss`."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from verl_steer import upstream

_upstream = upstream(globals())

#: Upper bound of numbers that have no other: neither NaN nor infinity is within it.
LARGEST = sys.float_info.max


@dataclass
class PolicyLossConfig(_upstream.PolicyLossConfig):
    """Configuration of the policy loss: upstream's fields plus this fork's; `loss_mode=entropy_control` is STEER.

    A field that is None takes its default; the configuration files leave them so, which lets Hydra take both
    `policy_loss.token_weight_min=0.7` and `+policy_loss.token_weight_min=0.7`.

    Args:
        token_weight_min: weight of the token with the largest estimated entropy change. Default 0.8.
        token_weight_max: largest weight. Default 1.2 in the linear map, 1.0 in the other two, where it can't be more.
        linear: the linear map from estimate to weight, else the exponential one. Default True.
        token_weight_map: one of core_algos.TOKEN_WEIGHT_MAPS. Default: what `linear` says.
        token_weight_quantile: the threshold map holds back the tokens whose estimate exceeds this quantile. Default
            0.8.
        token_weight_normalizer: one of core_algos.TOKEN_WEIGHT_NORMALIZERS, whose range measures the estimates: that
            of the micro-batch, of the whole mini-batch, or a running one over mini-batches. Default "micro_batch".
        token_weight_ema_decay: share of the past in the running range. Default 0.9.
        entropy_change_estimator: one of core_algos.ENTROPY_CHANGE_ESTIMATORS. Default "released".
        base_loss: the loss that STEER weights, one of core_algos.BASE_LOSSES; the estimators in
            core_algos.PPO_CLIPPED_ESTIMATORS go with "vanilla" only. Default "vanilla".
        advantage_entropy_alpha, advantage_entropy_kappa: of `loss_mode=entropy_shaped_advantage`. Default 0.4 and 2.
        dynamic_clip_low, dynamic_clip_high: of `loss_mode=dynamic_clip`. Default 0.16 and 0.2.
        high_entropy_share: share of the tokens that `loss_mode=high_entropy_tokens` trains on. Default 0.2.
        quadrant: tokens that `loss_mode=quadrant` scales, one of losses.QUADRANTS. Default
            "positive_likely".
        quadrant_weight: their weight. Default 0.5.
        quadrant_probability: tokens at least as probable are likely. Default None: exp(-H), state by state.
        target_entropy: entropy below which `loss_mode=adaptive_entropy` rewards entropy, in nats. Default 0.2.
        entropy_coeff_step, entropy_coeff_max: by how much its coefficient changes a step, and its bound. Default
            0.0001 and 0.005.

    Raises:
        ValueError: if a value, upstream's numbers included, is out of range; the message has the key, the value and
            what was expected.
    """

    token_weight_min: float | None = None
    token_weight_max: float | None = None
    linear: bool | None = None
    token_weight_map: str | None = None
    token_weight_quantile: float | None = None
    token_weight_normalizer: str | None = None
    token_weight_ema_decay: float | None = None
    entropy_change_estimator: str | None = None
    base_loss: str | None = None
    advantage_entropy_alpha: float | None = None
    advantage_entropy_kappa: float | None = None
    dynamic_clip_low: float | None = None
    dynamic_clip_high: float | None = None
    high_entropy_share: float | None = None
    quadrant: str | None = None
    quadrant_weight: float | None = None
    quadrant_probability: float | None = None
    target_entropy: float | None = None
    entropy_coeff_step: float | None = None
    entropy_coeff_max: float | None = None

    def __post_init__(self) -> None:
        # core_algos imports this module.
        from verl.steer.methods import losses
        from verl.trainer.ppo import core_algos

        self._check_token_weights(core_algos)
        self._check_upstreams(core_algos)
        self._number("advantage_entropy_alpha", 0.4, low=0.0)
        self._number("advantage_entropy_kappa", 2.0, low=1.0, strict=True)
        self._number("dynamic_clip_low", 0.16, low=0.0, strict=True)
        self._number("dynamic_clip_high", 0.2, low=0.0, strict=True)
        self._number("high_entropy_share", 0.2, low=0.0, high=1.0, strict=True)
        self._choice("quadrant", "positive_likely", losses.QUADRANTS)
        self._number("quadrant_weight", 0.5, low=0.0)
        self._number("quadrant_probability", None, low=0.0, high=1.0, strict=True)
        self._number("target_entropy", 0.2, low=0.0, strict=True)
        self._number("entropy_coeff_step", 1e-4, low=0.0, strict=True)
        self._number("entropy_coeff_max", 5e-3, low=0.0, strict=True)

    def _check_token_weights(self, core_algos: ModuleType) -> None:
        linear = self._default("linear", True)
        if not isinstance(linear, bool):
            raise ValueError(f"policy_loss.linear={linear!r}: expected true or false")
        mapping = self._choice("token_weight_map", "linear" if linear else "exponential", core_algos.TOKEN_WEIGHT_MAPS)
        low = self._number("token_weight_min", 0.8)
        high = self._number("token_weight_max", 1.2 if mapping == "linear" else 1.0)
        if not 0 < low <= high:
            raise ValueError(
                f"policy_loss.token_weight_min={low}: expected 0 < token_weight_min <= token_weight_max={high}"
            )
        if mapping != "linear" and high > 1:
            raise ValueError(f"policy_loss.token_weight_max={high}: expected at most 1 in the {mapping} map")
        self._number("token_weight_quantile", 0.8, low=0.0, high=1.0)
        self._number("token_weight_ema_decay", 0.9, low=0.0, high=1.0)
        estimator = self._choice("entropy_change_estimator", "released", core_algos.ENTROPY_CHANGE_ESTIMATORS)
        base_loss = self._choice("base_loss", "vanilla", core_algos.BASE_LOSSES)
        if estimator in core_algos.PPO_CLIPPED_ESTIMATORS and base_loss != "vanilla":
            raise ValueError(
                f"policy_loss.base_loss={base_loss!r}: expected vanilla with entropy_change_estimator={estimator}, "
                "which is 0 where PPO's clip takes the gradient away"
            )
        normalizer = self._choice("token_weight_normalizer", "micro_batch", core_algos.TOKEN_WEIGHT_NORMALIZERS)
        if estimator == "exact" and normalizer != "micro_batch":
            raise ValueError(
                f"policy_loss.token_weight_normalizer={normalizer!r}: expected micro_batch with "
                "entropy_change_estimator=exact, whose sums over the vocabulary a batch has not for the old policy"
            )

    def _check_upstreams(self, core_algos: ModuleType) -> None:
        """Upstream's numbers, of which it takes None too."""
        self._number("clip_cov_ratio", None, low=0.0, strict=True)
        self._number("clip_cov_lb", None, low=-math.inf, high=math.inf)
        self._number("clip_cov_ub", None, low=-math.inf, high=math.inf)
        self._number("kl_cov_ratio", None, low=0.0, strict=True)
        self._number("ppo_kl_coef", None)
        beta = self._number("dro_beta", None)
        if core_algos.base_loss_of(self) == "dro" and (beta is None or beta <= 0):
            raise ValueError(f"policy_loss.dro_beta={beta}: expected a finite number above 0 with the loss dro")

    def _default(self, name: str, value):
        """The field's value, after None has been replaced by `value`."""
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)
        return getattr(self, name)

    def _choice(self, name: str, default: str, choices: Sequence[str]) -> str:
        value = self._default(name, default)
        if value not in choices:
            raise ValueError(f"policy_loss.{name}={value!r}: expected one of {', '.join(choices)}")
        return value

    def _number(
        self, name: str, default: float | None, low: float = -LARGEST, high: float = LARGEST, strict: bool = False
    ) -> Any:
        """The field's value, a number from `low` to `high`, or with `strict` above `low`; None only by default."""
        value = self._default(name, default)
        if value is None:
            return None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high or (strict and value == low):
            kind = "finite number" if high == LARGEST else "number"
            above = "" if low <= -LARGEST else f" above {low:g}" if strict else f" of at least {low:g}"
            most = "" if high >= LARGEST else f" and at most {high:g}"
            raise ValueError(f"policy_loss.{name}={value!r}: expected a {kind}{above}{most}")
        return value
