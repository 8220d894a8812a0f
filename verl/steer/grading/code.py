# SPDX-License-Identifier: Apache-2.0
"""The reward of a program: it passes its tests in a sandbox, or it doesn't.

Tests are verl's (`verl.utils.reward_score.prime_code` and `.sandbox_fusion`), as JSON in `ground_truth`:

    {"inputs": [text, ...], "outputs": [text, ...]}                            standard input and output
    {"fn_name": name, "inputs": [one JSON value a line, ...], "outputs": [JSON, ...]}    arguments and results
    {"assert_case": [code, ...]}                                               each passes unless it raises
    {"zlib": base64 of the compressed JSON of one of these}

What is expected never enters the sandbox of the program: outputs are compared here, and results and assertions in a
sandbox of their own, which the values that the program's functions return are carried to.
"""

import base64
import json
import math
import os
import re
import threading
import time
import zlib
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import Any

from verl.steer.grading.code_driver import CALLS, encode
from verl.steer.grading.sandbox import Limits, Process
from verl.steer.options import option

BENCHMARKS = ("humaneval", "mbpp", "livecodebench")  # prefixes of data sources
TRAINING_SOURCES = ("codecontests", "apps", "codeforces", "taco")  # the sources that verl grades as code
PARTIAL_TESTS = 10  # tests that count for partial credit, as in verl
MAX_PROGRAM = 100_000  # characters; a longer program is wrong

_DECIMAL = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
_FENCE = re.compile(r"```py(?:thon)?3?(?![a-z])[^`\n]*\n")  # what follows on a fence's line has no backtick
_slots = threading.BoundedSemaphore(os.cpu_count() or 1)


@dataclass
class CodeOptions(Limits):
    """Keys of the grader, beside its limits.

    Args:
        sandbox: `bwrap`, or `prime_code` for verl's grader, which has no sandbox.
        continuous: whether programs that fail get the share of tests that they pass; None: where verl gives it.
    """

    sandbox: str = option("bwrap", choices=("bwrap", "prime_code"))
    continuous: bool | None = option(None, choices=(True, False))


def is_code(data_source: str) -> bool:
    """Whether rows of this source are graded here."""
    return data_source in TRAINING_SOURCES or data_source.startswith(BENCHMARKS)


def last_program(response: str) -> str | None:
    """The content of the last block fenced as Python, to the end if it isn't closed; None if there is none."""
    *_, after = [None, *(found.end() for found in _FENCE.finditer(response))]
    return None if after is None else response[after:].partition("```")[0]


def tests_of(ground_truth: str | dict[str, Any]) -> dict[str, Any]:
    """The tests of a row, without the keys that are empty.

    Raises:
        ValueError: there are none, or they have another form.
    """
    tests = _from_json(ground_truth) if isinstance(ground_truth, str) else ground_truth
    if isinstance(tests, dict) and (packed := tests.get("zlib")):
        try:
            tests = _from_json(zlib.decompress(base64.b64decode(packed)))
        except (TypeError, ValueError, zlib.error) as error:
            raise ValueError(f"ground_truth.zlib={packed!r:.60}: expected base64 of compressed JSON: {error}") from None
    if not isinstance(tests, dict):
        raise ValueError(f"ground_truth={tests!r:.60}: expected a JSON object with tests")
    tests = {key: value for key, value in tests.items() if value}
    for key in ("assert_case", "inputs", "outputs"):
        if not isinstance(tests.get(key, []), list):  # a text would be taken for a list of its characters
            raise ValueError(f"ground_truth with {key}={tests[key]!r:.60}: expected a list")
    if "assert_case" in tests:
        return tests
    given, expected = tests.get("inputs", ()), tests.get("outputs", ())
    if not given or len(given) != len(expected):
        raise ValueError(f"ground_truth with {sorted(tests)}: expected as many inputs as outputs, or assert_case")
    if "fn_name" not in tests:
        for text in (*given, *expected):
            if not (isinstance(text, str) or (isinstance(text, list) and all(isinstance(line, str) for line in text))):
                raise ValueError(f"ground_truth with {text!r:.60} as an input or output: expected text or a list of it")
    return tests


