# SPDX-License-Identifier: Apache-2.0
"""The page of a run report: one HTML file without scripts or addresses, and its figures as PNG and SVG.

Whatever comes from a model or a file name is escaped by the template, and the page's content security policy forbids
scripts and requests, so that a response can't do anything.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup
from verl.steer.report import figures
from verl.steer.report.run_metrics import Run, group_seeds, summary

#: Colour levels of a token, and the quantiles of the estimated change that part them: few tokens change much.
LEVELS = 6
CHANGE_QUANTILES = (0.5, 0.75, 0.9, 0.97, 0.99)

_NEEDS_STEER = "a run with actor_rollout_ref.actor.policy_loss.loss_mode=entropy_control logs them"
_NEEDS_AUDIT = "a run with trainer.entropy_audit.freq writes them to audit/*.parquet in its folder"
_NEEDS_LOGGER = "a run with `file` among trainer.logger has them, accuracy from trainer.test_freq"


@dataclass(frozen=True)
class ReportOptions:
    """What a reader may choose.

    Args:
        estimator: the estimate that colours tokens and that the quadrants share out.
        probability_bound: tokens above it are likely, in the quadrants.
        responses: how many responses are shown for each method.
    """

    estimator: str = "released"
    probability_bound: float = 0.5
    responses: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.probability_bound < 1:
            raise ValueError(f"probability_bound={self.probability_bound}: expected a number between 0 and 1")
        if self.responses < 0:
            raise ValueError(f"responses={self.responses}: expected 0 or more")


@dataclass(frozen=True)
class Section:
    """A figure's place on the page: its file's name, heading and caption, and which option gives what it lacks."""

    name: str
    title: str
    caption: str
    lacks: str
    draw: Callable[[figures.Groups], figures.Drawing | None]


def sections(options: ReportOptions) -> list[Section]:
    """The page's figures in order."""
    estimator, bound = options.estimator, options.probability_bound
    return [
        Section(
            "training",
            "Entropy and accuracy",
            "Mean of each method's seeds; the band reaches from the least to the greatest seed. The entropy is the "
            "policy's before the step's update, averaged over the tokens it sampled; the accuracy is the mean over "
            "the validation's data sources.",
            f"entropy and accuracy: {_NEEDS_LOGGER}",
            figures.training,
        ),
        Section(
            "weight_maps",
            "Token weight against estimated entropy change",
            "The exponential and the linear map between the least and the greatest weight a method logged, as they "
            "are where a micro-batch's largest change is the mean of the steps' largest. The dotted line is the mean "
            "change of a token. The axis is linear up to 0.02 and logarithmic above. Audited tokens lie on the maps "
            "of their own micro-batches.",
            f"token weights and estimated changes: {_NEEDS_STEER}",
            lambda groups: figures.weight_maps(groups, estimator),
        ),
        Section(
            "weight_against_entropy",
            "Mean token weight and the entropy's change",
            "One point a step: the mean weight of its tokens, and the next step's policy entropy minus this one's.",
            f"token weights: {_NEEDS_STEER}",
            figures.weight_against_entropy,
        ),
        Section(
            "estimators",
            "Estimators against the truth",
            f"Points: up to {figures.SHOWN} tokens. Line: medians of twenty bins of equal count, over all tokens. "
            "Tokens that did not change or whose estimate is 0 have no place on logarithmic axes.",
            f"estimated and true changes of tokens: {_NEEDS_AUDIT}",
            figures.estimator_truth,
        ),
        Section(
            "clipped",
            "Clipped tokens by probability",
            "Tokens whose gradient PPO's clip took away, by the probability of the token and the sign of its "
            "advantage A: how many, and which share of all tokens in the bin.",
            f"clipped tokens: {_NEEDS_AUDIT}; any run logs their share as actor/pg_clipfrac",
            figures.clip_counts,
        ),
        Section(
            "quadrants",
            "Quadrants of advantage and probability",
            f"Tokens by the sign of their advantage A and by whether their probability π is above {bound:g}: each "
            f"quadrant's share of all tokens, of the estimated change ({estimator}) and of the true one, in size. "
            "Beside each quadrant the sum of its true changes. Tokens without advantage are left out.",
            f"advantages and probabilities of tokens: {_NEEDS_AUDIT}",
            lambda groups: figures.quadrants(groups, estimator, bound),
        ),
    ]


