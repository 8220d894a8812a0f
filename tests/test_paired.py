# SPDX-License-Identifier: Apache-2.0
"""Comparison of methods with a baseline, paired by seed."""

import math
from pathlib import Path

import pytest
from scipy.stats import t as student_t
from verl.steer.report.paired import differences, holm
from verl.steer.report.run_metrics import Run, run_figures, seed_of


def run(name, seed, accuracy, **metrics):
    data = {"val-core/countdown/acc/mean@64": accuracy, "actor/entropy": 0.5, **metrics}
    return Run(name, Path(), {1: data}, seed=str(seed))


def test_holms_correction_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    corrected = holm([0.02, math.nan, 0.01])
    assert corrected[::2] == pytest.approx([0.02, 0.02]) and math.isnan(corrected[1])


def test_differences_pair_seeds_in_any_order_and_leave_out_the_others():
    methods = {
        "grpo": [run("grpo", 1, 0.1), run("grpo", 2, 0.3), run("grpo", 3, 0.2)],
        "other": [run("other", 3, 0.5), run("other", 1, 0.2), run("other", 9, 0.9)],
        "alone": [run("alone", 2, 0.9)],
    }
    found = differences(methods, "grpo", ["final"])
    assert found.keys() == {("other", "final")}
    difference = found["other", "final"]
    assert sorted(difference.values) == pytest.approx([0.1, 0.3])
    deviation = math.sqrt(2) * 0.1
    assert difference.effect == pytest.approx(0.2 / deviation)
    assert difference.p == pytest.approx(2 * student_t.sf(0.2 / (deviation / math.sqrt(2)), df=1))
    assert difference.p_holm == difference.p


def test_figures_are_corrected_together():
    methods = {
        name: [run(name, seed, value + 0.01 * seed**power) for seed in (1, 2, 3)]
        for name, value, power in (("grpo", 0.1, 1), ("a", 0.3, 2), ("b", 0.5, 2))
    }
    found = differences(methods, "grpo", ["final"])
    assert found["b", "final"].p_holm == pytest.approx(2 * found["b", "final"].p)
    assert found["a", "final"].p_holm == pytest.approx(found["a", "final"].p)


def test_equal_differences_tell_nothing_about_their_variance(recwarn):
    accuracies = {"grpo": (0.1, 0.2, 0.3), "a": (0.4, 0.5, 0.6), "b": (0.2, 0.4, 0.5)}
    methods = {name: [run(name, seed, one) for seed, one in enumerate(seeds)] for name, seeds in accuracies.items()}
    found = differences(methods, "grpo", ["final"])
    assert found["a", "final"].values == pytest.approx([0.3] * 3)
    assert all(map(math.isnan, found["a", "final"][1:]))
    assert found["b", "final"].p_holm == found["b", "final"].p < 0.1
    assert not recwarn.list


def test_figures_of_validations_with_many_samples():
    metrics = {f"val-aux/countdown/acc/pass@{k}": k / 100 for k in (1, 16, 4, 64, 8)}
    metrics |= {"val-aux/countdown/distinct_right": 2.5, "val-aux/countdown/distinct_share": 0.125}
    figures = run_figures(run("grpo", 1, 0.1, **metrics))
    assert (figures["pass@8"], figures["pass@64"]) == (0.08, 0.64)
    assert (figures["distinct right"], figures["distinct share"]) == (2.5, 0.125)
    assert [name for name in figures if "pass" in name or "distinct" in name] == [
        *(f"pass@{k}" for k in (8, 16, 64)),
        "distinct right",
        "distinct share",
    ]
    assert "pass@4" not in figures and "pass@1" not in figures


@pytest.mark.parametrize(
    "path, seed", [("seed42/grpo", "42"), ("grpo_seed7", "7"), ("1/grpo", "1"), ("grpo", ""), ("grpo_1e-4", "")]
)
def test_a_runs_seed_is_that_of_its_path(path, seed):
    assert seed_of(Path("outputs") / path) == seed
