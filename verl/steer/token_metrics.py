# SPDX-License-Identifier: Apache-2.0
"""Which tokens an update moves: metrics that every run of this fork logs, from tensors that the loss has at hand.

    actor/token_weights_below_0.9          share of the tokens that STEER clearly holds back
    actor/pg_clipfrac_high|low             share of the tokens that PPO's clip cuts from above, from below
    actor/pg_clipfrac_high|low/prob_BIN    share of all tokens that are so and whose probability is in the bin
    actor/quadrant/NAME/tokens|change      the quadrant's share of all tokens, and of the estimated entropy change

Bins and quadrants go by the probability under the old policy. Shares are of the valid tokens of one micro-batch; verl
averages them over micro-batches and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

#: Between the bins of probability; the second parts likely tokens from unlikely ones.
PROBABILITY_BOUNDS = (0.1, 0.5, 0.9)
PROBABILITY_BINS = ("below_0.1", "0.1_to_0.5", "0.5_to_0.9", "above_0.9")

#: Sign of the advantage, and whether the token is likely: those of methods.losses.QUADRANTS.
QUADRANTS = ("positive_likely", "positive_unlikely", "negative_likely", "negative_unlikely")

HELD_BACK = 0.9


@torch.no_grad()
def token_metrics(
    advantages: torch.Tensor,
    old_log_prob: torch.Tensor,
    clipped_above: torch.Tensor | None,
    clipped_below: torch.Tensor | None,
    response_mask: torch.Tensor,
    entropy_change: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The module's metrics of one micro-batch, left on the device.

    Args:
        advantages, old_log_prob: (batch, response_length).
        clipped_above, clipped_below: as `clipped_by_loss` returns them, boolean (batch, response_length); None: no
            shares of them, as with a loss that does not clip as PPO does.
        response_mask: 1 or True on valid tokens, (batch, response_length).
        entropy_change: estimated, at least 0 and finite, (batch, response_length); None: no shares of it.
        token_weights: STEER's, (batch, response_length); None: no share of them.

    Returns:
        Scalars, 0 where no token is valid or nothing is estimated to change. A token without advantage is in no
        quadrant, so that the quadrants' shares of the tokens may add up to less than 1.
    """
    mask = response_mask.float().flatten()
    count = mask.sum().clamp_min(1)
    old_log_prob, advantages = old_log_prob.float().flatten(), advantages.float().flatten()

    # Indicators are numbers 0 and 1, and dot products count: on a CPU torch is slow with booleans.
    above = [_indicator(torch.ge, old_log_prob, math.log(bound)) for bound in PROBABILITY_BOUNDS]
    metrics: dict[str, torch.Tensor] = {}
    for side, clipped in (("high", clipped_above), ("low", clipped_below)):
        if clipped is None:
            continue
        valid = mask * clipped.flatten().view(torch.uint8)
        # Clipped tokens in a bin or above it, and from that those in it.
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
        # Without an advantage nothing changes, so the quadrants hold it all.
        shares = change / change.sum().clamp_min(torch.finfo(change.dtype).tiny)
        metrics |= {f"actor/quadrant/{name}/change": shares[i] for i, name in enumerate(QUADRANTS)}
    if token_weights is not None:
        held_back = _indicator(torch.lt, token_weights.flatten(), HELD_BACK)
        metrics[f"actor/token_weights_below_{HELD_BACK:g}"] = torch.dot(held_back, mask) / count
    return metrics


def _indicator(compare: Callable[..., torch.Tensor], values: torch.Tensor, bound: float) -> torch.Tensor:
    """1.0 where the comparison with the bound holds, else 0.0, also where a value is NaN."""
    return compare(values, bound, out=torch.empty_like(values))
