# SPDX-License-Identifier: Apache-2.0
"""A table and a picture of one or several runs: entropy, accuracy and speed; and a table of their entropy audits.

    python scripts/compare_runs.py outputs/grpo outputs/steer_exp --out outputs/comparison.png

Each argument is a run's folder with the files of verl's `file` logger (`metrics*.jsonl`), or one such file. Runs whose
names differ only by a seed, such as `seed0/grpo` and `seed1/grpo`, are seeds of one method: the table gives their mean
and its 95 % interval by Student's t, and the picture a band from the least to the greatest. With `--baseline METHOD` a
second table compares each method with that one, seed by seed, and a third marks the figures of methods with one run if
they lie outside of the 95 % interval of a further run of METHOD. Further tables have errors and correlations of each
estimate with the true change of the entropy, for runs with an entropy audit (docs/entropy_audit.md), the predicted
changes of whole updates, and how well a target of the entropy was held (docs/control.md). `scripts/report.py` makes a
page of everything that a run logged.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Column, Table
from verl.steer.report import figures
from verl.steer.report.notes import notes
from verl.steer.report.paired import differences
from verl.steer.report.run_metrics import (
    GAIN,
    HELD_STEPS,
    SCORE,
    TARGET,
    WEIGHT,
    Run,
    distances_from,
    group_seeds,
    mean_and_interval,
    ordered,
    read_runs,
    run_figures,
    summary,
)
from verl.steer.report.single_runs import single_runs

#: Heading -> (metric below `entropy_audit/` or `entropy_audit/step/`, factor, decimals).
AUDIT_FIGURES = {
    "tokens": ("tokens", 1, 0),
    "MSE, 1e-4": ("{}/mse", 1e4, 3),
    "Pearson": ("{}/pearson", 1, 2),
    "Spearman": ("{}/spearman", 1, 2),
    "Pearson, sizes": ("{}/pearson_magnitude", 1, 2),
    "Spearman, sizes": ("{}/spearman_magnitude", 1, 2),
}


def _empty_table(title: str | None, labels: tuple[str, ...], numbers: Iterable[str]) -> Table:
    """`method`, whose names are never cut, further columns of text, and columns of numbers."""
    result = Table(Column("method", no_wrap=True), *labels, title=title)
    for heading in numbers:
        result.add_column(heading, justify="right")
    return result


def _cell(form: str, *values: float) -> str:
    """The values in this form, or the dash of `mean_and_interval` where one is NaN."""
    return "-" if any(map(math.isnan, values)) else form.format(*values)


def means_table(methods: dict[str, list[Run]]) -> Table:
    """A row per method: means of its runs' figures, with intervals if there are several. No column without a value."""
    several = any(len(runs) > 1 for runs in methods.values())
    rows = summary(methods)
    result = _empty_table("means over seeds ± 95 % interval" if several else None, (), ("seeds", *rows))
    for name, row in rows.iterrows():
        result.add_row(name, str(len(methods[name])), *row)
    return result


def _compared(methods: dict[str, list[Run]], asked: list[str] | None) -> list[str]:
    """The headings of the figures in which methods are compared with a baseline; ValueError if one is unknown.

    Of pass@k the least and the greatest k: those between tell little more, and Holm's correction counts each.
    """
    headings = ordered(heading for runs in methods.values() for run in runs for heading in run_figures(run))
    if asked:
        if unknown := [name for name in asked if name not in [*headings, GAIN]]:
            raise ValueError(f"--compare {', '.join(unknown)}: expected some of {', '.join([*headings, GAIN])}")
        return list(dict.fromkeys(asked))
    shares = [name for name in headings if name.startswith("pass@")]
    wanted = {"final", "distinct right", "last ten", *shares[:1], *shares[-1:]}
    return [name for name in headings if name in wanted]


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.0005 else _cell("{:.3f}", p)


def paired_table(methods: dict[str, list[Run]], baseline: str, wanted: list[str]) -> Table:
    """A row per method and figure: its difference from the baseline's, seed by seed."""
    numbers = ("seeds", "difference", "effect size", "p", "p, Holm")
    result = _empty_table(f"differences from {baseline}, paired by seed", ("figure",), numbers)
    for (name, figure), found in differences(methods, baseline, wanted).items():
        cells = (_cell("{:+.1f}", found.effect), _p_value(found.p), _p_value(found.p_holm))
        result.add_row(name, figure, str(len(found.values)), mean_and_interval(found.values, 3), *cells)
    return result


