# SPDX-License-Identifier: Apache-2.0
"""`policy_loss.loss_mode=ce_gppo`: tokens that PPO clips keep a gradient of bounded size (CE-GPPO, 2509.20712)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from verl.steer.methods.registry import policy_loss
from verl.steer.options import option
from verl.trainer.ppo.core_algos import LossInputs, LossOutputs, agg_loss, clip_ratios
from verl.utils.torch_functional import masked_mean


@dataclass
class CeGppoOptions:
    """Keys below `policy_loss`: factors of the clipped tokens' gradients; with 0 and 0 the loss is PPO's.

    Args:
        ce_gppo_beta1: of those with a negative advantage and a ratio below 1 - `clip_ratio_low`.
        ce_gppo_beta2: of those with a positive advantage and a ratio above 1 + `clip_ratio_high`.
    """

    ce_gppo_beta1: float = option(0.75, at_least=0.0)
    ce_gppo_beta2: float = option(1.0, at_least=0.0)


@policy_loss("ce_gppo", clips_as_ppo=False)
def compute_policy_loss_ce_gppo(inputs: LossInputs, config: Any) -> LossOutputs:
    """PPO's loss, the ratio of a clipped token replaced by beta * bound * ratio / sg(ratio) (arXiv 2509.20712).

    sg stops the gradient: the gradient of a clipped token's loss by its log-prob is -A beta bound, however far beyond
    the bound its ratio is. Ratios above `actor.clip_ratio_c` with a negative advantage have none, as in PPO.
    """
    options, clip, mask = config.policy_loss, clip_ratios(config), inputs.response_mask
    advantages = inputs.advantages.float()
    log_ratio, ratio = inputs.log_ratio, inputs.ratio
    below = (advantages < 0) & (ratio < 1 - clip.low)
    above = (advantages > 0) & (ratio > 1 + clip.high)
    beyond = (advantages < 0) & (ratio > clip.c)
    one = torch.exp(log_ratio - log_ratio.detach())
    # The bound that applies, before it is multiplied: `actor.clip_ratio_high` may be inf, and 0 * inf is no gradient.
    bound = torch.where(below, options.ce_gppo_beta1 * (1 - clip.low), 0.0)
    bound = torch.where(above, options.ce_gppo_beta2 * (1 + clip.high), bound)
    ratio = torch.where(below | above, bound * one, ratio)
    ratio = torch.where(advantages < 0, ratio.clamp_max(clip.c), ratio)
    losses = -advantages * ratio
    if inputs.rollout_is_weights is not None:
        losses = losses * inputs.rollout_is_weights
    loss = agg_loss(losses, mask, config.loss_agg_mode, **config.global_batch_info)
    with torch.no_grad():
        metrics = {
            "actor/pg_clipfrac_high": masked_mean((above | beyond).float(), mask),
            "actor/pg_clipfrac_low": masked_mean(below.float(), mask),
            "actor/ppo_kl": masked_mean(-log_ratio.clamp(-20.0, 20.0), mask),
        }
    return LossOutputs(loss, metrics)
