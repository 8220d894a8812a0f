# SPDX-License-Identifier: Apache-2.0
"""Single runs against the interval of a further run of the baseline."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t as student_t
from verl.steer.report.run_metrics import Run
from verl.steer.report.single_runs import prediction_interval, single_runs


def test_interval_by_hand():
    """Squares of 2 and 8 about the means with 1 and 2 degrees of freedom: the variance is 10 / 3."""
    half = student_t.ppf(0.975, 3) * math.sqrt(10 / 3 * (1 + 1 / 2))
    assert prediction_interval([1.0, 3.0], [[10.0, 12.0, 14.0], [99.0]]) == pytest.approx((2 - half, 2 + half))


def test_missing_figures_do_not_count():
    nan = math.nan
    assert prediction_interval([1.0, nan, 3.0], [[5.0, nan]]) == pytest.approx(prediction_interval([1.0, 3.0], []))


@pytest.mark.parametrize("baseline, others", [([1.0], [[2.0], [3.0]]), ([], [[1.0, 2.0]]), ([math.nan], [[1.0, 2.0]])])
def test_no_interval_without_a_variance_or_a_baseline(baseline, others):
    assert all(map(math.isnan, prediction_interval(baseline, others)))


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_coverage(spread):
    """Of methods with the same variance, whatever their means; within 4 standard errors of 95 %."""
    random, trials, inside = np.random.default_rng(0), 2000, 0
    for _ in range(trials):
        least, greatest = prediction_interval(
            random.normal(size=3).tolist(), [random.normal(spread * method, size=3).tolist() for method in range(1, 3)]
        )
        inside += least < random.normal() < greatest
    assert abs(inside / trials - 0.95) < 4 * math.sqrt(0.95 * 0.05 / trials)


def test_methods_with_one_run():
    def run(name, seed, accuracy):
        return Run(name, Path(), {1: {"val-core/countdown/acc/mean@64": accuracy, "actor/entropy": 0.5}}, seed)

    methods = {
        "grpo": [run("grpo", "1", 0.1), run("grpo", "2", 0.3)],
        "two": [run("two", "1", 0.4), run("two", "2", 0.4)],
        "one": [run("one", "1", 0.7)],
    }
    found, interval = single_runs(methods, "grpo", ["final", "last ten"])
    assert found.to_dict() == {"final": {"one": 0.7}, "last ten": {"one": 0.5}}
    assert interval["final"].tolist() == pytest.approx(prediction_interval([0.1, 0.3], [[0.4, 0.4]]))
    methods["again"] = [run("again", "1", 0.6), run("again", "1", 0.6)]
    assert list(single_runs(methods, "grpo", ["final"])[0].index) == ["one"]
    found, _ = single_runs({"one": methods["one"], "grpo": methods["grpo"]}, "one", ["final"])
    assert found.empty and list(found) == ["final"]
