# SPDX-License-Identifier: Apache-2.0
"""How well estimated entropy changes agree with the true ones; the audit's metrics and the report both use it."""

from __future__ import annotations

import numpy as np
import pandas as pd


def agreement(estimate: pd.Series, truth: pd.Series, truth_ranks: pd.Series | None = None) -> dict[str, float]:
    """MSE, Pearson and Spearman correlation of an estimate with the truth.

    An estimate is per unit step, so a plain MSE would measure the learning rate. The MSE here is that of the estimate
    times its least-squares factor. No offset is fitted: an estimate of 0 predicts no change.

    Args:
        estimate, truth: finite, (tokens,); the truth in nats.
        truth_ranks: `truth.rank()`, where several estimates are compared with the same truth.

    Returns:
        `mse` in nats squared, `pearson` and `spearman`. A correlation is NaN where either is constant, and all are NaN
        without tokens.
    """
    square = (estimate * estimate).sum()
    factor = (estimate * truth).sum() / square if square else 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        # With one value, pandas 2 warns before it returns NaN.
        pearson = estimate.corr(truth, min_periods=2)
        spearman = estimate.rank().corr(truth.rank() if truth_ranks is None else truth_ranks, min_periods=2)
    return {"mse": ((factor * estimate - truth) ** 2).mean(), "pearson": pearson, "spearman": spearman}
