# SPDX-License-Identifier: Apache-2.0
"""The policy losses of this fork, and the inputs that each of them reads.

    @policy_loss("my_loss", needs=("entropys",))
    def my_loss(inputs, config): ...

makes `policy_loss.loss_mode=my_loss` a loss that gets its `LossInputs` from `verl.steer.loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from verl.trainer.ppo.core_algos import (
    EXACT_FIELDS,
    RANGE_NORMALIZERS,
    ClipRatios,
    LossInputs,
    LossOutputs,
    TokenMask,
    clip_ratios,
    ppo_clipped,
    steer_policy_loss,
    weighs_mini_batches,
)

LossFunction = Callable[[LossInputs, Any], LossOutputs]


@dataclass(frozen=True)
class PolicyLoss:
    """A policy loss.

    Args:
        compute: from inputs and `ActorConfig` to outputs.
        needs: fields of `LossInputs` beside verl's own that it reads.
        clips_as_ppo: whether PPO's clip, `ppo_clipped`, and no other removes gradients; weights of 0 may as well.
    """

    compute: LossFunction
    needs: tuple[str, ...]
    clips_as_ppo: bool


POLICY_LOSSES: dict[str, PolicyLoss] = {}


def policy_loss(
    name: str, needs: tuple[str, ...] = (), clips_as_ppo: bool = True
) -> Callable[[LossFunction], LossFunction]:
    """Register a policy loss as a value of `policy_loss.loss_mode`; the arguments are those of `PolicyLoss`.

    Raises:
        ValueError: if `LossInputs` has no such field.
    """
    known = [field.name for field in fields(LossInputs)]
    for field_name in needs:
        if field_name not in known:
            raise ValueError(f"{name}: {field_name}: expected fields of LossInputs, {', '.join(known)}")

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
    """Whether a loss, given by `actor.policy_loss`, clips where `ppo_clipped` holds and nowhere else."""
    name = base_loss_of(options)
    return name == "vanilla" or name in POLICY_LOSSES and POLICY_LOSSES[name].clips_as_ppo


def clip_of(config: Any) -> ClipRatios | None:
    """The clip of an `ActorConfig`; None if its loss does not clip as PPO does."""
    return clip_ratios(config) if clips_as_ppo(config.policy_loss) else None


def clipped_by_loss(config: Any, inputs: LossInputs) -> tuple[TokenMask, TokenMask] | None:
    """`ppo_clipped` with the clip of an `ActorConfig`; None if its loss does not clip as PPO does."""
    clip = clip_of(config)
    return None if clip is None else ppo_clipped(inputs, clip)
