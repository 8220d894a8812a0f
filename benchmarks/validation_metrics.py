# SPDX-License-Identifier: Apache-2.0
"""Time of the metrics of a validation with 64 samples of each problem: verl's bootstrap, and this fork's.

python benchmarks/validation_metrics.py
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

import verl.steer.validation_metrics as ours
from verl.trainer.ppo import metric_utils


def validation(problems: int, samples: int) -> tuple[list[str], list[str], dict[str, list[Any]]]:
    """Data sources, problems and values of random samples, a third of them right."""
    rng = random.Random(0)
    right = [rng.random() < 1 / 3 for _ in range(problems * samples)]
    values: dict[str, list[Any]] = {
        "reward": [2.0 * one - 1 for one in right],
        "acc": [float(one) for one in right],
        "pred": [str(rng.randint(0, 20)) for _ in right],
    }
    return ["source"] * len(right), [str(index // samples) for index in range(len(right))], values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--samples", type=int, default=64)
    args = parser.parse_args()
    data, seconds, results = validation(args.problems, args.samples), [], []
    for bootstrap in (metric_utils.bootstrap_metric, ours.bootstrap_metric):
        metric_utils.bootstrap_metric = bootstrap
        start = time.perf_counter()
        results.append(metric_utils.process_validation_metrics(*data))
        seconds.append(time.perf_counter() - start)
    same = "the same" if results[0] == results[1] else "DIFFERENT"
    print(f"verl {seconds[0]:.2f} s, here {seconds[1]:.2f} s, ratio {seconds[0] / seconds[1]:.1f}; results {same}")


if __name__ == "__main__":
    main()
