# SPDX-License-Identifier: Apache-2.0
"""Records of a run: the metrics of verl's `file` logger, the audited tokens, and a summary over seeds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import t as student_t
from verl.steer.report.metrics_files import accuracy_metrics, in_order, start_of

ENTROPY, WEIGHT = "actor/entropy", "actor/token_weights_mean"
#: Standard deviation over a step's tokens: how strongly a method of token weights acts.
WEIGHT_STD = "actor/token_weights_std"
TARGET = "actor/target_entropy"
#: Mean score of a step's rollouts.
SCORE = "critic/score/mean"
#: Tokens of prompts and responses on all devices together, and seconds, of a step.
TOKENS, SECONDS = "perf/total_num_tokens", "perf/time_per_step"
GAIN = "gain"

#: Steps at the end of a run over which its entropy is compared with a target.
HELD_STEPS = 20

#: Columns of `audit/*.parquet`. Each estimator adds `omega_NAME`, and a loss with PPO's clip adds `clipped`.
AUDIT_COLUMNS = (
    "step mini_batch token_id text response position prob entropy advantage ratio weight true_change".split()
)

#: End of a validation metric's name -> heading (verl.steer.validation_metrics).
_DISTINCT = {"/distinct_right": "distinct right", "/distinct_share": "distinct share"}
_PASS_AT_K = re.compile(r"val-aux/.+/acc/pass@(\d+)")
_SEED = re.compile(r"^seed[-_=]?\d+[-_. ]?|[-_. ]?seed[-_=]?\d+", re.IGNORECASE)


@dataclass
class Run:
    """One run: its name without the seed, its folder, its metrics by step, and the seed in its path, empty without."""

    name: str
    folder: Path
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    seed: str = ""

    def series(self, metric: str) -> dict[int, float]:
        """Step -> value at the steps with a finite value (the logger writes NaN as null)."""
        found = ((step, data.get(metric)) for step, data in sorted(self.steps.items()))
        return {step: value for step, value in found if isinstance(value, int | float) and math.isfinite(value)}

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics of the run, sorted."""
        return sorted({name for data in self.steps.values() for name in data})

    @property
    def accuracy(self) -> dict[int, float]:
        """Step -> validation accuracy, averaged over the data sources."""
        sources = pd.DataFrame([self.series(name) for name in accuracy_metrics(self.metrics)], dtype=float)
        return sources.mean().sort_index().to_dict()

    @property
    def last_step(self) -> int:
        return max(self.steps)

    def ends_with(self, metric: str) -> bool:
        """Whether the last logged value of a metric is a finite one."""
        logged = [step for step, data in self.steps.items() if metric in data]
        return bool(logged) and max(logged) in self.series(metric)

    def at_end(self, metric: str) -> list[float]:
        """The value of a validation's metric at the last validation; none if that is the one before training.

        None either if the value there is not a finite one.
        """
        found = [value for step, value in self.series(metric).items() if step or not self.last_step]
        return found[-1:] if self.ends_with(metric) else []

    @property
    def pass_at_k(self) -> dict[int, float]:
        """k -> pass@k at the end, averaged over the data sources that have pass@k; empty with one sample a problem.

        Only k that all of these have, for the curve is of one set of problems.
        """
        found: dict[int, list[float]] = {}
        for name in self.metrics:
            if match := _PASS_AT_K.fullmatch(name):
                found.setdefault(int(match[1]), []).extend(self.at_end(name))
        sources = max(map(len, found.values()), default=0)
        return {k: sum(values) / sources for k, values in sorted(found.items()) if values and len(values) == sources}

    @property
    def audited_steps(self) -> list[int]:
        """The steps that the run audited; its folder may have audits of starts whose steps a later one replaced."""
        return [step for step, data in self.steps.items() if any(name.startswith("entropy_audit/") for name in data)]

    @cached_property
    def audit(self) -> pd.DataFrame | None:
        """The tokens of `audit/*.parquet` of `audited_steps`, sorted; None without tokens.

        Raises:
            ValueError: if a file lacks a column.
        """
        frames = []
        files = [f for f in (self.folder / "audit").glob("*.parquet") if not f.stem.endswith("_updates")]
        for file in sorted(files):
            frames.append(pd.read_parquet(file))
            missing = [name for name in AUDIT_COLUMNS if name not in frames[-1]]
            missing += [] if frames[-1].filter(regex="^omega_").columns.size else ["omega_…"]
            if missing:
                raise ValueError(f"{file}: no column {', '.join(missing)}; expected a file of the entropy audit")
        if not any(len(frame) for frame in frames):
            return None
        order = ["step", "mini_batch", "response", "position"]
        audit = pd.concat(frames).query("step in @self.audited_steps")
        return audit.sort_values(order, kind="stable", ignore_index=True) if len(audit) else None

    @cached_property
    def updates(self) -> pd.DataFrame | None:
        """The updates of `audit/step_*_updates.parquet` of the same steps, sorted; None without any."""
        frames = [pd.read_parquet(file) for file in (self.folder / "audit").glob("step_*_updates.parquet")]
        if not frames:
            return None
        updates = pd.concat(frames).query("step in @self.audited_steps")
        return updates.sort_values(["step", "mini_batch"], ignore_index=True) if len(updates) else None


