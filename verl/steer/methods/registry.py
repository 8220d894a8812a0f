# SPDX-License-Identifier: Apache-2.0
"""The policy losses and advantage estimators of this fork, and the inputs that each of them reads.

    @policy_loss("my_loss", needs=("entropys",))
    def my_loss(inputs, config): ...

makes `policy_loss.loss_mode=my_loss` a loss that gets its `LossInputs` from `verl.steer.loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from verl.trainer.ppo.core_algos import (
    ADV_ESTIMATOR_REGISTRY,
    ClipRatios,
    LossInputs,
    LossOutputs,
    TokenMask,
    clip_ratios,
    ppo_clipped,
    register_adv_est,
    steer_policy_loss,
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

_ESTIMATORS: dict[str, Callable[..., Any]] = {}


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
    exact = options.entropy_change_estimator == "exact"
    needed = {"current_entropys", "sum_pi_squared", "sum_pi_squared_log_pi"} if exact else {"entropys"}
    return needed if options.token_weight_normalizer == "micro_batch" else needed | {"change_range"}


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


def advantage_estimator(name: str, *batch_fields: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register an advantage estimator as a value of `algorithm.adv_estimator`.

    It takes verl's arguments: token_level_rewards and response_mask, (batch, response_length); index, (batch,), the
    prompt of each response; config, `algorithm` of the configuration. It takes `batch_fields` and `rm_scores` besides,
    each (batch, response_length), by name. It returns advantages and returns, both (batch, response_length) and 0 on
    tokens that are not valid.
    """

    def register(estimator: Callable[..., Any]) -> Callable[..., Any]:
        def checked(config: Any = None, **arguments: Any) -> Any:
            penalised = {"use_kl_in_reward": config is not None and config.get("use_kl_in_reward")}
            for field in estimator_fields({"adv_estimator": name, **penalised}):
                if arguments.get(field) is None:
                    raise ValueError(
                        f"algorithm.adv_estimator={name}: the batch has no {field}; expected "
                        "trainer.v1.trainer_mode=steer"
                    )
            return estimator(config=config, **arguments)

        ESTIMATOR_FIELDS[name], _ESTIMATORS[name] = batch_fields, checked
        register_adv_est(name)(checked)
        return estimator

    return register


def estimator_fields(algorithm: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields of the trainer's batch that `algorithm.adv_estimator` takes beside verl's arguments.

    With `algorithm.use_kl_in_reward` a penalty is taken from the rewards, so that only the scores say which answers are
    right.
    """
    fields = ESTIMATOR_FIELDS.get(algorithm["adv_estimator"])
    return () if fields is None else (*fields, SCORES) if algorithm.get("use_kl_in_reward") else fields


def bind_estimator(name: str, fields: Mapping[str, Any]) -> None:
    """Have verl call an estimator of this fork with these fields of the batch, until the next call."""
    estimator = _ESTIMATORS[name]
    ADV_ESTIMATOR_REGISTRY[name] = lambda **arguments: estimator(**arguments, **fields)
