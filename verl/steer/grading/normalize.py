# SPDX-License-Identifier: Apache-2.0
"""Reduce the ways of writing one mathematical answer to a single string, so that answers can be compared exactly.

The rules cover what graders of MATH (Hendrycks et al., arXiv 2103.03874) and Minerva (Lewkowycz et al.,
arXiv 2206.14858, appendix D) equate: shorthand fractions and roots, spacing, delimiters, units, currency, degrees,
percent signs, text wrappers, thousands separators, superfluous zeros and a leading `x =`.
A space between two digits is kept (`1 2` is not 12) unless it groups them in thousands. Boxes within an answer go.
Every rule is a regular expression; none backtracks over more than one run of like characters.
"""

import re
from collections.abc import Callable, Iterator

_UNICODE_TO_LATEX = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "÷": "/",
        "π": r"\pi ",
        "√": r"\sqrt ",
        "∞": r"\infty ",
        "°": r"^\circ ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "±": r"\pm ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∅": r"\emptyset ",
        "∈": r"\in ",
        "²": "^2",
        "³": "^3",
        "½": r"\frac{1}{2}",
        "％": "%",
        "，": ",",
        "（": "(",
        "）": ")",
    }
)

_UNIT_WORDS = (
    r"degrees?|radians?|(?:square|cubic|sq\.?) *\w+|units?|millimet(?:er|re)s?|centimet(?:er|re)s?|kilomet(?:er|re)s?"
    r"|met(?:er|re)s?|mm|cm|km|inch(?:es)?|foot|feet|ft|yards?|miles?|mph|km/h|m/s|milliseconds?|seconds?|secs?"
    r"|minutes?|mins?|hours?|hrs?|days?|weeks?|months?|years?|milligrams?|kilograms?|grams?|mg|kg|pounds?|lbs?|ounces?"
    r"|oz|lit(?:er|re)s?|milliliters?|ml|gallons?|dollars?|cents?|euros?|percent|people|students?|points?|ways?|times"
)
_TOKEN = r"(\\[a-zA-Z]+|[^{}\\])"

# A space has no meaning beside anything but a digit, nor after a digit that is the whole argument of a command.
_IDLE_SPACES = r"(?<!\d)\s+|\s+(?!\d)"

# Applied in this order. The first table sees all spaces, the second those between digits only.
_WITH_SPACES: list[tuple[str, str]] = [
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![a-zA-Z])\.?", ""),
    (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-zA-Z])|\\hspace\*?\{[^{}]*\}", " "),
    (r"\{,\}", ","),
    (r"(?<=\d), *(?=\d{3},\d{3}(?!\d))", ","),
    (r"\^ *\{? *\\circ *\}?|\\degree(?![a-zA-Z])", ""),
    (r"\\?[%€£]|\\[$]|\\(?:euro|pounds)(?![a-zA-Z])", ""),
    (r"[, ]*(?:\\(?:text|mbox|textrm|mathrm)\{ *(?:and|or) *\}|\b(?:and|or)\b)[, ]*", ","),
    # Text after a quantity is its unit.
    (r"(?<=[^\s{(,=+\-])\s*\\(?:text|mbox|hbox|textrm|mathrm)\{[^{}]*\}(?:\^ *\{?[23]\}?)? *\.?$", ""),
    (rf"(?<=[\d)}}\s])(?<=[\d)}}]) *(?:{_UNIT_WORDS})(?: *\^ *\{{?[23]\}}?)?\.?$", ""),
    (r"\\(?:text|mbox|hbox|textrm|textbf|textit|mathrm|mathbf|mathit|operatorname)\*?\{([^{}]*)\}", r"\1"),
]
_WITHOUT_SPACES: list[tuple[str, str | Callable[[re.Match], str]]] = [
    (r"(\\(?:frac|sqrt|d?binom) *\d|[\^_] *\d) +(?=\d)", r"\1"),
    (_IDLE_SPACES, ""),
    (r"\\(?:leq|leqslant)(?![a-zA-Z])|<=", r"\\le"),
    (r"\\(?:geq|geqslant)(?![a-zA-Z])|>=", r"\\ge"),
    (r"\\neq(?![a-zA-Z])", r"\\ne"),
    (r"\\times(?![a-zA-Z])|\*(?!\*)", r"\\cdot"),
    (r"\\(?:lbrace|rbrace)(?![a-zA-Z])", lambda m: r"\{" if m[0] == r"\lbrace" else r"\}"),
    (rf"\\sqrt(?!\[|{{){_TOKEN}", r"\\sqrt{\1}"),
    (rf"\\frac(?!{{){_TOKEN}", r"\\frac{\1}"),
    (rf"(\\frac\{{[^{{}}]*\}}){_TOKEN}", r"\1{\2}"),
    (r"(?<![\w./])(\d+)/(\d+)(?![\w./({])", r"\\frac{\1}{\2}"),
    (r"\\frac\{-([\w.]+)\}", r"-\\frac{\1}"),
    (r"([\^_])\{(\w)\}", r"\1\2"),
    # A name before the value, as in `x=5`, `f(x)=2x` or `x\in[1,2]`, when nothing else is equated.
    (r"^[a-zA-Z](?:_\w|_\{\w+\}|\([a-zA-Z]\))?(?:=(?=[^=]+$)|\\in(?=[\[({\\]))", ""),
    (r"(?<![\w.])\.(?=\d)", "0."),
    (r"(\.\d*?)0+(?!\d)", r"\1"),
    (r"(?<=\d)\.(?!\d)", ""),
    (r"^\+", ""),
    (r"^(-?)0+(?=\d+(?:\.\d+)?$)", r"\1"),
    (r"^-0$", "0"),
    (r"^-?\d{1,3}(?:,\d{3})+(?:\.\d+)?$", lambda m: m[0].replace(",", "")),
    (r"^\(([a-zA-Z])\)$", r"\1"),
    (r"^[a-zA-Z]{2,}$", lambda m: m[0].lower()),
    (_IDLE_SPACES, ""),
]

