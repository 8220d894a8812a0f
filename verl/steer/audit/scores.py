# SPDX-License-Identifier: Apache-2.0
"""The entropy audit: estimated changes of the tokens' entropies, held against the changes that came about.

    AuditOptions           the keys below `trainer.entropy_audit`
    AuditRequest           what the trainer asks of the workers at an audited step
    signed_estimates       omega of each estimator
    covariance_estimate    that of arXiv 2505.22617
    score_estimates        MSE, Pearson and Spearman correlation of each estimate with the truth
    sampled_lengths        which tokens are saved
    write_tokens           and where

Who measures: `verl.steer.audit.update` each optimiser update, `verl.steer.audit.step` a
whole training step. docs/entropy_audit.md tells what comes out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from verl.trainer.ppo.core_algos import ENTROPY_CHANGE_ESTIMATORS, PPO_CLIPPED_ESTIMATORS, signed_entropy_change

#: All that are audited: those of STEER and the covariance.
AUDITED_ESTIMATORS = (*ENTROPY_CHANGE_ESTIMATORS, "covariance")


@dataclass(frozen=True)
class AuditOptions:
    """The keys below `trainer.entropy_audit`.

    Args:
        freq: every so many training steps are audited; 0: none. Default 0.
        tokens: at most so many tokens of an audited step are saved on each rank. Default 4096.

    Raises:
        ValueError: if a value is not an integer of at least 0.
    """

    freq: int = 0
    tokens: int = 4096

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"trainer.entropy_audit.{name}={value!r}: expected an integer of at least 0")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> AuditOptions:
        """From `trainer` of the configuration, where None takes the default."""
        given = config.get("entropy_audit") or {}
        names = [field.name for field in fields(cls)]
        for name in given:
            if name not in names:
                raise ValueError(f"trainer.entropy_audit.{name}: unknown; expected one of {', '.join(names)}")
        return cls(**{name: value for name, value in given.items() if value is not None})

    def due(self, step: int) -> bool:
        """Whether this training step, counted from 1, is audited."""
        return self.freq > 0 and step % self.freq == 0


@dataclass(frozen=True)
class AuditRequest:
    """Sent with the batch of an audited step, as its non-tensor datum `entropy_audit`.

    Args:
        step: the training step.
        folder: where the tokens go.
        tokens: at most so many on each rank.
        mini_batches: optimiser updates of the step.
    """

    step: int
    folder: str
    tokens: int
    mini_batches: int


def signed_estimates(
    advantages: torch.Tensor,
    entropys: torch.Tensor,
    current_entropys: torch.Tensor,
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    sum_pi_squared: torch.Tensor,
    sum_pi_squared_log_pi: torch.Tensor,
    clip: tuple[float, float, float] | None,
) -> dict[str, torch.Tensor]:
    """The change of each state's entropy as STEER's estimators have it, with its sign, per unit step.

    Args:
        advantages, old_log_prob, log_prob: (batch, response_length).
        entropys: of the old policy, which the estimators read in training, in nats, (batch, response_length).
        current_entropys: of the policy being updated; `exact` reads them instead.
        sum_pi_squared, sum_pi_squared_log_pi: as in `exact_entropy_change`, of the policy being updated.
        clip: clip_ratio_low, clip_ratio_high, clip_ratio_c; None with a loss that does not clip as PPO does, of which
            `PPO_CLIPPED_ESTIMATORS` tell nothing.

    Returns:
        By name of the estimator, finite, float32 (batch, response_length).
    """
    return {
        name: signed_entropy_change(
            advantages,
            current_entropys if name == "exact" else entropys,
            old_log_prob,
            log_prob,
            name,
            *(clip or ()),
            sum_pi_squared=sum_pi_squared,
            sum_pi_squared_log_pi=sum_pi_squared_log_pi,
        )
        for name in ENTROPY_CHANGE_ESTIMATORS
        if clip or name not in PPO_CLIPPED_ESTIMATORS
    }


def covariance_estimate(
    log_prob: torch.Tensor, advantages: torch.Tensor, mean_log_prob: torch.Tensor, mean_advantage: torch.Tensor
) -> torch.Tensor:
    """A token's share of -Cov(ln prob, A), which the entropy's change follows (arXiv 2505.22617, Clip-Cov and KL-Cov).

    Args:
        log_prob, advantages: any shape.
        mean_log_prob, mean_advantage: means over the tokens that the covariance is taken over, scalars.

    Returns:
        -(ln prob - mean) (A - mean), float32 of the same shape.
    """
    return -(log_prob.float() - mean_log_prob) * (advantages.float() - mean_advantage)


def score_estimates(estimates: Mapping[str, torch.Tensor], true_change: torch.Tensor) -> dict[str, float]:
    """How well each estimate tells the true change of the entropy.

    An estimate is per unit step, so a plain MSE would measure the learning rate. The MSE here is what is left, in nats
    squared, after the estimate is multiplied by the factor that makes it least. No offset is fitted: an estimate of 0
    says that nothing changes.

    Args:
        estimates: with their signs, by name, each (tokens,).
        true_change: entropy after the update minus before, in nats, (tokens,).

    Returns:
        NAME/mse, NAME/pearson, NAME/spearman; the same of magnitudes, |estimate| against |change|, as
        NAME/mse_magnitude and so on; `tokens`, and their mean change as `entropy_change`. A correlation is 0 where the
        estimate or the change is the same for all tokens, and all is 0 without tokens.
    """
    frame = pd.DataFrame({"": true_change.double().numpy()} | {k: v.double().numpy() for k, v in estimates.items()})
    scores = {"tokens": float(len(frame)), "entropy_change": frame[""].mean() if len(frame) else 0.0}
    for suffix, values in (("", frame), ("_magnitude", frame.abs())):
        pearson, spearman = values.corr()[""].fillna(0.0), values.rank().corr()[""].fillna(0.0)
        for name in estimates:
            told, truth = values[name], values[""]
            square = (told * told).sum()
            factor = (told * truth).sum() / square if square else 0.0
            scores[f"{name}/mse{suffix}"] = ((factor * told - truth) ** 2).mean() if len(frame) else 0.0
            scores[f"{name}/pearson{suffix}"] = pearson[name]
            scores[f"{name}/spearman{suffix}"] = spearman[name]
    return {name: float(value) for name, value in scores.items()}


def sampled_lengths(lengths: Sequence[int], allowance: int, longest: int) -> list[int]:
    """How many tokens of each response are saved: all of the first responses, until one doesn't fit.

    Args:
        lengths: tokens of each response.
        allowance: at most so many tokens in all.
        longest: a response counts as cut to this length, so that one longer than any allowance is not left out.
    """
    kept = []
    for length in lengths:
        length = min(length, longest)
        if length > allowance:
            break
        allowance -= length
        kept.append(length)
    return kept + [0] * (len(lengths) - len(kept))


def write_tokens(tokens: pd.DataFrame, request: AuditRequest, rank: int) -> None:
    """Write a rank's tokens of a step; the file is there whole or not at all.

    Args:
        tokens: one row a token, with the columns that docs/entropy_audit.md names.
        request: where to.
        rank: of the data-parallel ranks.
    """
    file = Path(request.folder, f"step_{request.step}_rank_{rank}.parquet")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    tokens.to_parquet(part, index=False)
    os.replace(part, file)
