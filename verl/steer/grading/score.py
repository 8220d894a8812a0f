# SPDX-License-Identifier: Apache-2.0
r"""The reward of a response: +1 if its final answer is right, −1 if not, by a rule that depends on the data source.

verl calls `compute_score` as its custom reward function, `pkg://verl.steer.grading.score`. Programs go to `code`; what
follows is about mathematics.

The training rule is strict and cheap: the answer must be within the last 300 characters, in the last balanced
`\boxed{…}` or the last `Answer: …`, on that line or below it, and equal the ground truth after normalization. The
evaluation rule also accepts an answer further up or in a sentence, and one that is equal in scientific notation or, by
math-verify, symbolically.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

from verl.steer.grading import code as programs
from verl.steer.grading import symbolic
from verl.steer.grading.normalize import MAGNITUDES, boxes, clean, expand_scientific, normalize
from verl.steer.grading.sandbox import SECTION
from verl.steer.options import from_config
from verl.steer.tasks import TASKS
from verl.utils.reward_score import default_compute_score

TRAINING_SOURCES = {"math_dapo"}
# Prefixes, since one benchmark has several names: aime_2024_dapo_boxed, minerva_math, omni and omni_math_test, …
BENCHMARKS = ("aime", "amc", "gsm8k", "math500", "minerva", "olympiad", "omni")

TRAINING_WINDOW = 300  # characters at the end of a response
EVALUATION_WINDOW = 20_000
MAX_ANSWER = 2_000  # characters; a longer answer is wrong
MAX_PRED = 300  # characters of an answer that are reported

# The answer may stand on a line of its own below "Answer:", unless that line is another "Answer:".
_ANSWER_LINE = re.compile(r"\banswer\b[ \t*]*:[\s*]*(?![\s*]|answer\b[ \t*]*:)([^\n]+)", re.IGNORECASE)
_ANSWER_IS = re.compile(r"\banswer is:?[ \t*]+([^\n]+?)(?=\.\s|\.?$|\n)", re.IGNORECASE | re.MULTILINE)
_ANSWER_HEADING = re.compile(
    r"^(?:#+|\*\*)[ \t*]*(?:final )?answer[ \t*]*\n[\s*]*(?![\s*])([^\n]+)", re.IGNORECASE | re.MULTILINE
)
_GSM8K_LINE = re.compile(r"####([^\na-zA-Z]*)")
_MATH_THEN_WORDS = re.compile(rf"(?:\$([^$]+)\$|\\\((.+?)\\\))(?![a-zA-Z .*]*{MAGNITUDES})[a-zA-Z .*]*")
_DISPLAYS = {r"\[": r"\]", "$$": "$$"}


def last_answer(text: str, *, prose: bool = False) -> str | None:
    r"""The final answer in `text`: the last balanced box or the last `Answer: …`, whichever ends later, or None.

    Of nested boxes the outer one counts. With `prose`, a text with neither may end with GSM8K's `#### …`, state
    `… answer is …` in a sentence, or have a heading `# Answer` or `**Answer**`; such a sentence may follow `Answer:`.
    """
    found = list(boxes(text))
    lines = list(_ANSWER_LINE.finditer(text))
    if found and (not lines or found[-1][2] > lines[-1].start()):
        _, start, end = found[-1]
        return text[start:end]
    if not lines and prose:
        lines = _lines_without_label(text)
    if not lines:
        return None
    answer = _with_display(text, lines[-1])
    formula = _MATH_THEN_WORDS.fullmatch(answer.strip())
    if prose and not formula and (sentence := _ANSWER_IS.search(answer)):
        answer = sentence[1]
        formula = _MATH_THEN_WORDS.fullmatch(answer.strip())
    return (formula[1] or formula[2]) if formula else answer


def _lines_without_label(text: str) -> list[re.Match]:
    """The lines of `text` that may hold an answer, of the likeliest form only."""
    text = text.rstrip()
    last_line = _GSM8K_LINE.fullmatch(text, text.rfind("\n") + 1)
    if last_line and re.search(r"\d", last_line[1]):
        return [last_line]
    return list(_ANSWER_IS.finditer(text)) or list(_ANSWER_HEADING.finditer(text))


def _with_display(text: str, line: re.Match) -> str:
    r"""The answer on `line`; if that only opens a formula by `\[` or `$$`, all up to the line that closes it."""
    closing = _DISPLAYS.get(line[1].strip())
    end = text.find(closing, line.end(1)) if closing else -1
    return text[line.start(1) : end] + text[end:].partition("\n")[0] if end >= 0 else line[1]


def is_own_source(data_source: str) -> bool:
    """Whether `compute_score` grades this source itself; verl's function gets the others."""
    own = data_source in TRAINING_SOURCES or data_source in TASKS or programs.is_code(data_source)
    return own or data_source.startswith(BENCHMARKS)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict | None = None,
    *,
    rule: Literal["auto", "train", "eval"] = "auto",
    timeout: float = 2.0,
    code: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, Any] | float:
    """Grade one response; verl's reward managers call this.

    Args:
        data_source: the row's data source. Sources that aren't STEER's are graded by verl's `default_compute_score`.
        solution_str: the response.
        ground_truth: the right answer, in LaTeX or plain.
        extra_info: the row's `extra_info`, only for verl's own graders.
        rule: `auto` is the evaluation rule for benchmarks and the training rule for training data; `train` and `eval`
            apply one rule to every mathematical source. verl doesn't tell a reward function whether it validates.
        timeout: seconds of CPU time that a symbolic comparison may take.
        code: the keys of `CodeOptions`, for programs.
        **kwargs: options of verl's own graders; with `sandbox_fusion_url` that service runs programs.

    Returns:
        For STEER's sources `score` (+1.0 or −1.0), `acc` (bool), `pred` (str: the normalized answer, empty if there is
        none) and `timed_out` (bool: the comparison or program used up its time, so the answer counts as wrong); for
        other sources the result of verl's grader.

    Raises:
        ValueError: `rule` is none of the three, or a program's tests or options have another form.
        SandboxError: the sandbox of programs didn't start.
        NotImplementedError: neither STEER nor verl has a grader for `data_source`.
    """
    if rule not in ("auto", "train", "eval"):
        raise ValueError(f"rule={rule!r}: expected 'auto', 'train' or 'eval'")
    is_benchmark = data_source.startswith(BENCHMARKS)
    if is_benchmark or data_source in TRAINING_SOURCES:
        if rule == "auto":
            rule = "eval" if is_benchmark else "train"
        return _grade(solution_str, str(ground_truth), rule, timeout)
    if programs.is_code(data_source):
        options = from_config(programs.CodeOptions, code, SECTION)
        service = kwargs if kwargs.get("sandbox_fusion_url") else None
        return programs.compute_score(data_source, solution_str, ground_truth, options, service)
    if data_source in TASKS:
        # verl takes a batch's keys from its first row, so all of STEER's sources have the same keys.
        return {**TASKS[data_source].compute_score(solution_str, ground_truth), "timed_out": False}
    return default_compute_score(data_source, solution_str, ground_truth, extra_info, **kwargs)


def _grade(response: str, truth: str, rule: str, timeout: float) -> dict[str, Any]:
    answer = last_answer(response[-TRAINING_WINDOW:])
    verdict: bool | None = _same(answer, truth)
    if rule == "eval" and not verdict:
        answer = last_answer(response[-EVALUATION_WINDOW:], prose=True)
        verdict = _same(answer, truth)
        if not verdict and answer is not None and len(answer) <= MAX_ANSWER:
            expected, given = expand_scientific(clean(truth)), expand_scientific(clean(answer))
            verdict = symbolic.comparer.equivalent(expected, given, timeout)
    pred = normalize(answer[:MAX_ANSWER])[:MAX_PRED] if answer is not None else ""
    return {"score": 1.0 if verdict else -1.0, "acc": bool(verdict), "pred": pred, "timed_out": verdict is None}


def _same(answer: str | None, truth: str) -> bool:
    return answer is not None and len(answer) <= MAX_ANSWER and normalize(answer) == normalize(truth) != ""
