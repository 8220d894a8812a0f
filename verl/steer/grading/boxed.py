# SPDX-License-Identifier: Apache-2.0
r"""Grade the final answer of a mathematical response: +1 where it is right, −1 where it is not.

The training rule is strict and cheap: the answer must be within the last 300 characters, in the last balanced
`\boxed{…}` or the last line `Answer: …`, and equal the ground truth after normalisation. The evaluation rule accepts
that, and also an answer further up that is equal after normalisation or, by math-verify, symbolically.
"""

import re
from collections import deque
from typing import Literal

from verl.steer.grading import symbolic
from verl.steer.grading.normalize import boxes, clean, normalize

TRAINING_WINDOW = 300  # characters at a response's end
EVALUATION_WINDOW = 20_000
MAX_ANSWER = 2_000  # a longer answer is wrong
MAX_PRED = 300  # characters of an answer that are reported

_ANSWER_LINE = re.compile(r"\banswer\b[ \t*]*:[ \t*]*([^\n]+)", re.IGNORECASE)
_ANSWER_IS = re.compile(r"\banswer is:?[ \t*]+([^\n]+?)(?=\.\s|\.?$|\n)", re.IGNORECASE | re.MULTILINE)
_MATH_THEN_WORDS = re.compile(r"(?:\$([^$]+)\$|\\\((.+?)\\\))[a-zA-Z .*]*")


def last_boxed(text: str) -> tuple[int, str] | None:
    r"""End and content of the last `\boxed{…}` or `\fbox{…}` in `text` whose braces balance, or None.

    Of nested boxes that is the outer.
    """
    last = deque(boxes(text), maxlen=1)
    return (last[0][2], text[last[0][1] : last[0][2]]) if last else None


def _without_words(answer: str) -> str:
    formula = _MATH_THEN_WORDS.fullmatch(answer.strip())
    return (formula[1] or formula[2]) if formula else answer


def last_answer(text: str, *, prose: bool = False) -> str | None:
    r"""The final answer in `text`: the last box or the last `Answer: …` line, whichever comes later, or None.

    With `prose`, a text that has neither may give its answer as `… answer is …`.
    """
    box = last_boxed(text)
    lines = list(_ANSWER_LINE.finditer(text))
    if box and (not lines or box[0] > lines[-1].start()):
        return box[1]
    if not lines and prose:
        lines = list(_ANSWER_IS.finditer(text))
    return _without_words(lines[-1][1]) if lines else None


def _same(answer: str | None, truth: str) -> bool:
    return answer is not None and len(answer) <= MAX_ANSWER and normalize(answer) == normalize(truth) != ""


def _result(correct: bool, answer: str | None, timed_out: bool = False) -> dict:
    pred = normalize(answer[:MAX_ANSWER])[:MAX_PRED] if answer is not None else ""
    return {"score": 1.0 if correct else -1.0, "acc": correct, "pred": pred, "timed_out": timed_out}


def _grade_training(response: str, truth: str) -> dict:
    answer = last_answer(response[-TRAINING_WINDOW:])
    return _result(_same(answer, truth), answer)


def _grade_evaluation(response: str, truth: str, timeout: float) -> dict:
    strict = _grade_training(response, truth)
    if strict["acc"]:
        return strict
    answer = last_answer(response[-EVALUATION_WINDOW:], prose=True)
    verdict: bool | None = _same(answer, truth)
    if not verdict and answer is not None and len(answer) <= MAX_ANSWER:
        verdict = symbolic.comparer.equivalent(clean(truth), clean(answer), timeout)
    return _result(bool(verdict), answer, timed_out=verdict is None)


def compute_score(
    solution_str: str, ground_truth: str, *, rule: Literal["train", "eval"] = "train", timeout: float = 2.0
) -> dict:
    """Grade one response.

    Args:
        solution_str: the response.
        ground_truth: the right answer, in LaTeX or plain.
        rule: `train` for the training rule, `eval` for the evaluation rule.
        timeout: seconds of CPU time that a symbolic comparison may take (evaluation rule only).

    Returns:
        `score` (+1.0 or −1.0), `acc` (bool), `pred` (str: the normalised answer, empty where the response has none) and
        `timed_out` (bool: the comparison used up its time, so the answer counts as wrong without having been judged).

    Raises:
        ValueError: `rule` is neither.
    """
    truth = str(ground_truth)
    if rule == "train":
        return _grade_training(solution_str, truth)
    if rule == "eval":
        return _grade_evaluation(solution_str, truth, timeout)
    raise ValueError(f"rule={rule!r}: expected 'train' or 'eval'")
