# SPDX-License-Identifier: Apache-2.0
"""Advantage estimators that other papers propose against entropy collapse, to compare STEER with.

    psr, nsr, w_reinforce    only right answers, only wrong ones, both with the right ones weighted down
    unlikeliness             right answers that the policy finds unlikely are worth more
    gtpo, grpo_s             rewards shared out by entropy, over tokens or over responses

Each is a value of `algorithm.adv_estimator`; `AdvantageOptions` names its keys. All take upstream's arguments:
token_level_rewards and response_mask (batch, response_length), index (batch,), the prompt that a response belongs to,
and config, `algorithm` of the configuration. They return advantages and returns, both float (batch, response_length),
0 on tokens that are not valid.

A response is right if the reward function's scores of it sum to more than 0, whatever KL penalty is taken from its
rewards. docs/interventions.md compares the estimators.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, register_adv_est
from verl.utils import as_torch_index

#: What an estimator reads beside upstream's arguments: fields of the batch, here those of the old policy.
FIELDS_READ: dict[str, tuple[str, ...]] = {
    "psr": (),
    "nsr": (),
    "w_reinforce": (),
    "unlikeliness": ("old_log_probs",),
    "gtpo": ("entropy",),
    "grpo_s": ("entropy",),
}

#: And the reward function's scores, where `algorithm.use_kl_in_reward` takes a penalty from the rewards.
SCORES = "rm_scores"

#: 1 / H is taken of at least this entropy, in nats.
ENTROPY_FLOOR = 1e-4

#: Keeps a quotient by a group's standard deviation finite, as in upstream's GRPO.
STD_EPSILON = 1e-6


@dataclass
class AdvantageOptions:
    """This fork's keys below `algorithm`.

    Args:
        positive_weight: advantage of a right answer in `w_reinforce`. Default 0.1.
        unlikeliness_beta: how much less the likeliest right answer of a group is worth. Default 0.25.
        entropy_reward_share: share of the reward that entropy hands out in `gtpo` and `grpo_s`. Default 0.1.

    Raises:
        ValueError: if a value is not a number from 0 to 1.
    """

    positive_weight: float = 0.1
    unlikeliness_beta: float = 0.25
    entropy_reward_share: float = 0.1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"algorithm.{name}={value!r}: expected a number from 0 to 1")

    @classmethod
    def of(cls, config: Mapping[str, Any] | None) -> AdvantageOptions:
        """From `algorithm` of the configuration, where None takes the default."""
        given = {field.name: (config or {}).get(field.name) for field in fields(cls)}
        return cls(**{name: value for name, value in given.items() if value is not None})


def fields_read(algorithm: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields of the batch that `algorithm.adv_estimator` reads beside upstream's arguments."""
    estimator = algorithm["adv_estimator"]
    if estimator in FIELDS_READ and algorithm.get("use_kl_in_reward"):
        return (*FIELDS_READ[estimator], SCORES)
    return FIELDS_READ.get(estimator, ())


_batch_fields: ContextVar[Mapping[str, torch.Tensor]] = ContextVar("batch_fields")