_UPRIGHT_CONSTANT = re.compile(r"\\(?:mathrm|operatorname|text|rm)\{ *([ie]) *\}")
_MATH_DELIMITERS = re.compile(r"(?<!\\)\$|(?<!\\)\\[()\[\]]")

_BRACES = re.compile(r"(?P<box>\\{1,2}(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
_PROSE = re.compile(r"(?:[a-zA-Z\s{}.:$]|\\(?:text(?:bf|it|rm)?(?![a-zA-Z])|[\[\]()]))*")

_NEGATIVE_SPACE = re.compile(r"(?<!\\)\\!")
_SPACE_BETWEEN_DIGITS = re.compile(r"(?<=\d)(?:\\[,;:> ]|\\q?quad|\\hspace\*?\{[^{}]*\}|[~ ])+(?=\d)")
# The groups before and after the decimal point; `3 100/7` is a mixed number.
_GROUPED_DIGITS = re.compile(
    r"(?<![\d.])(?<!\d )\d{1,3}(?: \d{3})+(?![\d/]| [\d/])|(?<=\.\d{3})(?: \d{3})* \d{1,3}(?![\d/]| [\d/])"
)
_MIXED_NUMBER = re.compile(r"(?<![\d./])(?<!\d )(\d+) (\d+) ?/ ?(\d+)(?![\d/]|\.\d)")


def boxes(text: str) -> Iterator[tuple[int, int, int]]:
    r"""Where each `\boxed{…}` or `\fbox{…}` in `text` starts, its content starts and its content ends.

    In the order in which they close: an outer box comes after those in it. Boxes that don't close are left out; as in
    TeX, `\{` and `\}` don't count. Takes time proportional to the length.
    """
    opened: list[tuple[int, int] | None] = []
    for token in _BRACES.finditer(text):
        if token[0] == "}":
            box = opened.pop() if opened else None
            if box:
                yield *box, token.start()
        elif token["box"] or token[0] == "{":
            opened.append((token.start(), token.end()) if token["box"] else None)


def _without_boxes(text: str) -> str:
    r"""The content of the one box in `text` where only words surround it, else all of `text` without the boxes' frames.

    Words introduce a box; anything else, such as the end of `\boxed{5}+17`, belongs to the answer.
    """
    found = list(boxes(text))
    while found:
        start, content, end = found[-1]
        if not _PROSE.fullmatch(text[:start] + text[end + 1 :]):
            break
        text = text[content:end]
        found = list(boxes(text))
    frames = sorted(cut for start, content, end in found for cut in ((start, content), (end, end + 1)))
    kept, position = [], 0
    for before, after in frames:
        kept.append(text[position:before])
        position = after
    return " ".join([*kept, text[position:]])


def clean(answer: str) -> str:
    r"""Strip what carries no meaning: boxes, invisible characters, `$` and `\(` delimiters, stars, final punctuation.

    Unicode symbols become their LaTeX commands, `12\,345` becomes `12345` and `3 1/2` becomes `3\frac{1}{2}`. The
    meaning, percent signs included, is left as it is.
    """
    unboxed = _without_boxes(answer).translate(_UNICODE_TO_LATEX)
    visible = "".join(char if char.isprintable() else " " * char.isspace() for char in unboxed)
    visible = " ".join(visible.split())
    bare = _UPRIGHT_CONSTANT.sub(r"\1", _MATH_DELIMITERS.sub("", visible))
    spaced = _SPACE_BETWEEN_DIGITS.sub(" ", _NEGATIVE_SPACE.sub("", bare))
    grouped = _GROUPED_DIGITS.sub(lambda digits: digits[0].replace(" ", ""), spaced)
    mixed = _MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", grouped)
    return mixed.strip(" *`").rstrip(".,;: ").strip()


def normalize(answer: str) -> str:
    r"""Return the canonical form of `answer`: two answers that are written alike but for style get the same string.

    Examples: `\dfrac12` and `1/2` give `\frac{1}{2}`; `$1{,}000$ dollars` gives `1000`; `x = .50` gives `0.5`.
    """
    canonical = clean(answer)
    for pattern, replacement in _WITH_SPACES:
        canonical = re.sub(pattern, replacement, canonical)
    canonical = canonical.rstrip(" .,;:")
    for pattern, rewrite in _WITHOUT_SPACES:
        canonical = re.sub(pattern, rewrite, canonical)
    return canonical
