# SPDX-License-Identifier: Apache-2.0
"""A table and a picture of one or several runs: entropy, accuracy and speed, and what an entropy audit found.

    python scripts/compare_runs.py outputs/grpo outputs/steer_exp --out outputs/comparison.png

Each argument is a run's folder with the files of verl's `file` logger (`metrics*.jsonl`), or one such file. Runs whose
names differ only by a seed, such as `seed0/grpo` and `seed1/grpo`, are seeds of one method: the table gives their mean
and its 95 % interval by Student's t, and the picture a band from the least to the greatest. A second table has the
errors and correlations of each estimate with the true change of the entropy, for runs with an entropy audit
(docs/entropy_audit.md). `scripts/report.py` makes a page of all that a run logged.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib
from rich import box
from rich.console import Console
from rich.table import Table
from verl.steer.report import figures as report_figures
from verl.steer.report.run_metrics import AUDIT_FIGURES, COLUMNS, Run, audit_summary, group_seeds, read_run, summary


def table(methods: dict[str, list[Run]]) -> Table:
    """A row for each method: means of its runs' figures, with intervals where there are several runs.

    What no run has is left out.
    """
    several = any(len(runs) > 1 for runs in methods.values())
    rows = {name: summary(runs) for name, runs in methods.items()}
    headings = [heading for heading, *_ in COLUMNS if any(row[heading] != "-" for row in rows.values())]
    result = Table(title="means over seeds ± 95 % interval" if several else None)
    for heading in ("method", "seeds", *headings):
        result.add_column(heading, justify="left" if heading == "method" else "right")
    for name, row in rows.items():
        result.add_row(name, str(len(methods[name])), *(row[heading] for heading in headings))
    return result


def audit_table(methods: dict[str, list[Run]]) -> Table | None:
    """A row for each method, span of the change (an update or a whole step) and estimator; None without an audit."""
    result = Table(title="estimated against true change of the entropy")
    for heading in ("method", "change by", "estimator", "tokens", *(heading for heading, *_ in AUDIT_FIGURES)):
        result.add_column(heading, justify="left" if heading in ("method", "change by", "estimator") else "right")
    for name, runs in methods.items():
        for span, of in (("update", "entropy_audit/"), ("step", "entropy_audit/step/")):
            for estimator, figures in audit_summary(runs, of).items():
                result.add_row(name, span, estimator, *figures.values())
    return result if result.row_count else None


def show(tables: list[Table], markdown: Path | None) -> None:
    """Print the tables, and write them into a file if one is named."""
    # A log has no width to keep to.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(*tables, sep="\n")
    if markdown:
        with markdown.open("w") as file:
            for one in tables:
                one.title, one.box = None, box.MARKDOWN
            Console(file=file, width=200).print(*tables, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or its .jsonl file")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .png or .svg")
    parser.add_argument("--markdown", type=Path, help="also write the table into this file")
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
    show([one for one in (table(methods), audit_table(methods)) if one], args.markdown)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