def read_run(path: Path) -> Run:
    """Read a run: its folder with `metrics*.jsonl`, or one file of verl's `file` logger.

    A resumed run continues in a new file (`verl.steer.report.metrics_files`), which replaces the steps that earlier
    files logged after its checkpoint. An incomplete last line, left by a killed run, is ignored.

    Raises:
        ValueError: if there are no metrics, or a line is not a record.
    """
    path = path.resolve()
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; expected a run")
    files, folder, named = in_order(path), path, path
    if path.is_file():
        files, folder = [path], path.parent
        named = folder if path.stem.startswith("metrics") else path.with_suffix("")
    run = Run(method_of(named), folder, seed=seed_of(named))
    for file in files:
        records = list(_records(file))
        if records:
            _, checkpoint = start_of(file)
            kept = records[0]["step"] if checkpoint is None else checkpoint or -1  # from step 0: no step is kept
            run.steps = {step: data for step, data in run.steps.items() if step <= kept}
        for record in records:
            run.steps.setdefault(record["step"], {}).update(record["data"])
    if not run.steps:
        raise ValueError(f"{path}: {_what_is_missing(path, files)}")
    return run


def _what_is_missing(path: Path, files: list[Path]) -> str:
    """Why a path has no metrics, and what is expected."""
    if files:
        return f"no step in {', '.join(file.name for file in files)} yet; expected a run that has ended one"
    runs = sorted(file.parent.name for file in path.glob("*/metrics*.jsonl"))
    if runs:
        return f"a folder of runs; expected one of them, such as {path / runs[0]}"
    kept = sorted(file.name for file in path.glob("*.jsonl") if not file.name.startswith("evaluation_of_"))
    if kept:
        return f"no metrics*.jsonl; expected a run's folder, or a file by its name, such as {path / kept[0]}"
    return "no metrics*.jsonl; expected a run with `file` among trainer.logger"


def _records(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), start=1):
        try:
            record = json.loads(line)
            yield {"step": int(record["step"]), "data": dict(record["data"])}
        except (ValueError, KeyError, TypeError) as error:
            if not line.endswith(b"\n"):
                return
            raise ValueError(f'{file}:{number}: expected {{"step": n, "data": {{...}}}}, as verl logs') from error


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """The runs of several folders or files, as `read_run`; one that is named twice is read once.

    Raises:
        ValueError: as `read_run`, or if two runs have the same method and seed.
    """
    found: dict[tuple[str, str], Path] = {}
    runs = []
    for path in dict.fromkeys(path.resolve() for path in paths):
        run = read_run(path)
        other = found.setdefault((run.name, run.seed), path)
        if other != path:
            both = f"both are {run.name}, seed {run.seed or 'none'}"
            raise ValueError(f"{other} and {path}: {both}; expected names that differ by method or seed")
        runs.append(run)
    return runs


def method_of(path: Path) -> str:
    """A run's name without its seed: `grpo` for `grpo`, `grpo_seed1`, `grpo/seed1`, `1/grpo` and `grpo/1`."""
    for part in (path.name, path.parent.name):
        name = _SEED.sub("", part)
        if name and not name.isdigit():
            return name
    return path.name


def seed_of(path: Path) -> str:
    """The digits of a run's seed, as `method_of` finds it: `1` for `grpo_seed1`, `grpo/seed1` and `1/grpo`."""
    for part in (path.name, path.parent.name):
        found = re.search(r"seed[-_=]?(\d+)", part, re.IGNORECASE) or re.fullmatch(r"(\d+)", part)
        if found:
            return found[1]
    return ""


