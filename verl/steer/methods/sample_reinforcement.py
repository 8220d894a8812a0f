# SPDX-License-Identifier: Apache-2.0
"""`algorithm.adv_estimator=psr`, `nsr` and `w_reinforce`: advantages by the answer's class alone (arXiv 2506.01347)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from verl.steer.methods.advantages import AdvantageInputs, advantage_estimator
from verl.steer.options import AlgorithmOptions, from_config, option


@dataclass
class ReinforceOptions(AlgorithmOptions):
    """Key below `algorithm`: the advantage of a right answer in `w_reinforce`."""

    positive_weight: float = option(0.1, at_least=0.0, at_most=1.0)


@advantage_estimator("psr", grouped=False)
def compute_psr_advantage(inputs: AdvantageInputs) -> Tensor:
    """Positive sample reinforcement (arXiv 2506.01347): right answers alone, `_one_class`, without a baseline."""
    return _one_class(inputs, inputs.right)


@advantage_estimator("nsr", grouped=False)
def compute_nsr_advantage(inputs: AdvantageInputs) -> Tensor:
    """Negative sample reinforcement (arXiv 2506.01347): wrong answers alone, `_one_class` negated."""
    return -_one_class(inputs, ~inputs.right)


@advantage_estimator("w_reinforce", grouped=False)
def compute_w_reinforce_advantage(inputs: AdvantageInputs) -> Tensor:
    """Weighted REINFORCE (arXiv 2506.01347): `positive_weight` for right answers, -1 for wrong ones."""
    weight = from_config(ReinforceOptions, inputs.config).positive_weight
    return torch.where(inputs.right, weight, -1.0).unsqueeze(-1) * inputs.response_mask


def _one_class(inputs: AdvantageInputs, belongs: Tensor) -> Tensor:
    """Advantages that are 1 on average over all tokens of the batch, and 0 outside one class of answers.

    The authors' code drops the other class, so that its loss is a mean over the tokens of one class. Here the other
    class stays and has no gradient; the advantages of the class are number of tokens / number of its tokens.

    Args:
        inputs: the trainer's batch.
        belongs: which answers are of the class, boolean (batch,).
    """
    tokens = inputs.response_mask * belongs.unsqueeze(-1)
    return tokens * (inputs.response_mask.sum() / tokens.sum().clamp_min(1))
