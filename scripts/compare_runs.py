# SPDX-License-Identifier: Apache-2.0
"""A table and a picture of one or several runs: entropy, accuracy and speed.

    python scripts/compare_runs.py outputs/grpo outputs/steer_exp --out outputs/comparison.png

Each argument is a run's folder with the files of verl's `file` logger (`metrics*.jsonl`), or one such file. Runs whose
names differ only by a seed, such as `seed0/grpo` and `seed1/grpo`, are seeds of one method: the table gives their mean
and its 95 % interval by Student's t, and the picture a band from the least to the greatest. `scripts/report.py` makes a
page of all that a run logged.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.table import Table
from verl.utils import report_figures
from verl.utils.run_metrics import COLUMNS, Run, group_seeds, read_run, summary


def table(methods: dict[str, list[Run]]) -> Table:
    """A row for each method: means of its runs' figures, with intervals where there are several runs."""
    several = any(len(runs) > 1 for runs in methods.values())
    result = Table(title="means over seeds ± 95 % interval" if several else None)
    for heading in ("method", "seeds", *(heading for heading, *_ in COLUMNS)):
        result.add_column(heading, justify="left" if heading == "method" else "right")
    for name, runs in methods.items():
        result.add_row(name, str(len(runs)), *summary(runs).values())
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
    # A log has no width to keep to.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table(methods))
    console.print(f"picture: {args.out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
