# SPDX-License-Identifier: Apache-2.0
"""`algorithm.adv_estimator=gtpo` and `grpo_s`: rewards divided by entropy over tokens or responses (2508.04349)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl.steer.methods.advantages import AdvantageInputs, advantage_estimator
from verl.steer.options import AlgorithmOptions, from_config, option
from verl.utils import as_torch_index

#: Lower bound of the entropy in 1 / H, in nats.
ENTROPY_FLOOR = 1e-4

#: Keeps a quotient by a group's standard deviation finite, as in verl's GRPO.
STD_EPSILON = 1e-6


@dataclass
class EntropyRewardOptions(AlgorithmOptions):
    """Keys below `algorithm`.

    Args:
        entropy_reward_share: the fraction of the reward that is divided by entropy.
        entropy_reward_by_class: whether right and wrong answers are standardised apart, else together.
    """

    entropy_reward_share: float = option(0.1, at_least=0.0, at_most=1.0)
    entropy_reward_by_class: bool = option(True, choices=(True, False))


@advantage_estimator("gtpo", "entropy")
def compute_gtpo_advantage(inputs: AdvantageInputs) -> Tensor:
    """GTPO (arXiv 2508.04349): token rewards by `entropy_weighted_rewards`, standardised over tokens of the prompt.

    By `algorithm.entropy_reward_by_class` these are the tokens of the right or of the wrong answers, or all of them.
    """
    valid = inputs.response_mask.bool()
    rewards = entropy_weighted_rewards(inputs.entropy.float(), valid, inputs.right, inputs.index, inputs.config)
    group = _standardised_together(inputs)
    groups, count = int(group.max()) + 1, valid.sum(-1)

    def mean_of_group(values: Tensor) -> Tensor:
        """Mean over the valid tokens of each response's group, (batch, 1)."""
        sums = values.new_zeros(groups).index_add_(0, group, values.masked_fill(~valid, 0).sum(-1))
        counts = values.new_zeros(groups).index_add_(0, group, count.to(values.dtype))
        return (sums / counts.clamp_min(1))[group].unsqueeze(-1)

    advantages = rewards - mean_of_group(rewards)
    if inputs.norm_by_std:
        advantages = advantages / (mean_of_group(advantages.square()).sqrt() + STD_EPSILON)
    return advantages.masked_fill(~valid, 0)


@advantage_estimator("grpo_s", "entropy")
def compute_grpo_s_advantage(inputs: AdvantageInputs) -> Tensor:
    """GRPO-S (arXiv 2508.04349): `entropy_weighted_rewards` of a response's mean entropy, standardised as in GTPO.

    The configuration has the loss of a sequence's ratio, `policy_loss.loss_mode=gspo`, and its mean over responses. A
    response without a valid token, such as a rejected one, has no part in the mean of its class.
    """
    count = inputs.response_mask.sum(-1, keepdim=True)
    entropys = (inputs.entropy.float() * inputs.response_mask).sum(-1, keepdim=True) / count.clamp_min(1)
    rewards = entropy_weighted_rewards(entropys, count > 0, inputs.right, inputs.index, inputs.config)
    group = _standardised_together(inputs)
    alone = group.max() + 1 + torch.arange(len(group), device=group.device)
    return replace(inputs, index=torch.where(count.squeeze(-1) > 0, group, alone).tolist()).grpo(rewards)


def _standardised_together(inputs: AdvantageInputs) -> Tensor:
    """A number for each response, (batch,): the same for those whose rewards are standardised together."""
    group = as_torch_index(inputs.index, device=inputs.response_mask.device)
    by_class = from_config(EntropyRewardOptions, inputs.config).entropy_reward_by_class
    return 2 * group + inputs.right.long() if by_class else group


def entropy_weighted_rewards(
    entropys: Tensor, valid: Tensor, right: Tensor, index: np.ndarray, config: Any = None
) -> Tensor:
    """Rewards of 1 and -1, a fraction of which is divided by entropy (arXiv 2508.04349).

    In each column, the right answers to a prompt divide their rewards in proportion to H, the wrong ones in proportion
    to 1 / H: uncertainty is rewarded in right answers, certainty blamed in wrong ones. With s = `entropy_reward_share`
    the reward is 1 + s * (n * H / (sum of H over those n right answers) - 1), and the negative of the same with 1 / H
    for wrong ones: exactly 1 for the only right answer, whose tokens then have no advantage.

    Args:
        entropys: in nats, (batch, columns): a column is a token position, or the only one, a mean over a response.
        valid: which entropies exist, boolean (batch, columns).
        right: whether the answer is right, boolean (batch,).
        index: the prompt of each response, (batch,).
        config: `algorithm` of the configuration.

    Returns:
        Float32 (batch, columns), 0 where nothing is valid.
    """
    fraction = from_config(EntropyRewardOptions, config).entropy_reward_share
    entropys = entropys.float().clamp_min(ENTROPY_FLOOR)
    scores = torch.where(right.unsqueeze(-1), entropys, 1 / entropys).masked_fill(~valid, 0)
    # Right and wrong answers to one prompt are two classes.
    together = 2 * as_torch_index(index, device=scores.device) + right.long()
    sums = scores.new_zeros(int(together.max()) + 1, scores.shape[1])
    counts = sums.index_add(0, together, valid.float())[together]
    sums = sums.index_add(0, together, scores)[together]
    rewards = 1 + fraction * (counts * scores / sums.clamp_min(torch.finfo(sums.dtype).tiny) - 1)
    return torch.where(right.unsqueeze(-1), rewards, -rewards).masked_fill(~valid, 0)
