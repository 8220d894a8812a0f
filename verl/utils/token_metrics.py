# SPDX-License-Identifier: Apache-2.0
"""Which tokens an update moves: metrics that every run of this fork logs, from tensors that the loss has at hand.

    actor/token_weights_below_0.9          share of the tokens that STEER clearly holds back
    actor/pg_clipfrac_high/prob_BIN        share of all tokens that are clipped from above and whose probability is in
    actor/pg_clipfrac_low/prob_BIN           the bin; the same from below. Bins add up to the metric without the bin
    actor/quadrant/NAME/tokens|change      the quadrant's share of all tokens, and of the estimated entropy change

Bins and quadrants go by the probability under the old policy. Shares are of the valid tokens of one micro-batch; verl
averages them over micro-batches and ranks.
"""

from __future__ import annotations

import math

import torch

#: Between the bins of probability; the second parts likely tokens from unlikely ones.
PROBABILITY_BOUNDS = (0.1, 0.5, 0.9)
PROBABILITY_BINS = ("below_0.1", "0.1_to_0.5", "0.5_to_0.9", "above_0.9")

#: Sign of the advantage, and whether the token is likely: those of entropy_interventions.QUADRANTS.
QUADRANTS = ("positive_likely", "positive_unlikely", "negative_likely", "negative_unlikely")

HELD_BACK = 0.9


@torch.no_grad()
def token_metrics(
    advantages: torch.Tensor,
    old_log_prob: torch.Tensor,
    clipped_above: torch.Tensor,
    clipped_below: torch.Tensor,
    response_mask: torch.Tensor,
    entropy_change: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The module's metrics of one micro-batch, left on the device.

    Args:
        advantages, old_log_prob: (batch, response_length).
        clipped_above, clipped_below: as `ppo_clipped` returns them, boolean (batch, response_length).
        response_mask: 1 or True on valid tokens, (batch, response_length).
        entropy_change: estimated, at least 0 and finite, (batch, response_length); None: no shares of it.
        token_weights: STEER's, (batch, response_length); None: no share of them.

    Returns:
        Scalars, 0 where no token is valid or nothing is estimated to change. A token without advantage is in no
        quadrant, so that the quadrants' shares of the tokens may add up to less than 1.
    """
    valid = response_mask.bool()
    count = torch.count_nonzero(valid).clamp_min(1)
    old_log_prob = old_log_prob.float()

    def share(selected: torch.Tensor) -> torch.Tensor:
        return torch.count_nonzero(selected & valid) / count

    metrics: dict[str, torch.Tensor] = {}
    # Written so that each token, NaN too, is in one bin.
    above = [old_log_prob >= math.log(bound) for bound in PROBABILITY_BOUNDS]
    in_bin = (~above[0], above[0] & ~above[1], above[1] & ~above[2], above[2])
    for name, clipped in (("high", clipped_above), ("low", clipped_below)):
        for bin_name, inside in zip(PROBABILITY_BINS, in_bin, strict=True):
            metrics[f"actor/pg_clipfrac_{name}/prob_{bin_name}"] = share(clipped & inside)
    likely, positive, negative = above[1], (advantages > 0) & valid, (advantages < 0) & valid
    in_quadrant = (positive & likely, positive & ~likely, negative & likely, negative & ~likely)
    for name, inside in zip(QUADRANTS, in_quadrant, strict=True):
        metrics[f"actor/quadrant/{name}/tokens"] = torch.count_nonzero(inside) / count
    if entropy_change is not None:
        # One piece of memory for all quadrants: on a CPU fresh memory costs more than the arithmetic.
        flat, indicator = entropy_change.flatten(), torch.empty_like(entropy_change).flatten()
        change = torch.stack([torch.dot(indicator.copy_(inside.flatten()), flat) for inside in in_quadrant])
        # Without an advantage nothing changes, so the quadrants hold it all.
        shares = change / change.sum().clamp_min(torch.finfo(change.dtype).tiny)
        metrics |= {f"actor/quadrant/{name}/change": shares[i] for i, name in enumerate(QUADRANTS)}
    if token_weights is not None:
        metrics[f"actor/token_weights_below_{HELD_BACK:g}"] = share(token_weights < HELD_BACK)
    return metrics
