# SPDX-License-Identifier: Apache-2.0
"""`algorithm.adv_estimator=unlikeliness`: right answers that the policy finds unlikely are worth more (2506.02355)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl.steer.methods.registry import advantage_estimator
from verl.steer.methods.sample_reinforcement import is_right
from verl.steer.options import from_config, option, resolve_options
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
from verl.utils import as_torch_index


@dataclass
class UnlikelinessOptions:
    """Key below `algorithm`: the fraction of the reward that the likeliest right answer of a group loses."""

    unlikeliness_beta: float = option(0.25, at_least=0.0, at_most=1.0)

    def __post_init__(self) -> None:
        resolve_options(self, "algorithm")


@advantage_estimator("unlikeliness", "old_log_probs")
def compute_unlikeliness_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    config: Any,
    old_log_probs: Tensor,
    rm_scores: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """GRPO on the unlikeliness reward (arXiv 2506.02355): a right answer's reward times 1 - beta (G - rank) / G.

    rank runs from 0, the likeliest of the G responses to the prompt under the old policy, to G - 1, the least likely;
    a response is as likely as the product of its tokens' probabilities. Wrong answers keep their reward: the paper
    gives them 0, where the factor changes nothing. Responses without a valid token are not counted.
    """
    log_prob = (old_log_probs.float() * response_mask).sum(-1)
    group = as_torch_index(index, device=log_prob.device)
    together = (group[:, None] == group[None, :]) & response_mask.any(-1)[None, :]
    # Of two equally likely responses the earlier one counts as likelier, so that all ranks differ.
    row = torch.arange(len(group), device=log_prob.device)
    likelier = (log_prob[None, :] > log_prob[:, None]) | (
        (log_prob[None, :] == log_prob[:, None]) & (row[None, :] < row[:, None])
    )
    rank, size = (together & likelier).sum(-1), together.sum(-1).clamp_min(1)
    factor = 1 - from_config(UnlikelinessOptions, config).unlikeliness_beta * (size - rank) / size
    factor = torch.where(is_right(token_level_rewards, config, rm_scores), factor, 1.0)
    return compute_grpo_outcome_advantage(
        token_level_rewards * factor.unsqueeze(-1), response_mask, index, norm_adv_by_std_in_grpo=by_std(config)
    )


def by_std(config: Any) -> bool:
    """Whether advantages are divided by the group's standard deviation, the option of verl's GRPO."""
    return True if config is None else config.get("norm_adv_by_std_in_grpo", True)
