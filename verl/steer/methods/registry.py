# SPDX-License-Identifier: Apache-2.0
"""The policy losses and advantage estimators of this fork, and the inputs that each of them reads.

    @policy_loss("my_loss", needs=("entropys",))
    def my_loss(inputs, config): ...

makes `policy_loss.loss_mode=my_loss` a loss that gets its `LossInputs` from `verl.steer.loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from verl.trainer.ppo.core_algos import (
    ADV_ESTIMATOR_REGISTRY,
    EXACT_FIELDS,
    RANGE_NORMALIZERS,
    ClipRatios,
    LossInputs,
    LossOutputs,
    TokenMask,
    clip_ratios,
    compute_grpo_outcome_advantage,
    ppo_clipped,
    register_adv_est,
    steer_policy_loss,
    weighs_mini_batches,
)

LossFunction = Callable[[LossInputs, Any], LossOutputs]

#: The reward function's scores, as the trainer's batch names them.
SCORES = "rm_scores"


@dataclass(frozen=True)
class PolicyLoss:
    """A policy loss.

    Args:
        compute: from inputs and `ActorConfig` to outputs.
        needs: fields of `LossInputs` beside verl's own that it reads.
        clips_as_ppo: whether a token has no gradient exactly where `ppo_clipped` holds.
    """

    compute: LossFunction
    needs: tuple[str, ...]
    clips_as_ppo: bool


POLICY_LOSSES: dict[str, PolicyLoss] = {}

#: Advantage estimator -> fields of the trainer's batch that it takes beside verl's arguments.
ESTIMATOR_FIELDS: dict[str, tuple[str, ...]] = {}

#: Estimators that compare a prompt's rollouts with each other: verl's, and those registered here.
GROUPED = {"grpo", "grpo_vectorized", "grpo_passk", "gdpo", "rloo", "rloo_vectorized", "opo"}

_ESTIMATORS: dict[str, Callable[..., Any]] = {}

#: Advantage estimator -> the module that defines it and its options.
_MODULES: dict[str, str] = {}


def policy_loss(
    name: str, needs: tuple[str, ...] = (), clips_as_ppo: bool = True
) -> Callable[[LossFunction], LossFunction]:
    """Register a policy loss as a value of `policy_loss.loss_mode`; the arguments are those of `PolicyLoss`."""

    def register(compute: LossFunction) -> LossFunction:
        POLICY_LOSSES[name] = PolicyLoss(compute, needs, clips_as_ppo)
        return compute

    return register


# STEER's inputs depend on its options; see `fields_needed`.
policy_loss("entropy_control")(steer_policy_loss)


def fields_needed(options: Any) -> set[str]:
    """Fields of `LossInputs` beside verl's own that a loss reads.

    Args:
        options: `policy_loss` of the actor's configuration.
    """
    if options.loss_mode != "entropy_control":
        return set(POLICY_LOSSES[options.loss_mode].needs) if options.loss_mode in POLICY_LOSSES else set()
    if weighs_mini_batches(options):
        return {"token_weights"}
    exact = options.entropy_change_estimator == "exact"
    needed = set(EXACT_FIELDS) if exact else {"entropys"}
    return needed | {"change_range"} if options.token_weight_normalizer in RANGE_NORMALIZERS else needed


def base_loss_of(options: Any) -> str:
    """The loss whose gradients the tokens get: STEER's base loss, else the loss itself."""
    return options.base_loss if options.loss_mode == "entropy_control" else options.loss_mode


def clips_as_ppo(options: Any) -> bool:
    """Whether a loss, given by `actor.policy_loss`, removes gradients exactly where `ppo_clipped` holds."""
    name = base_loss_of(options)
    return name == "vanilla" or name in POLICY_LOSSES and POLICY_LOSSES[name].clips_as_ppo


def clip_of(config: Any) -> ClipRatios | None:
    """The clip of an `ActorConfig`; None if its loss does not clip as PPO does."""
    return clip_ratios(config) if clips_as_ppo(config.policy_loss) else None


def clipped_by_loss(config: Any, inputs: LossInputs) -> tuple[TokenMask, TokenMask] | None:
    """`ppo_clipped` with the clip of an `ActorConfig`; None if its loss does not clip as PPO does."""
    clip = clip_of(config)
    return None if clip is None else ppo_clipped(inputs, clip)


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


AdvantageEstimator = Callable[[AdvantageInputs], Tensor]


def advantage_estimator(
    name: str, *batch_fields: str, grouped: bool = True
) -> Callable[[AdvantageEstimator], AdvantageEstimator]:
    """Register an advantage estimator as a value of `algorithm.adv_estimator`.

    It returns the advantages, (batch, response_length), 0 on tokens that are not valid.

    Args:
        name: the value.
        batch_fields: the fields among `old_log_probs` and `entropy` that it reads.
        grouped: whether it compares a prompt's rollouts with each other, so that it needs two of them.
    """

    def register(estimator: AdvantageEstimator) -> AdvantageEstimator:
        def with_verls_signature(**arguments: Any) -> tuple[Tensor, Tensor]:
            taken = AdvantageInputs.__dataclass_fields__.keys() & arguments.keys()
            inputs = AdvantageInputs(**{field: arguments[field] for field in taken})
            use_kl = (inputs.config or {}).get("use_kl_in_reward")
            for field in estimator_fields({"adv_estimator": name, "use_kl_in_reward": use_kl}):
                if getattr(inputs, field) is None:
                    raise ValueError(
                        f"algorithm.adv_estimator={name}: the batch has no {field}; expected "
                        "trainer.v1.trainer_mode=steer"
                    )
            advantages = estimator(inputs)
            return advantages, advantages

        ESTIMATOR_FIELDS[name], _ESTIMATORS[name] = batch_fields, with_verls_signature
        _MODULES[name] = estimator.__module__
        if grouped:
            GROUPED.add(name)
        register_adv_est(name)(with_verls_signature)
        return estimator

    return register


def estimator_fields(algorithm: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields of the trainer's batch that `algorithm.adv_estimator` reads beside verl's arguments."""
    fields = ESTIMATOR_FIELDS.get(algorithm["adv_estimator"])
    return () if fields is None else (*fields, SCORES) if algorithm.get("use_kl_in_reward") else fields


def module_of(name: str) -> str | None:
    """The module of an advantage estimator of this fork; None for verl's."""
    return _MODULES.get(name)


def bind_estimator(name: str, fields: Mapping[str, Any]) -> None:
    """Have verl call an estimator of this fork with these fields of the batch, until the next call."""
    estimator = _ESTIMATORS[name]
    ADV_ESTIMATOR_REGISTRY[name] = lambda **arguments: estimator(**arguments, **fields)
