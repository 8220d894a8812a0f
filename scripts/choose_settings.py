# SPDX-License-Identifier: Apache-2.0
"""Choose each method's settings from a sweep: a table, and a file with the names of the chosen runs, one a line.

    python scripts/choose_settings.py outputs/study/seed47/countdown_* --out outputs/study/chosen.txt

The runs `NAME_lr5e-5` and `NAME_coefficient0.6` have other settings of the method `NAME`, whose own are in the run
`NAME`. Of a method's settings those with the greatest figure at the end are chosen, the method's own before equal ones.
`PARTS=chosen bash run/study.sh` trains the runs of the file.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Column, Table
from verl.steer.report.run_metrics import Run, figures_by_seed, group_seeds, read_runs

_SETTING = re.compile(r"_(?:lr|coefficient)\d.*")


def figures_of(runs: Sequence[Run], heading: str) -> pd.DataFrame:
    """A figure's mean over the seeds, by the columns method, run and figure, a method's own settings first.

    Raises:
        ValueError: if a run lacks the figure, runs have other lengths, or the runs of a method have different seeds.
    """
    rows = []
    for name, seeds in group_seeds(runs).items():
        values = figures_by_seed(seeds, [heading])[heading]
        if values.isna().any():
            raise ValueError(f"{name}: no {heading} at the end; expected whole runs, and a heading of compare_runs.py")
        rows.append((_SETTING.sub("", name), name, values.mean(), " ".join(sorted(values.index))))
    steps = {run.last_step: f"{run.name} {run.last_step}" for run in runs}
    if len(steps) > 1:
        raise ValueError(f"steps of the runs: {', '.join(steps.values())}; expected whole runs, of the same length")
    found = pd.DataFrame(rows, columns=["method", "run", "figure", "seeds"])
    for method, one in found.groupby("method"):
        if one["seeds"].nunique() > 1:
            raise ValueError(
                f"{method}: seeds {' and '.join(one['seeds'].unique())}; expected the same of each setting"
            )
    return found.iloc[(found["run"] != found["method"]).argsort(kind="stable")].drop(columns="seeds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or its .jsonl file")
    parser.add_argument("--figure", default="pass@8", help="the figure, a heading of compare_runs.py (pass@8)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the names of the chosen runs")
    args = parser.parse_args()
    try:
        found = figures_of(read_runs(args.runs), args.figure)
        table = Table(Column("method", no_wrap=True), "settings", f"{args.figure}, its own", "chosen", args.figure)
        chosen = []
        for method, one in found.groupby("method", sort=False):
            best = one.loc[one["figure"].idxmax()]
            chosen.append(best["run"])
            own = [f"{value:.3f}" for value in one.loc[one["run"] == method, "figure"]] or ["-"]
            setting = best["run"].removeprefix(f"{method}_") if best["run"] != method else "its own"
            table.add_row(str(method), str(len(one)), *own, setting, f"{best['figure']:.3f}")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("".join(f"{name}\n" for name in chosen))
    except (OSError, ValueError) as error:
        sys.exit(f"choose_settings: {error}")
    Console(markup=False, emoji=False, width=None if sys.stdout.isatty() else 120).print(table)
    print(f"chosen: {args.out}")


if __name__ == "__main__":
    main()
