# SPDX-License-Identifier: Apache-2.0
"""Countdown problems with solutions of several steps, for training tiny models, and the rule that grades them.

A problem such as `3,7,8,2=19` asks for steps that combine all its numbers into the last one: `3*8=24;24-7=17;17+2=19`.
A step takes two of the numbers that are left and puts its result in their place. Most problems have several solutions.
None can be worked out step by step from the left: whoever solves a problem has searched, or guesses well.
"""

import random
import re
from typing import NamedTuple

from verl.steer.tasks.rows import check_difficulty

DATA_SOURCE = "countdown"

LARGEST = 99  # of the results of steps

_STEP = re.compile(r"(\d{1,2})([-+*])(\d{1,2})=(\d{1,2})", re.ASCII)
_MAX_CHARACTERS = 64  # of a response that is read: a solution is shorter
_OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


class Difficulty(NamedTuple):
    """How many numbers a problem has, the largest of them (the smallest is 1), and the operations of its solution."""

    numbers: int
    largest: int
    operations: str


_LEVELS = ((3, 9, "+-"), (3, 9, "+-*"), (4, 9, "+-"), (4, 9, "+-*"), (5, 9, "+-*"), (3, 12, "+-*"), (3, 9, "-*"))
DIFFICULTIES = {number: Difficulty(*level) for number, level in enumerate(_LEVELS, start=1)}
DEFAULT_DIFFICULTY = 2


class Problem(NamedTuple):
    """A problem: its numbers, the prompt, one solution, and the ground truth, which is the prompt."""

    terms: tuple[int, ...]
    prompt: str
    solution: str
    ground_truth: str
    difficulty: int


def make_problem(rng: random.Random, difficulty: int = DEFAULT_DIFFICULTY) -> Problem:
    """Draw numbers and steps; the target is what the steps lead to.

    Raises:
        ValueError: `difficulty` is not one of `DIFFICULTIES`.
    """
    check_difficulty(difficulty, DIFFICULTIES)
    level = DIFFICULTIES[difficulty]
    numbers = tuple(rng.randint(1, level.largest) for _ in range(level.numbers))
    solution = random_steps(numbers, level.operations, rng)
    prompt = f"{','.join(map(str, numbers))}={solution.rpartition('=')[2]}"
    return Problem(numbers, prompt, solution, prompt, difficulty)


def random_steps(numbers: tuple[int, ...], operations: str, rng: random.Random) -> str:
    """Steps that combine the numbers at random; no result is below 0 or above `LARGEST`."""
    left, steps = list(numbers), []
    while len(left) > 1:
        first, second = rng.sample(range(len(left)), 2)
        a, b, operation = left[first], left[second], rng.choice(operations)
        result = _OPERATIONS[operation](a, b)
        if 0 <= result <= LARGEST:
            steps.append(f"{a}{operation}{b}={result}")
            left = [number for index, number in enumerate(left) if index not in (first, second)] + [result]
    return ";".join(steps)


def noisy_solution(problem: Problem, rng: random.Random, slip: float) -> str:
    """The problem's solution or, with probability `slip`, correct steps on its numbers that lead anywhere."""
    if rng.random() < slip:
        return random_steps(problem.terms, DIFFICULTIES[problem.difficulty].operations, rng)
    return problem.solution


def compute_score(solution_str: str, ground_truth: str) -> dict[str, float | bool | str]:
    """Check a response's steps; nothing of it is evaluated.

    Args:
        solution_str: steps, separated by semicolons. Only the first 64 characters are read.
        ground_truth: the problem's prompt.

    Returns:
        `score` +1.0 or -1.0, `acc` whether the steps are a solution, and `pred`, the steps with the operands of sums
        and products in order: solutions that differ only there count as the same.
    """
    numbers, _, target = ground_truth.partition("=")
    left = [int(number) for number in numbers.split(",")]
    steps = solution_str[:_MAX_CHARACTERS].strip().split(";")
    done, result = [], None
    for step in steps:
        found = _STEP.fullmatch(step)
        if found is None:
            break
        first, operation, second, claimed = found.groups()
        a, b, result = int(first), int(second), int(claimed)
        if a not in left or b not in left or a == b and left.count(a) < 2 or _OPERATIONS[operation](a, b) != result:
            break
        left.remove(a)
        left.remove(b)
        left.append(result)
        low, high = (b, a) if operation != "-" and a > b else (a, b)
        done.append(f"{low}{operation}{high}={result}")
    acc = len(done) == len(steps) and left == [int(target)]
    return {"score": 1.0 if acc else -1.0, "acc": acc, "pred": ";".join(done)}