def write_report(runs: Sequence[Run], out: Path, options: ReportOptions) -> Path:
    """Write `out/report.html` and `out/figures/*.png|svg`; the same runs give the same bytes.

    Figures of an earlier report in the folder go.

    Returns:
        The page.

    Raises:
        ValueError: if an audit lacks a column or has no estimate `options.estimator`.
    """
    groups = group_seeds(runs)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    shown = []
    for section in sections(options):
        for earlier in (out / "figures").glob(f"{section.name}.*"):
            earlier.unlink()
        with matplotlib.rc_context({**figures.STYLE, "svg.hashsalt": section.name}):
            drawing = section.draw(groups)
            svg = save(drawing.figure, out / "figures", section.name) if drawing else ""
        shown.append({"section": section, "drawing": drawing, "svg": Markup(inline(svg, section.name))})
    page = render(
        groups=groups,
        summaries={name: summary(members) for name, members in groups.items()},
        shown=shown,
        scores=list(score_rows(groups)),
        coloured=coloured_responses(groups, options),
        options=options,
        quantiles=", ".join(f"{quantile:.0%}" for quantile in CHANGE_QUANTILES),
        lacks=_NEEDS_AUDIT,
    )
    file = out / "report.html"
    file.write_text(page, encoding="utf-8")
    return file


def render(**values: Any) -> str:
    """The template `page.html`, everything escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["figure"] = figure_text
    template = environment.from_string(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    return template.render(values)


def figure_text(value: float | None) -> str:
    """A figure with three decimals, or in powers of ten where they would not tell it; a dash for None and NaN."""
    if value is None or value != value:
        return "–"
    return f"{value:.3f}" if value == 0 or 1e-2 <= abs(value) < 1e4 else f"{value:.2e}"


def save(figure: Any, folder: Path, name: str) -> str:
    """Write a figure as PNG and SVG without a date, and return the SVG's text."""
    figure.savefig(folder / f"{name}.png", dpi=200, metadata={"Software": None})
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    (folder / f"{name}.svg").write_text(text.getvalue(), encoding="utf-8")
    return text.getvalue()


def inline(svg: str, name: str) -> str:
    """An SVG file's text as an element of the page, in the page's colours, its ids told from other figures' by `name`.

    Addresses, comments (which repeat a figure's texts) and sizes go: the page is without addresses, and scales it.
    """
    svg = svg[svg.find("<svg") :] if svg else ""
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"(?=[^>]*viewBox)| version="1.1"', "", svg)
    svg = svg.replace("<svg ", '<svg aria-hidden="true" ', 1)
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    variables = {figures.INK: "ink", figures.GRID: "grid", figures.PAPER: "paper"}
    variables |= {colour: f"colour-{index}" for index, colour in enumerate(figures.COLOURS)}
    return re.sub("|".join(variables), lambda found: f"var(--{variables[found[0]]})", svg)


def score_rows(groups: figures.Groups) -> Iterator[dict[str, Any]]:
    """Rows of the estimators' table: what the runs logged as entropy_audit/..., and what the audited tokens give."""
    audits = figures.audited(groups)
    for name, runs in groups.items():
        logged = pd.DataFrame([data for run in runs for _, data in sorted(run.steps.items())])
        keys = [re.fullmatch(r"entropy_audit/(.+)/mse", key) for key in logged]
        for estimator in (key[1] for key in keys if key):
            means = {key: logged[f"entropy_audit/{estimator}/{key}"] for key in ("mse", "pearson", "spearman")}
            source = f"logged, mean of {means['mse'].count()} steps"
            yield {"method": name, "estimator": estimator, "source": source, "sign": None} | {
                key: float(values.mean()) for key, values in means.items()
            }
        if name in audits:
            for estimator, scores in figures.estimator_scores(audits[name]).iterrows():
                source = f"{len(audits[name])} audited tokens"
                yield {"method": name, "estimator": estimator, "source": source, **scores}


