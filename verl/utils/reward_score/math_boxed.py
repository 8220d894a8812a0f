# SPDX-License-Identifier: Apache-2.0
r"""Grade the final answer of a mathematical response: +1 where it is right, −1 where it is not.

The training rule is strict and cheap: the answer must be within the last 300 characters, in the last balanced
`\boxed{…}` or the last line `Answer: …`, and equal the ground truth after normalisation. The evaluation rule accepts
that, and also an answer further up that is equal after normalisation or, by math-verify, symbolically.
"""

import re
from typing import Literal

from verl.utils.reward_score import math_symbolic
from verl.utils.reward_score.math_normalize import clean, normalize

TRAINING_WINDOW = 300  # characters at a response's end
EVALUATION_WINDOW = 20_000
MAX_ANSWER = 2_000  # a longer answer is wrong
MAX_PRED = 300  # characters of an answer that are reported

_BRACES = re.compile(r"(?P<box>\\{1,2}(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
_ANSWER_LINE = re.compile(r"\banswer\b[ \t*]*:[ \t*]*([^\n]+)", re.IGNORECASE)
_ANSWER_IS = re.compile(r"\banswer is:?[ \t*]+([^\n]+?)(?=\.\s|\.?$|\n)", re.IGNORECASE | re.MULTILINE)
_MATH_THEN_WORDS = re.compile(r"(?:\$([^$]+)\$|\\\((.+?)\\\))[a-zA-Z .*]*")


def last_boxed(text: str) -> tuple[int, str] | None:
    r"""Position and content of the last `\boxed{…}` or `\fbox{…}` in `text` whose braces balance, or None.

    As in TeX, `\{` and `\}` don't count. Of nested boxes the inner is the last. Takes time proportional to the length.
    """
    last = None
    opened: list[tuple[int, bool]] = []
    for token in _BRACES.finditer(text):
        if token[0] == "}":
            start, is_box = opened.pop() if opened else (0, False)
            if is_box and (last is None or start > last[0]):
                last = start, text[start : token.start()]
        elif token["box"] or token[0] == "{":
            opened.append((token.end(), token["box"] is not None))
    return last


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


def _result(correct: bool, answer: str | None) -> dict:
    pred = normalize(answer[:MAX_ANSWER])[:MAX_PRED] if answer is not None else ""
    return {"score": 1.0 if correct else -1.0, "acc": correct, "pred": pred}


def _grade_training(response: str, truth: str) -> dict:
    answer = last_answer(response[-TRAINING_WINDOW:])
    return _result(_same(answer, truth), answer)


def _grade_evaluation(response: str, truth: str, timeout: float) -> dict:
    strict = _grade_training(response, truth)
    if strict["acc"]:
        return strict
    answer = last_answer(response[-EVALUATION_WINDOW:], prose=True)
    correct = _same(answer, truth)
    if not correct and answer is not None and len(answer) <= MAX_ANSWER:
        correct = math_symbolic.comparer.equivalent(clean(truth), clean(answer), timeout)
    return _result(correct, answer)


def compute_score(
    solution_str: str, ground_truth: str, *, rule: Literal["train", "eval"] = "train", timeout: float = 2.0
) -> dict:
    """Grade one response.

    Args:
        solution_str: the response.
        ground_truth: the right answer, in LaTeX or plain.
        rule: `train` for the training rule, `eval` for the evaluation rule.
        timeout: seconds that a symbolic comparison may take (evaluation rule only); past it, the answer is wrong.

    Returns:
        `score` (+1.0 or −1.0), `acc` (bool) and `pred` (str: the normalised answer, empty where the response has none).

    Raises:
        ValueError: `rule` is neither.
    """
    truth = str(ground_truth)
    if rule == "train":
        return _grade_training(solution_str, truth)
    if rule == "eval":
        return _grade_evaluation(solution_str, truth, timeout)
    raise ValueError(f"rule={rule!r}: expected 'train' or 'eval'")
