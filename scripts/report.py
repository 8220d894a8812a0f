# SPDX-License-Identifier: Apache-2.0
"""A page of one or several runs: entropy, token weights, and estimated against true changes of the entropy.

    python scripts/report.py outputs/grpo outputs/steer_exp --out outputs/report

Each argument is a run: its folder with `metrics*.jsonl`, or one file of verl's `file` logger. Runs whose names differ
only by a seed (`grpo_seed1` and `grpo_seed2`, `1/grpo` and `2/grpo`) are seeds of one method. FOLDER/report.html opens
without a network; FOLDER/figures has the figures as PNG and SVG. A figure without data is left out, and the page names
the option that logs its data.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from verl.steer.report.page import ReportOptions, write_report
from verl.steer.report.run_metrics import read_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or its .jsonl file")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder for the page and its figures")
    parser.add_argument("--estimator", default="released", help="estimator of the tokens' colours (released)")
    parser.add_argument("--probability-bound", type=float, default=0.5, help="bound between the quadrants (0.5)")
    parser.add_argument("--responses", type=int, default=4, help="responses shown for each method (4)")
    args = parser.parse_args()
    try:
        options = ReportOptions(args.estimator, args.probability_bound, args.responses)
        page = write_report(read_runs(args.runs), args.out, options)
    except (OSError, ValueError) as error:
        sys.exit(f"report: {error}")
    print(f"report: {page}")


if __name__ == "__main__":
    main()
