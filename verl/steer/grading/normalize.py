# SPDX-License-Identifier: Apache-2.0
r"""Reduce the ways of writing one mathematical answer to a single string, so that answers can be compared exactly.

The rules equate what graders of MATH (Hendrycks et al., arXiv 2103.03874) and Minerva (Lewkowycz et al.,
arXiv 2206.14858, appendix D) equate: shorthand fractions and roots, spacing, delimiters, units, currency, degrees,
percent signs, text commands, thousands separators, superfluous zeros and a leading `x =`.
A space between two digits is kept (`1 2` is not 12) unless it groups them in thousands.
No regular expression backtracks over more than one run of like characters.
"""

import re
from collections.abc import Callable, Iterator

# A pattern and its replacement, as for `re.sub`.
Rule = tuple[str, str | Callable[[re.Match], str]]

_COMMANDS = (
    r"× \times · \cdot ⋅ \cdot π \pi √ \sqrt ∞ \infty ° ^\circ ≤ \le ≥ \ge ≠ \ne ± \pm"
    r" ∪ \cup ∩ \cap ∅ \emptyset ∈ \in"
).split()
_UNICODE_TO_LATEX: dict[int, int | str] = {
    **str.maketrans("−–÷％，（）", "--/%,()"),
    **{ord(symbol): f"{command} " for symbol, command in zip(_COMMANDS[::2], _COMMANDS[1::2], strict=True)},
    **{ord("²"): "^2", ord("³"): "^3", ord("½"): r"\frac{1}{2}"},
}

_UNIT_WORDS = (
    r"deg(?:rees?)?|radians?|(?:square|cubic|sq\.?) *\w+|units?|millimet(?:er|re)s?|centimet(?:er|re)s?"
    r"|kilomet(?:er|re)s?|met(?:er|re)s?|mm|cm|km|inch(?:es)?|foot|feet|ft|yards?|miles?|mph|km/h|m/s|milliseconds?|seconds?|secs?"
    r"|minutes?|mins?|hours?|hrs?|days?|weeks?|months?|years?|milligrams?|kilograms?|grams?|mg|kg|pounds?|lbs?|ounces?"
    r"|oz|lit(?:er|re)s?|milliliters?|ml|gallons?|dollars?|cents?|euros?|percent|people|students?|points?|ways?|times"
)
# These multiply the quantity before them, but not in `5.4 to the nearest tenth`.
MAGNITUDES = r"(?i:\b(?<!nearest )(?:(?:hundred|thousand|million|billion|trillion|dozen)(?:ths?|s)?|tenths?)\b)"
_TOKEN = r"(\\[a-zA-Z]+|[^{}\\])"

_UNIT_AT_END = rf"(?:{_UNIT_WORDS})(?: *\^ *\{{?[23]\}}?)?\.?$"

# A letter, or a command that may name something that has a value.
_NAME = r"(?:[a-zA-Z]|\\(?!(?:[gl]eq?|neq?|pm|mp|pi|infty|[lc]?dots|approx|in)(?![a-zA-Z]))[a-zA-Z]+)"

# A space has no meaning beside anything but a digit, nor after a digit that is the whole argument of a command.
_IDLE_SPACES = r"(?<!\d)\s+|\s+(?!\d)"

# Applied in this order.
_NORMALIZING: list[Rule] = [
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![a-zA-Z])\.?", ""),
    (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-zA-Z])|\\hspace\*?\{[^{}]*\}", " "),
    (r"\{,\}", ","),
    (r"(?<=\d), *(?=\d{3},\d{3}(?!\d))", ","),
    (r"\^ *\{? *\\circ *\}?|\\degree(?![a-zA-Z])", ""),
    (r"\\?[%€£]|\\[$]|\\(?:euro|pounds)(?![a-zA-Z])", ""),
    (r"[, ]*(?:\\(?:text|mbox|textrm|mathrm)\{ *(?:and|or) *\}|\b(?:and|or)\b)[, ]*", ","),
    # Text after a quantity is its unit.
    (
        rf"(?<=[^\s{{(,=+\-])\s*\\(?:text(?:bf|it|rm)?|mbox|hbox|mathrm)\{{(?![^{{}}]*{MAGNITUDES})[^{{}}]*\}}"
        r"(?:\^ *\{?[23]\}?)? *\.?$",
        "",
    ),
    (r"(?<=[\d)}\s])(?<=[\d)}]) *" + _UNIT_AT_END, ""),
    (r"\\(?:text|mbox|hbox|textrm|textbf|textit|mathrm|mathbf|mathit|operatorname)\*?\{([^{}]*)\}", r"\1"),
    (r"(?<![ .,;:])[ .,;:]+$", ""),
    # From here on the only spaces are those between digits.
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
    # A name before the value, as in `x=5`, `f(x)=2x`, `\lambda_{\max}=5` or `x\in[1,2]`, when nothing else is equated.
    ("^" + _NAME + r"(?:_\w|_\{[^{}=]*\}|\([a-zA-Z]\))?(?:=(?=[^=]+$)|\\in(?=[\[({\\]))", ""),
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