@dataclass(frozen=True)
class Token:
    """A token as the page shows it: its text, its three colour levels, whether it was clipped, and its figures."""

    text: str
    change: int
    weight: int
    entropy: int
    clipped: bool
    figures: str


@dataclass(frozen=True)
class Response:
    """A response: a heading, its tokens, and those with the largest estimated change, for a table."""

    title: str
    tokens: list[Token]
    largest: list[Token]


@dataclass(frozen=True)
class ColouredMethod:
    """The responses shown for a method, and for each of the three measures the values that part the colours."""

    method: str
    edges: dict[str, list[float]]
    responses: list[Response]


def coloured_responses(groups: figures.Groups, options: ReportOptions) -> list[ColouredMethod]:
    """Some responses of each audited method: of its first audited seed, at the last audited step."""
    result = []
    for name, runs in groups.items():
        audit = next((run.audit for run in runs if run.audit is not None), None)
        if audit is None or options.responses == 0:
            continue
        tokens = audit[audit["step"] == audit["step"].max()].copy()
        tokens["change"] = figures.estimate(tokens, options.estimator)
        edges = {
            "change": tokens["change"].quantile(CHANGE_QUANTILES).tolist(),
            "weight": np.linspace(tokens["weight"].max(), tokens["weight"].min(), LEVELS + 1)[1:-1].tolist(),
            "entropy": np.linspace(0, tokens["entropy"].max(), LEVELS + 1)[1:-1].tolist(),
        }
        tokens["change_level"] = np.searchsorted(edges["change"], tokens["change"], side="left")
        tokens["weight_level"] = np.searchsorted(-np.array(edges["weight"]), -tokens["weight"], side="left")
        tokens["entropy_level"] = np.searchsorted(edges["entropy"], tokens["entropy"], side="left")
        # A response that got no advantage has no change to show.
        chosen = tokens[tokens["advantage"] != 0] if (tokens["advantage"] != 0).any() else tokens
        members = list(chosen.groupby(["mini_batch", "response"]))
        places = np.linspace(0, len(members) - 1, min(options.responses, len(members))).round().astype(int)
        result.append(ColouredMethod(name, edges, [_response(members[place][1]) for place in places]))
    return result


def _response(rows: pd.DataFrame) -> Response:
    first = rows.iloc[0]
    tokens = [_token(row) for row in rows.itertuples()]
    order = np.argsort(-rows["change"].to_numpy(), kind="stable")[:5]
    title = f"Step {first.step}, response {first.response}: {len(rows)} tokens, advantage {first.advantage:+.3g}"
    return Response(title, tokens, [tokens[place] for place in order])


def _token(row: Any) -> Token:
    clipped = bool(getattr(row, "clipped", False))
    told = (
        f"probability {row.prob:.3g} · entropy {row.entropy:.3g} · advantage {row.advantage:+.3g} · ratio "
        f"{row.ratio:.4g} · estimated change {row.change:.3g} · true change {row.true_change:+.2g} · weight "
        f"{row.weight:.4g}{' · clipped' if clipped else ''}"
    )
    return Token(visible(row.text), row.change_level, row.weight_level, row.entropy_level, clipped, told)


def visible(text: str) -> str:
    """A token's text with what can't be seen as escapes: control and format characters, lone surrogates."""
    hidden = {"Cc", "Cf", "Cs"}
    return "".join(
        f"\\u{ord(sign):04x}" if unicodedata.category(sign) in hidden and sign not in "\n\t" else sign for sign in text
    )
