# SPDX-License-Identifier: Apache-2.0
"""`policy_loss.loss_mode=high_entropy_tokens`: a gradient only for tokens of high entropy (arXiv 2506.01939)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from verl.steer.methods.registry import policy_loss
from verl.steer.options import option
from verl.trainer.ppo.core_algos import LossInputs, LossOutputs, reweighted_policy_loss, sorted_valid
from verl.utils.torch_functional import masked_mean


@dataclass
class HighEntropyOptions:
    """Key below `policy_loss`: the fraction of the tokens that has a gradient."""

    high_entropy_share: float = option(0.2, above=0.0, at_most=1.0)


@policy_loss("high_entropy_tokens", needs=("entropys",))
def compute_policy_loss_high_entropy_tokens(inputs: LossInputs, config: Any) -> LossOutputs:
    """PPO's loss on the `high_entropy_share` of a micro-batch's tokens whose entropy is highest (arXiv 2506.01939).

    The entropies are the old policy's. The other tokens have no gradient, but they count in the loss's average.
    """
    entropys = inputs.require("entropys", "loss_mode=high_entropy_tokens expects the entropy of each response token")
    with torch.no_grad():
        entropys, valid = entropys.float(), inputs.response_mask.bool()
        last = (valid.sum() - 1).clamp_min(0)
        index = (last * (1 - config.policy_loss.high_entropy_share)).ceil().long()
        threshold = sorted_valid(entropys, valid).index_select(0, index.view(1)).view(())
        chosen = (valid & (entropys >= threshold)).float()
    outputs = reweighted_policy_loss("vanilla", chosen, inputs, config)
    outputs.metrics["actor/high_entropy_share"] = masked_mean(chosen, inputs.response_mask)
    outputs.metrics["actor/high_entropy_threshold"] = threshold.nan_to_num(posinf=0.0)
    return outputs
