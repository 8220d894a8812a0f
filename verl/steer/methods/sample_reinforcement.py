# SPDX-License-Identifier: Apache-2.0
"""`algorithm.adv_estimator=psr`, `nsr` and `w_reinforce`: advantages by the answer's class alone (arXiv 2506.01347)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from verl.steer.methods.registry import AdvantageInputs, advantage_estimator
from verl.steer.options import from_config, option, resolve_options


@dataclass
class ReinforceOptions:
    """Key below `algorithm`: the advantage of a right answer in `w_reinforce`."""

    positive_weight: float = option(0.1, at_least=0.0, at_most=1.0)

    def __post_init__(self) -> None:
        resolve_options(self, "algorithm")


@advantage_estimator("psr")
def compute_psr_advantage(inputs: AdvantageInputs) -> Tensor:
    """Positive sample reinforcement (arXiv 2506.01347): 1 for right answers, 0 for wrong ones, without a baseline."""
    return inputs.right.float().unsqueeze(-1) * inputs.response_mask


@advantage_estimator("nsr")
def compute_nsr_advantage(inputs: AdvantageInputs) -> Tensor:
    """Negative sample reinforcement (arXiv 2506.01347): 0 for right answers, -1 for wrong ones, without a baseline."""
    return (inputs.right.float() - 1).unsqueeze(-1) * inputs.response_mask


@advantage_estimator("w_reinforce")
def compute_w_reinforce_advantage(inputs: AdvantageInputs) -> Tensor:
    """Weighted REINFORCE (arXiv 2506.01347): `positive_weight` for right answers, -1 for wrong ones."""
    weight = from_config(ReinforceOptions, inputs.config).positive_weight
    return torch.where(inputs.right, weight, -1.0).unsqueeze(-1) * inputs.response_mask
