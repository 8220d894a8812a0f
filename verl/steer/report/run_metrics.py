# SPDX-License-Identifier: Apache-2.0
"""What a run left behind: the metrics of verl's `file` logger, and the tokens of the entropy audit.

run = read_run(Path("outputs/steer_exp"))
run.series("actor/entropy")       {1: 0.369, 2: 0.361, ...}
run.audit                         one row a token, or None
group_seeds([run, ...])           {"steer_exp": [run, ...]}
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd
from scipy.stats import t as student_t
from verl.steer.report.metrics_files import in_order, start_of

ENTROPY, WEIGHT = "actor/entropy", "actor/token_weights_mean"
TOKENS, SECONDS = "perf/total_num_tokens", "perf/time_per_step"

#: Columns of `audit/*.parquet`, one row a token; the estimates are further ones, `omega_NAME`, and so is `clipped`
#: where the loss clips as PPO does.
AUDIT_COLUMNS = (
    *("step", "mini_batch", "token_id", "text", "response", "position"),
    *("prob", "entropy", "advantage", "ratio", "weight", "true_change"),
)

_SEED = re.compile(r"^seed[-_=]?\d+[-_. ]?|[-_. ]?seed[-_=]?\d+", re.IGNORECASE)


@dataclass
class Run:
    """One run: its name without the seed, its folder, and its metrics by step."""

    name: str
    folder: Path
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)

    def series(self, metric: str) -> dict[int, float]:
        """Step -> value wherever the metric was logged and finite (the logger writes NaN as null)."""
        found = ((step, data.get(metric)) for step, data in sorted(self.steps.items()))
        return {step: value for step, value in found if isinstance(value, int | float) and math.isfinite(value)}

    @property
    def accuracy(self) -> dict[int, float]:
        """Step -> mean accuracy on the validation data, averaged over its data sources."""
        names = {key for data in self.steps.values() for key in data}
        sources = [self.series(name) for name in names if name.startswith("val-core/") and "/acc/mean@" in name]
        steps = sorted({step for source in sources for step in source})
        return {step: fmean(source[step] for source in sources if step in source) for step in steps}

    @cached_property
    def audit(self) -> pd.DataFrame | None:
        """The tokens of `audit/*.parquet` in order, or None where there are none.

        Raises:
            ValueError: if a file lacks a column.
        """
        files = sorted((self.folder / "audit").glob("*.parquet"))
        frames = [_read_audit(file) for file in files]
        if not any(len(frame) for frame in frames):
            return None
        order = ["step", "mini_batch", "response", "position"]
        return pd.concat(frames).sort_values(order, kind="stable", ignore_index=True)


def _read_audit(file: Path) -> pd.DataFrame:
    frame = pd.read_parquet(file)
    missing = [name for name in AUDIT_COLUMNS if name not in frame]
    if not any(name.startswith("omega_") for name in frame):
        missing.append("omega_…")
    if missing:
        raise ValueError(f"{file}: no column {', '.join(missing)}; expected a file of the entropy audit")
    return frame


def read_run(path: Path) -> Run:
    """Read a run: its folder with `metrics*.jsonl`, or one file of verl's `file` logger.

    A resumed run goes on in a new file (`verl.steer.report.metrics_files`). What earlier files logged beyond the step
    where it starts is not part of the run any more. A torn last line, as a killed run leaves it, is passed over.

    Raises:
        ValueError: if there are no metrics, or a line is not a record.
    """
    path = path.resolve()
    files = [path] if path.is_file() else in_order(path)
    folder = path.parent if path.is_file() else path
    run = Run(method_of(folder if files != [path] or path.stem.startswith("metrics") else path.with_suffix("")), folder)
    for file in files:
        records = list(_records(file))
        if records:
            _, checkpoint = start_of(file)
            start = (
                records[0]["step"] if checkpoint is None else checkpoint or -1
            )  # one that begins again keeps nothing
            run.steps = {step: data for step, data in run.steps.items() if step <= start}
        for record in records:
            run.steps.setdefault(record["step"], {}).update(record["data"])
    if not run.steps:
        raise ValueError(f"{path}: no metrics*.jsonl; expected a run with `file` among trainer.logger")
    return run


def _records(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), start=1):
        try:
            record = json.loads(line)
            yield {"step": int(record["step"]), "data": dict(record["data"])}
        except (ValueError, KeyError, TypeError) as error:
            if not line.endswith(b"\n"):
                return
            raise ValueError(f'{file}:{number}: expected {{"step": n, "data": {{...}}}}, as verl logs') from error


def method_of(path: Path) -> str:
    """The run's name without its seed: `grpo` for `grpo`, `grpo_seed1`, `grpo/seed1`, `1/grpo` and `grpo/1`."""
    for part in (path.name, path.parent.name):
        name = _SEED.sub("", part)
        if name and not name.isdigit():
            return name
    return path.name