_CLEANING: list[Rule] = [
    (r"^[a-zA-Z](?: ?: ?[a-zA-Z])+ ?= ?", ""),  # the names of a ratio
    (r"\\\\\[ *-?[\d.]+ *(?:pt|ex|em|mm|cm)\]", r"\\\\"),  # space between the rows of a matrix
    (r"(?<!\\)\$|(?<!\\)\\[()\[\]]", ""),  # math delimiters
    (r"\\(?:mathrm|operatorname|text|rm)\{ *([ie]) *\}", r"\1"),
    (r"(?<!\\)\\!", ""),
    (r"(?<=\d)(?:\\[,;:> ]|\\q?quad|\\hspace\*?\{[^{}]*\}|[~ ])+(?=\d)", " "),
    # Digits in groups of three, before and after the decimal point; `3 100/7` is a mixed number.
    (
        r"(?<![\d.])(?<!\d )\d{1,3}(?: \d{3})+(?![\d/]| [\d/])|(?<=\.\d{3})(?: \d{3})* \d{1,3}(?![\d/]| [\d/])",
        lambda digits: digits[0].replace(" ", ""),
    ),
    (r"(?<![\d./])(?<!\d )(\d+) (\d+) ?/ ?(\d+)(?![\d/]|\.\d)", r"\1\\frac{\2}{\3}"),
]

# The whole answer, but for a sign, a name and a unit: in a longer expression `2e-3` is rather 2e − 3.
_SCIENTIFIC = re.compile(
    r"^((?:[a-zA-Z] ?= ?)?[-+]?(?:\d+(?:\.\d*)?|\.\d+))[eE]([-+]?\d{1,3})(?=$| ?\\(?:[ ,]|text|mathrm)| [a-zA-Z]{2})"
)

_BRACES = re.compile(r"(?P<box>\\{1,2}(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
_WORDS_AROUND_BOX = re.compile(r"(?:[a-zA-Z\s{}.:$]|\\(?:text(?:bf|it|rm)?(?![a-zA-Z])|[\[\]()]))*")


def boxes(text: str) -> Iterator[tuple[int, int, int]]:
    r"""Find each `\boxed{…}` or `\fbox{…}` in `text`: yields its start, and the start and end of its content.

    They come in the order of their closing braces, inner boxes before outer. Boxes without a closing brace are left
    out; `\{` and `\}` don't count, as in TeX. Takes time proportional to the length.
    """
    opened: list[tuple[int, int] | None] = []
    for token in _BRACES.finditer(text):
        if token[0] == "}":
            box = opened.pop() if opened else None
            if box:
                yield *box, token.start()
        elif token["box"] or token[0] == "{":
            opened.append(token.span() if token["box"] else None)


def _without_boxes(text: str) -> str:
    r"""The content of a box that has only words around it; of other text, all but the frames of its boxes.

    Words introduce a box; anything else, such as the end of `\boxed{5}+17`, belongs to the answer.
    """
    while found := list(boxes(text)):
        start, content, end = found[-1]
        if not _WORDS_AROUND_BOX.fullmatch(text[:start] + text[end + 1 :]):
            break
        text = text[content:end]
    characters = list(text)
    for start, content, end in found:
        characters[start:content] = [" "] + [""] * (content - start - 1)
        characters[end] = " "
    return "".join(characters)


def _apply(rules: list[Rule], text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def _without_end(text: str) -> str:
    """The text without final punctuation and spaces, those of TeX included."""
    while text:
        # The backslash of a space such as `\,` whose second character is gone, but not a line's end.
        if text[-1] not in " .,;:" and (not text.endswith("\\") or text.endswith("\\\\")):
            break
        text = text[:-1]
    return text


def clean(answer: str) -> str:
    r"""Remove what has no meaning: boxes, invisible characters, `$` and `\(` delimiters, stars, final punctuation.

    Unicode symbols become LaTeX commands, `12\,345` becomes `12345` and `3 1/2` becomes `3\frac{1}{2}`. Percent signs
    and units stay.
    """
    unboxed = _without_boxes(answer).translate(_UNICODE_TO_LATEX)
    visible = "".join(char if char.isprintable() else " " * char.isspace() for char in unboxed)
    return _without_end(_apply(_CLEANING, " ".join(visible.split())).strip(" *`")).strip()


def expand_scientific(answer: str) -> str:
    r"""Write a number in scientific notation as a product: `1.2e-05` becomes `1.2 \cdot 10^{-5}`.

    Other text stays. Exponents have at most three digits.
    """
    return _SCIENTIFIC.sub(lambda number: rf"{number[1]} \cdot 10^{{{int(number[2])}}}", answer)


def without_unit(answer: str) -> str:
    r"""The answer without a unit at its end: `5cm`, `5 m` and `2\pi cm` become `5`, `5` and `2\pi`.

    A letter beside a number or in a longer expression is rather a factor: `6m` and `1+2 m` stay as they are.
    """
    answer = re.sub(r"^([-+]?[\d.,]+)(?: |\\[,;:])+[mgshLNJWVAK]$", r"\1", answer)
    return re.sub(r"(?:(?<=[\d)}\]]) *|(?<=[\w)}\]]) +)" + _UNIT_AT_END, "", answer)


def normalize(answer: str) -> str:
    r"""Return the canonical form of `answer`, equal for answers that differ only in style.

    Examples: `\dfrac12` and `1/2` give `\frac{1}{2}`; `$1{,}000$ dollars` gives `1000`; `x = .50` gives `0.5`.
    """
    return _apply(_NORMALIZING, clean(answer))
