# SPDX-License-Identifier: Apache-2.0
"""`algorithm.adv_estimator=psr`, `nsr` and `w_reinforce`: advantages by the answer's class alone (arXiv 2506.01347)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from verl.steer.methods.registry import advantage_estimator
from verl.steer.options import from_config, option, resolve_options


@dataclass
class ReinforceOptions:
    """Key below `algorithm`: the advantage of a right answer in `w_reinforce`."""

    positive_weight: float = option(0.1, at_least=0.0, at_most=1.0)

    def __post_init__(self) -> None:
        resolve_options(self, "algorithm")


def is_right(token_level_rewards: Tensor, config: Any, rm_scores: Tensor | None) -> Tensor:
    """Whether each answer is right, boolean (batch,): the reward function's scores sum to more than 0.

    Args:
        token_level_rewards: the scores, less a KL penalty with `algorithm.use_kl_in_reward`; (batch, response_length).
        config: `algorithm` of the configuration.
        rm_scores: the scores, (batch, response_length); read if a penalty is taken.
    """
    penalised = config is not None and config.get("use_kl_in_reward")
    scores = rm_scores if penalised and rm_scores is not None else token_level_rewards
    return scores.sum(-1) > 0


def _constant_over_tokens(advantages: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    advantages = advantages.unsqueeze(-1) * response_mask
    return advantages, advantages


@advantage_estimator("psr")
def compute_psr_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    config: Any = None,
    rm_scores: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """Positive sample reinforcement (arXiv 2506.01347): 1 for right answers, 0 for wrong ones, without a baseline."""
    return _constant_over_tokens(is_right(token_level_rewards, config, rm_scores).float(), response_mask)


@advantage_estimator("nsr")
def compute_nsr_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    config: Any = None,
    rm_scores: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """Negative sample reinforcement (arXiv 2506.01347): 0 for right answers, -1 for wrong ones, without a baseline."""
    return _constant_over_tokens(is_right(token_level_rewards, config, rm_scores).float() - 1, response_mask)


@advantage_estimator("w_reinforce")
def compute_w_reinforce_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    config: Any = None,
    rm_scores: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """Weighted REINFORCE (arXiv 2506.01347): `positive_weight` for right answers, -1 for wrong ones."""
    weight = from_config(ReinforceOptions, config).positive_weight
    right = is_right(token_level_rewards, config, rm_scores)
    return _constant_over_tokens(torch.where(right, weight, -1.0), response_mask)
