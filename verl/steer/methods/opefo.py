# SPDX-License-Identifier: Apache-2.0
"""`policy_loss.loss_mode=opefo`: tokens that raise and tokens that lower the entropy balanced (arXiv 2605.11491)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from verl.steer.methods.registry import policy_loss
from verl.steer.options import option
from verl.trainer.ppo.core_algos import (
    EXACT_FIELDS,
    LossInputs,
    LossOutputs,
    PerToken,
    Scalar,
    clip_ratios,
    reweighted_policy_loss,
    signed_entropy_change,
)


@dataclass
class OpefoOptions:
    """Key below `policy_loss`: a lambda that stays the same, in place of the one that balances each micro-batch.

    It serves the study: such weights have the sign of the estimate only, neither its size nor a feedback.
    """

    opefo_lambda: float | None = option(at_least=0.0, at_most=1.0)


@policy_loss("opefo", needs=EXACT_FIELDS)
def compute_policy_loss_opefo(inputs: LossInputs, config: Any) -> LossOutputs:
    """PPO's loss with `sign_weights` of the first-order entropy changes of a micro-batch (arXiv 2605.11491).

    The changes are STEER's estimate `exact`. As those of each micro-batch cancel, those of the mini-batch do. To find
    lambda they count as the tokens do in the loss: times the rollout weights and the token's share in the mean.
    """
    change = signed_entropy_change(inputs, "exact", clip_ratios(config)) * inputs.response_mask
    strength = config.policy_loss.opefo_lambda
    if strength is None:
        counted = change if inputs.rollout_is_weights is None else change * inputs.rollout_is_weights
        if config.loss_agg_mode == "seq-mean-token-mean":  # in verl's other modes all tokens have one share
            counted = counted / inputs.response_mask.sum(-1, keepdim=True).clamp_min(1)
        strength = balancing_lambda(counted)
    weights = sign_weights(change, strength)
    outputs = reweighted_policy_loss("vanilla", weights, inputs, config)
    outputs.metrics["actor/opefo_lambda"] = strength
    return outputs


@torch.no_grad()
def balancing_lambda(change: PerToken) -> Scalar:
    """The lambda of `sign_weights` with which the changes add up to 0, as far as both signs occur.

    With D+ and D- the sums of the magnitudes of positive and negative changes, lambda = (D- - D+) / (D- + D+), so that
    (1 + lambda) D+ = (1 - lambda) D- (arXiv 2605.11491).

    Args:
        change: signed entropy change by each token in the loss; 0 on tokens that are not valid.

    Returns:
        From -1 to 1; 0 where there is no change at all.
    """
    return -change.sum() / change.abs().sum().clamp_min(torch.finfo(change.dtype).tiny)


@torch.no_grad()
def sign_weights(change: PerToken, strength: Scalar | float) -> PerToken:
    """Factors of the tokens' losses by the sign of their entropy changes (arXiv 2605.11491).

    Args:
        change: signed entropy change by each token.
        strength: lambda, from -1 to 1.

    Returns:
        1 + lambda where the entropy rises, 1 - lambda where it falls, and 1 where it does not change.
    """
    return 1 + strength * change.sign()
