# SPDX-License-Identifier: Apache-2.0
"""verl's actor configuration, with STEER's options in `policy_loss`."""

from __future__ import annotations

from dataclasses import dataclass

from verl_steer import upstream

_upstream = upstream(globals())


@dataclass
class PolicyLossConfig(_upstream.PolicyLossConfig):
    """Configuration of the policy loss: upstream's fields plus STEER's, which `loss_mode=entropy_control` reads.

    A field that is None takes its default; the configuration files leave them so, which lets Hydra take both
    `policy_loss.token_weight_min=0.7` and `+policy_loss.token_weight_min=0.7`.

    Args:
        token_weight_min: weight of the token with the largest estimated entropy change. Default 0.8.
        token_weight_max: largest weight. Default 1.2 in the linear map, 1.0 in the exponential one, where it can't
            be more.
        linear: the linear map from estimate to weight, else the exponential one. Default True.
        entropy_change_estimator: one of core_algos.ENTROPY_CHANGE_ESTIMATORS. Default "released".

    Raises:
        ValueError: if a value is out of range; the message has the key, the value and what was expected.
    """

    token_weight_min: float | None = None
    token_weight_max: float | None = None
    linear: bool | None = None
    entropy_change_estimator: str | None = None

    def __post_init__(self) -> None:
        linear = self._default("linear", True)
        low = self._default("token_weight_min", 0.8)
        high = self._default("token_weight_max", 1.2 if linear else 1.0)
        estimator = self._default("entropy_change_estimator", "released")
        # core_algos imports this module.
        from verl.trainer.ppo.core_algos import ENTROPY_CHANGE_ESTIMATORS

        if not isinstance(linear, bool):
            raise ValueError(f"policy_loss.linear={linear!r}: expected true or false")
        if not 0 < low <= high:
            raise ValueError(
                f"policy_loss.token_weight_min={low}: expected 0 < token_weight_min <= token_weight_max={high}"
            )
        if not linear and high > 1:
            raise ValueError(
                f"policy_loss.token_weight_max={high}: expected at most 1 in the exponential map (linear=false)"
            )
        if estimator not in ENTROPY_CHANGE_ESTIMATORS:
            raise ValueError(
                f"policy_loss.entropy_change_estimator={estimator!r}: expected one of "
                f"{', '.join(ENTROPY_CHANGE_ESTIMATORS)}"
            )

    def _default(self, name: str, value):
        """The field's value, after None has been replaced by `value`."""
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)
        return getattr(self, name)
