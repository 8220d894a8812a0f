# SPDX-License-Identifier: Apache-2.0
"""The countdown problems, and the rule that grades them."""

import random
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from verl.steer.grading import score
from verl.steer.tasks import countdown
from verl.steer.tasks.countdown import DIFFICULTIES, compute_score, make_problem, noisy_solution

seeds = st.integers(0, 2**32)
difficulties = st.sampled_from(sorted(DIFFICULTIES))


def last_number(numbers, steps):
    """The number that the steps leave, by Python's own arithmetic; every step must use numbers that are left."""
    left = list(numbers)
    for step in steps.split(";"):
        expression, result = step.split("=")
        for number in re.findall(r"\d+", expression):
            left.remove(int(number))
        assert eval(expression) == int(result)
        left.append(int(result))
    (last,) = left
    return last


@given(seeds, difficulties)
def test_a_problems_solution_is_one_and_graded_so(seed, difficulty):
    problem = make_problem(random.Random(seed), difficulty)
    level = DIFFICULTIES[difficulty]
    assert len(problem.terms) == level.numbers and all(1 <= term <= level.largest for term in problem.terms)
    assert set(re.findall(r"[^\d=;]", problem.solution)) <= set(level.operations)
    assert problem.prompt == f"{','.join(map(str, problem.terms))}={last_number(problem.terms, problem.solution)}"
    assert compute_score(problem.solution, problem.ground_truth)["acc"]


@given(seeds, difficulties)
def test_noise_leads_anywhere_by_right_steps(seed, difficulty):
    rng = random.Random(seed)
    problem = make_problem(rng, difficulty)
    assert noisy_solution(problem, rng, slip=0.0) == problem.solution
    steps = noisy_solution(problem, rng, slip=1.0)
    target = int(problem.ground_truth.partition("=")[2])
    right = last_number(problem.terms, steps) == target
    assert compute_score(steps, problem.ground_truth)["acc"] == right


@pytest.mark.parametrize(
    "response, right, pred",
    [
        ("3*8=24;24-7=17;17+2=19", True, "3*8=24;24-7=17;2+17=19"),
        ("8*3=24;24-7=17;2+17=19", True, "3*8=24;24-7=17;2+17=19"),  # the same solution
        ("7-2=5;3*8=24;24-5=19", True, "7-2=5;3*8=24;24-5=19"),
        ("3*8=24;24-7=17", False, "3*8=24;24-7=17"),  # the 2 is left
        ("3*8=25;25-7=18;18+2=20", False, ""),  # a wrong product
        ("3*8=24;24-7=17;17+2=18", False, "3*8=24;24-7=17"),
        ("8*8=64", False, ""),  # there is one 8
        ("3*8=24;24-7=17;17+2=19;", False, "3*8=24;24-7=17;2+17=19"),
        ("3*8=24;24-7=17;17+2=19;19-0=19", False, "3*8=24;24-7=17;2+17=19"),  # there is no 0
        ("19", False, ""),
        ("", False, ""),
        ("3*8=24;24-7=17;17+2=19" + " " * 80 + "x", True, "3*8=24;24-7=17;2+17=19"),  # beyond what is read
        ("٣*8=24;24-7=17;17+2=19", False, ""),  # digits of another script
    ],
)
def test_grades_by_hand(response, right, pred):
    expected = {"score": 1.0 if right else -1.0, "acc": right, "pred": pred}
    assert compute_score(response, "3,7,8,2=19") == expected
    assert score.compute_score(countdown.DATA_SOURCE, response, "3,7,8,2=19") == expected | {"timed_out": False}


def test_two_equal_numbers_may_be_combined():
    assert compute_score("4+4=8", "4,4=8")["acc"] and not compute_score("4+4=8", "4,5=8")["acc"]


@settings(max_examples=400)
@given(st.sampled_from("+-*+-*+-*=;0123456789"), st.floats(0, 1), st.booleans(), st.booleans(), seeds)
def test_responses_are_right_where_they_are_solutions(sign, place, replaces, edited, seed):
    """A solution, or one with a character put in or replaced."""
    rng = random.Random(seed)
    problem = make_problem(rng, 1)
    response = noisy_solution(problem, rng, 0.0)
    if edited:
        at = int(place * len(response))
        response = response[:at] + sign + response[at + replaces :]
    assume(not re.search(r"\b0\d|\d{3}", response))  # numbers as a solution has them
    try:
        assert all(re.fullmatch(r"\d+[-+*]\d+=\d+", step) for step in response.split(";"))
        right = f"{last_number(problem.terms, response)}" == problem.ground_truth.partition("=")[2]
    except (AssertionError, ValueError):
        right = False
    assert compute_score(response, problem.ground_truth)["acc"] == right
    assert edited or right


def test_an_unknown_difficulty_is_refused():
    with pytest.raises(ValueError, match=r"difficulty is 9, expected one of \[1, 2, 3, 4, 5, 6, 7\]"):
        make_problem(random.Random(0), 9)
