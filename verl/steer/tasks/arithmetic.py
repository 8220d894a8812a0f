# SPDX-License-Identifier: Apache-2.0
"""Arithmetic problems with step-by-step solutions, for training tiny models, and the rule that grades them.

A problem is a chain of signed terms, such as `7+8-5+9`. Its solution keeps a running total, adds one term at each step
and gives the answer after a marker: `7+8=15;15-5=10;9+10=19;#19`.

The running total may start from any positive term, and take the others in any order that keeps it from going below
zero; the two operands of a sum may come in either order. So a policy that solves the task has entropy to keep or lose.
"""

import random
from typing import NamedTuple

from verl.steer.tasks.rows import check_difficulty

DATA_SOURCE = "arithmetic"
ANSWER_MARKER = "#"

_TAIL_CHARACTERS = 64  # an answer has only a few characters


class Difficulty(NamedTuple):
    """The number of terms of a problem, and the largest absolute value of a term (the smallest is 1)."""

    terms: int
    largest: int


_LEVELS = ((3, 9), (4, 9), (4, 19), (4, 99), (6, 99))
DIFFICULTIES = {number: Difficulty(*level) for number, level in enumerate(_LEVELS, start=1)}
DEFAULT_DIFFICULTY = 2


class Problem(NamedTuple):
    """A problem: its signed terms, the prompt, one correct solution, and the answer."""

    terms: tuple[int, ...]
    prompt: str
    solution: str
    ground_truth: str


def make_problem(rng: random.Random, difficulty: int = DEFAULT_DIFFICULTY) -> Problem:
    """Draw a problem; its first term is positive and its answer is not negative.

    Raises:
        ValueError: `difficulty` is not one of `DIFFICULTIES`.
    """
    check_difficulty(difficulty, DIFFICULTIES)
    level = DIFFICULTIES[difficulty]
    while True:
        numbers = [rng.randint(1, level.largest) for _ in range(level.terms)]
        terms = (numbers[0], *(rng.choice((1, -1)) * number for number in numbers[1:]))
        if sum(terms) >= 0:
            break
    prompt = str(terms[0]) + "".join(f"{term:+d}" for term in terms[1:])
    return Problem(terms, prompt, worked_solution(terms, rng), str(sum(terms)))


def worked_solution(terms: tuple[int, ...], rng: random.Random, slip: float = 0.0) -> str:
    """Write one of the valid solutions of a problem, chosen at random.

    Args:
        terms: signed terms, at least one of them positive, with a sum that is not negative.
        slip: probability that a step's result is wrong; later steps continue from the wrong total.
    """
    left = list(terms)
    total = rng.choice([term for term in left if term > 0])
    left.remove(total)
    solution = ""
    while left:
        # After a slip possibly every term makes the total negative: then any term may be next.
        term = rng.choice([term for term in left if total + term >= 0] or left)
        left.remove(term)
        result = total + term
        if rng.random() < slip:
            nearby = range(max(0, result - 10), max(0, result) + 11)
            result = rng.choice([wrong for wrong in nearby if wrong != result])
        first, second = total, term
        if term >= 0:
            first, second = rng.sample((total, term), 2) if total >= 0 else (term, total)
        solution += f"{first}{second:+d}={result};"
        total = result
    return f"{solution}{ANSWER_MARKER}{total}"


def noisy_solution(problem: Problem, rng: random.Random, slip: float) -> str:
    """One of the problem's solutions, each step of it wrong with probability `slip`."""
    return worked_solution(problem.terms, rng, slip)


def compute_score(solution_str: str, ground_truth: str) -> dict[str, float | bool | str]:
    """Compare the text after the last answer marker with the ground truth.

    Only the last 64 characters are read, and none of them is evaluated or parsed as a number.

    Returns:
        `score` +1.0 or -1.0, `acc` whether the answer is right, and `pred`, the answer (empty without a marker).
    """
    _, marker, answer = solution_str[-_TAIL_CHARACTERS:].rpartition(ANSWER_MARKER)
    pred = answer.strip() if marker else ""
    acc = pred == ground_truth
    return {"score": 1.0 if acc else -1.0, "acc": acc, "pred": pred}
