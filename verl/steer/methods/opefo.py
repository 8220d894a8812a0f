# SPDX-License-Identifier: Apache-2.0
"""`policy_loss.loss_mode=opefo`: tokens that raise and tokens that lower the entropy balanced (arXiv 2605.11491)."""

from __future__ import annotations

from typing import Any

import torch
from verl.steer.methods.registry import policy_loss
from verl.trainer.ppo.core_algos import (
    LossInputs,
    LossOutputs,
    PerToken,
    Scalar,
    clip_ratios,
    reweighted_policy_loss,
    signed_entropy_change,
)


@policy_loss("opefo", needs=("current_entropys", "sum_pi_squared", "sum_pi_squared_log_pi"))
def compute_policy_loss_opefo(inputs: LossInputs, config: Any) -> LossOutputs:
    """PPO's loss with `balancing_weights` of the first-order entropy changes of a micro-batch (arXiv 2605.11491).

    The changes are STEER's estimate `exact`. As those of each micro-batch cancel, those of the mini-batch do.
    """
    change = signed_entropy_change(inputs, "exact", clip_ratios(config)) * inputs.response_mask
    weights, strength = balancing_weights(change)
    outputs = reweighted_policy_loss("vanilla", weights, inputs, config)
    outputs.metrics["actor/opefo_lambda"] = strength
    return outputs


@torch.no_grad()
def balancing_weights(change: PerToken) -> tuple[PerToken, Scalar]:
    """Weights with which the changes add up to 0, as far as both signs occur: 1 + lambda times sign of the change.

    With D+ and D- the sums of the magnitudes of positive and negative changes, lambda = (D- - D+) / (D- + D+), so that
    (1 + lambda) D+ = (1 - lambda) D- (arXiv 2605.11491).

    Args:
        change: signed entropy change by each token; 0 on tokens that are not valid.

    Returns:
        Weights from 0 to 2, 1 where the change is 0, and lambda; 0 where there is no change at all.
    """
    total = change.abs().sum()
    strength = -change.sum() / total.clamp_min(torch.finfo(change.dtype).tiny)
    return 1 + strength * change.sign(), strength
