# SPDX-License-Identifier: Apache-2.0
"""Metrics of a validation with several samples of each problem: verl's own, faster, and pass@k and distinct answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from verl.trainer.ppo.metric_utils import calc_maj_val


@cache
def _resamples(samples: int, size: int, count: int, seed: int) -> NDArray[np.int64]:
    """Indices of resamples, (count, size): those that verl draws."""
    return np.random.RandomState(seed).choice(samples, size=(count, size), replace=True)


def bootstrap_metric(
    data: list[Any],
    subset_size: int,
    reduce_fns: list[Callable[..., Any]],
    n_bootstrap: int = 1000,
    seed: int = 42,
) -> list[tuple[float, float]]:
    """verl's `bootstrap_metric` with the same resamples and results, without a Python call for each of them.

    Raises:
        ValueError: a reduction is neither `np.max`, `np.min` nor verl's majority vote.
    """
    drawn = _resamples(len(data), subset_size, n_bootstrap, seed)
    results = []
    for reduce_fn in reduce_fns:
        if reduce_fn is np.max or reduce_fn is np.min:
            values = np.asarray(data, dtype=np.float64)[drawn]
            reduced = values.max(axis=1) if reduce_fn is np.max else values.min(axis=1)
        elif isinstance(reduce_fn, partial) and reduce_fn.func is calc_maj_val:
            reduced = _majority_values(data, drawn, **reduce_fn.keywords)
        else:
            raise ValueError(f"reduce_fns has {reduce_fn}: expected np.max, np.min or verl's calc_maj_val")
        results.append((float(reduced.mean()), float(reduced.std())))
    return results


def _majority_values(
    data: list[dict[str, Any]], drawn: NDArray[np.int64], vote_key: str, val_key: str
) -> NDArray[np.float64]:
    """The value of the first of the most frequent votes in each resample, (count,)."""
    codes = np.unique([str(one[vote_key]) for one in data], return_inverse=True)[1]
    values = np.array([one[val_key] for one in data], dtype=np.float64)
    votes, rows = codes[drawn], np.arange(len(drawn))
    kinds = codes.max() + 1
    counts = np.bincount((rows[:, None] * kinds + votes).ravel(), minlength=len(drawn) * kinds).reshape(-1, kinds)
    # `argmax` takes the first of equals, as verl's dictionary of votes does.
    first = np.take_along_axis(counts, votes, axis=1).argmax(axis=1)
    return values[drawn[rows, first]]


def pass_at_k(right: NDArray[Any], samples: NDArray[Any], k: int) -> NDArray[np.float64]:
    """Probability that one of k samples drawn without replacement is right (arXiv 2107.03374, equation 1).

    Args:
        right: number of right samples of each problem, (problems,).
        samples: number of samples of each problem, each at least k, (problems,).
        k: number of samples drawn.
    """
    # With fewer than k wrong samples one of these factors is 0, and so is the product.
    wrong = (samples - right)[:, None] - np.arange(k)
    return 1 - (wrong / (samples[:, None] - np.arange(k))).prod(axis=1)


def problems_of(
    data_sources: Sequence[str], uids: Sequence[str], prompts: Sequence[str], asked: Mapping[tuple[str, str], int]
) -> list[str]:
    """What the samples of one problem have in common: the row's uid, or the prompt where each row is sampled once.

    Files such as AIME's have a problem in many rows, and verl gives each row a uid.

    Args:
        data_sources, uids, prompts: of each stored sample.
        asked: (data source, uid) -> number of samples requested.
    """
    several = {source for (source, _), count in asked.items() if count > 1}
    samples = zip(data_sources, uids, prompts, strict=True)
    return [uid if str(source) in several else prompt for source, uid, prompt in samples]


def sampling_metrics(
    data_sources: Sequence[str], problems: Sequence[str], values: Mapping[str, Sequence[Any]]
) -> dict[str, float]:
    """pass@k and distinct right answers of a validation with several samples of each problem.

    Args:
        data_sources, problems: of each stored sample.
        values: variable -> value of each stored sample; it is right if its `acc` is 1, and `pred` is its answer.

    Returns:
        For each data source with `acc`, and N the greatest number of samples that half of its problems have, at least
        2: `val-aux/SOURCE/acc/pass@k` for the powers of two up to N, as a mean over the problems with k samples or
        more, which are all of them unless samples were lost. With `pred` also
        `val-aux/SOURCE/distinct_right` and `.../distinct_share`: the number of different right answers of a problem as
        a mean over problems, and that number divided by the number of right answers, both summed over problems.
    """
    answers: dict[str, dict[str, list[tuple[bool, Any]]]] = defaultdict(lambda: defaultdict(list))
    preds = values.get("pred", [None] * len(problems))
    for source, problem, acc, pred in zip(data_sources, problems, values.get("acc", []), preds, strict=False):
        if acc is not None:
            answers[source][problem].append((acc >= 1, pred))
    metrics = {}
    for source, by_problem in answers.items():
        right = np.array([sum(acc for acc, _ in samples) for samples in by_problem.values()])
        samples = np.array([len(samples) for samples in by_problem.values()])
        # Not the greatest number of all: of a data set with a row a problem, a few are there twice.
        most = int(np.sort(samples)[len(samples) // 2])
        if most < 2:
            continue
        for k in (2**power for power in range(most.bit_length())):
            enough = samples >= k
            metrics[f"val-aux/{source}/acc/pass@{k}"] = float(pass_at_k(right[enough], samples[enough], k).mean())
        if "pred" in values:
            distinct = [len({pred for acc, pred in samples if acc}) for samples in by_problem.values()]
            metrics[f"val-aux/{source}/distinct_right"] = float(np.mean(distinct))
            metrics[f"val-aux/{source}/distinct_share"] = sum(distinct) / max(1, int(right.sum()))
    return metrics
