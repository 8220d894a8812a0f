# SPDX-License-Identifier: Apache-2.0
"""What a reader of tables and pictures of several runs must know of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from verl.steer.report.run_metrics import ENTROPY, Run

_SOURCE = re.compile(r"val-core/(.*)/acc/mean@\d+")


def notes(methods: Mapping[str, Sequence[Run]]) -> list[str]:
    """A line for each: runs that end before others, runs that diverged, and accuracies of different data."""
    runs = [run for seeds in methods.values() for run in seeds]
    longest = max(run.last_step for run in runs)
    short = [f"{_named(run)} ends at step {run.last_step}" for run in runs if run.last_step < longest]
    found = [f"the longest run has {longest} steps; {'; '.join(short)}"] if short else []
    diverged = [_named(run) for run in runs if ENTROPY in run.metrics and not run.ends_with(ENTROPY)]
    found += [f"the entropy is no number at the end of {'; '.join(diverged)}"] if diverged else []
    by_sources: dict[str, list[str]] = {}
    for run in runs:
        if sources := " and ".join(sorted({match[1] for match in map(_SOURCE.fullmatch, run.metrics) if match})):
            by_sources.setdefault(sources, []).append(_named(run))
    if len(by_sources) > 1:
        listed = "; ".join(f"{sources}: {', '.join(names)}" for sources, names in by_sources.items())
        found.append(f"the accuracies are of different data, so they cannot be compared: {listed}")
    return found


def _named(run: Run) -> str:
    return f"{run.name} (seed {run.seed})" if run.seed else run.name
