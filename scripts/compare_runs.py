# SPDX-License-Identifier: Apache-2.0
"""A table and a picture of one or several runs: entropy and accuracy over the steps.

    python scripts/compare_runs.py outputs/grpo outputs/steer_exp --out outputs/comparison.png

Each argument is a run's folder with the files of verl's `file` logger (`metrics*.jsonl`). Runs whose folders end in
the same name, such as `seed0/grpo` and `seed1/grpo`, are seeds of one method: the table gives their mean and the
picture a band from the least to the greatest.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

ENTROPY, WEIGHT = "actor/entropy", "actor/token_weights_mean"


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


def table(methods: dict[str, list[Run]]) -> Table:
    """Accuracy before and after, entropy first and last, mean token weight: means over the seeds."""
    result = Table(title="means over seeds" if any(len(runs) > 1 for runs in methods.values()) else None)
    for heading in ("method", "seeds", "accuracy before", "after", "entropy first", "last", "mean token weight"):
        result.add_column(heading, justify="left" if heading == "method" else "right")

    def mean(series: Sequence[dict[int, float]], position: int) -> str:
        values = [list(one.values())[position] for one in series if one]
        return f"{fmean(values):.3f}" if values else "-"

    for name, runs in methods.items():
        weights = [fmean(series.values()) for run in runs if (series := run.series(WEIGHT))]
        accuracy, entropy = [run.accuracy for run in runs], [run.series(ENTROPY) for run in runs]
        cells = (mean(accuracy, 0), mean(accuracy, -1), mean(entropy, 0), mean(entropy, -1))
        result.add_row(name, str(len(runs)), *cells, f"{fmean(weights):.3f}" if weights else "-")
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
