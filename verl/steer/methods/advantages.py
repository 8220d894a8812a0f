# SPDX-License-Identifier: Apache-2.0
"""The advantage estimators of this fork, and the batch as each of them reads it.

    @advantage_estimator("my_advantage", "entropy")
    def my_advantage(inputs): ...

makes `algorithm.adv_estimator=my_advantage` an estimator that gets its `AdvantageInputs` from `verl.steer.trainer`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from torch import Tensor
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, compute_grpo_outcome_advantage, register_adv_est

#: The reward function's scores, as the trainer's batch names them.
SCORES = "rm_scores"

#: verl's estimators that compare a prompt's rollouts with each other.
VERLS_GROUPED = ("grpo", "grpo_vectorized", "grpo_passk", "gdpo", "rloo", "rloo_vectorized", "opo")


@dataclass
class AdvantageInputs:
    """The trainer's batch, as an advantage estimator of this fork reads it.

    Args:
        token_level_rewards: the scores, less a KL penalty with `algorithm.use_kl_in_reward`; (batch, response_length).
        response_mask: 1 on valid tokens, (batch, response_length).
        index: the prompt of each response, (batch,).
        config: `algorithm` of the configuration, or None.
        old_log_probs, entropy: of the old policy, in nats, (batch, response_length).
        rm_scores: the reward function's scores, (batch, response_length); read if a penalty is taken.
        progress: the training step over the number of the run's steps.
        tempered: the prompts whose answers have another temperature.
    """

    token_level_rewards: Tensor
    response_mask: Tensor
    index: Any = None
    config: Any = None
    old_log_probs: Any = None
    entropy: Any = None
    rm_scores: Any = None
    progress: float = 0.0
    tempered: Collection[Any] = ()

    @property
    def right(self) -> Tensor:
        """Whether each answer is right, boolean (batch,): its scores sum to more than 0, whatever the penalty."""
        penalised = self.config is not None and self.config.get("use_kl_in_reward")
        return (self.rm_scores if penalised else self.token_level_rewards).sum(-1) > 0

    @property
    def norm_by_std(self) -> bool:
        """Whether advantages are divided by the group's standard deviation, the option of verl's GRPO."""
        return True if self.config is None else self.config.get("norm_adv_by_std_in_grpo", True)

    def grpo(self, rewards: Tensor) -> Tensor:
        """The advantages of verl's GRPO for other rewards, (batch, any columns), as (batch, response_length)."""
        return compute_grpo_outcome_advantage(
            rewards, self.response_mask, self.index, norm_adv_by_std_in_grpo=self.norm_by_std
        )[0]


Compute = Callable[[AdvantageInputs], Tensor]

#: Fields of the trainer's batch that an estimator may read beside verl's arguments.
BATCH_FIELDS = ("old_log_probs", "entropy")


@dataclass(frozen=True)
class Estimator:
    """An advantage estimator, which verl calls with its own arguments.

    Args:
        name: value of `algorithm.adv_estimator`.
        compute: from inputs to the advantages, (batch, response_length), 0 on tokens that are not valid.
        batch_fields: those of `BATCH_FIELDS` that it reads.
        grouped: whether it compares a prompt's rollouts with each other, so that it needs two of them.
    """

    name: str
    compute: Compute
    batch_fields: tuple[str, ...]
    grouped: bool

    def fields(self, algorithm: Mapping[str, Any]) -> tuple[str, ...]:
        """Fields of the trainer's batch that it reads beside verl's arguments."""
        return (*self.batch_fields, SCORES) if algorithm.get("use_kl_in_reward") else self.batch_fields

    def __call__(self, **arguments: Any) -> tuple[Tensor, Tensor]:
        """The advantages, which are the returns as well.

        Raises:
            ValueError: if the trainer's batch has not the fields that it reads.
        """
        taken = {field.name for field in fields(AdvantageInputs)} & arguments.keys()
        inputs = AdvantageInputs(**{name: arguments[name] for name in taken})
        for name in self.fields(inputs.config or {}):
            if getattr(inputs, name) is None:
                raise ValueError(
                    f"algorithm.adv_estimator={self.name}: the batch has no {name}; expected "
                    "trainer.v1.trainer_mode=steer"
                )
        advantages = self.compute(inputs)
        return advantages, advantages


ESTIMATORS: dict[str, Estimator] = {}


def advantage_estimator(name: str, *batch_fields: str, grouped: bool = True) -> Callable[[Compute], Compute]:
    """Register an advantage estimator; the arguments are those of `Estimator`.

    Raises:
        ValueError: if the batch has no such field.
    """
    for field_name in batch_fields:
        if field_name not in BATCH_FIELDS:
            raise ValueError(f"{name}: {field_name}: expected fields among {', '.join(BATCH_FIELDS)}")

    def register(compute: Compute) -> Compute:
        ESTIMATORS[name] = Estimator(name, compute, batch_fields, grouped)
        register_adv_est(name)(ESTIMATORS[name])
        return compute

    return register


def estimator_fields(algorithm: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields of the trainer's batch that `algorithm.adv_estimator` reads beside verl's arguments; of verl's none."""
    estimator = ESTIMATORS.get(algorithm["adv_estimator"])
    return estimator.fields(algorithm) if estimator else ()


def compares_rollouts(name: str) -> bool:
    """Whether an estimator of this fork or of verl compares a prompt's rollouts with each other."""
    return ESTIMATORS[name].grouped if name in ESTIMATORS else name in VERLS_GROUPED


def bind_estimator(name: str, batch: Mapping[str, Any]) -> None:
    """Have verl call an estimator of this fork with these fields of the batch, until the next call."""
    ADV_ESTIMATOR_REGISTRY[name] = partial(ESTIMATORS[name], **batch)
