# SPDX-License-Identifier: Apache-2.0
"""What a step and a validation say of rollouts that were asked for and never stored.

A step goes on without them: upstream's advantages are relative to those of the group that are there, and rows without
a valid token fill its mini-batches up.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

#: The number of a step's rollouts that are missing.
LOST_IN_TRAINING = "training/rollout_failure/lost_rollouts"


def lost_rollouts(asked: Mapping[str, int], failed: Iterable[str], keys: Iterable[str]) -> int:
    """How many rollouts of the prompts that failed are missing.

    Args:
        asked: rollouts of each prompt.
        failed: prompts whose status is `failure`; a finished one lacks none.
        keys: of what is stored, `{prompt}_{rollout}_{output}`.
    """
    stored = Counter(session.partition("_")[0] for session in {key.rpartition("_")[0] for key in keys})
    return sum(asked[uid] - stored[uid] for uid in failed)


def stored_samples(
    data_sources: Sequence[str], uids: Sequence[str], asked: Mapping[tuple[str, str], int]
) -> tuple[dict[tuple[str, str], int], dict[str, int]]:
    """How many of a validation's samples are there, prompt by prompt, and its metrics of them.

    Args:
        data_sources, uids: of each sample that is there.
        asked: samples of each (data source, prompt).

    Returns:
        Samples of each (data source, prompt), for upstream to take no other for wrong, and the metrics
        `val-aux/{data source}/num_samples`, what the data source's means are over, and `.../num_lost`.
    """
    there = Counter(zip(map(str, data_sources), map(str, uids), strict=True))
    stored = {prompt: min(there[prompt], count) for prompt, count in asked.items()}
    metrics: Counter[str] = Counter()
    for (source, uid), count in asked.items():
        metrics[f"val-aux/{source}/num_samples"] += stored[source, uid]
        metrics[f"val-aux/{source}/num_lost"] += count - stored[source, uid]
    return stored, dict(metrics)


def means_of_what_is_there(
    metrics: Mapping[str, float],
    data_sources: Sequence[str],
    uids: Sequence[str],
    values: Mapping[str, Sequence[Any]],
    asked: Mapping[tuple[str, str], int],
) -> dict[str, float]:
    """Upstream's metrics of a validation that lacks samples, with one mean for each data source and variable.

    Upstream names a mean by how many samples a prompt has, so that `acc/mean@4` would leave a prompt with three out.
    Here `mean@N`, N the most samples asked for, is over all prompts, each with the samples it has, and `mean@k` of
    fewer is dropped. The other metrics @N stay upstream's, of the prompts with N samples.

    Args:
        metrics: upstream's, `val-(core|aux)/{data source}/{variable}/...`.
        data_sources, uids: of each sample that is there.
        values: variable -> of each sample, None where it has none.
        asked: samples of each (data source, prompt).
    """
    metrics = dict(metrics)
    if "acc" in values:
        values = {**values, "acc_success_only": values["acc"]}  # upstream's name for the same, had it counted the lost
    for source in {source for source, _ in asked}:
        most = max(count for (of, _), count in asked.items() if of == source)
        for variable, of_samples in values.items():
            by_prompt = defaultdict(list)
            for of, uid, value in zip(data_sources, uids, of_samples, strict=True):
                if of == source and value is not None and not isinstance(value, str):
                    by_prompt[uid].append(value)
            named = [name for name in metrics if name.split("/", 1)[1].startswith(f"{source}/{variable}/mean@")]
            if not named:
                continue
            core = any(name.startswith("val-core/") for name in named)
            for name in named:
                del metrics[name]
            mean = float(np.mean([np.mean(of_prompt) for of_prompt in by_prompt.values()]))
            metrics[f"val-{'core' if core else 'aux'}/{source}/{variable}/mean@{most}"] = mean
    return metrics
