# SPDX-License-Identifier: Apache-2.0
"""A table and a picture of one or several runs: entropy and accuracy over the steps.

    python scripts/compare_runs.py outputs/grpo outputs/steer_exp --out outputs/comparison.png

Each argument is a run's folder with the files of verl's `file` logger (`metrics*.jsonl`), or one such file. Runs whose
names differ only by a seed, such as `seed0/grpo` and `seed1/grpo`, are seeds of one method: the table gives their mean
and the picture a band from the least to the greatest. `scripts/report.py` makes a page of all that a run logged.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.table import Table
from verl.utils import report_figures
from verl.utils.run_metrics import Run, group_seeds, read_run, summary


def table(methods: dict[str, list[Run]]) -> Table:
    """Accuracy before and after, entropy first and last, mean token weight: means over the seeds."""
    rows = {name: summary(runs) for name, runs in methods.items()}
    result = Table(title="means over seeds" if any(len(runs) > 1 for runs in methods.values()) else None)
    result.add_column("method")
    for heading in ("seeds", *next(iter(rows.values()))):
        result.add_column(heading, justify="right")
    for name, values in rows.items():
        cells = ("-" if value is None else f"{value:.3f}" for value in values.values())
        result.add_row(name, str(len(methods[name])), *cells)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or its .jsonl file")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .png or .svg")
    args = parser.parse_args()
    try:
        methods = group_seeds(read_run(run) for run in args.runs)
    except ValueError as error:
        sys.exit(f"compare_runs: {error}")
    with matplotlib.rc_context(report_figures.STYLE):
        drawing = report_figures.training(methods)
        if drawing is None:
            sys.exit("compare_runs: no entropy and no accuracy in the metrics; expected runs of verl's trainer")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        drawing.figure.savefig(args.out, dpi=150)
    console = Console()
    console.print(table(methods))
    console.print(f"picture: {args.out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
