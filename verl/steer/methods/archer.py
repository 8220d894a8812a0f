# SPDX-License-Identifier: Apache-2.0
"""`policy_loss.loss_mode=archer`: a wider clip and less KL loss for a response's high-entropy tokens (2507.15778)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from verl.steer.methods.registry import policy_loss
from verl.steer.methods.response_quantile import above_response_quantile
from verl.steer.methods.tensor_clip import tensor_clip_policy_loss
from verl.steer.options import option
from verl.trainer.ppo.core_algos import LossInputs, LossOutputs
from verl.utils.torch_functional import masked_mean


@dataclass
class ArcherOptions:
    """Keys below `policy_loss`.

    Args:
        archer_quantile: tokens above this quantile of their response's entropies are "reasoning", the others
            "knowledge".
        archer_clip_knowledge, archer_clip_reasoning: PPO's clip of each kind, the same below and above the ratio 1.
        archer_kl_reasoning: the KL loss of a reasoning token, as a multiple of that of a knowledge token.
    """

    archer_quantile: float = option(0.8, at_least=0.0, below=1.0)  # none lies above the largest
    archer_clip_knowledge: float = option(0.2, above=0.0)
    archer_clip_reasoning: float = option(0.5, above=0.0)
    archer_kl_reasoning: float = option(0.0, at_least=0.0)


@policy_loss("archer", needs=("entropys",), clips_as_ppo=False)
def compute_policy_loss_archer(inputs: LossInputs, config: Any) -> LossOutputs:
    """PPO's loss with two clips, by the entropy of the token's state within its response (arXiv 2507.15778).

    The entropies are the old policy's. With `actor.use_kl_loss` the KL loss of the reasoning tokens is scaled too.
    """
    options = config.policy_loss
    entropys = inputs.require("entropys", "loss_mode=archer expects the entropy of each response token")
    reasoning = above_response_quantile(entropys.float(), inputs.response_mask, options.archer_quantile)
    width = torch.where(reasoning, options.archer_clip_reasoning, options.archer_clip_knowledge)
    outputs = tensor_clip_policy_loss(inputs, config, width, width)
    outputs.kl_weights = torch.where(reasoning, options.archer_kl_reasoning, 1.0)
    outputs.metrics["actor/high_entropy_share"] = masked_mean(reasoning.float(), inputs.response_mask)
    return outputs
