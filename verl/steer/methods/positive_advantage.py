# SPDX-License-Identifier: Apache-2.0
"""`policy_loss.loss_mode=positive_advantage`: tokens with a positive advantage count less (arXiv 2511.05993)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from verl.steer.methods.registry import policy_loss
from verl.steer.options import option
from verl.trainer.ppo.core_algos import LossInputs, LossOutputs, reweighted_policy_loss


@dataclass
class PositiveAdvantageOptions:
    """Key below `policy_loss`: weight of the loss of tokens with a positive advantage."""

    positive_advantage_weight: float = option(0.5, at_least=0.0)


@policy_loss("positive_advantage")
def compute_policy_loss_positive_advantage(inputs: LossInputs, config: Any) -> LossOutputs:
    """PPO's loss, tokens with a positive advantage times `positive_advantage_weight` (arXiv 2511.05993).

    They are what lowers the entropy most: a weight below 1 keeps it up, above 1 brings it down.
    """
    weights = torch.where(inputs.advantages > 0, config.policy_loss.positive_advantage_weight, 1.0)
    return reweighted_policy_loss("vanilla", weights, inputs, config)
