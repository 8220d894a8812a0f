# SPDX-License-Identifier: Apache-2.0
"""`policy_loss.loss_mode=bapo`: clip bounds that follow the share of positive tokens in the loss (2510.18927)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from verl.steer.methods.registry import policy_loss
from verl.steer.methods.tensor_clip import tensor_clip_policy_loss
from verl.steer.options import option
from verl.trainer.ppo.core_algos import LossInputs, LossOutputs, Scalar


@dataclass
class BapoOptions:
    """Keys below `policy_loss`; bounds are those of the ratio itself.

    Args:
        bapo_share: the share of positive tokens in the loss that is wanted.
        bapo_low, bapo_low_max, bapo_low_step: first and last lower bound, and the step between.
        bapo_high, bapo_high_max, bapo_high_step: the same of the upper bound.
    """

    bapo_share: float = option(0.5, at_least=0.0, at_most=1.0)
    bapo_low: float = option(0.6, at_least=0.0, at_most=1.0)
    bapo_low_max: float = option(0.9, at_least=0.0, at_most=1.0)
    bapo_low_step: float = option(0.05, at_least=0.001)
    bapo_high: float = option(1.2, at_least=1.0, at_most=100.0)
    bapo_high_max: float = option(3.0, at_least=1.0, at_most=100.0)
    bapo_high_step: float = option(0.05, at_least=0.01)


def check_bapo(options: BapoOptions) -> None:
    """Check that no first bound lies beyond the last one.

    Raises:
        ValueError: if it does; the message has the key, the value and the last bound.
    """
    for key in ("bapo_low", "bapo_high"):
        first, last = getattr(options, key), getattr(options, f"{key}_max")
        if first > last:
            raise ValueError(f"policy_loss.{key}={first}: expected at most {key}_max={last}")


def bapo_bounds(options: BapoOptions, device: Any = None) -> tuple[Tensor, Tensor]:
    """Lower bounds, (lows,), and upper bounds, (highs,), each from the first to the last."""

    def bounds(first: float, last: float, step: float) -> Tensor:
        # The margin keeps a rounded quotient from adding a step.
        steps = math.ceil((last - first) / step - 1e-6)
        return (first + step * torch.arange(1 + steps, device=device)).clamp_max(last)

    return (
        bounds(options.bapo_low, options.bapo_low_max, options.bapo_low_step),
        bounds(options.bapo_high, options.bapo_high_max, options.bapo_high_step),
    )


def pairs_of_bounds(lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs in the order in which they are tried: first the lower bound rises, then the upper one.

    Returns:
        Indices into `lows` and into `highs`, each (pairs,).
    """
    rises = len(lows) - 1
    step = torch.arange(rises + len(highs), device=lows.device)
    return step.clamp_max(rises), (step - rises).clamp_min(0)


@torch.no_grad()
def find_bounds(inputs: LossInputs, options: BapoOptions) -> tuple[Scalar, Scalar, Scalar]:
    """The first pair with which positive tokens have the wanted share of a micro-batch's loss, or the last one.

    With r the ratio, positive tokens have the loss sum A min(r, high) and negative ones sum -A max(r, low); no token is
    left out of the sums where it loses its gradient.

    Returns:
        Lower bound, upper bound and the positive tokens' share with them, 0 if no token has an advantage.
    """
    ratio = inputs.ratio.flatten()
    advantages = inputs.advantages.float().masked_fill(~inputs.response_mask.bool(), 0.0).flatten()
    lows, highs = bapo_bounds(options, ratio.device)
    low, high = pairs_of_bounds(lows, highs)
    # Not a product of matrices, which a GPU or autocast may round.
    positive = (torch.minimum(ratio, highs[:, None]) * advantages.clamp_min(0.0)).sum(1)[high]
    negative = (torch.maximum(ratio, lows[:, None]) * advantages.clamp_max(0.0)).sum(1).neg()[low]
    total = positive + negative
    # The number of bounds before the first that reaches the share is the index of that one.
    missed = (positive < options.bapo_share * total).cumprod(0).sum().clamp_max(len(low) - 1)
    share = positive / total.clamp_min(torch.finfo(total.dtype).tiny)
    return lows.take(low.take(missed)), highs.take(high.take(missed)), share.take(missed)


@policy_loss("bapo", clips_as_ppo=False)
def compute_policy_loss_bapo(inputs: LossInputs, config: Any) -> LossOutputs:
    """PPO's loss with the bounds that `find_bounds` gives for the micro-batch (arXiv 2510.18927)."""
    low, high, share = find_bounds(inputs, config.policy_loss)
    outputs = tensor_clip_policy_loss(inputs, config, 1 - low, high - 1)
    outputs.metrics |= {"actor/bapo_low": low, "actor/bapo_high": high, "actor/bapo_share": share}
    return outputs
