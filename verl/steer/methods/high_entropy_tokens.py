# SPDX-License-Identifier: Apache-2.0
"""`policy_loss.loss_mode=high_entropy_tokens`: a gradient only for tokens of high entropy (arXiv 2506.01939)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from verl.steer.methods.registry import policy_loss
from verl.steer.options import option
from verl.trainer.ppo.core_algos import LossInputs, LossOutputs, reweighted_policy_loss
from verl.utils.torch_functional import masked_mean


@dataclass
class HighEntropyOptions:
    """Key below `policy_loss`: the fraction of the tokens that has a gradient."""

    high_entropy_share: float = option(0.2, above=0.0, at_most=1.0)


@policy_loss("high_entropy_tokens", needs=("current_entropys",))
def compute_policy_loss_high_entropy_tokens(inputs: LossInputs, config: Any) -> LossOutputs:
    """PPO's loss on the `high_entropy_share` of a micro-batch's tokens whose entropy is highest (arXiv 2506.01939).

    The entropies are those of the policy being updated, without gradient. Of n tokens the share times n, rounded up,
    are chosen, and all that are equal to the last of them. As in the authors' code, `token-mean` is the mean over the
    chosen tokens: their losses are multiplied by n / number of the chosen, so that the weights are 1 on average.
    """
    entropys = inputs.require(
        "current_entropys", "loss_mode=high_entropy_tokens expects the entropy of each response token"
    )
    with torch.no_grad():
        entropys, valid = entropys.float(), inputs.response_mask.bool()
        count = valid.sum()
        descending = torch.where(valid, entropys, -torch.inf).flatten().sort(descending=True).values
        # In float64 and less a small number: share * n may lie just above the whole number that it stands for.
        last = (count.double() * config.policy_loss.high_entropy_share - 1e-6).ceil().long().sub(1).clamp_min(0)
        threshold = descending.take(last)
        chosen = (valid & (entropys >= threshold)).float()
        share = masked_mean(chosen, inputs.response_mask)
    outputs = reweighted_policy_loss("vanilla", chosen / share.clamp_min(1 / chosen.numel()), inputs, config)
    outputs.metrics["actor/high_entropy_share"] = share
    outputs.metrics["actor/high_entropy_threshold"] = threshold.where(count > 0, 0.0)
    return outputs
