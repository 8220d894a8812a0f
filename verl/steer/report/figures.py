# SPDX-License-Identifier: Apache-2.0
"""Figures of a run report, by matplotlib: one function a figure, from runs grouped by method to a drawing or None.

Methods differ by colour (Okabe and Ito's palette), line style and marker, bars by hatching too, so that the figures
read in black and white.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from verl.steer.report.run_metrics import ENTROPY, WEIGHT, Run, over_seeds
from verl.trainer.ppo.core_algos import ENTROPY_CHANGE_FLOOR, map_to_token_weights

Groups = Mapping[str, Sequence[Run]]

#: Foreground, grid and background: the page puts its own colours for them, and for `COLOURS`, into inline figures.
INK, GRID, PAPER = "#1a1a1a", "#d9d9d9", "#ffffff"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
LINES, MARKERS, HATCHES = ("-", "--", "-.", ":"), ("o", "s", "^", "D", "v", "P", "X"), ("", "////", "....", "xx")

STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "svg.fonttype": "path",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}

#: Tokens drawn in a scatter; medians, counts and correlations are over all of them.
SHOWN = 400


@dataclass(frozen=True)
class Drawing:
    """A figure, and in words what it shows, for whoever can't see it."""

    figure: Figure
    description: str


def canvas(rows: int, columns: int, height: float = 2.9, **sharing: Any) -> tuple[Figure, np.ndarray]:
    """A figure with (rows, columns) axes; `height` is one row's, in inches, `sharing` as in matplotlib's subplots."""
    figure = Figure(figsize=(7.5, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **sharing)


def label(name: str) -> str:
    """A name as plain text for matplotlib, which reads formulas between $ and hides what begins with _."""
    return (" " + name if name.startswith("_") else name).replace("$", r"\$")


def line_style(index: int) -> dict[str, Any]:
    """Colour, line and marker of the method at this place."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def legend(figure: Figure, axis: Any) -> None:
    """One legend above all panels, as wide as the names allow."""
    handles, names = axis.get_legend_handles_labels()
    columns = max(1, min(len(names), 100 // (max(map(len, names), default=0) + 8)))
    figure.legend(handles, names, loc="outside upper left", ncols=columns)


def audited(groups: Groups) -> dict[str, pd.DataFrame]:
    """The audited tokens of each method, its seeds one after another."""
    found = {name: [run.audit for run in runs if run.audit is not None] for name, runs in groups.items()}
    return {name: pd.concat(frames, ignore_index=True) for name, frames in found.items() if frames}


def estimators(audit: pd.DataFrame) -> list[str]:
    """Names of the estimates that an audit holds."""
    return [column.removeprefix("omega_") for column in audit if column.startswith("omega_")]


def estimate(audit: pd.DataFrame, estimator: str) -> pd.Series:
    """Size of the change that an estimator tells.

    Raises:
        ValueError: if the audit has no such estimate.
    """
    if estimator not in estimators(audit):
        raise ValueError(f"estimator={estimator!r}: expected one of {', '.join(estimators(audit))}")
    return audit[f"omega_{estimator}"].abs()


def training(groups: Groups) -> Drawing | None:
    """Entropy and accuracy over the steps: mean of each method's seeds, a band from the least to the greatest."""
    measures: dict[str, Callable[[Run], dict[int, float]]] = {
        "policy entropy (nats)": lambda run: run.series(ENTROPY),
        "validation accuracy": lambda run: run.accuracy,
    }
    bands = {
        measure: {name: over_seeds([series_of(run) for run in runs]) for name, runs in groups.items()}
        for measure, series_of in measures.items()
    }
    bands = {measure: of for measure, of in bands.items() if any(len(band) for band in of.values())}
    if not bands:
        return None
    figure, axes = canvas(1, len(bands))
    told = []
    for axis, (measure, of) in zip(axes[0], bands.items(), strict=True):
        for index, (name, band) in enumerate(of.items()):
            every = max(1, len(band) // 10)
            axis.plot(band.index, band["mean"], label=label(name), markevery=every, **line_style(index))
            if len(groups[name]) > 1:
                colour = line_style(index)["color"]
                axis.fill_between(band.index, band["least"], band["greatest"], color=colour, alpha=0.18, linewidth=0)
            if len(band):
                first, last = band["mean"].iloc[0], band["mean"].iloc[-1]
                told.append(f"{name}: {measure} {first:.3g} at step {band.index[0]}, {last:.3g} at {band.index[-1]}")
        axis.set(xlabel="training step", ylabel=measure)
    legend(figure, axes[0, 0])
    return Drawing(figure, "; ".join(told))


def weight_maps(groups: Groups, estimator: str) -> Drawing | None:
    """Token weight against estimated change: both maps over the range a method logged, and its audited tokens."""
    audits = audited(groups)
    figure, axes = canvas(1, 1, height=3.3)
    axis, told = axes[0, 0], []
    for index, (name, runs) in enumerate(groups.items()):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        range_told = _draw_maps(axis, name, colour, runs)
        if range_told is None:
            continue
        told.append(f"{name}: {range_told}")
        if name in audits:
            tokens = _sample(audits[name])
            style = {"linestyle": "", "marker": marker, "markersize": 2.5, "color": colour, "alpha": 0.5}
            axis.plot(estimate(tokens, estimator), tokens["weight"], label=f"{label(name)}: tokens", **style)
    if not told:
        return None
    axis.set_xscale("symlog", linthresh=ENTROPY_CHANGE_FLOOR)
    axis.set_xlim(left=0)
    axis.set(xlabel="estimated entropy change of the token (nats per unit step)", ylabel="token weight")
    legend(figure, axis)
    return Drawing(figure, "; ".join(told))


def _draw_maps(axis: Any, name: str, colour: str, runs: Sequence[Run]) -> str | None:
    """The maps over a method's logged range; returns that range in words, None where nothing was logged."""
    names = ("entropy_change_mean", "entropy_change_max", "token_weights_min", "token_weights_max")
    logged = [[value for run in runs for value in run.series(f"actor/{name}").values()] for name in names]
    if not all(logged):
        return None
    mean, largest, least, most = fmean(logged[0]), fmean(logged[1]), min(logged[2]), max(logged[3])
    changes = torch.cat([torch.zeros(1), torch.logspace(-4, math.log10(max(largest, 2e-4)), 300)])[None]
    maps = [("linear", "--", most)]
    if 0 < least < 1:  # the exponential map only holds back
        maps.insert(0, ("exponential", "-", min(most, 1.0)))
    for mapping, line, upper in maps:
        weights = map_to_token_weights(changes, torch.ones_like(changes), least, upper, linear=mapping == "linear")
        axis.plot(changes[0], weights[0], line, color=colour, label=f"{label(name)}: {mapping} map")
    axis.axvline(mean, color=colour, linestyle=":", linewidth=1.2, label=f"{label(name)}: mean change")
    told = f"weights from {least:.3g} to {most:.3g}, estimated change {mean:.3g} on average"
    return f"{told}, largest of a step {largest:.3g}"


def weight_against_entropy(groups: Groups) -> Drawing | None:
    """The mean token weight of a step against what the entropy did until the next."""
    figure, axes = canvas(1, 1)
    axis, told = axes[0, 0], []
    for index, (name, runs) in enumerate(groups.items()):
        points = pd.DataFrame(
            [
                (weight, entropy[step + 1] - entropy[step])
                for run in runs
                if (entropy := run.series(ENTROPY))
                for step, weight in run.series(WEIGHT).items()
                if step in entropy and step + 1 in entropy
            ],
            columns=["weight", "change"],
        )
        if points.empty:
            continue
        style = {**line_style(index), "linestyle": ""}
        axis.plot(points["weight"], points["change"], label=label(name), alpha=0.75, **style)
        told.append(f"{name}: {len(points)} steps, Pearson correlation {points['weight'].corr(points['change']):.2f}")
    if not told:
        return None
    axis.axhline(0, color=INK, linewidth=0.8)
    axis.set(xlabel="mean token weight of the step", ylabel="entropy after minus before (nats)")
    legend(figure, axis)
    return Drawing(figure, "; ".join(told))


def estimator_scores(audit: pd.DataFrame) -> pd.DataFrame:
    """How well each estimator tells the true change, by name: mse, pearson, spearman, sign.

    Means over the updates (step, mini_batch). An estimate that is never negative is compared with the size of the
    change and has no sign. The MSE, in nats squared, is what is left after the factor that fits the update best: an
    estimate is per unit step.
    """
    rows = {}
    for name in estimators(audit):
        signed = bool((audit[f"omega_{name}"] < 0).any())
        updates = []
        for _, update in audit.groupby(["step", "mini_batch"]):
            pair = update[[f"omega_{name}", "true_change"]].replace([np.inf, -np.inf], np.nan).dropna()
            told, truth = pair[f"omega_{name}"], pair["true_change"] if signed else pair["true_change"].abs()
            factor = (told * truth).sum() / max((told**2).sum(), np.finfo(float).tiny)
            moved = (told != 0) & (truth != 0)
            updates.append(
                {
                    "mse": ((factor * told - truth) ** 2).mean(),
                    "pearson": told.corr(truth),
                    "spearman": told.rank().corr(truth.rank()),
                    "sign": (np.sign(told) == np.sign(truth))[moved].mean() if signed else np.nan,
                }
            )
        rows[name] = pd.DataFrame(updates).mean()
    return pd.DataFrame(rows).T


def estimator_truth(groups: Groups) -> Drawing | None:
    """Size of the true change against the estimate: some tokens, and medians of twenty bins of equal count."""
    audits = audited(groups)
    if not audits:
        return None
    names = list(dict.fromkeys(name for audit in audits.values() for name in estimators(audit)))
    figure, axes = canvas(len(audits), len(names), height=2.0, sharex="col", sharey="row")
    told = []
    for index, (method, audit) in enumerate(audits.items()):
        scores = estimator_scores(audit)
        for axis, name in zip(axes[index], names, strict=True):
            axis.set_title(name if index == 0 else "", fontsize="medium")
            axis.set_visible(name in scores.index)
            if name not in scores.index:
                continue
            _truth_panel(axis, audit, name, index)
            told.append(f"{method}, {name}: Spearman correlation {scores.loc[name, 'spearman']:.2f}")
        axes[index, 0].set_ylabel(label(method) if len(audits) > 1 else "")
    figure.supxlabel("size of the estimate", fontsize="medium")
    figure.supylabel("size of the true change (nats)", fontsize="medium")
    return Drawing(figure, "; ".join(told))


def _truth_panel(axis: Any, audit: pd.DataFrame, name: str, index: int) -> None:
    pairs = pd.DataFrame({"told": estimate(audit, name), "truth": audit["true_change"].abs()})
    pairs = pairs[(pairs > 0).all(axis=1) & np.isfinite(pairs).all(axis=1)]
    if pairs.empty:
        axis.text(0.5, 0.5, "nothing changed", transform=axis.transAxes, ha="center", va="center")
        return
    shown = _sample(pairs)
    axis.plot(
        shown["told"],
        shown["truth"],
        linestyle="",
        marker=MARKERS[index % len(MARKERS)],
        markersize=2,
        alpha=0.35,
        color=COLOURS[index % len(COLOURS)],
        label="token",
    )
    # Ranks cut into twenty, since many equal estimates would leave no edge between two bins.
    bins = pairs.groupby((pairs["told"].rank(method="first", pct=True) * 20).apply(np.ceil))
    axis.plot(bins["told"].median(), bins["truth"].median(), "-", color=INK, label="median of a bin")
    axis.set(xscale="log", yscale="log")


def clip_counts(groups: Groups) -> Drawing | None:
    """Tokens that PPO's clip cut by probability, in tenths: how many, for either sign of the advantage."""
    audits = {name: audit for name, audit in audited(groups).items() if "clipped" in audit}
    if not audits:
        return None
    figure, axes = canvas(len(audits), 2, height=2.5)
    told = []
    edges = np.linspace(0, 1, 11)
    middles = (edges[:-1] + edges[1:]) / 2
    for row, (name, audit) in zip(axes, audits.items(), strict=True):
        tenths = np.clip((audit["prob"].to_numpy() * 10).astype(int), 0, 9)
        everything = np.bincount(tenths, minlength=10)
        base, shares = np.zeros(10), np.zeros(10)
        for place, (sign, chosen) in enumerate((("A > 0", audit["advantage"] > 0), ("A < 0", audit["advantage"] < 0))):
            clipped = np.bincount(tenths[(chosen & audit["clipped"]).to_numpy()], minlength=10)
            share = clipped / np.maximum(everything, 1)
            style = {"color": COLOURS[place], "edgecolor": PAPER, "hatch": HATCHES[place], "width": 0.09}
            row[0].bar(middles, clipped, bottom=base, label=f"clipped, {sign}", **style)
            row[1].bar(middles, share, bottom=shares, **style)
            base, shares = base + clipped, shares + share
            told.append(f"{name}, {sign}: {clipped.sum()} of {len(audit)} tokens clipped")
        title = label(name) if len(audits) > 1 else ""
        row[0].set(ylabel="clipped tokens", title=title)
        row[1].set(ylabel="share of the bin's tokens")
        row[1].yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    for axis in axes[-1]:
        axis.set_xlabel("probability of the token")
    legend(figure, axes[0, 0])
    return Drawing(figure, "; ".join(told))


def quadrant_shares(audit: pd.DataFrame, estimator: str, bound: float) -> pd.DataFrame:
    """Shares of tokens, of estimated and of true change in the four quadrants, and the net true change there.

    Shares are of sizes and sum to 1; `net`, in nats, is the sum with signs.

    Args:
        audit: audited tokens; those without advantage are in no quadrant.
        estimator: the estimate to share out.
        bound: a token is likely if its probability is above this.
    """
    tokens = audit[audit["advantage"] != 0]
    names = [f"A {sign} 0, π {side} {bound:g}" for sign in "><" for side in ">≤"]
    place = 2 * (tokens["advantage"] < 0) + (tokens["prob"] <= bound)
    sizes = pd.DataFrame(
        {
            "tokens": 1.0,
            "estimated change": estimate(tokens, estimator).replace(np.inf, np.nan),
            "true change": tokens["true_change"].abs(),
        },
        index=tokens.index,
    )
    sums = sizes.groupby(place).sum().reindex(range(4), fill_value=0.0).set_axis(names)
    shares = sums / sums.sum().where(sums.sum() > 0, 1.0)
    net = tokens["true_change"].groupby(place).sum().reindex(range(4), fill_value=0.0).set_axis(names)
    return shares.assign(net=net)


def quadrants(groups: Groups, estimator: str, bound: float) -> Drawing | None:
    """Sign of the advantage times probability above or below a bound: who has the tokens, who the change."""
    audits = audited(groups)
    if not audits:
        return None
    figure, axes = canvas(len(audits), 1, height=2.6)
    told = []
    for axis, (name, audit) in zip(axes[:, 0], audits.items(), strict=True):
        shares = quadrant_shares(audit, estimator, bound)
        for place, measure in enumerate(shares.columns.drop("net")):
            axis.barh(
                np.arange(4) + 0.27 * (place - 1),
                shares[measure],
                height=0.25,
                color=COLOURS[place],
                edgecolor=PAPER,
                hatch=HATCHES[place],
                label=f"share of {measure}",
            )
        for quadrant, row in shares.iterrows():
            parts = ", ".join(f"{row[key]:.0%} of {key}" for key in row.index.drop("net"))
            told.append(f"{name}, {quadrant}: {parts}")
        axis.set_yticks(range(4), [f"{quadrant}\nnet {net:+.2g} nats" for quadrant, net in shares["net"].items()])
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
        axis.set_title(label(name) if len(audits) > 1 else "")
    legend(figure, axes[0, 0])
    return Drawing(figure, "; ".join(told))


def _sample(tokens: pd.DataFrame) -> pd.DataFrame:
    """At most `SHOWN` tokens, the same ones each time."""
    return tokens if len(tokens) <= SHOWN else tokens.sample(SHOWN, random_state=0).sort_index()
