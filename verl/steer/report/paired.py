# SPDX-License-Identifier: Apache-2.0
"""Methods against a baseline, paired by seed: differences, effect sizes, and p-values corrected for their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import ttest_rel
from verl.steer.report.run_metrics import Run, figures_by_seed


class Difference(NamedTuple):
    """A method's figure minus the baseline's over the seeds that both have.

    Args:
        values: one for each seed.
        effect: mean difference divided by the standard deviation of the differences (Cohen's d for pairs).
        p: of the paired t-test, two-sided; `p_holm` is corrected over all methods and figures of a table. If all
            differences are equal, they tell nothing about their variance, and these three are NaN.
    """

    values: list[float]
    effect: float
    p: float
    p_holm: float


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (Scandinavian Journal of Statistics 6, 1979, 65-70); NaN stays NaN and is not counted."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)[: int(np.isfinite(p).sum())]
    corrected = np.full(len(p), np.nan)
    corrected[order] = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)).clip(max=1)
    return corrected.tolist()


def differences(
    methods: Mapping[str, Sequence[Run]], baseline: str, figures: Sequence[str]
) -> dict[tuple[str, str], Difference]:
    """(method, figure) -> difference from the baseline, for methods that share at least two seeds with it.

    Args:
        methods: runs by method, one for each seed; those of one seed are paired.
        baseline: one of the methods.
        figures: headings of `run_figures`.
    """
    tables = {name: figures_by_seed(runs, figures) for name, runs in methods.items()}
    pairs = {}
    for name in methods:
        if name != baseline:
            difference = tables[name] - tables[baseline]
            for figure in figures:
                values = difference[figure].dropna()
                if len(values) > 1:
                    pairs[name, figure] = values
    tests = {key: _test(values) for key, values in pairs.items()}
    corrected = dict(zip(tests, holm([p for _, p in tests.values()]), strict=True))
    return {key: Difference(values.tolist(), *tests[key], corrected[key]) for key, values in pairs.items()}


def _test(values: pd.Series) -> tuple[float, float]:
    """Effect size and p-value of the differences `values`."""
    if values.round(9).nunique() == 1:
        return np.nan, np.nan
    return float(values.mean() / values.std()), float(ttest_rel(values, np.zeros(len(values))).pvalue)