def group_seeds(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs by name, in the order given: those of one name are seeds of one method."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.name].append(run)
    return dict(groups)


def over_seeds(series: Sequence[dict[int, float]]) -> pd.DataFrame:
    """Mean, least and greatest over the seeds at each step that all have: columns mean, least, greatest."""
    table = pd.DataFrame([one for one in series if one]).dropna(axis=1).sort_index(axis=1)
    return pd.DataFrame({"mean": table.mean(), "least": table.min(), "greatest": table.max()})


def tokens_per_second(run: Run) -> float | None:
    """Tokens of prompts and responses a second of training, on all devices together."""
    tokens, seconds = run.series(TOKENS), run.series(SECONDS)
    steps = tokens.keys() & seconds.keys()
    return sum(tokens[step] for step in steps) / sum(seconds[step] for step in steps) if steps else None


def _reduced(
    series_of: Callable[[Run], dict[int, float]], reduce: Callable[[list[float]], float]
) -> Callable[[Run], float | None]:
    """A figure of a run: its series, reduced over the steps, or None where it has none."""

    def figure_of(run: Run) -> float | None:
        values = list(series_of(run).values())
        return reduce(values) if values else None

    return figure_of


#: Heading, figure of a run, decimals.
COLUMNS: tuple[tuple[str, Callable[[Run], float | None], int], ...] = (
    ("accuracy before", _reduced(lambda run: run.accuracy, itemgetter(0)), 3),
    ("final", _reduced(lambda run: run.accuracy, itemgetter(-1)), 3),
    ("best", _reduced(lambda run: run.accuracy, max), 3),
    ("entropy first", _reduced(lambda run: run.series(ENTROPY), itemgetter(0)), 3),
    ("last ten", _reduced(lambda run: run.series(ENTROPY), lambda values: fmean(values[-10:])), 3),
    ("least", _reduced(lambda run: run.series(ENTROPY), min), 3),
    ("mean token weight", _reduced(lambda run: run.series(WEIGHT), fmean), 3),
    ("tokens/s", tokens_per_second, 0),
)


#: Heading, metric behind NAME/ of an estimator, factor, decimals.
AUDIT_FIGURES = (
    ("MSE, 1e-4", "mse", 1e4, 3),
    ("Pearson", "pearson", 1, 2),
    ("Spearman", "spearman", 1, 2),
    ("Pearson, sizes", "pearson_magnitude", 1, 2),
    ("Spearman, sizes", "spearman_magnitude", 1, 2),
)


def mean_and_interval(values: list[float], decimals: int) -> str:
    """Mean, and from two values on the half width of its 95 % interval by Student's t."""
    if not values:
        return "-"
    mean = f"{fmean(values):.{decimals}f}"
    if len(values) == 1:
        return mean
    half = student_t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {half:.{decimals}f}"


def summary(runs: Sequence[Run]) -> dict[str, str]:
    """A method in a few figures, by `COLUMNS`: means over its seeds, with intervals where there are several."""
    values = {heading: [figure_of(run) for run in runs] for heading, figure_of, _ in COLUMNS}
    return {
        heading: mean_and_interval([value for value in values[heading] if value is not None], decimals)
        for heading, _, decimals in COLUMNS
    }


def audit_summary(runs: Sequence[Run], of: str) -> dict[str, dict[str, str]]:
    """By estimator what `AUDIT_FIGURES` names, and the tokens: means over the audited steps, then over the seeds.

    Args:
        runs: the seeds of a method.
        of: `entropy_audit/` for the changes by updates, `entropy_audit/step/` for those by whole steps.
    """
    metrics = {key for run in runs for data in run.steps.values() for key in data}
    names = [match[1] for key in metrics if (match := re.fullmatch(rf"{of}(\w+)/mse", key))]

    def figure(metric: str, factor: float, decimals: int) -> str:
        series = [run.series(of + metric).values() for run in runs]
        return mean_and_interval([factor * fmean(values) for values in series if values], decimals)

    tokens = {"tokens": figure("tokens", 1, 0)}
    return {
        name: tokens | {heading: figure(f"{name}/{metric}", *form) for heading, metric, *form in AUDIT_FIGURES}
        for name in sorted(names)
    }