@contextmanager
def batch_fields(values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Lets the estimators called inside read fields of the batch, each (batch, response_length)."""
    token = _batch_fields.set(values)
    try:
        yield
    finally:
        _batch_fields.reset(token)


def _of_batch(field: str, estimator: str) -> torch.Tensor:
    values = _batch_fields.get({})
    if field not in values:
        raise ValueError(
            f"algorithm.adv_estimator={estimator}: the batch has no {field}; expected trainer.v1.trainer_mode=steer"
        )
    return values[field].float()


def _constant_over_tokens(advantages: torch.Tensor, response_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    advantages = advantages.unsqueeze(-1) * response_mask
    return advantages, advantages


def _right(token_level_rewards: torch.Tensor, config: Any, estimator: str) -> torch.Tensor:
    """Whether each answer is right, boolean (batch,)."""
    penalised = config is not None and config.get("use_kl_in_reward")
    scores = _of_batch(SCORES, estimator) if penalised else token_level_rewards
    return scores.sum(-1) > 0


@register_adv_est("psr")
def compute_psr_advantage(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, config: Any = None, **unused: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positive sample reinforcement (arXiv 2506.01347): 1 for right answers, 0 for wrong ones, without a baseline."""
    return _constant_over_tokens(_right(token_level_rewards, config, "psr").float(), response_mask)


@register_adv_est("nsr")
def compute_nsr_advantage(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, config: Any = None, **unused: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative sample reinforcement (arXiv 2506.01347): 0 for right answers, -1 for wrong ones, without a baseline."""
    return _constant_over_tokens(_right(token_level_rewards, config, "nsr").float() - 1, response_mask)


@register_adv_est("w_reinforce")
def compute_w_reinforce_advantage(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, config: Any = None, **unused: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted REINFORCE (arXiv 2506.01347): `positive_weight` for right answers, -1 for wrong ones."""
    weight = AdvantageOptions.of(config).positive_weight
    right = _right(token_level_rewards, config, "w_reinforce")
    return _constant_over_tokens(torch.where(right, weight, -1.0), response_mask)


@register_adv_est("unlikeliness")
def compute_unlikeliness_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    config: Any = None,
    **unused: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GRPO on the unlikeliness reward (arXiv 2506.02355): a right answer's reward times 1 - beta (G - rank) / G.

    rank runs from 0, the likeliest of the G responses to the prompt under the old policy, to G - 1, the least likely;
    a response is as likely as the product of its tokens' probabilities. Wrong answers keep their reward: the paper
    gives them 0, where the factor changes nothing. Responses without a valid token are not counted.
    """
    log_prob = (_of_batch("old_log_probs", "unlikeliness") * response_mask).sum(-1)
    group = as_torch_index(index, device=log_prob.device)
    together = (group[:, None] == group[None, :]) & response_mask.any(-1)[None, :]
    # Of two equally likely responses the earlier one counts as likelier, so that ranks are never shared.
    place = torch.arange(len(group), device=log_prob.device)
    likelier = (log_prob[None, :] > log_prob[:, None]) | (
        (log_prob[None, :] == log_prob[:, None]) & (place[None, :] < place[:, None])
    )
    rank, size = (together & likelier).sum(-1), together.sum(-1).clamp_min(1)
    factor = 1 - AdvantageOptions.of(config).unlikeliness_beta * (size - rank) / size
    factor = torch.where(_right(token_level_rewards, config, "unlikeliness"), factor, 1.0)
    return compute_grpo_outcome_advantage(
        token_level_rewards * factor.unsqueeze(-1), response_mask, index, norm_adv_by_std_in_grpo=_by_std(config)
    )


@register_adv_est("gtpo")
def compute_gtpo_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    config: Any = None,
    **unused: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GTPO (arXiv 2508.04349): token rewards by `entropy_weighted_rewards`, standardised over the prompt's tokens.

    As this fork reads the paper, mean and standard deviation are over the tokens of right and wrong answers together.
    """
    valid = response_mask.bool()
    rewards = entropy_weighted_rewards(
        _of_batch("entropy", "gtpo"), valid, _right(token_level_rewards, config, "gtpo"), index, config
    )
    group = as_torch_index(index, device=rewards.device)
    groups, count = int(group.max()) + 1, valid.sum(-1)

    def mean_of_group(values: torch.Tensor) -> torch.Tensor:
        """Mean over the valid tokens of each response's group, (batch, 1)."""
        sums = values.new_zeros(groups).index_add_(0, group, values.masked_fill(~valid, 0).sum(-1))
        counts = values.new_zeros(groups).index_add_(0, group, count.to(values.dtype))
        return (sums / counts.clamp_min(1))[group].unsqueeze(-1)

    advantages = rewards - mean_of_group(rewards)
    if _by_std(config):
        advantages = advantages / (mean_of_group(advantages.square()).sqrt() + STD_EPSILON)
    advantages = advantages.masked_fill(~valid, 0)
    return advantages, advantages


@register_adv_est("grpo_s")
def compute_grpo_s_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    config: Any = None,
    **unused: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GRPO-S (arXiv 2508.04349): `entropy_weighted_rewards` of a response's mean entropy, standardised over the prompt.

    The advantage is the paper's; the ratio in the loss stays the token's (`policy_loss.loss_mode=gspo` has a
    sequence's).
    """
    count = response_mask.sum(-1, keepdim=True)
    entropys = (_of_batch("entropy", "grpo_s") * response_mask).sum(-1, keepdim=True) / count.clamp_min(1)
    right = _right(token_level_rewards, config, "grpo_s")
    rewards = entropy_weighted_rewards(entropys, count > 0, right, index, config)
    return compute_grpo_outcome_advantage(rewards, response_mask, index, norm_adv_by_std_in_grpo=_by_std(config))


def entropy_weighted_rewards(
    entropys: torch.Tensor, valid: torch.Tensor, right: torch.Tensor, index: np.ndarray, config: Any = None
) -> torch.Tensor:
    """Rewards of 1 and -1, a share of which is handed out by entropy (arXiv 2508.04349).

    Column by column, the right answers to a prompt that reach it share out their rewards in proportion to H, the
    wrong ones in proportion to 1 / H: uncertainty is rewarded where the answer is right, certainty blamed where it is
    wrong. With s = `entropy_reward_share` the reward is (1 - s) + s * n * H / (sum of H over those n right answers),
    and the negative of the same with 1 / H for wrong ones.

    Args:
        entropys: in nats, (batch, columns): a column is a token's place, or the only one, a mean over a response.
        valid: which entropies there are, boolean (batch, columns).
        right: whether the answer is right, boolean (batch,).
        index: the prompt of each response, (batch,).
        config: `algorithm` of the configuration.

    Returns:
        Float32 (batch, columns), 0 where nothing is valid.
    """
    share = AdvantageOptions.of(config).entropy_reward_share
    entropys = entropys.float().clamp_min(ENTROPY_FLOOR)
    scores = torch.where(right.unsqueeze(-1), entropys, 1 / entropys).masked_fill(~valid, 0)
    # Right and wrong answers to one prompt are two classes.
    together = 2 * as_torch_index(index, device=scores.device) + right.long()
    sums = scores.new_zeros(int(together.max()) + 1, scores.shape[1])
    counts = sums.index_add(0, together, valid.float())[together]
    sums = sums.index_add(0, together, scores)[together]
    rewards = (1 - share) + share * counts * scores / sums.clamp_min(torch.finfo(sums.dtype).tiny)
    return torch.where(right.unsqueeze(-1), rewards, -rewards).masked_fill(~valid, 0)


def _by_std(config: Any) -> bool:
    """Whether advantages are divided by the group's standard deviation, as upstream's GRPO is told."""
    return True if config is None else config.get("norm_adv_by_std_in_grpo", True)