def compute_score(
    data_source: str,
    response: str,
    ground_truth: str | dict[str, Any],
    options: CodeOptions,
    service: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Grade one response.

    Args:
        data_source: the row's data source.
        response: the response, with the program in its last ```python block.
        ground_truth: the tests.
        options: limits, and what the score is.
        service: arguments of verl's `sandbox_fusion`, which then runs the program elsewhere.

    Returns:
        As `verl.steer.grading.score`. `score` is +1 or -1 or, if `continuous`, 1 if all tests pass, else the share that
        passes among the first ten (by `service` among all). `pred` is empty.

    Raises:
        ValueError: `ground_truth` has no tests.
        SandboxError: the sandbox didn't start.
    """
    tests = tests_of(ground_truth)
    partial = data_source in TRAINING_SOURCES if options.continuous is None else options.continuous
    program = last_program(response)
    passed, share, timed_out = False, 0.0, False
    if program is not None and len(program) <= MAX_PROGRAM:
        if service is not None or options.sandbox == "prime_code":
            passed, share = _verl_score(response, tests, options, service)
        else:
            with _slots:
                passed, share, timed_out = _run(program, tests, options, partial)
    score = share if partial else 1.0 if passed else -1.0
    return {"score": score, "acc": passed, "pred": "", "timed_out": timed_out}


def _verl_score(
    response: str, tests: dict[str, Any], options: CodeOptions, service: dict[str, Any] | None
) -> tuple[bool, float]:
    """Whether all tests pass by verl's graders, and the share of the tests that do."""
    from verl.utils.reward_score import prime_code, sandbox_fusion

    if service is None:
        if "assert_case" in tests:
            raise ValueError("code.sandbox=prime_code: expected bwrap for tests with assert_case")
        # a share is of the first ten tests, which may all pass where a later one fails
        found = prime_code.compute_score(response, tests, continuous=True)[0]
        return found is True, float(found)
    share = sandbox_fusion.compute_score(
        service["sandbox_fusion_url"],
        _service_slots(service.get("max_concurrent", 64)),
        service.get("memory_limit_mb", options.memory_mb),
        response,
        tests,
        timeout=int(max(1, options.timeout)),
    )[0]
    return share == 1.0, share


@cache
def _service_slots(number: int) -> threading.Semaphore:
    return threading.Semaphore(number)


def _run(program: str, tests: dict[str, Any], options: CodeOptions, partial: bool) -> tuple[bool, float, bool]:
    """Whether all tests pass; the share of the first ones that do, each run alone; and whether one took too long."""
    cases, grade = _cases(tests), _grade_values if "assert_case" in tests or "fn_name" in tests else _grade_output
    passed, timed_out = grade(program, cases, options)
    if passed or not partial:
        return passed, float(passed), timed_out
    first = cases[:PARTIAL_TESTS]
    return False, sum(grade(program, [case], options)[0] for case in first) / len(first), timed_out


def _cases(tests: dict[str, Any]) -> list[Any]:
    """Pairs of input and output, or cases of the driver's mode `tests`."""
    if "assert_case" in tests:
        return tests["assert_case"]
    pairs = list(zip(tests["inputs"], tests["outputs"], strict=True))
    name = tests.get("fn_name")
    return [[name, encode(_arguments(given)), _accepted(expected)] for given, expected in pairs] if name else pairs


def _grade_output(program: str, cases: list[Any], limits: Limits) -> tuple[bool, bool]:
    for given, expected in cases:
        text = "\n".join(given) if isinstance(given, list) else given
        process = Process({"mode": "program", "program": program}, limits, text.encode(errors="replace"))
        output = process.output()
        if output is None or not same_output(output.decode(errors="replace"), expected):
            return False, process.timed_out
    return True, False


def _grade_values(program: str, cases: list[Any], limits: Limits) -> tuple[bool, bool]:
    passed, end = 0, time.monotonic() + CALLS * limits.wall
    # Tests are trusted, and all of them are in memory at once.
    ample = Limits(limits.timeout, limits.wall, 4 * limits.memory_mb, 2**10)
    with (
        Process({"mode": "calls", "program": program}, limits) as called,
        Process({"mode": "tests", "cases": cases}, ample) as testing,
    ):
        while passed < len(cases) and (line := testing.line()) is not None:
            if line == b"v1":
                passed += 1
                continue
            if line == b"v0":
                break
            called.send(line[1:])
            if (answer := called.line()) is None or time.monotonic() > end:
                break
            testing.send(answer)
    return passed == len(cases), called.timed_out or testing.timed_out or time.monotonic() > end


def _from_json(text: str | bytes) -> Any:
    """The value of JSON, whose integers may have more digits than Python reads by itself.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(text, parse_int=lambda digits: int(Decimal(digits)))
    except ValueError as error:
        raise ValueError(f"ground_truth with {text!r:.60}: expected JSON: {error}") from None


def _arguments(given: str | list) -> list:
    """The arguments of a call; of a first one with integers as keys, which JSON writes as text, the keys' numbers."""
    arguments = [_from_json(line) for line in given.split("\n") if line.strip()] if isinstance(given, str) else given
    if arguments and isinstance(arguments[0], dict) and all(_INTEGER.fullmatch(key) for key in arguments[0]):
        arguments = [{int(key): value for key, value in arguments[0].items()}, *arguments[1:]]
    return arguments


def _accepted(expected: Any) -> list[Any]:
    """The right results, encoded; APPS puts some of them in a list of one."""
    value = _from_json(expected) if isinstance(expected, str) else expected
    return encode([value, *(value if isinstance(value, list) and len(value) == 1 else ())])


def same_output(printed: str, expected: str | list[str]) -> bool:
    """Whether two outputs agree in all lines but empty ones.

    Lines agree without the white space around them, or word by word, where numbers that aren't both integers may differ
    as in numpy's `allclose`: by 1e-8 + 1e-5 |expected|.
    """
    texts = printed, "\n".join(expected) if isinstance(expected, list) else expected
    ours, theirs = ([stripped for line in text.split("\n") if (stripped := line.strip())] for text in texts)
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _same_line(printed: str, expected: str) -> bool:
    if printed == expected:
        return True
    ours, theirs = printed.split(), expected.split()
    return len(ours) == len(theirs) and all(map(_same_word, ours, theirs))


def _same_word(printed: str, expected: str) -> bool:
    if printed == expected:
        return True
    if not (_DECIMAL.fullmatch(printed) and _DECIMAL.fullmatch(expected)):
        return False
    if _INTEGER.fullmatch(printed) and _INTEGER.fullmatch(expected):
        return False
    found, right = float(printed), float(expected)
    # beyond the range of floats the tolerance would be infinite
    return math.isfinite(right) and abs(found - right) <= 1e-8 + 1e-5 * abs(right)
