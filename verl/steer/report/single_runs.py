# SPDX-License-Identifier: Apache-2.0
"""Methods with one run against a baseline with several: the interval in which a further run of the baseline lies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
from scipy.stats import t as student_t
from verl.steer.report.run_metrics import Run, figures_by_seed


def prediction_interval(baseline: Sequence[float], others: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The 95 % prediction interval of a further run of the baseline: mean ± t s √(1 + 1/n).

    Args:
        baseline: a figure of each of its n runs.
        others: the same of further methods. The variance s² within a method is pooled over all of them and the
            baseline, and t has the sum of their degrees of freedom.

    Returns:
        Its ends; NaN if no method has two runs.
    """
    groups = [pd.Series(values, dtype=float).dropna() for values in (baseline, *others)]
    freedom = sum(max(0, len(group) - 1) for group in groups)
    if not freedom or groups[0].empty:
        return math.nan, math.nan
    variance = sum(float(((group - group.mean()) ** 2).sum()) for group in groups) / freedom
    half = float(student_t.ppf(0.975, freedom)) * math.sqrt(variance * (1 + 1 / len(groups[0])))
    return float(groups[0].mean()) - half, float(groups[0].mean()) + half


def single_runs(
    methods: Mapping[str, Sequence[Run]], baseline: str, figures: Sequence[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The figures of the methods with one run, and the intervals of a further run of the baseline.

    Args:
        methods: runs by method.
        baseline: one of the methods.
        figures: headings of `run_figures`.

    Returns:
        A row per method and a column per figure; and the interval's ends, as rows `least` and `greatest`.
    """
    tables = {name: figures_by_seed(runs, figures) for name, runs in methods.items()}
    others = [table for name, table in tables.items() if name != baseline]
    ends = {
        figure: prediction_interval(tables[baseline][figure].tolist(), [table[figure].tolist() for table in others])
        for figure in figures
    }
    alone = {name: table.iloc[0] for name, table in tables.items() if name != baseline and len(table) == 1}
    found = pd.DataFrame(alone, index=list(figures)).T
    return found, pd.DataFrame(ends, index=["least", "greatest"])