def single_table(methods: dict[str, list[Run]], baseline: str, wanted: list[str]) -> Table:
    """A row per method with one run; a star at figures that are outside of the baseline's interval."""
    result = _empty_table(f"single runs; * is outside of the 95 % interval of a further run of {baseline}", (), wanted)
    found, interval = single_runs(methods, baseline, wanted)
    if found.empty or interval.isna().all(axis=None):
        return result
    least, greatest = interval.loc["least"], interval.loc["greatest"]
    result.add_row("interval", *(_cell("{:.3f} to {:.3f}", least[name], greatest[name]) for name in wanted))
    for name, row in found.iterrows():
        outside = (row < least) | (row > greatest)
        result.add_row(name, *(mean_and_interval([row[f]], 3) + (" *" if outside[f] else "") for f in wanted))
    return result


def reached_table(methods: dict[str, list[Run]], score: float) -> Table:
    """A row per method: the steps after which the mean score of ten steps' rollouts has first reached `score`."""
    result = _empty_table(f"steps to a mean score of {score:g}", (), ("runs", "that reach it", "steps"))
    for name, runs in methods.items():
        means = [pd.Series(run.series(SCORE), dtype=float).rolling(10).mean() for run in runs]
        steps = [float(reached.index[0]) for mean in means if len(reached := mean[mean >= score])]
        result.add_row(name, str(len(runs)), str(len(steps)), mean_and_interval(steps, 0))
    return result


def audit_table(methods: dict[str, list[Run]]) -> Table:
    """A row per method, span of the change (an update or a whole step) and estimator.

    Figures are means over a run's audited steps, then over the seeds.
    """
    title = "estimated against true change of the entropy"
    result = _empty_table(title, ("change by", "estimator"), AUDIT_FIGURES)
    for name, runs in methods.items():
        metrics = {metric for run in runs for metric in run.metrics}
        for span, prefix in (("update", "entropy_audit/"), ("step", "entropy_audit/step/")):
            scored = [re.fullmatch(rf"{prefix}(\w+)/mse", metric) for metric in sorted(metrics)]
            for estimator in (found[1] for found in scored if found):
                cells = []
                for metric, factor, decimals in AUDIT_FIGURES.values():
                    logged = [pd.Series(run.series(prefix + metric.format(estimator)), dtype=float) for run in runs]
                    cells.append(mean_and_interval([factor * values.mean() for values in logged], decimals))
                result.add_row(name, span, estimator, *cells)
    return result


def _of_all(seeds: Sequence[Iterable[str]]) -> list[str]:
    """The names that all seeds of a method have, in the order of the first."""
    return [name for name in (seeds[0] if seeds else ()) if all(name in names for names in seeds)]


def prediction_table(methods: dict[str, list[Run]]) -> Table:
    """A row per method and estimator: predicted against true change of the mean entropy by each audited update."""
    title = "predicted against true change of the mean entropy by an update"
    result = _empty_table(title, ("estimator",), ("updates", "Pearson", "slope"))
    for name, runs in methods.items():
        audits = [run.updates for run in runs if run.updates is not None]
        scores = [figures.prediction_scores(updates) for updates in audits]
        for estimator in _of_all([one.index for one in scores]):
            columns = ([one.loc[estimator, kind] for one in scores] for kind in ("pearson", "slope"))
            count = str(sum(map(len, audits)))
            result.add_row(name, estimator, count, *(mean_and_interval(values, 3) for values in columns))
    return result


def single_token_table(methods: dict[str, list[Run]]) -> Table:
    """A row per method and estimate: against the true effect of single tokens on the mean entropy.

    `sign` is the percentage of tokens whose effect has the sign of the estimate, among those where neither is 0.
    """
    title = "estimates against the true effect of single tokens"
    result = _empty_table(title, ("estimate",), ("tokens", "Spearman", "Pearson", "sign"))
    for name, runs in methods.items():
        audits = [
            run.audit.dropna(subset="one_token") for run in runs if run.audit is not None and "one_token" in run.audit
        ]
        for estimate in (c for c in _of_all(audits) if c.startswith(("influence", "omega_"))):
            pairs = [(audit[estimate], audit["one_token"]) for audit in audits]
            cells = [
                [x.corr(y, "spearman") for x, y in pairs],
                [x.corr(y) for x, y in pairs],
                [100 * ((x > 0) == (y > 0))[(x != 0) & (y != 0)].mean() for x, y in pairs],
            ]
            row = [mean_and_interval(values, decimals) for values, decimals in zip(cells, (3, 3, 0), strict=True)]
            result.add_row(name, estimate.removeprefix("omega_"), str(sum(map(len, audits))), *row)
    return result


