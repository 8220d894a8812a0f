# SPDX-License-Identifier: Apache-2.0
"""Clip_B and Clip_V (arXiv 2602.03392): no gradient for negative tokens that would lower the entropy by far the most.

With an independent logit for each action of a state, a step w along the gradient of a sampled token's log-prob changes
the state's entropy by -w (S - E[S]), where S = prob (H + ln prob) is the token's discriminant score and E[S] its mean
over the actions under the policy. Where w is negative, a low score lowers the entropy.

    algorithm.adv_estimator=clip_b     S against its mean and deviation over the step's batch
    policy_loss.loss_mode=clip_v       S - E[S] against its deviation over the micro-batch
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from verl.steer.methods.advantages import AdvantageInputs, advantage_estimator
from verl.steer.methods.registry import policy_loss
from verl.steer.options import AlgorithmOptions, from_config, option
from verl.trainer.ppo.core_algos import (
    EXACT_FIELDS,
    LossInputs,
    LossOutputs,
    Scalar,
    TokenMask,
    entropy_slope,
    reweighted_policy_loss,
)
from verl.utils.torch_functional import masked_mean, masked_var

#: No token is clipped where the deviation is smaller.
LEAST_DEVIATION = 1e-12


@dataclass
class ClipBOptions(AlgorithmOptions):
    """Key below `algorithm`: a negative token is clipped so many deviations below the mean score."""

    clip_b_mu: float = option(2.5, at_least=0.0)


@dataclass
class ClipVOptions:
    """Keys below `policy_loss`.

    Args:
        clip_v_mu: a negative token is clipped if its score is so many deviations below its mean over the actions.
        clip_v_max_share: the largest fraction of the tokens that may be clipped, but at least one token.
    """

    clip_v_mu: float = option(8.5, at_least=0.0)
    clip_v_max_share: float = option(0.0001, above=0.0, at_most=1.0)


def discriminant_score(log_prob: Tensor, entropys: Tensor) -> Tensor:
    """S = prob (H + ln prob) of each sampled token, in nats, float32."""
    log_prob = log_prob.float()
    return log_prob.exp() * (entropys.float() + log_prob)


def _deviation(values: Tensor, mask: Tensor) -> Scalar:
    """The standard deviation of the valid tokens as a whole population."""
    return masked_var(values, mask, unbiased=False).sqrt()


@advantage_estimator("clip_b", "old_log_probs", "entropy")
def compute_clip_b_advantage(inputs: AdvantageInputs) -> Tensor:
    """GRPO; 0 for negative tokens whose score is `clip_b_mu` deviations below the mean of the whole batch's tokens."""
    score = discriminant_score(inputs.old_log_probs, inputs.entropy)
    mean, deviation = masked_mean(score, inputs.response_mask), _deviation(score, inputs.response_mask)
    advantages = inputs.grpo(inputs.token_level_rewards)
    mu = from_config(ClipBOptions, inputs.config).clip_b_mu
    clipped = (advantages < 0) & (score < mean - mu * deviation) & (deviation >= LEAST_DEVIATION)
    return advantages.masked_fill(clipped, 0.0)


@torch.no_grad()
def clip_v_tokens(inputs: LossInputs, mu: float, max_share: float) -> TokenMask:
    """Negative tokens with E[S] - S above `mu` deviations of it, the greatest first, up to `max_share` of all tokens.

    Deviation and share are those of the micro-batch's valid tokens. Score and mean are those of the policy being
    updated.

    Raises:
        ValueError: if `current_entropys` or a sum over the vocabulary is None.
    """
    valid = inputs.response_mask.bool()
    lack = entropy_slope(inputs, "loss_mode=clip_v")
    deviation = _deviation(lack, valid)
    found = valid & (inputs.advantages < 0) & (lack > mu * deviation) & (deviation >= LEAST_DEVIATION)
    most = (valid.sum().double() * max_share + 1e-9).long().clamp_min(1)
    ordered = lack.masked_fill(~found, -torch.inf).flatten().sort(descending=True).values
    return found & (lack >= ordered.take(most - 1))


@policy_loss("clip_v", needs=EXACT_FIELDS)
def compute_policy_loss_clip_v(inputs: LossInputs, config: Any) -> LossOutputs:
    """PPO's loss without the gradient of `clip_v_tokens`, which still count in the loss's average."""
    clipped = clip_v_tokens(inputs, config.policy_loss.clip_v_mu, config.policy_loss.clip_v_max_share)
    kept = (inputs.response_mask.bool() & ~clipped).float()
    outputs = reweighted_policy_loss("vanilla", kept, inputs, config)
    outputs.metrics["actor/clip_v_share"] = masked_mean(clipped.float(), inputs.response_mask)
    return outputs
