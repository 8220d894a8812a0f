# SPDX-License-Identifier: Apache-2.0
"""The page of a run report: one HTML file without scripts or addresses, and its figures as PNG and SVG.

The template `page.html` escapes all text from models and file names, and the page's content security policy forbids
scripts and requests.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure
from verl.steer.report import figures
from verl.steer.report.notes import notes
from verl.steer.report.run_metrics import Run, group_seeds, summary

#: Number of a token's colours, and the quantiles that divide the estimated changes: few tokens change much.
LEVELS = 6
CHANGE_QUANTILES = (0.5, 0.75, 0.9, 0.97, 0.99)


@dataclass(frozen=True)
class ReportOptions:
    """Estimator for colours and quadrants, greatest probability of an unlikely token, shown responses per method."""

    estimator: str = "released"
    probability_bound: float = 0.5
    responses: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.probability_bound < 1:
            raise ValueError(f"probability_bound={self.probability_bound}: expected a number between 0 and 1")
        if self.responses < 0:
            raise ValueError(f"responses={self.responses}: expected 0 or more")


def write_report(runs: Sequence[Run], out: Path, options: ReportOptions) -> Path:
    """Write `out/report.html`, which is returned, and `out/figures/*.png|svg`; the same runs give the same bytes.

    Figures of an earlier report in the folder are deleted. ValueError if an audit lacks a column or the estimator.
    """
    groups = group_seeds(runs)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(figures.STYLE):
        drawings = {
            "training": figures.training(groups),
            "tradeoff": figures.tradeoff(groups),
            "weight_maps": figures.weight_maps(groups, options.estimator),
            "weight_against_entropy": figures.weight_against_entropy(groups),
            "estimators": figures.estimator_truth(groups),
            "predicted": figures.predicted_updates(groups),
            "held": figures.held_entropy(groups),
            "clipped": figures.clip_counts(groups),
            "quadrants": figures.quadrants(groups, options.estimator, options.probability_bound),
        }
        svgs = {}
        for name, drawing in drawings.items():
            for earlier in (out / "figures").glob(f"{name}.*"):
                earlier.unlink()
            if drawing:
                svgs[name] = Markup(inline(save(drawing.figure, out / "figures", name), name))
    source = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    template = jinja2.Template(
        source, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = template.render(
        groups=groups,
        summary=summary(groups),
        notes=notes(groups),
        drawings=drawings,
        svgs=svgs,
        points=figures.SHOWN,
        scores=list(score_rows(groups)),
        coloured=coloured_responses(groups, options),
        options=options,
        quantiles=CHANGE_QUANTILES,
        figure_text=figure_text,
        visible=visible,
    )
    (out / "report.html").write_text(page, encoding="utf-8")
    return out / "report.html"


def figure_text(value: float | None) -> str:
    """A number with three decimals, or as a power of ten if it is small or large; a dash for None and NaN."""
    if value is None or value != value:
        return "–"
    return f"{value:.3f}" if value == 0 or 1e-2 <= abs(value) < 1e4 else f"{value:.2e}"


def save(figure: Figure, folder: Path, name: str) -> str:
    """Write a figure as PNG and SVG without a date and with ids that depend on `name` only; returns the SVG's text."""
    figure.savefig(folder / f"{name}.png", dpi=200, metadata={"Software": None})
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    (folder / f"{name}.svg").write_text(text.getvalue(), encoding="utf-8")
    return text.getvalue()


def inline(svg: str, name: str) -> str:
    """An SVG file's text as an element of the page, in the page's colours, with `name` in front of its ids.

    Without addresses (the page has none), comments (they repeat a figure's texts) and sizes (the page scales it).
    """
    svg = svg[svg.find("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"(?=[^>]*viewBox)| version="1.1"', "", svg)
    svg = svg.replace("<svg ", '<svg aria-hidden="true" ', 1)
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    variables = {figures.INK: "ink", figures.GRID: "grid", figures.PAPER: "paper"}
    variables |= {colour: f"colour-{index}" for index, colour in enumerate(figures.COLOURS)}
    return re.sub("|".join(variables), lambda found: f"var(--{variables[found[0]]})", svg)


def score_rows(groups: figures.Groups) -> Iterator[dict[str, Any]]:
    """Rows of the estimators' table: the scores that the runs logged, and those of the audited tokens."""
    audits = figures.audited(groups)
    for name, runs in groups.items():
        logged = pd.DataFrame([data for run in runs for _, data in sorted(run.steps.items())])
        for key in logged.filter(regex="^entropy_audit/.+/mse$"):
            estimator, source = (
                key[len("entropy_audit/") : -len("/mse")],
                f"logged, mean of {logged[key].count()} steps",
            )
            # Without correlations where the estimate is constant.
            scores = logged.reindex(columns=[key.removesuffix("mse") + kind for kind in ("mse", "pearson", "spearman")])
            means = dict(zip(("mse", "pearson", "spearman"), scores.mean(), strict=True))
            yield {"method": name, "estimator": estimator, "source": source, "sign": None, **means}
        if name in audits:
            for estimator, scores in figures.estimator_scores(audits[name]).iterrows():
                source = f"{len(audits[name])} audited tokens"
                yield {"method": name, "estimator": estimator, "source": source, **scores}


def coloured_responses(
    groups: figures.Groups, options: ReportOptions
) -> dict[str, tuple[dict[str, np.ndarray], list[pd.DataFrame]]]:
    """Some responses of each audited method: of its first audited seed, at the last audited step.

    Returns:
        Method -> the values between two colours for change, weight and entropy; and the tokens of each response, with
        the numbers of their colours in `change_level`, `weight_level` and `entropy_level`.
    """
    result = {}
    for name, runs in groups.items():
        audit = next((run.audit for run in runs if run.audit is not None), None)
        if audit is None or options.responses == 0:
            continue
        tokens = audit[audit["step"] == audit["step"].max()].copy()
        tokens["change"] = figures.estimate(tokens, options.estimator)
        tokens["clipped"] = tokens.get("clipped", False)
        edges = {
            "change": tokens["change"].quantile(CHANGE_QUANTILES).to_numpy(),
            "weight": np.linspace(tokens["weight"].max(), tokens["weight"].min(), LEVELS + 1)[1:-1],
            "entropy": np.linspace(0, tokens["entropy"].max(), LEVELS + 1)[1:-1],
        }
        for measure, values in edges.items():
            sign = -1 if measure == "weight" else 1  # small weights get the strong colours
            tokens[f"{measure}_level"] = np.searchsorted(sign * values, sign * tokens[measure])
        # A response without advantage has no change.
        chosen = tokens[tokens["advantage"] != 0] if tokens["advantage"].any() else tokens
        responses = [response for _, response in chosen.groupby(["mini_batch", "response"])]
        indices = np.linspace(0, len(responses) - 1, min(options.responses, len(responses))).round().astype(int)
        result[name] = edges, [responses[index] for index in indices]
    return result


def visible(text: str) -> str:
    """A text with escapes for invisible characters: control and format characters and lone surrogates."""
    return "".join(
        f"\\u{ord(sign):04x}" if unicodedata.category(sign) in ("Cc", "Cf", "Cs") and sign not in "\n\t" else sign
        for sign in text
    )
