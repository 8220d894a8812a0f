# SPDX-License-Identifier: Apache-2.0
"""Rows of a task's problems, in verl's format, in two splits."""

import hashlib
import random
from typing import Any, Protocol

SPLITS = ("train", "test")

_MAX_FRUITLESS_DRAWS = 10_000  # consecutive draws without a new problem that show that none is left


class Problem(Protocol):
    """A problem: the numbers that it is about, its prompt, and what its grader compares an answer with."""

    @property
    def terms(self) -> tuple[int, ...]: ...
    @property
    def prompt(self) -> str: ...
    @property
    def ground_truth(self) -> str: ...


class Task(Protocol):
    """A module of this package with a task."""

    DATA_SOURCE: str
    DEFAULT_DIFFICULTY: int

    def make_problem(self, rng: random.Random, difficulty: int) -> Problem: ...


def check_difficulty(difficulty: int, known: Any) -> None:
    """Raise ValueError unless `difficulty` is one of the `known`."""
    if difficulty not in known:
        raise ValueError(f"difficulty is {difficulty!r}, expected one of {sorted(known)}")


def split_of(terms: tuple[int, ...]) -> str:
    """The split of a problem, about one in ten `test`. No test problem is a rearranged training problem."""
    digest = hashlib.sha256(repr(sorted(terms)).encode()).digest()
    return "test" if digest[0] % 10 == 0 else "train"


def make_rows(task: Task, split: str, size: int, seed: int, difficulty: int | None = None) -> list[dict[str, Any]]:
    """Rows of `size` different problems of a split, in verl's format; the difficulty is by default the task's own.

    Raises:
        ValueError: unknown `split` or `difficulty`, or the split has fewer than `size` problems.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {SPLITS}")
    difficulty = task.DEFAULT_DIFFICULTY if difficulty is None else difficulty
    rng = random.Random(f"{seed} {split}")
    answers: dict[str, str] = {}
    fruitless = 0
    while len(answers) < size:
        problem = task.make_problem(rng, difficulty)
        if problem.prompt not in answers and split_of(problem.terms) == split:
            answers[problem.prompt] = problem.ground_truth
            fruitless = 0
        elif (fruitless := fruitless + 1) == _MAX_FRUITLESS_DRAWS:
            raise ValueError(f"size is {size}, expected at most about {len(answers)} for {split=} and {difficulty=}")
    return [
        {
            "data_source": task.DATA_SOURCE,
            "prompt": [{"role": "user", "content": prompt}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {"index": index, "raw_problem": prompt, "split": split},
        }
        for index, (prompt, answer) in enumerate(answers.items())
    ]
