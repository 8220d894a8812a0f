# SPDX-License-Identifier: Apache-2.0
"""Copy the metrics that comparisons of runs need into small files, which can be kept when the runs are deleted.

    python scripts/keep_metrics.py outputs/study/seed45/countdown_* --out docs/study_runs
    python scripts/compare_runs.py docs/study_runs/seed45/* --baseline countdown_grpo --out outputs/seed45.png

The run `seed45/countdown_grpo` becomes `seed45/countdown_grpo.jsonl`, in the format of verl's `file` logger. It has the
entropy and its target, the token weights and the rewards, with five significant digits, and the validations. Metrics of
speed, which another machine would not repeat, are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from verl.steer.report.run_metrics import Run, compared_metrics, read_runs


def file_of(run: Run) -> str:
    """The name of the file that keeps a run."""
    return f"seed{run.seed}/{run.name}.jsonl" if run.seed else f"{run.name}.jsonl"


def records(run: Run) -> list[dict[str, object]]:
    """The records of the kept file: one for each step at which something is kept."""
    series = {name: run.series(name) for name in compared_metrics(run.metrics)}
    steps = {
        step: {name: kept(name, values[step]) for name, values in series.items() if step in values}
        for step in sorted(run.steps)
    }
    return [{"step": step, "data": data} for step, data in steps.items() if data]


def kept(name: str, value: float) -> float:
    """A metric's value: of a validation as it is, since tests of its differences need equal ones to be equal."""
    return value if name.startswith("val-") else float(f"{value:.5g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or its .jsonl file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the small files")
    args = parser.parse_args()
    try:
        runs = read_runs(args.runs)
    except ValueError as error:
        sys.exit(f"keep_metrics: {error}")
    for run in runs:
        file = args.out / file_of(run)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(record) + "\n" for record in records(run)))
        print(file)


if __name__ == "__main__":
    main()