def group_seeds(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs by method in the given order: runs of the same name, which `read_runs` gives different seeds."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)
    return groups


def over_seeds(series: Sequence[dict[int, float]]) -> pd.DataFrame:
    """Columns mean, least and greatest over the seeds, at the steps that all seeds have; empty seeds don't count."""
    table = pd.DataFrame([values for values in series if values]).dropna(axis=1).sort_index(axis=1)
    return pd.DataFrame({"mean": table.mean(), "least": table.min(), "greatest": table.max()})


def mean_and_interval(values: Iterable[float], decimals: int) -> str:
    """Mean ± half the width of its 95 % interval by Student's t, without NaN; one value has no interval."""
    found = pd.Series(values, dtype=float).dropna()
    if found.empty:
        return "-"
    mean = f"{found.mean():.{decimals}f}"
    if len(found) == 1:
        return mean
    return f"{mean} ± {student_t.ppf(0.975, len(found) - 1) * found.sem():.{decimals}f}"


def compared_metrics(names: Sequence[str]) -> list[str]:
    """Those among a run's metrics that `run_figures`, its curves and a held target depend on, without its speed."""
    fixed = {ENTROPY, WEIGHT, WEIGHT_STD, TARGET, SCORE, *accuracy_metrics(names)}
    return [n for n in names if n in fixed or _PASS_AT_K.fullmatch(n) or n.endswith(tuple(_DISTINCT))]


def distances_from(run: Run, target: float | pd.Series) -> pd.Series:
    """Distance of the policy's entropy from a target, in nats, at the last `HELD_STEPS` steps with an entropy.

    `target` is one number or, by step, a series.
    """
    return (pd.Series(run.series(ENTROPY), dtype=float) - target).abs().iloc[-HELD_STEPS:]


def run_figures(run: Run) -> dict[str, float]:
    """The comparison's figures of one run by heading; NaN if the run lacks the metric.

    A run that was not validated after its start has no figures of the end, one whose accuracy ended as NaN no `final`,
    and one whose entropy did no `last ten`.
    """
    accuracy, entropy, weight = (
        pd.Series(series, dtype=float) for series in (run.accuracy, run.series(ENTROPY), run.series(WEIGHT))
    )
    final = accuracy[accuracy.index > 0 if run.last_step else slice(None)].iloc[-1:].mean()
    speed = pd.DataFrame({name: run.series(name) for name in (TOKENS, SECONDS)}, dtype=float).dropna().mean()
    sampling = {f"pass@{k}": share for k, share in run.pass_at_k.items() if k >= 8}
    for end, heading in _DISTINCT.items():
        if distinct := [run.at_end(name) for name in run.metrics if name.endswith(end)]:
            sampling[heading] = pd.Series([*chain(*distinct)], dtype=float).mean()
    # Slices instead of single elements: the mean of an empty series is NaN.
    return {
        "accuracy before": accuracy[accuracy.index == 0].mean(),
        "final": final if all(map(run.ends_with, accuracy_metrics(run.metrics))) else math.nan,
        "best": accuracy.max(),
        **sampling,
        "entropy first": entropy.iloc[:1].mean(),
        "last ten": entropy.iloc[-10:].mean() if run.ends_with(ENTROPY) else math.nan,
        "least": entropy.min(),
        "mean token weight": weight.mean(),
        "weight std": pd.Series(run.series(WEIGHT_STD), dtype=float).mean(),
        "tokens/s": speed[TOKENS] / speed[SECONDS],
    }


def figures_by_seed(runs: Sequence[Run], headings: Sequence[str]) -> pd.DataFrame:
    """A row per run of a method, with its seed as index, and a column per heading of `run_figures`.

    `GAIN` is a heading too: the final accuracy less that before.
    """
    rows = pd.DataFrame([run_figures(run) for run in runs], index=[run.seed for run in runs])
    rows[GAIN] = rows["final"] - rows["accuracy before"]
    return rows.reindex(columns=list(headings))


def summary(groups: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    """A row per method and a column per figure: means over its seeds, with intervals if there are several.

    "-" where a method has no such figure, and the number of seeds that have it where not all do; no column that is
    empty for all methods.
    """
    tables = {name: pd.DataFrame([run_figures(run) for run in runs]) for name, runs in groups.items()}
    order = ordered(heading for table in tables.values() for heading in table)

    def cell(table: pd.DataFrame, heading: str) -> str:
        values = table.get(heading, pd.Series(dtype=float))
        text, count = mean_and_interval(values, 0 if heading == "tokens/s" else 3), values.count()
        return f"{text} ({count} of {len(table)})" if 0 < count < len(table) else text

    cells = {name: [cell(table, heading) for heading in order] for name, table in tables.items()}
    table = pd.DataFrame.from_dict(cells, orient="index", columns=order)
    return table.loc[:, (table != "-").any()]


def ordered(headings: Iterable[str]) -> list[str]:
    """Headings of the `run_figures` of several runs, each once and in one order, pass@k by k."""
    first = ("accuracy before", "final", "best", "pass", *_DISTINCT.values())

    def place(heading: str) -> tuple[int, int]:
        name, _, k = heading.partition("@")
        return first.index(name) if name in first else len(first), int(k or 0)

    return sorted(dict.fromkeys(headings), key=place)