def held_table(methods: dict[str, list[Run]], baseline: str | None) -> Table:
    """A row per method and target: how far the entropy was from it over the last `HELD_STEPS` steps.

    The baseline, or without one every method without a target, is compared with the targets of the others; its row
    says so.
    """
    title = f"|entropy - target| over the last {HELD_STEPS} steps"
    result = _empty_table(title, ("target",), ("nats", "% of the target", "mean token weight"))
    series = {name: [pd.Series(run.series(TARGET), dtype=float) for run in runs] for name, runs in methods.items()}
    constants = sorted({one.iloc[0] for seeds in series.values() for one in seeds if one.nunique() == 1}, reverse=True)
    for name, runs in methods.items():
        targets = [(f"{c:g}, not its own", [c] * len(runs)) for c in constants]
        if any(map(len, series[name])):
            changes = series[name][0].drop_duplicates()
            targets = [(", then ".join(f"{value:g}" for value in changes), series[name])]
        elif baseline not in (None, name):
            continue
        for label, asked in targets:
            distances = [distances_from(run, target) for run, target in zip(runs, asked, strict=True)]
            parts = [100 * (d / target).dropna().mean() for d, target in zip(distances, asked, strict=True)]
            weights = [pd.Series(run.series(WEIGHT), dtype=float).mean() for run in runs]
            cells = (([d.mean() for d in distances], 4), (parts, 1), (weights, 3))
            result.add_row(name, label, *(mean_and_interval(values, decimals) for values, decimals in cells))
    return result


def not_compared(methods: dict[str, list[Run]], baseline: str) -> list[str]:
    """The methods that are not compared with the baseline, a line for each."""
    found = []
    several = any(len(runs) > 1 for runs in methods.values())  # so that single runs have a table
    for name, runs in methods.items():
        shared = len({run.seed for run in runs} & {run.seed for run in methods[baseline]})
        if name != baseline and shared < 2 and (len(runs) > 1 or not several):
            found.append(f"{name} is not compared with {baseline}: expected at least 2 seeds in common, found {shared}")
    return found


def show(found: list[Table], remarks: list[str], markdown: Path | None) -> None:
    """Print the tables and remarks, and write them to the file `markdown`, if given."""
    # A log has no terminal width.
    plain: dict[str, Any] = {"markup": False, "emoji": False}  # names of runs may have brackets and colons
    console = Console(**plain) if sys.stdout.isatty() else Console(width=240, **plain)
    console.print(*found, *remarks, sep="\n")
    if markdown:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        with markdown.open("w") as file:
            written = Console(file=file, width=1000, **plain)
            for one in found:
                if one.title:
                    written.print(one.title)
                one.title, one.box = None, box.MARKDOWN
                written.print(one)
            written.print(*remarks, sep="\n\n")


def tables(methods: dict[str, list[Run]], args: argparse.Namespace) -> list[Table]:
    """All tables that have rows; ValueError if an argument or an audit does not fit."""
    found = [means_table(methods)]
    if args.baseline:
        if args.baseline not in methods:
            raise ValueError(f"--baseline {args.baseline}: expected one of {', '.join(methods)}")
        compared = _compared(methods, args.compare)
        found += [paired_table(methods, args.baseline, compared), single_table(methods, args.baseline, compared)]
    found += [audit_table(methods), prediction_table(methods), single_token_table(methods)]
    if args.reach is not None:
        found.append(reached_table(methods, args.reach))
    if any(TARGET in run.metrics for runs in methods.values() for run in runs):
        found.append(held_table(methods, args.baseline))
    return [one for one in found if one.row_count]


def draw(methods: dict[str, list[Run]], out: Path) -> None:
    """Draw the picture; ValueError if the runs logged nothing that it shows."""
    with matplotlib.rc_context(figures.STYLE):
        drawing = figures.training(methods)
        if drawing is None:
            raise ValueError(
                "no entropy and no accuracy at a step that all seeds of a method have; expected runs of verl's trainer"
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        drawing.figure.savefig(out, dpi=150)


def picture(name: str) -> Path:
    """The argument `--out`."""
    if Path(name).suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"{name}: expected a file whose name ends with .png or .svg")
    return Path(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or its .jsonl file")
    parser.add_argument("--out", type=picture, required=True, help="the picture, .png or .svg")
    parser.add_argument("--markdown", type=Path, help="also write the tables into this file")
    parser.add_argument("--baseline", metavar="METHOD", help="the method that the others are compared with")
    parser.add_argument(
        "--compare", action="append", metavar="FIGURE",
        help="a figure to compare with the baseline in place of the usual ones: a heading of the first table, or "
        f"{GAIN!r}, the final accuracy less that before; may be repeated",
    )  # fmt: skip
    parser.add_argument("--reach", type=float, metavar="SCORE", help="a table of the steps to this mean score")
    args = parser.parse_args()
    if args.compare and not args.baseline:
        parser.error(f"--compare {args.compare[0]}: expected a --baseline to compare with")
    try:
        methods = group_seeds(read_runs(args.runs))
        found = tables(methods, args)
        remarks = notes(methods) + (not_compared(methods, args.baseline) if args.baseline else [])
        show(found, remarks, args.markdown)
        draw(methods, args.out)
    except (OSError, ValueError) as error:
        sys.exit(f"compare_runs: {error}")
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
