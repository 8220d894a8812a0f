# SPDX-License-Identifier: Apache-2.0
"""Metrics of a step and of a validation in which rollouts are lost.

A step goes on without them: upstream computes advantages relative to the group's stored rollouts, and fills
mini-batches with rows that have no valid token.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

#: The number of a step's lost rollouts.
LOST_IN_TRAINING = "training/rollout_failure/lost_rollouts"


def lost_rollouts(asked: Mapping[str, int], failed: Iterable[str], keys: Iterable[str]) -> int:
    """The number of lost rollouts of the failed prompts.

    Args:
        asked: prompt -> number of rollouts requested.
        failed: prompts with status `failure`, also those of earlier steps; the others lack no rollout.
        keys: `{prompt}_{rollout}_{output}` of the stored outputs.
    """
    stored = Counter(session.partition("_")[0] for session in {key.rpartition("_")[0] for key in keys})
    return sum(asked[uid] - stored[uid] for uid in failed if uid in asked)


def stored_samples(
    data_sources: Sequence[str], uids: Sequence[str], asked: Mapping[tuple[str, str], int]
) -> tuple[dict[tuple[str, str], int], dict[str, int]]:
    """The numbers of stored samples of a validation.

    Args:
        data_sources, uids: of each stored sample.
        asked: (data source, prompt) -> number of samples requested.

    Returns:
        (data source, prompt) -> number of samples stored, for upstream, which counts the others as wrong; and the
        metrics `val-aux/{data source}/num_samples` (stored) and `.../num_lost`.
    """
    found = Counter(zip(map(str, data_sources), map(str, uids), strict=True))
    stored = {prompt: min(found[prompt], count) for prompt, count in asked.items()}
    metrics: Counter[str] = Counter()
    for (source, uid), count in asked.items():
        metrics[f"val-aux/{source}/num_samples"] += stored[source, uid]
        metrics[f"val-aux/{source}/num_lost"] += count - stored[source, uid]
    return stored, dict(metrics)


def lost_share(metrics: Mapping[str, float], name: str) -> float:
    """The share of samples that a validation lost, of the data source of one of its metrics; 0 if it has none.

    Args:
        metrics: the validation's, with those of `stored_samples`.
        name: of a metric, `val-(core|aux)/{data source}/...`.
    """
    measured = name.partition("/")[2]
    sources = [key.removeprefix("val-aux/").removesuffix("/num_lost") for key in metrics if key.endswith("/num_lost")]
    source = max((one for one in sources if measured.startswith(f"{one}/")), key=len, default=None)
    if source is None:
        return 0.0
    lost, stored = (metrics[f"val-aux/{source}/{count}"] for count in ("num_lost", "num_samples"))
    return lost / max(1, lost + stored)


def means_over_stored_samples(
    metrics: Mapping[str, float],
    data_sources: Sequence[str],
    uids: Sequence[str],
    values: Mapping[str, Sequence[Any]],
    asked: Mapping[tuple[str, str], int],
) -> dict[str, float]:
    """Upstream's metrics of a validation that lacks samples, with one mean for each data source and variable.

    Upstream groups prompts by their number of samples, so that `acc/mean@4` omits a prompt with three. Here `mean@N`,
    N the largest number requested, is over all prompts, each with its stored samples, and `mean@k` of a smaller k is
    dropped. The other metrics remain upstream's.

    Args:
        metrics: upstream's, `val-(core|aux)/{data source}/{variable}/...`.
        data_sources, uids: of each stored sample.
        values: variable -> value of each stored sample, or None.
        asked: (data source, prompt) -> number of samples requested.
    """
    metrics = dict(metrics)
    if "acc" in values:
        values = {**values, "acc_success_only": values["acc"]}  # upstream's `acc` without lost samples counted as wrong
    samples: dict[tuple[str, str], dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for variable, column in values.items():
        for source, uid, value in zip(data_sources, uids, column, strict=True):
            if value is not None and not isinstance(value, str):
                samples[source, variable][uid].append(value)
    for (source, variable), by_prompt in samples.items():
        replaced = [name for name in metrics if name.partition("/")[2].startswith(f"{source}/{variable}/mean@")]
        if replaced:
            core = any(name.startswith("val-core/") for name in replaced)
            for name in replaced:
                del metrics[name]
            most = max(count for (other, _), count in asked.items() if other == source)
            mean = float(np.mean([np.mean(of_prompt) for of_prompt in by_prompt.values()]))
            metrics[f"val-{'core' if core else 'aux'}/{source}/{variable}/mean@{most}"] = mean
    return metrics
