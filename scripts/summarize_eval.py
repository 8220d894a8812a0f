# SPDX-License-Identifier: Apache-2.0
"""Results of an evaluation: a table, `results.json`, and every response with its grade in `responses.parquet`.

    python scripts/summarize_eval.py outputs/eval/MODEL-0123456789 --only aime24-0123456789 math500-0123456789

Reads what run/eval.sh writes into the folder: `settings.json`, `BENCHMARK.parquet` and, with one line per response,
`BENCHMARK/0.jsonl`; benchmarks are shown without the digest at the end of their names. Responses that the settings ask
for and the file lacks are counted as lost; the metrics are of the others. Responses to the same prompt with the same
ground truth are samples of one problem; k is their number in most problems. mean@k is the mean of `acc`. A response is
right if its `acc` is 1: maj@k is the share of problems whose most frequent answer `pred` is right (the first of
several; right answers count as one however they are written, wrong ones apart; a response without an answer has no
vote, a problem without any answer is wrong; none where no response has one, as with programs), pass@k that of problems
with a right response among k. Intervals are 95 %, over problems: Wilson's where each problem has 0 or 1, else by
bootstrap.

`results.json` and `responses.parquet` keep the benchmarks of earlier calls; the average in the file is over all of
them, the printed one over those of `--only`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, mode
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest

RESAMPLES = 10_000
METRICS: dict[str, Callable[[pd.DataFrame], float]] = {
    "mean": lambda samples: float(samples["acc"].mean()),
    "maj": lambda samples: float(majority(samples)),
    "pass": lambda samples: float((samples["acc"] >= 1).any()),
}


def majority(samples: pd.DataFrame) -> bool:
    """Whether the most frequent answer of a problem's samples is right.

    All right answers count as one: they are ways of writing the same.
    """
    answered = samples.loc[samples["pred"] != "", ["pred", "acc"]]
    votes = Counter(None if acc >= 1 else pred for pred, acc in answered.itertuples(index=False))
    return bool(votes) and votes.most_common(1)[0][0] is None


def read_responses(file: Path) -> pd.DataFrame:
    """The responses of one benchmark; `pred` is text, empty without an answer or with a reward function that has none.

    Columns have the same types with every grader: `acc` is a number, `gts` is text. pandas' own reader would take
    answers such as "1" for numbers.
    """
    rows = []
    with file.open() as lines:
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{file}:{number}: expected a response as JSON: {error}") from error
    responses = pd.DataFrame(rows)
    if missing := [name for name in ("input", "gts", "acc") if name not in responses]:
        raise ValueError(f"{file}: no {', '.join(missing)}; expected a grade `acc` for each response, of 0 to 1")
    preds = responses.get("pred", pd.Series("", responses.index))
    preds = ["" if pred is None or pred != pred else str(pred) for pred in preds]
    grades = pd.to_numeric(responses["acc"], errors="coerce")
    if len(bad := grades.index[~grades.between(0, 1)]):
        raise ValueError(
            f"{file}:{bad[0] + 1}: acc={responses['acc'][bad[0]]}: expected a number of 0 to 1, which the reward "
            "function returns beside its score"
        )
    return responses.assign(pred=preds, acc=grades.astype(float), gts=responses["gts"].map(str))


def responses_asked(folder: Path, name: str) -> int:
    """The number of responses to a benchmark that the settings in the folder ask for."""
    config = json.loads((folder / "settings.json").read_text())["config"]
    rows, most = pq.read_metadata(folder / f"{name}.parquet").num_rows, config["data"]["val_max_samples"]
    return (min(rows, most) if most > 0 else rows) * config["actor_rollout_ref"]["rollout"]["val_kwargs"]["n"]


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of `values`, one per problem, (problems,).

    By bootstrap, which has no width where all values are equal and too little near such: values of 0 and 1 get Wilson's
    (Journal of the American Statistical Association 22, 1927, 209-212). Of 30 problems, most of them hardly ever
    solved, the bootstrap's interval holds the true mean less often than in 95 % of the cases.
    """
    if np.isin(values, (0.0, 1.0)).all():
        share = binomtest(int(values.sum()), len(values)).proportion_ci(method="wilson")
        return float(share.low), float(share.high)
    means = np.random.default_rng(0).choice(values, (RESAMPLES, len(values))).mean(axis=1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def results_of(responses: pd.DataFrame, asked: int) -> dict[str, Any]:
    """n, k, the number of lost responses, and the metrics with their intervals, from one benchmark's responses."""
    problems = [samples for _, samples in responses.groupby(["input", "gts"], sort=False)]
    lost = max(0, asked - len(responses))
    result: dict[str, Any] = {"n": len(problems), "k": mode(map(len, problems)), "complete": not lost, "lost": lost}
    answered = (responses["pred"] != "").any()
    for name, metric in METRICS.items():
        if name == "maj" and not answered:
            continue
        values = np.array([metric(samples) for samples in problems])
        result[name] = {"value": float(values.mean()), "interval": interval(values)}
    return result


def table(results: dict[str, dict[str, Any]]) -> Table:
    """A row per benchmark, and the average over the benchmarks."""
    shown = Table("benchmark")
    for heading in ("n", "k", "lost", *(f"{name}@k" for name in METRICS)):
        shown.add_column(heading, justify="right")
    for name, result in results.items():
        cells = []
        for metric in METRICS:
            if metric not in result:
                cells.append("-")
                continue
            low, high = result[metric]["interval"]
            cells.append(f"{result[metric]['value']:.1%} [{low:.1%}, {high:.1%}]")
        shown.add_row(name, str(result["n"]), str(result["k"]), str(result["lost"]), *cells)
    shown.add_section()
    averages, cells = averages_of(results), []
    for metric in METRICS:
        having = sum(metric in result for result in results.values())
        value = f"{averages[metric]:.1%}" if having else "-"
        cells.append(f"{value} (of {having})" if 0 < having < len(results) else value)
    shown.add_row("average", "", "", "", *cells)
    return shown


def averages_of(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Each metric's average over the benchmarks that have it."""
    found = {name: [result[name]["value"] for result in results.values() if name in result] for name in METRICS}
    return {name: fmean(values) for name, values in found.items() if values}


def _kind(value: Any) -> type:
    """The type of a value; a list that was read from a table is an array."""
    return list if isinstance(value, np.ndarray) else type(value)


def write(folder: Path, results: dict[str, dict[str, Any]], responses: pd.DataFrame) -> None:
    """Write both files, with the benchmarks of earlier calls that are not among these."""
    file, table_file = folder / "results.json", folder / "responses.parquet"
    if file.is_file() and table_file.is_file():
        results = json.loads(file.read_text())["benchmarks"] | results
        earlier = pd.read_parquet(table_file)
        responses = pd.concat([earlier[~earlier["benchmark"].isin(responses["benchmark"].unique())], responses])
    parts = [path.with_name(f".{path.name}") for path in (table_file, file)]
    for name, column in responses.items():  # of benchmarks whose reward functions return other kinds of values
        if column.dropna().map(_kind).nunique() > 1:
            responses[name] = column.map(str, na_action="ignore")
    responses.reset_index(drop=True).to_parquet(parts[0])
    parts[1].write_text(json.dumps({"benchmarks": results, "average": averages_of(results)}, indent=2) + "\n")
    for part, path in zip(parts, (table_file, file), strict=True):
        os.replace(part, path)  # a kill leaves the old file or the new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder that run/eval.sh prints")
    parser.add_argument("--only", nargs="+", required=True, metavar="NAME", help="benchmarks")
    args = parser.parse_args()
    frames, results = {}, {}
    for name in args.only:
        file = args.folder / name / "0.jsonl"
        if not file.is_file():
            sys.exit(f"summarize_eval: {file}: no responses; expected the file that run/eval.sh writes for {name}")
        benchmark = re.sub(r"-[0-9a-f]{10}$", "", name)
        try:
            frames[benchmark] = read_responses(file)
            results[benchmark] = results_of(frames[benchmark], responses_asked(args.folder, name))
        except (ValueError, OSError) as error:
            sys.exit(f"summarize_eval: {error}")
    write(args.folder, results, pd.concat([frame.assign(benchmark=name) for name, frame in frames.items()]))
    console = Console()
    console.print(table(results))
    console.print(f"results: {args.folder / 'results.json'}, responses.parquet beside it", soft_wrap=True)


if __name__ == "__main__":
    main()
