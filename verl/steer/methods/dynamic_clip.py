# SPDX-License-Identifier: Apache-2.0
"""`policy_loss.loss_mode=dynamic_clip`: PPO's clip, wider for improbable tokens (DCPO, arXiv 2509.02333)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from verl.steer.methods.registry import policy_loss
from verl.steer.methods.tensor_clip import tensor_clip_policy_loss
from verl.steer.options import option
from verl.trainer.ppo.core_algos import LossInputs, LossOutputs, PerToken
from verl.utils.torch_functional import masked_mean

#: Upper bounds on a ratio are cut at `actor.clip_ratio_c`, but at no less than this (lime-RL/DCPO).
LEAST_CEILING = 10.0


@dataclass
class DynamicClipOptions:
    """Keys below `policy_loss`: bounds of |(ratio - 1) prob| below and above the ratio 1."""

    dynamic_clip_low: float = option(0.16, above=0.0)
    dynamic_clip_high: float = option(0.2, above=0.0)


def dynamic_clip_bounds(old_log_prob: PerToken, low: float, high: float) -> tuple[PerToken, PerToken]:
    """Ratios between which |(ratio - 1) prob| stays at most `low` below 1 and `high` above 1 (arXiv 2509.02333).

    With prob = ratio * old_prob these are the roots 1/2 + 1/2 sqrt(1 - 4 low / old_prob), or 1/2 where there is none,
    and 1/2 + 1/2 sqrt(1 + 4 high / old_prob).

    Returns:
        Lower and upper bound, float32.
    """
    inverse = torch.exp(-old_log_prob.float())
    lower = 0.5 + 0.5 * (1 - 4 * low * inverse).clamp_min(0.0).sqrt()
    return lower, 0.5 + 0.5 * (1 + 4 * high * inverse).sqrt()


@policy_loss("dynamic_clip", clips_as_ppo=False)
def compute_policy_loss_dynamic_clip(inputs: LossInputs, config: Any) -> LossOutputs:
    """DCPO's dynamic-adaptive clipping (arXiv 2509.02333): PPO's dual clip with `dynamic_clip_bounds`.

    No upper bound is above the greater of `actor.clip_ratio_c` and 10, as in the authors' code (lime-RL/DCPO).
    The paper's smooth advantage standardisation over steps and its averaging of the loss are not implemented.
    """
    options, c = config.policy_loss, config.clip_ratio_c
    lower, upper = dynamic_clip_bounds(inputs.old_log_prob, options.dynamic_clip_low, options.dynamic_clip_high)
    upper = upper.clamp_max(max(c, LEAST_CEILING))
    outputs = tensor_clip_policy_loss(inputs, config, 1 - lower, upper - 1)
    with torch.no_grad():
        ratio = inputs.log_ratio.exp()
        positive, negative = inputs.advantages > 0, inputs.advantages < 0
        above, below = positive & (ratio > upper) | negative & (ratio > c), negative & (ratio < lower)
        outputs.metrics["actor/pg_clipfrac_high"] = masked_mean(above.float(), inputs.response_mask)
        outputs.metrics["actor/pg_clipfrac_low"] = masked_mean(below.float(), inputs.response_mask)
    return outputs
