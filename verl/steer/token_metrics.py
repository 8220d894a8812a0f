# SPDX-License-Identifier: Apache-2.0
"""Metrics of every run: which tokens an update moves, from tensors that the loss has anyway.

    actor/token_weights_below_0.9          fraction of the tokens whose weight is below 0.9
    actor/pg_clipfrac_high|low             fraction of the tokens that PPO's clip cuts from above, from below
    actor/pg_clipfrac_high|low/prob_BIN    fraction of all tokens that are cut and whose probability is in the bin
    actor/quadrant/NAME/tokens             the quadrant's fraction of all tokens
    actor/quadrant/NAME/change             its part of the mean estimated entropy change

Bins and quadrants are by the probability under the old policy. Fractions are of the valid tokens of one micro-batch;
verl averages them over micro-batches and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import LossInputs, PerToken, Scalar, TokenMask

#: Bounds of the probability bins; from the second on a token is likely.
PROBABILITY_BOUNDS = (0.1, 0.5, 0.9)
PROBABILITY_BINS = ("below_0.1", "0.1_to_0.5", "0.5_to_0.9", "above_0.9")

#: Sign of the advantage, and whether the token is likely.
QUADRANTS = ("positive_likely", "positive_unlikely", "negative_likely", "negative_unlikely")

REDUCED = 0.9


@torch.no_grad()
def token_metrics(
    inputs: LossInputs,
    clipped: tuple[TokenMask, TokenMask] | None = None,
    entropy_change: PerToken | None = None,
    token_weights: PerToken | None = None,
) -> dict[str, Scalar]:
    """The module's metrics of one micro-batch, left on the device.

    Args:
        inputs: the micro-batch.
        clipped: from above and from below, as `clipped_by_loss` returns them; None: no metrics of them.
        entropy_change: estimated, at least 0 and finite; None: no metrics of it.
        token_weights: of the loss; None: no metric of them.

    Returns:
        Scalars, 0 where no token is valid or no change is estimated. A token with advantage 0 is in no quadrant, so the
        quadrants' fractions of the tokens may add up to less than 1.
    """
    mask = inputs.response_mask.float().flatten()
    count = mask.sum().clamp_min(1)
    old_log_prob, advantages = inputs.old_log_prob.float().flatten(), inputs.advantages.float().flatten()

    # Count by dot products of numbers 0 and 1: on a CPU torch is slow with booleans.
    above = [_indicator(torch.ge, old_log_prob, math.log(bound)) for bound in PROBABILITY_BOUNDS]
    metrics: dict[str, Scalar] = {}
    for side, cut in zip(("high", "low"), clipped or (), strict=False):
        valid = mask * cut.flatten().view(torch.uint8)
        # Clipped tokens in a bin or above it; the differences are those in the bin.
        reached = torch.stack([valid.sum(), *(torch.dot(valid, likelier) for likelier in above)]) / count
        inside = reached - torch.nn.functional.pad(reached[1:], (0, 1))
        metrics[f"actor/pg_clipfrac_{side}"] = reached[0]
        metrics |= {f"actor/pg_clipfrac_{side}/prob_{name}": inside[i] for i, name in enumerate(PROBABILITY_BINS)}

    likely = above[1]
    signs = [_indicator(sign, advantages, 0.0).mul_(mask) for sign in (torch.gt, torch.lt)]
    of_likely = torch.stack([torch.dot(sign, likely) for sign in signs])
    of_all = torch.stack([sign.sum() for sign in signs])
    tokens = torch.stack([of_likely, of_all - of_likely], 1).flatten() / count
    metrics |= {f"actor/quadrant/{name}/tokens": tokens[i] for i, name in enumerate(QUADRANTS)}
    if entropy_change is not None:
        change_of_all = entropy_change.flatten()
        change_of_likely = change_of_all * likely
        parts = (change_of_likely, change_of_all - change_of_likely)
        change = torch.stack([torch.dot(sign, part) for sign in signs for part in parts])
        # Parts, which means over micro-batches add up as they are, in place of fractions, which they would not.
        metrics |= {f"actor/quadrant/{name}/change": one for name, one in zip(QUADRANTS, change / count, strict=True)}
    if token_weights is not None:
        reduced = _indicator(torch.lt, token_weights.flatten(), REDUCED)
        metrics[f"actor/token_weights_below_{REDUCED:g}"] = torch.dot(reduced, mask) / count
    return metrics


def _indicator(compare: Callable[..., Tensor], values: Tensor, bound: float) -> Tensor:
    """1.0 where the comparison with the bound holds, else 0.0, also where a value is NaN."""
    return compare(values, bound, out=torch.empty_like(values))
