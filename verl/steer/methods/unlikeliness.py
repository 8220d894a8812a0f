# SPDX-License-Identifier: Apache-2.0
"""`algorithm.adv_estimator=unlikeliness`: right answers that the policy finds unlikely are worth more (2506.02355)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from verl.steer.methods.advantages import AdvantageInputs, advantage_estimator
from verl.steer.options import AlgorithmOptions, from_config, option
from verl.utils import as_torch_index


@dataclass
class UnlikelinessOptions(AlgorithmOptions):
    """Key below `algorithm`: the likeliest of G answers, if right, loses this times (G - 1) / G of its reward."""

    unlikeliness_beta: float = option(0.25, at_least=0.0, at_most=1.0)


@advantage_estimator("unlikeliness", "old_log_probs")
def compute_unlikeliness_advantage(inputs: AdvantageInputs) -> Tensor:
    """GRPO on the unlikeliness reward (arXiv 2506.02355): a right answer's reward times 1 - beta rank / G.

    As in the authors' code, rank runs from 0, the least likely of the G responses to the prompt under the old policy,
    to G - 1, the likeliest, and the likelihood is the mean log-prob of the response's tokens. Wrong answers keep their
    reward: the authors give them 0, where the factor changes nothing. Responses without a valid token are not counted.
    """
    count = inputs.response_mask.sum(-1)
    log_prob = (inputs.old_log_probs.float() * inputs.response_mask).sum(-1) / count.clamp_min(1)
    group = as_torch_index(inputs.index, device=log_prob.device)
    together = (group[:, None] == group[None, :]) & (count > 0)[None, :]
    # Of two equally likely responses the earlier one counts as likelier, so that all ranks differ.
    row = torch.arange(len(group), device=log_prob.device)
    less_likely = (log_prob[None, :] < log_prob[:, None]) | (
        (log_prob[None, :] == log_prob[:, None]) & (row[None, :] > row[:, None])
    )
    rank, size = (together & less_likely).sum(-1), together.sum(-1).clamp_min(1)
    factor = 1 - from_config(UnlikelinessOptions, inputs.config).unlikeliness_beta * rank / size
    factor = torch.where(inputs.right, factor, 1.0)
    return inputs.grpo(inputs.token_level_rewards * factor.unsqueeze(-1))
