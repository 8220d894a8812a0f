# SPDX-License-Identifier: Apache-2.0
"""A table and a picture of one or several runs: entropy, accuracy and speed.

    python scripts/compare_runs.py outputs/grpo outputs/steer_exp --out outputs/comparison.png

Each argument is a run's folder with the files of verl's `file` logger (`metrics*.jsonl`). Runs whose folders end in
the same name, such as `seed0/grpo` and `seed1/grpo`, are seeds of one method: the table gives their mean and its 95 %
interval by Student's t, and the picture a band from the least to the greatest.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student_t

ENTROPY, WEIGHT = "actor/entropy", "actor/token_weights_mean"
TOKENS, SECONDS = "perf/total_num_tokens", "perf/time_per_step"


@dataclass
class Run:
    """The metrics of one run, by step."""

    name: str
    steps: dict[int, dict[str, float]] = field(default_factory=dict)

    def series(self, metric: str) -> dict[int, float]:
        """Step -> value wherever the metric was logged."""
        return {step: data[metric] for step, data in sorted(self.steps.items()) if metric in data}

    @property
    def accuracy(self) -> dict[int, float]:
        """Step -> mean accuracy on the validation data, averaged over its data sources."""
        found = {
            step: [value for key, value in data.items() if key.startswith("val-core/") and "/acc/mean@" in key]
            for step, data in sorted(self.steps.items())
        }
        return {step: fmean(values) for step, values in found.items() if values}


def read_run(folder: Path) -> Run:
    """All records below `folder`; where a resumed run logged a step again, the later file counts."""
    run = Run(folder.name)
    for file in sorted(folder.glob("metrics*.jsonl"), key=lambda file: file.stat().st_mtime):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            run.steps.setdefault(record["step"], {}).update(record["data"])
    if not run.steps:
        sys.exit(f"compare_runs: {folder}: no metrics*.jsonl; expected a run with `file` among trainer.logger")
    return run


def at(position: int) -> Callable[[list[float]], float]:
    return lambda values: values[position]


def tokens_per_second(run: Run) -> float | None:
    """Tokens of prompts and responses a second of training, on all devices together."""
    tokens, seconds = run.series(TOKENS), run.series(SECONDS)
    steps = tokens.keys() & seconds.keys()
    return sum(tokens[step] for step in steps) / sum(seconds[step] for step in steps) if steps else None


def summary(series: Callable[[Run], dict[int, float]], reduce: Callable[[list[float]], float]):
    """A figure of a run: its series, reduced over the steps, or None where it has none."""

    def figure_of(run: Run) -> float | None:
        values = list(series(run).values())
        return reduce(values) if values else None

    return figure_of


def accuracy(run: Run) -> dict[int, float]:
    return run.accuracy


def entropy(run: Run) -> dict[int, float]:
    return run.series(ENTROPY)


def weight(run: Run) -> dict[int, float]:
    return run.series(WEIGHT)


#: Heading, figure of a run, decimals.
COLUMNS: tuple[tuple[str, Callable[[Run], float | None], int], ...] = (
    ("accuracy before", summary(accuracy, at(0)), 3),
    ("final", summary(accuracy, at(-1)), 3),
    ("best", summary(accuracy, max), 3),
    ("entropy first", summary(entropy, at(0)), 3),
    ("last", summary(entropy, at(-1)), 3),
    ("least", summary(entropy, min), 3),
    ("mean token weight", summary(weight, fmean), 3),
    ("tokens/s", tokens_per_second, 0),
)


def mean_and_interval(values: list[float], decimals: int) -> str:
    """Mean, and from two values on the half width of its 95 % interval by Student's t."""
    if not values:
        return "-"
    mean = f"{fmean(values):.{decimals}f}"
    if len(values) == 1:
        return mean
    half = student_t.ppf(0.975, len(values) - 1) * stdev(values) / sqrt(len(values))
    return f"{mean} ± {half:.{decimals}f}"


def table(methods: dict[str, list[Run]]) -> Table:
    """A row for each method: means of its runs' figures, with intervals where there are several runs."""
    several = any(len(runs) > 1 for runs in methods.values())
    result = Table(title="means over seeds ± 95 % interval" if several else None)
    for heading in ("method", "seeds", *(heading for heading, *_ in COLUMNS)):
        result.add_column(heading, justify="left" if heading == "method" else "right")
    for name, runs in methods.items():
        cells = []
        for _, figure_of, decimals in COLUMNS:
            values = [value for run in runs if (value := figure_of(run)) is not None]
            cells.append(mean_and_interval(values, decimals))
        result.add_row(name, str(len(runs)), *cells)
    return result


def figure(methods: dict[str, list[Run]]) -> plt.Figure:
    """Entropy and accuracy over the steps, a line for each method, a band over its seeds."""
    picture, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    panels = (("policy entropy (nats)", lambda run: run.series(ENTROPY)), ("accuracy", lambda run: run.accuracy))
    styles = ("-", "--", "-.", ":")
    for axis, (label, series_of) in zip(axes, panels, strict=True):
        for index, (name, runs) in enumerate(methods.items()):
            series = [series_of(run) for run in runs]
            steps = sorted(set.intersection(*(set(one) for one in series)))
            rows = [[one[step] for one in series] for step in steps]
            line = axis.plot(steps, [fmean(row) for row in rows], styles[index % 4], label=name)[0]
            axis.fill_between(
                steps, [min(row) for row in rows], [max(row) for row in rows], color=line.get_color(), alpha=0.15
            )
        axis.set(xlabel="training step", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .png or .svg")
    args = parser.parse_args()
    methods: dict[str, list[Run]] = defaultdict(list)
    for folder in args.runs:
        run = read_run(folder)
        methods[run.name].append(run)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure(methods).savefig(args.out, dpi=150)
    console = Console()
    console.print(table(methods))
    console.print(f"picture: {args.out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
