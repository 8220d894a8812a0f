# SPDX-License-Identifier: Apache-2.0
"""Metrics of a validation with several samples of a problem, against verl's own and against enumeration."""

from functools import partial
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from verl.steer.validation_metrics import bootstrap_metric, pass_at_k, problems_of, sampling_metrics
from verl.trainer.ppo import metric_utils
from verl.trainer.ppo.metric_utils import calc_maj_val

SETTINGS = {"n_bootstrap": 60, "seed": 42}


@given(
    st.lists(st.one_of(st.booleans(), st.sampled_from([-1.0, 0.25, 1.0])), min_size=1, max_size=9), st.integers(1, 9)
)
def test_best_and_worst_are_verls_numbers(data, size):
    expected = metric_utils.bootstrap_metric(data, size, [np.max, np.min], **SETTINGS)
    assert bootstrap_metric(data, size, [np.max, np.min], **SETTINGS) == expected


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([-1.0, 0.5, 1.0])), min_size=1, max_size=9),
    st.integers(1, 9),
)
def test_majority_is_verls_number(votes, size):
    data = [{"val": value, "pred": pred} for pred, value in votes]
    reduce_fns = [partial(calc_maj_val, vote_key="pred", val_key="val")]
    expected = metric_utils.bootstrap_metric(data, size, reduce_fns, **SETTINGS)
    assert bootstrap_metric(data, size, reduce_fns, **SETTINGS) == expected


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="expected np.max, np.min"):
        bootstrap_metric([0.0, 1.0], 2, [np.median])


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_fraction_of_subsets_with_a_right_sample(numbers):
    samples, right, k = numbers
    subsets = list(combinations([True] * right + [False] * (samples - right), k))
    expected = sum(map(any, subsets)) / len(subsets)
    assert pass_at_k(np.array([right]), np.array([samples]), k) == pytest.approx([expected], abs=1e-12)


def test_metrics_of_two_problems_by_hand():
    sources, uids = ["a"] * 8, ["x"] * 4 + ["y"] * 4
    values = {"acc": [1, 1, 1, 0, 0, 0, 0, 0], "pred": ["p", "p", "q", "r", "s", "s", "t", "u"]}
    expected = {
        "val-aux/a/acc/pass@1": 3 / 8,
        "val-aux/a/acc/pass@2": 1 / 2,
        "val-aux/a/acc/pass@4": 1 / 2,
        "val-aux/a/distinct_right": 1.0,  # two for x, none for y
        "val-aux/a/distinct_share": 2 / 3,
    }
    assert sampling_metrics(sources, uids, values) == pytest.approx(expected)


def test_pass_at_k_is_of_the_problems_with_k_samples_and_one_sample_has_no_metrics():
    """A sample of y was lost: one of two of its samples is right in 2 of 3 pairs."""
    values = {"acc": [True, False, False, False, True, False, False, None], "pred": ["p"] * 8}
    metrics = sampling_metrics(["a"] * 7 + ["b"], ["x"] * 4 + ["y"] * 3 + ["z"], values)
    shares = [metrics[f"val-aux/a/acc/pass@{k}"] for k in (1, 2, 4)]
    assert shares == pytest.approx([(1 / 4 + 1 / 3) / 2, (1 / 2 + 2 / 3) / 2, 1.0])
    assert "val-aux/a/acc/pass@8" not in metrics
    assert not any(name.startswith("val-aux/b") for name in metrics)
    assert sampling_metrics(["a"], ["x"], {"acc": [True]}) == {}
    scores = sampling_metrics(["a", "a"], ["x", "x"], {"acc": [-1.0, 0.5]})  # of which none is right
    assert scores == {"val-aux/a/acc/pass@1": 0.0, "val-aux/a/acc/pass@2": 0.0}
    assert sampling_metrics(["a", "a"], ["x", "x"], {"score": [1.0, 0.0]}) == {}


def test_rows_of_one_prompt_are_samples_of_a_problem_where_each_is_sampled_once():
    """Source a has two problems in two rows each, b a row sampled twice, and c four problems, one of them twice."""
    sources, uids = [*"aaaabbccccc"], ["1", "2", "3", "4", "5", "5", "6", "7", "8", "9", "10"]
    prompts = ["x", "y", "x", "y", "x", "x", "p", "p", "q", "r", "s"]
    asked = {(source, uid): 1 + (source == "b") for source, uid in zip(sources, uids, strict=True)}
    problems = problems_of(sources, uids, prompts, asked)
    assert problems == ["x", "y", "x", "y", "5", "5", "p", "p", "q", "r", "s"]
    metrics = sampling_metrics(sources, problems, {"acc": [1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1]})
    expected = {"a/acc/pass@1": 3 / 4, "a/acc/pass@2": 1.0, "b/acc/pass@1": 1 / 2, "b/acc/pass@2": 1.0}
    assert metrics == {f"val-aux/{name}": value for name, value in expected.items()}
