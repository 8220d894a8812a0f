# SPDX-License-Identifier: Apache-2.0
"""Figures of a run report: one function per figure, from runs grouped by method to a `Drawing`, or None without data.

Methods differ by colour, line style and marker, bars also by hatching, so that the figures are readable in black and
white. Every function expects matplotlib's settings `STYLE`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, PercentFormatter
from verl.steer.audit.agreement import agreement
from verl.steer.report.run_metrics import (
    ENTROPY,
    HELD_STEPS,
    TARGET,
    WEIGHT,
    Run,
    distances_from,
    ordered,
    over_seeds,
    run_figures,
)
from verl.trainer.ppo.core_algos import ENTROPY_CHANGE_FLOOR, map_to_token_weights

Groups = Mapping[str, Sequence[Run]]

MAP_METRICS = ("entropy_change_mean", "entropy_change_max", "token_weights_min", "token_weights_max")

STYLE = matplotlib.rc_params_from_file(Path(__file__).with_name("report.mplstyle"), use_default_template=False)
INK, GRID, PAPER = STYLE["text.color"], STYLE["grid.color"], STYLE["figure.facecolor"]
COLOURS = STYLE["axes.prop_cycle"].by_key()["color"]
LINES, MARKERS, HATCHES = ("-", "--", "-.", ":"), ("o", "s", "^", "D", "v", "P", "X"), ("", "////", "....", "xx")

#: Height of a line of a legend, in inches.
LEGEND_LINE = 0.2

PASS_AT_K = "pass@k at the end"

#: Tokens drawn in a scatter plot; medians, counts and correlations are over all tokens.
SHOWN = 400


class Drawing:
    """A figure with axes (rows, columns), and a description in words for screen readers."""

    def __init__(self, rows: int, columns: int, height: float = 2.9, **sharing: Any) -> None:
        """`height` of a row in inches, `sharing` as in matplotlib's `subplots`."""
        self.figure = Figure(figsize=(7.5, height * rows), layout="constrained")
        self.axes = self.figure.subplots(rows, columns, squeeze=False, **sharing)
        self.descriptions: list[str] = []

    @property
    def description(self) -> str:
        return "; ".join(self.descriptions)

    def with_legend(self) -> Drawing | None:
        """The drawing with the first panel's legend above all panels, or None if it has no data to describe.

        Lines of the legend after the second make the figure higher, not the panels smaller.
        """
        handles, names = self.axes[0, 0].get_legend_handles_labels()
        columns = max(1, min(len(names), 100 // (max(map(len, names), default=0) + 8)))
        lines = math.ceil(len(names) / columns)
        self.figure.set_figheight(self.figure.get_figheight() + LEGEND_LINE * max(0, lines - 2))
        self.figure.legend(handles, names, loc="outside upper left", ncols=columns)
        return self if self.descriptions else None


def label(name: str) -> str:
    """A name as plain text: matplotlib reads formulas between $ and hides labels that begin with _."""
    return (" " + name if name.startswith("_") else name).replace("$", r"\$")


def method_style(index: int, **changes: Any) -> dict[str, Any]:
    """Colour, line style and marker of the method with this index, and other properties of matplotlib's `plot`."""
    colour, line, marker = (values[index % len(values)] for values in (COLOURS, LINES, MARKERS))
    return {"color": colour, "linestyle": line, "marker": marker} | changes


def bar_style(index: int) -> dict[str, Any]:
    """Colours and hatching of the bars with this index."""
    return {"color": COLOURS[index], "edgecolor": PAPER, "hatch": HATCHES[index]}


def audited(groups: Groups) -> dict[str, pd.DataFrame]:
    """The audited tokens of each method with an audit, of all its seeds; `run` numbers them."""
    found = {
        name: [run.audit.assign(run=index) for index, run in enumerate(runs) if run.audit is not None]
        for name, runs in groups.items()
    }
    return {name: pd.concat(audits, ignore_index=True) for name, audits in found.items() if audits}


def estimators(audit: pd.DataFrame) -> list[str]:
    """Names of an audit's estimators."""
    return [column.removeprefix("omega_") for column in audit if column.startswith("omega_")]


def estimate(audit: pd.DataFrame, estimator: str) -> pd.Series:
    """Absolute entropy change of each token as predicted by an estimator; ValueError if the audit lacks it."""
    if estimator not in estimators(audit):
        raise ValueError(f"estimator={estimator!r}: expected one of {', '.join(estimators(audit))}")
    return audit[f"omega_{estimator}"].abs()


def sample(tokens: pd.DataFrame) -> pd.DataFrame:
    """At most `SHOWN` tokens, always the same ones."""
    return tokens if len(tokens) <= SHOWN else tokens.sample(SHOWN, random_state=0).sort_index()


def training(groups: Groups) -> Drawing | None:
    """Entropy and accuracy over the steps, pass@k over k: means over seeds, with a band from least to greatest.

    pass@k takes the place of the accuracy in runs that are validated only before and after the training, or once.
    """
    measures = {
        "policy entropy (nats)": lambda run: run.series(ENTROPY),
        "validation accuracy": lambda run: run.accuracy,
        PASS_AT_K: lambda run: run.pass_at_k,
    }
    bands = {
        measure: {name: over_seeds([series_of(run) for run in runs]) for name, runs in groups.items()}
        for measure, series_of in measures.items()
    }
    bands = {measure: methods for measure, methods in bands.items() if any(map(len, methods.values()))}
    if PASS_AT_K in bands and all(len(band) < 3 for band in bands.get("validation accuracy", {}).values()):
        bands.pop("validation accuracy", None)
    if not bands:
        return None
    drawing = Drawing(1, len(bands))
    for axis, (measure, methods) in zip(drawing.axes[0], bands.items(), strict=True):
        x = "samples k" if measure == PASS_AT_K else "training step"
        axis.set(xlabel=x, ylabel=measure)
        if measure == PASS_AT_K:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(lambda k, _: f"{k:g}")
        for index, (name, band) in enumerate(methods.items()):
            style = method_style(index, markevery=max(1, len(band) // 10))
            axis.plot(band.index, band["mean"], label=label(name), **style)
            if len(groups[name]) > 1:
                colour = style["color"]
                axis.fill_between(band.index, band["least"], band["greatest"], color=colour, alpha=0.18, linewidth=0)
            if len(band):
                (start, first), (end, last) = band["mean"].iloc[[0, -1]].items()
                drawing.descriptions.append(
                    f"{name}: {measure} {first:.3g} at {x.split()[-1]} {start}, {last:.3g} at {end}"
                )
    return drawing.with_legend()


def tradeoff(groups: Groups) -> Drawing | None:
    """pass@k at the end, for the greatest k, against accuracy and against entropy: a point per method, its seeds' mean.

    The first method has a name, and so has each to which no other is equal or superior in both accuracy and pass@k.
    """
    table = pd.DataFrame({name: pd.DataFrame(map(run_figures, runs)).mean() for name, runs in groups.items()}).T
    shares = [heading for heading in ordered(table) if heading.startswith("pass@")]
    if not shares:
        return None
    share = shares[-1]
    measures = {"final": "accuracy", "last ten": "policy entropy (nats)"}
    table = table[[*measures, share]].dropna()
    best = table[["final", share]]
    named = [name for name, row in best.iterrows() if not (best.drop(index=name) >= row).all(axis=1).any()]
    named = list(dict.fromkeys([*table.index[:1], *named]))
    drawing = Drawing(1, 2, height=3.6, sharey=True)
    for axis, (measure, text) in zip(drawing.axes[0], measures.items(), strict=True):
        for index, name in enumerate(named):
            style = method_style(index, linestyle="", markersize=6, zorder=3)
            axis.plot(*table.loc[name, [measure, share]], label=label(name), **style)
        others = table.drop(index=named)
        if len(others):
            axis.plot(others[measure], others[share], ".", color=INK, alpha=0.5, label="others")
        axis.set(xlabel=f"{text} at the end")
    drawing.axes[0, 0].set(ylabel=f"{share} at the end")
    drawing.axes[0, 1].set_xscale("log", base=2)
    drawing.axes[0, 1].xaxis.set_major_locator(LogLocator(base=2, numticks=6))  # a collapsed entropy has many octaves
    drawing.axes[0, 1].xaxis.set_major_formatter(lambda entropy, _: f"{entropy:.3g}")
    drawing.descriptions = [
        f"{name}: accuracy {row['final']:.3g}, {share} {row[share]:.3g}, entropy {row['last ten']:.3g}"
        for name, row in table.iterrows()
    ]
    return drawing.with_legend()


def weight_maps(groups: Groups, estimator: str) -> Drawing | None:
    """Token weight against estimated entropy change: both maps over a method's logged range, and audited tokens."""
    audits = audited(groups)
    drawing = Drawing(1, 1, height=3.3)
    axis = drawing.axes[0, 0]
    for index, (name, runs) in enumerate(groups.items()):
        logged = [[value for run in runs for value in run.series(f"actor/{metric}").values()] for metric in MAP_METRICS]
        if not all(logged):
            continue
        colour = method_style(index)["color"]
        mean, largest, least, most = fmean(logged[0]), fmean(logged[1]), min(logged[2]), max(logged[3])
        changes = torch.cat([torch.zeros(1), torch.logspace(-4, math.log10(max(largest, 2e-4)), 300)])[None]
        maps = {"linear": ("--", most)}
        if 0 < least < 1:  # the exponential map's largest weight is 1
            maps = {"exponential": ("-", min(most, 1.0))} | maps
        for mapping, (line, upper) in maps.items():
            weights = map_to_token_weights(changes, torch.ones_like(changes), least, upper, linear=mapping == "linear")
            axis.plot(changes[0], weights[0], line, color=colour, label=f"{label(name)}: {mapping} map")
        axis.axvline(mean, color=colour, linestyle=":", linewidth=1.2, label=f"{label(name)}: mean change")
        drawing.descriptions.append(
            f"{name}: weights from {least:.3g} to {most:.3g}, estimated change {mean:.3g} on average, "
            f"largest of a step {largest:.3g}"
        )
        if name in audits:
            tokens = sample(audits[name])
            style = method_style(index, linestyle="", markersize=2.5, alpha=0.5)
            axis.plot(estimate(tokens, estimator), tokens["weight"], label=f"{label(name)}: tokens", **style)
    axis.set_xscale("symlog", linthresh=ENTROPY_CHANGE_FLOOR)
    axis.set_xlim(left=0)
    axis.set(xlabel="estimated entropy change of the token (nats per unit step)", ylabel="token weight")
    return drawing.with_legend()


def _weights_and_changes(run: Run) -> pd.DataFrame:
    """Mean token weight of each step, and the policy entropy of the next step minus this step's, in nats."""
    entropy = pd.Series(run.series(ENTROPY), dtype=float)
    change = entropy.set_axis(entropy.index.astype(int) - 1) - entropy
    return pd.DataFrame({"weight": run.series(WEIGHT), "change": change}).dropna()


def weight_against_entropy(groups: Groups) -> Drawing | None:
    """A step's mean token weight against the change of the policy entropy from this step to the next."""
    drawing = Drawing(1, 1)
    axis = drawing.axes[0, 0]
    for index, (name, runs) in enumerate(groups.items()):
        points = pd.concat([_weights_and_changes(run) for run in runs])
        if points.empty:
            continue
        style = method_style(index, linestyle="", alpha=0.75)
        axis.plot(points["weight"], points["change"], label=label(name), **style)
        correlation = points["weight"].corr(points["change"])
        if math.isfinite(correlation):
            drawing.descriptions.append(f"{name}: {len(points)} steps, Pearson correlation {correlation:.2f}")
    axis.axhline(0, color=INK, linewidth=0.8)
    axis.set(xlabel="mean token weight of the step", ylabel="entropy after minus before (nats)")
    return drawing.with_legend()


def estimator_scores(audit: pd.DataFrame) -> pd.DataFrame:
    """Scores of each estimator, (estimators,) by mse, pearson, spearman, sign: means over the updates of each `run`.

    An estimate that is never negative is compared with the absolute change and has no sign; otherwise `sign` is the
    fraction of nonzero changes with the right sign. The other scores are those of `agreement`.
    """
    rows = {}
    for name in estimators(audit):
        signed = bool((audit[f"omega_{name}"] < 0).any())
        updates = []
        for _, update in audit.groupby(["run", "step", "mini_batch"]):
            pairs = update[[f"omega_{name}", "true_change"]].replace([np.inf, -np.inf], np.nan).dropna()
            estimates, truth = pairs[f"omega_{name}"], pairs["true_change"] if signed else pairs["true_change"].abs()
            right = (np.sign(estimates) == np.sign(truth))[(estimates != 0) & (truth != 0)]
            updates.append(agreement(estimates, truth) | {"sign": right.mean() if signed else np.nan})
        rows[name] = pd.DataFrame(updates).mean()
    return pd.DataFrame(rows).T


def estimator_truth(groups: Groups) -> Drawing | None:
    """Absolute true change against the estimate: some tokens, and the medians of twenty bins of equal count."""
    audits = audited(groups)
    if not audits:
        return None
    names = list(dict.fromkeys(name for audit in audits.values() for name in estimators(audit)))
    drawing = Drawing(len(audits), len(names), height=2.0, sharex="col", sharey="row")
    for index, (method, audit) in enumerate(audits.items()):
        scores = estimator_scores(audit)
        for axis, name in zip(drawing.axes[index], names, strict=True):
            axis.set_title(name if index == 0 else "", fontsize="medium")
            axis.set_visible(name in scores.index)
            if name in scores.index:
                _truth_panel(axis, estimate(audit, name), audit["true_change"].abs(), index)
                drawing.descriptions.append(
                    f"{method}, {name}: Spearman correlation {scores.loc[name, 'spearman']:.2f}"
                )
        drawing.axes[index, 0].set_ylabel(label(method) if len(audits) > 1 else "")
    drawing.figure.supxlabel("size of the estimate", fontsize="medium")
    drawing.figure.supylabel("size of the true change (nats)", fontsize="medium")
    return drawing


def _truth_panel(axis: Axes, estimates: pd.Series, truth: pd.Series, index: int) -> None:
    pairs = pd.DataFrame({"estimate": estimates, "truth": truth})
    pairs = pairs[(pairs > 0).all(axis=1) & np.isfinite(pairs).all(axis=1)]
    if pairs.empty:
        axis.text(0.5, 0.5, "nothing changed", transform=axis.transAxes, ha="center", va="center")
        return
    shown = sample(pairs)
    axis.plot(shown["estimate"], shown["truth"], **method_style(index, linestyle="", markersize=2, alpha=0.35))
    # Bins of ranks: with many equal estimates two bins of values would have the same edge.
    bins = pairs.groupby(np.ceil(pairs["estimate"].rank(method="first", pct=True) * 20))
    axis.plot(bins["estimate"].median(), bins["truth"].median(), "-", color=INK)
    axis.set(xscale="log", yscale="log")


#: Columns of audited updates that are no prediction.
MEASURED = ("step", "mini_batch", "entropy", "true_change")


def prediction_scores(updates: pd.DataFrame) -> pd.DataFrame:
    """How well each estimator predicts an update's change of the mean entropy: (estimators,) by pearson and slope.

    The slope is the least-squares factor from prediction to truth, without an offset: 1 for a prediction in nats.
    """
    truth = updates["true_change"]
    rows = {
        name: {"pearson": updates[name].corr(truth), "slope": (updates[name] @ truth) / (updates[name] @ updates[name])}
        for name in updates
        if name not in MEASURED
    }
    return pd.DataFrame(rows).T


def predicted_updates(groups: Groups) -> Drawing | None:
    """True change of the mean entropy by each audited update against each estimator's prediction."""
    found = {name: [run.updates for run in runs if run.updates is not None] for name, runs in groups.items()}
    audits = {name: pd.concat(updates, ignore_index=True) for name, updates in found.items() if updates}
    if not audits:
        return None
    names = list(dict.fromkeys(name for audit in audits.values() for name in audit if name not in MEASURED))
    columns = min(3, len(names))
    drawing = Drawing(math.ceil(len(names) / columns), columns, height=2.3)
    panels = drawing.axes.flatten()
    for axis in panels[len(names) :]:
        axis.set_visible(False)
    for index, (method, audit) in enumerate(audits.items()):
        scores = prediction_scores(audit)
        for axis, name in zip(panels, names, strict=False):
            axis.set_title(name.replace("_", " "), fontsize="medium")
            if name in audit:
                style = method_style(index, linestyle="", markersize=3, alpha=0.7)
                axis.plot(audit[name], audit["true_change"], label=label(method), **style)
                pearson, slope = scores.loc[name]
                drawing.descriptions.append(f"{method}, {name}: Pearson correlation {pearson:.3f}, slope {slope:.3g}")
            if name == "influence":
                axis.axline((0, 0), slope=1, color=INK, linewidth=0.8)
    drawing.figure.supxlabel("predicted change of the mean entropy by an update", fontsize="medium")
    drawing.figure.supylabel("true change (nats)", fontsize="medium")
    return drawing.with_legend()


def held_entropy(groups: Groups) -> Drawing | None:
    """The policy's entropy over the steps and the target that each run asked for."""
    asked = {name: over_seeds([run.series(TARGET) for run in runs]) for name, runs in groups.items()}
    if not any(map(len, asked.values())):
        return None
    drawing = Drawing(1, 1, height=3.6)
    axis = drawing.axes[0, 0]
    for index, (name, runs) in enumerate(groups.items()):
        held = over_seeds([run.series(ENTROPY) for run in runs])
        line = LINES[index % (len(LINES) - 1)]  # not the dotted one of the targets
        style = method_style(index, linestyle=line, markevery=max(1, len(held) // 8), markersize=4)
        axis.plot(held.index, held["mean"], label=label(name), **style)
        axis.fill_between(held.index, held["least"], held["greatest"], color=style["color"], alpha=0.18, linewidth=0)
        target = asked[name]
        if len(target):
            axis.step(target.index, target["mean"], where="mid", color=style["color"], linestyle=":", linewidth=1.2)
            away = pd.Series([distances_from(run, pd.Series(run.series(TARGET), dtype=float)).mean() for run in runs])
            if away.notna().any():
                over = f"over the last {HELD_STEPS} steps"
                drawing.descriptions.append(f"{name}: {away.mean():.3g} nats from the target {over}")
    axis.set(xlabel="training step", ylabel="policy entropy (nats); dotted: target")
    return drawing.with_legend()


def clip_counts(groups: Groups) -> Drawing | None:
    """Tokens clipped by PPO, in ten bins of probability, stacked by the sign of the advantage: count and share."""
    audits = {name: audit for name, audit in audited(groups).items() if "clipped" in audit}
    if not audits:
        return None
    drawing = Drawing(len(audits), 2, height=2.5)
    edges = np.linspace(0, 1, 11)
    middles = (edges[:-1] + edges[1:]) / 2
    for row, (name, audit) in zip(drawing.axes, audits.items(), strict=True):
        audit = audit[np.isfinite(audit["prob"])]
        bins = (audit["prob"] * 10).astype(int).clip(0, 9)
        tokens = np.bincount(bins, minlength=10)
        bottom = np.zeros((2, 10))
        for index, sign in enumerate("><"):
            clipped = np.bincount(bins[audit["clipped"] & audit.eval(f"advantage {sign} 0")], minlength=10)
            heights = np.stack([clipped, clipped / np.maximum(tokens, 1)])
            for axis, height, base in zip(row, heights, bottom, strict=True):
                axis.bar(middles, height, width=0.09, bottom=base, label=f"clipped, A {sign} 0", **bar_style(index))
            bottom += heights
            drawing.descriptions.append(f"{name}, A {sign} 0: {clipped.sum()} of {len(audit)} tokens clipped")
        row[0].set(ylabel="clipped tokens", title=label(name) if len(audits) > 1 else "")
        row[1].set(ylabel="share of the bin's tokens")
        row[1].yaxis.set_major_formatter(PercentFormatter(1))
    for axis in drawing.axes[-1]:
        axis.set_xlabel("probability of the token")
    return drawing.with_legend()


def quadrant_shares(audit: pd.DataFrame, estimator: str, bound: float) -> pd.DataFrame:
    """Shares of each quadrant of the tokens, of the estimated and of the true absolute change, and its net true change.

    Shares sum to 1; `net`, in nats, is the sum of the signed true changes. A token is likely if its probability is
    above `bound`; a token without advantage is in no quadrant.
    """
    tokens = audit[audit["advantage"].abs() > 0]  # nor is one whose advantage is NaN
    columns = {
        "tokens": 1.0,
        "estimated change": estimate(tokens, estimator).replace(np.inf, np.nan),
        "true change": tokens["true_change"].abs(),
        "net": tokens["true_change"],
    }
    quadrant = 2 * (tokens["advantage"] < 0) + (tokens["prob"] <= bound)
    sums = pd.DataFrame(columns, index=tokens.index).groupby(quadrant).sum().reindex(range(4), fill_value=0.0)
    sums.index = [f"A {sign} 0, π {side} {bound:g}" for sign in "><" for side in ">≤"]
    sizes = sums.drop(columns="net")
    return (sizes / sizes.sum().where(sizes.sum() > 0, 1.0)).assign(net=sums["net"])


def quadrants(groups: Groups, estimator: str, bound: float) -> Drawing | None:
    """`quadrant_shares` of each method as bars."""
    audits = audited(groups)
    if not audits:
        return None
    drawing = Drawing(len(audits), 1, height=2.6)
    for axis, (name, audit) in zip(drawing.axes[:, 0], audits.items(), strict=True):
        shares = quadrant_shares(audit, estimator, bound)
        net = shares.pop("net")
        for index, measure in enumerate(shares):
            heights = np.arange(4) + 0.27 * (index - 1)
            axis.barh(heights, shares[measure], height=0.25, label=f"share of {measure}", **bar_style(index))
        for quadrant, row in shares.iterrows():
            parts = ", ".join(f"{share:.0%} of {measure}" for measure, share in row.items())
            drawing.descriptions.append(f"{name}, {quadrant}: {parts}")
        axis.set_yticks(range(4), [f"{quadrant}\nnet {change:+.2g} nats" for quadrant, change in net.items()])
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.xaxis.set_major_formatter(PercentFormatter(1))
        axis.set_title(label(name) if len(audits) > 1 else "")
    return drawing.with_legend()
