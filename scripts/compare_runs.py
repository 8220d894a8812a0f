# SPDX-License-Identifier: Apache-2.0
"""A table and a picture of one or several runs: entropy, accuracy and speed; and a table of their entropy audits.

    python scripts/compare_runs.py outputs/grpo outputs/steer_exp --out outputs/comparison.png

Each argument is a run's folder with the files of verl's `file` logger (`metrics*.jsonl`), or one such file. Runs whose
names differ only by a seed, such as `seed0/grpo` and `seed1/grpo`, are seeds of one method: the table gives their mean
and its 95 % interval by Student's t, and the picture a band from the least to the greatest. A second table has the
errors and correlations of each estimate with the true change of the entropy, for runs with an entropy audit
(docs/entropy_audit.md). `scripts/report.py` makes a page of everything that a run logged.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import matplotlib
import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from verl.steer.report import figures
from verl.steer.report.run_metrics import Run, group_seeds, mean_and_interval, read_run, summary

#: Heading -> (metric below `entropy_audit/` or `entropy_audit/step/`, factor, decimals).
AUDIT_FIGURES = {
    "tokens": ("tokens", 1, 0),
    "MSE, 1e-4": ("{}/mse", 1e4, 3),
    "Pearson": ("{}/pearson", 1, 2),
    "Spearman": ("{}/spearman", 1, 2),
    "Pearson, sizes": ("{}/pearson_magnitude", 1, 2),
    "Spearman, sizes": ("{}/spearman_magnitude", 1, 2),
}


def table(methods: dict[str, list[Run]]) -> Table:
    """A row per method: means of its runs' figures, with intervals if there are several. No column without a value."""
    several = any(len(runs) > 1 for runs in methods.values())
    rows = pd.DataFrame({name: summary(runs) for name, runs in methods.items()}).T
    rows = rows.loc[:, (rows != "-").any()]
    result = Table("method", title="means over seeds ± 95 % interval" if several else None)
    for heading in ("seeds", *rows):
        result.add_column(heading, justify="right")
    for name, row in rows.iterrows():
        result.add_row(name, str(len(methods[name])), *row)
    return result


def audit_table(methods: dict[str, list[Run]]) -> Table:
    """A row per method, span of the change (an update or a whole step) and estimator.

    Figures are means over a run's audited steps, then over the seeds.
    """
    result = Table("method", "change by", "estimator", title="estimated against true change of the entropy")
    for heading in AUDIT_FIGURES:
        result.add_column(heading, justify="right")
    for name, runs in methods.items():
        metrics = {metric for run in runs for metric in run.metrics}
        for span, prefix in (("update", "entropy_audit/"), ("step", "entropy_audit/step/")):
            scored = [re.fullmatch(rf"{prefix}(\w+)/mse", metric) for metric in sorted(metrics)]
            for estimator in (found[1] for found in scored if found):
                cells = []
                for metric, factor, decimals in AUDIT_FIGURES.values():
                    logged = [pd.Series(run.series(prefix + metric.format(estimator)), dtype=float) for run in runs]
                    cells.append(mean_and_interval([factor * values.mean() for values in logged], decimals))
                result.add_row(name, span, estimator, *cells)
    return result


def show(tables: list[Table], markdown: Path | None) -> None:
    """Print the tables, and write them to the file `markdown`, if given."""
    # A log has no terminal width.
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
    with matplotlib.rc_context(figures.STYLE):
        drawing = figures.training(methods)
        if drawing is None:
            sys.exit("compare_runs: no entropy and no accuracy in the metrics; expected runs of verl's trainer")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        drawing.figure.savefig(args.out, dpi=150)
    show([one for one in (table(methods), audit_table(methods)) if one.row_count], args.markdown)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
