# SPDX-License-Identifier: Apache-2.0
"""`policy_loss.loss_mode=entropy_shaped_advantage`: advantages raised by the token's entropy (arXiv 2506.14758)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from verl.steer.methods.registry import policy_loss
from verl.steer.options import option
from verl.trainer.ppo.core_algos import LossInputs, LossOutputs, reweighted_policy_loss
from verl.utils.torch_functional import masked_mean


@dataclass
class EntropyShapedAdvantageOptions:
    """Keys below `policy_loss`.

    Args:
        advantage_entropy_alpha: factor of the entropy.
        advantage_entropy_kappa: the bonus is at most |A| / kappa.
    """

    advantage_entropy_alpha: float = option(0.4, at_least=0.0)
    advantage_entropy_kappa: float = option(2.0, above=1.0)


@policy_loss("entropy_shaped_advantage", needs=("entropys",))
def compute_policy_loss_entropy_shaped_advantage(inputs: LossInputs, config: Any) -> LossOutputs:
    """PPO's loss with the advantages A + min(alpha H, |A| / kappa) (arXiv 2506.14758), H without gradient.

    As kappa is above 1, no advantage changes its sign. H is the old policy's entropy, which costs no forward pass and
    equals the current policy's at the first update of a batch.
    """
    options = config.policy_loss
    entropys = inputs.require("entropys", "loss_mode=entropy_shaped_advantage expects the entropy of each token")
    with torch.no_grad():
        bonus = torch.minimum(
            options.advantage_entropy_alpha * entropys.float(),
            inputs.advantages.float().abs() / options.advantage_entropy_kappa,
        )
    outputs = reweighted_policy_loss("vanilla", None, inputs, config, advantages=inputs.advantages + bonus)
    outputs.metrics["actor/advantage_bonus_mean"] = masked_mean(bonus, inputs.response_mask)
    return outputs
