# SPDX-License-Identifier: Apache-2.0
"""Copy the metrics that comparisons of runs need into small files, which can be kept when the runs are deleted.

    python scripts/keep_metrics.py outputs/study/seed45/countdown_* --out docs/study_runs
    python scripts/compare_runs.py docs/study_runs/seed45/* --baseline countdown_grpo --out outputs/seed45.png

The run `seed45/countdown_grpo` becomes `seed45/countdown_grpo.jsonl`, in the format of verl's `file` logger. It has the
entropy and its target, the token weights and the rewards, with five significant digits, and the validations. Metrics of
speed, which another machine would not repeat, are left out. A kept file is replaced by that of another run only with
`--force`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from verl.steer.report.run_metrics import Run, compared_metrics, read_runs


def file_of(run: Run) -> str:
    """The name of the file that keeps a run."""
    return f"seed{run.seed}/{run.name}.jsonl" if run.seed else f"{run.name}.jsonl"


def records(run: Run) -> list[dict[str, object]]:
    """The records of the kept file: one for each step at which something is kept."""
    names = compared_metrics(run.metrics)
    steps = {
        step: {name: kept(name, data[name]) for name in names if name in data}
        for step, data in sorted(run.steps.items())
    }
    return [{"step": step, "data": data} for step, data in steps.items() if data]


def kept(name: str, value: float | None) -> float | None:
    """A metric's value: of a validation as it is, since tests of its differences need equal ones to be equal.

    One that is not finite is null, as verl logs NaN: a run that ends with such a value has no figures of the end.
    """
    if value is None or not math.isfinite(value):
        return None
    return value if name.startswith("val-") else float(f"{value:.5g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or its .jsonl file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the small files")
    parser.add_argument("--force", action="store_true", help="replace the kept files of other runs")
    args = parser.parse_args()
    try:
        small = {args.out / file_of(run): records(run) for run in read_runs(args.runs)}
        for file, lines in small.items():
            if not lines:
                raise ValueError(f"{file}: nothing to keep; expected a run with the metrics that runs are compared by")
            keep(file, "".join(json.dumps(line) + "\n" for line in lines), args.force)
            print(file)
    except (OSError, ValueError) as error:
        sys.exit(f"keep_metrics: {error}")


def keep(file: Path, text: str, force: bool) -> None:
    """Write a small file; ValueError if it would replace another one."""
    if file.is_file() and not force and file.read_text() != text:
        raise ValueError(f"{file}: keeps another run; expected another --out, or --force to replace it")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


if __name__ == "__main__":
    main()
