# SPDX-License-Identifier: Apache-2.0
"""Options of the control of the entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl.steer.options import option
from verl.trainer.ppo.core_algos import CONTROL_MAPS, INFLUENCE

CONTROLLERS = ("solve", "pi")
WAYS = ("parameters", "head")


@dataclass
class EntropyControlOptions:
    """Keys below `policy_loss` of the estimator `influence` and the maps `target` and `band`.

    Args:
        influence_way: `parameters`, through all layers, or `head`, through the last layer alone.
        influence_refresh: compute the direction of the influence at the first mini-batch of a training step and every
            so many mini-batches after it.
        target_gain: fraction of the distance to the target that one update covers.
        target_controller: `solve` the weights from the predicted change, which only `influence` knows in nats, or let a
            proportional and integral controller (`pi`) set the strength from the measured entropy.
        target_kp, target_ki: gains of `pi`, EntroPIC's (arXiv 2511.15248).
        entropy_band: of the map `band`, in nats: weights stay at 1 while the predicted change of the mean entropy by an
            update is within plus or minus the band.
    """

    influence_way: str = option("parameters", choices=WAYS)
    influence_refresh: int = option(1, at_least=1, integer=True)
    target_gain: float = option(0.5, above=0.0, at_most=1.0)
    target_controller: str = option("solve", choices=CONTROLLERS)
    target_kp: float = option(1.0, at_least=0.0)
    target_ki: float = option(0.01, at_least=0.0)
    entropy_band: float | None = option(above=0.0)


def check_control(options: Any) -> None:
    """Check that the options of the maps `target` and `band` fit each other.

    Args:
        options: `policy_loss`, resolved.

    Raises:
        ValueError: if one is missing, or two exclude each other.
    """
    mapping, estimator = options.token_weight_map, options.entropy_change_estimator
    if mapping not in CONTROL_MAPS:
        return
    if mapping == "band" and options.entropy_band is None:
        raise ValueError("policy_loss.entropy_band=None: expected a number of nats with token_weight_map=band")
    controller = options.target_controller if mapping == "target" else "solve"
    if controller == "solve" and estimator != INFLUENCE:
        raise ValueError(
            f"policy_loss.entropy_change_estimator={estimator!r}: expected influence with token_weight_map={mapping}"
            + (" and target_controller=solve" if mapping == "target" else "")
            + ": other estimates have no known scale in nats"
        )
