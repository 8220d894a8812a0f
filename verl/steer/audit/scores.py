# SPDX-License-Identifier: Apache-2.0
"""The entropy audit: estimated entropy changes of tokens against the true changes.

    AuditOptions           the keys below `trainer.entropy_audit`
    AuditRequest           the trainer's request to the workers at an audited step
    signed_estimates       omega of each estimator
    covariance_estimate    the covariance of arXiv 2505.22617
    score_estimates        MSE, Pearson and Spearman correlation of each estimate with the true change
    sampled_lengths        the tokens that are saved
    write_tokens           saves them

`verl.steer.audit.update` measures each optimiser update, `verl.steer.audit.step` a whole training step;
docs/entropy_audit.md describes the output.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from torch import Tensor
from verl.steer.audit.agreement import agreement
from verl.steer.options import option, resolve_options
from verl.trainer.ppo.core_algos import (
    ENTROPY_CHANGE_ESTIMATORS,
    PPO_CLIPPED_ESTIMATORS,
    ClipRatios,
    LossInputs,
    signed_entropy_change,
)


@dataclass
class AuditOptions:
    """The keys below `trainer.entropy_audit`.

    Args:
        freq: audit every so many training steps; 0: none.
        tokens: save at most so many tokens of an audited step on each rank.
        influence: predict each update's change of the mean entropy by the tokens' influence as well.
        one_token: measure the true effect of so many single tokens in the first update of an audited step.
    """

    freq: int = option(0, at_least=0, integer=True)
    tokens: int = option(4096, at_least=0, integer=True)
    influence: bool = option(False, choices=(False, True))
    one_token: int = option(0, at_least=0, integer=True)

    def __post_init__(self) -> None:
        resolve_options(self, "trainer.entropy_audit")

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
        influence, one_token: as in `AuditOptions`.
    """

    step: int
    folder: str
    tokens: int
    mini_batches: int
    influence: bool = False
    one_token: int = 0


def signed_estimates(inputs: LossInputs, clip: ClipRatios | None) -> dict[str, Tensor]:
    """The change of each state's entropy by each of STEER's estimators, with its sign, per unit step.

    Args:
        inputs: the batch, with all fields that estimators read; tensors of one shape.
        clip: PPO's clip; None with a loss that does not clip as PPO does: `PPO_CLIPPED_ESTIMATORS` are then left out.

    Returns:
        Estimator -> finite values, float32 of the same shape.
    """
    names = [name for name in ENTROPY_CHANGE_ESTIMATORS if clip or name not in PPO_CLIPPED_ESTIMATORS]
    return {name: signed_entropy_change(inputs, name, clip or ClipRatios()) for name in names}


def covariance_estimate(
    log_prob: Tensor, advantages: Tensor, mean_log_prob: Tensor | float, mean_advantage: Tensor | float
) -> Tensor:
    """A token's term of -Cov(ln prob, A), which the entropy's change follows (arXiv 2505.22617, Clip-Cov and KL-Cov).

    Args:
        log_prob, advantages: any shape.
        mean_log_prob, mean_advantage: means over the tokens that the covariance is taken over.

    Returns:
        -(ln prob - mean) (A - mean), float32 of the same shape.
    """
    return -(log_prob.float() - mean_log_prob) * (advantages.float() - mean_advantage)


def score_estimates(estimates: Mapping[str, Tensor], true_change: Tensor) -> dict[str, float]:
    """`agreement` of each estimate with the true change of the entropy.

    Args:
        estimates: with their signs, by name, each (tokens,).
        true_change: entropy after the update minus before, in nats, (tokens,).

    Returns:
        NAME/mse, NAME/pearson, NAME/spearman; the same of magnitudes, |estimate| against |change|, as
        NAME/mse_magnitude and so on; `tokens`, and their mean change as `entropy_change`. Undefined scores, such as
        the correlations of a constant estimate, are left out, so that means over updates are over those that have one.
    """
    frame = pd.DataFrame({"": true_change.double().numpy()} | {k: v.double().numpy() for k, v in estimates.items()})
    scores = {"tokens": float(len(frame)), "entropy_change": frame[""].mean() if len(frame) else 0.0}
    for suffix, values in (("", frame), ("_magnitude", frame.abs())):
        ranks = values[""].rank()
        for name in estimates:
            for kind, score in agreement(values[name], values[""], ranks).items():
                if not math.isnan(score):
                    scores[f"{name}/{kind}{suffix}"] = score
    return {name: float(value) for name, value in scores.items()}


def sampled_lengths(lengths: Sequence[int], allowance: int, longest: int) -> list[int]:
    """Number of tokens of each response to save: all tokens of the first responses, until one response doesn't fit.

    Args:
        lengths: tokens of each response.
        allowance: at most so many tokens in total.
        longest: longer responses are cut to this length, so that one longer than any allowance is saved in part.
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
    """Write a rank's tokens of a step.

    Args:
        tokens: one row per token, with the columns in docs/entropy_audit.md.
        request: holds the folder.
        rank: data-parallel rank.
    """
    write_table(tokens, Path(request.folder, f"step_{request.step}_rank_{rank}.parquet"))


def write_table(table: pd.DataFrame, file: Path) -> None:
    """Write a parquet file; it appears complete or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    table.to_parquet(part, index=False)
    os.replace(part, file)
