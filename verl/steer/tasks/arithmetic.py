# SPDX-License-Identifier: Apache-2.0
"""Arithmetic problems whose solution takes several written steps, for training tiny models.

A problem is a chain of signed terms, such as ``7+8-5+9``. Its worked solution keeps a running total and
takes one more term at each step, then gives the answer after a marker: ``7+8=15;15-5=10;9+10=19;#19``.

A solution may be written in many valid ways: the running total starts from any positive term and takes the
others in any order that keeps it from going below zero, and a sum may name its two operands in either order.
A policy that solves the task therefore has entropy to keep or to lose.
"""

import hashlib
import random
from dataclasses import dataclass
from typing import Any

DATA_SOURCE = "arithmetic"
SEPARATOR = ";"
ANSWER_MARKER = "#"
SPLITS = ("train", "test")

# How many consecutive draws without a new problem mean that a difficulty has no more to give.
_FRUITLESS_DRAWS = 10_000


@dataclass(frozen=True)
class Difficulty:
    """How many terms a problem has, and the largest one (the smallest is 1)."""

    terms: int
    largest: int


DIFFICULTIES = {
    1: Difficulty(terms=3, largest=9),
    2: Difficulty(terms=4, largest=9),
    3: Difficulty(terms=4, largest=19),
    4: Difficulty(terms=4, largest=99),
    5: Difficulty(terms=6, largest=99),
}
DEFAULT_DIFFICULTY = 2


@dataclass(frozen=True)
class Problem:
    """One problem: its signed terms, the prompt text, one correct worked solution, and the answer."""

    terms: tuple[int, ...]
    prompt: str
    solution: str
    ground_truth: str


def make_problem(rng: random.Random, difficulty: int = DEFAULT_DIFFICULTY) -> Problem:
    """Draw a problem; its first term is positive and its answer is not negative.

    Raises:
        ValueError: ``difficulty`` is not one of ``DIFFICULTIES``.
    """
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"difficulty is {difficulty!r}, expected one of {sorted(DIFFICULTIES)}")
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
        slip: probability that a step's result is wrong; later steps go on from the wrong total.
    """
    left = list(terms)
    total = rng.choice([term for term in left if term > 0])
    left.remove(total)
    steps = []
    while left:
        # After a slip no term may keep the total from going below zero: then any will do.
        term = rng.choice([term for term in left if total + term >= 0] or left)
        left.remove(term)
        result = total + term
        if rng.random() < slip:
            result = _slipped(result, rng)
        steps.append(_step(total, term, result, rng))
        total = result
    return "".join(steps) + f"{ANSWER_MARKER}{total}"


def split_of(terms: tuple[int, ...]) -> str:
    """The split that a problem belongs to: about one in ten is a test problem.

    It depends on the terms and not on their order, so that no test problem is a rearranged training problem,
    whatever the seeds and sizes.
    """
    digest = hashlib.sha256(repr(sorted(terms)).encode()).digest()
    return "test" if digest[0] % 10 == 0 else "train"


def make_rows(split: str, size: int, seed: int, difficulty: int = DEFAULT_DIFFICULTY) -> list[dict[str, Any]]:
    """Rows of ``size`` different problems of a split, in verl's format.

    Raises:
        ValueError: unknown ``split`` or ``difficulty``, or the split has fewer than ``size`` problems.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {SPLITS}")
    rng = random.Random(f"{seed} {split}")
    problems: dict[str, Problem] = {}
    fruitless = 0
    while len(problems) < size:
        problem = make_problem(rng, difficulty)
        if problem.prompt not in problems and split_of(problem.terms) == split:
            problems[problem.prompt] = problem
            fruitless = 0
        elif (fruitless := fruitless + 1) == _FRUITLESS_DRAWS:
            raise ValueError(f"size is {size}, expected at most about {len(problems)} for {split=} and {difficulty=}")
    return [_row(problem, index, split) for index, problem in enumerate(problems.values())]


def _row(problem: Problem, index: int, split: str) -> dict[str, Any]:
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": problem.prompt}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": problem.ground_truth},
        "extra_info": {"index": index, "raw_problem": problem.prompt, "split": split},
    }


def _step(total: int, term: int, result: int, rng: random.Random) -> str:
    if term < 0:
        expression = f"{total}{term}"
    elif total < 0:
        expression = f"{term}{total}"
    else:
        first, second = rng.sample((total, term), 2)
        expression = f"{first}+{second}"
    return f"{expression}={result}{SEPARATOR}"


def _slipped(result: int, rng: random.Random) -> int:
    """A wrong result, near the right one and not negative."""
    return rng.choice([wrong for wrong in range(max(0, result - 10), max(0, result) + 11) if wrong != result])
