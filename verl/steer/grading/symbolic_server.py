# SPDX-License-Identifier: Apache-2.0
"""The process that compares answers by math-verify. `symbolic` starts it; nothing imports it.

Usage: python -I symbolic_server.py SYS_PATH_ENTRY..., with one end of a `multiprocessing.Pipe` as standard input.

Responses go through math-verify's LaTeX grammar only. math-verify's other grammar, plain expressions, is not used: it
passes the text to sympy's parse_expr, which evaluates it as Python. On the LaTeX route sympy evaluates nothing but the
number tokens of the grammar (`Integer (12 )`). As a second barrier the process may not start others, open sockets or
write files.
"""

import contextlib
import logging
import os
import re
import resource
import signal
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

if __name__ == "__main__":
    sys.path[:] = sys.argv[1:]

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Eq, Expr, FiniteSet, Float, Integer, Interval, Tuple

WARM_UP = [("(x+1)^2", "x^2+2x+1"), (r"[0,1)\cup\{2\}", r"\{2\}\cup[0,1)"), ("y=2x", "2x=y"), (r"\sin 2", "0.5")]

_EQUATES = re.compile(r"(?<![\\<>!~])=|~=|\\(?:approx|equiv)(?![a-zA-Z])")
# Without letters, which may be units, and without degrees.
_CONSTANT = re.compile(
    r"(?:[\d\s.+\-*/^_(){}\[\]!]"
    r"|\\(?:[dt]?frac|sqrt|cdot|times|div|binom|log|ln|pi|infty|left|right)(?![a-zA-Z]))+"
)
_NUMBER = re.compile(r"-?\d*(?:\.(\d+))?(?: *\\(?:times|cdot) *10\^\{?(-?\d+)\}?)?")
_SMALL = 1e-2  # math-verify takes decimals for equal that differ by less than half a millionth
_ZERO = 1e-60  # math-verify tells zero from other numbers
_CLOSE = 2e-4  # how far the ratio of equal decimals may be from 1: at least four digits agree

_HARMLESS_OS_EVENTS = {"os.listdir", "os.scandir", "os.walk"}
_REFUSED_PREFIXES = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "fcntl.", "signal.pthread_kill")
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def raise_fence() -> None:
    """Refuse with RuntimeError that this process starts others, opens sockets, or writes or removes files.

    The fence can't be removed, as an audit hook can't.
    """

    def refuse(event: str, args: tuple) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & _WRITE_FLAGS
        if writes or (event.startswith(_REFUSED_PREFIXES) and event not in _HARMLESS_OS_EVENTS):
            raise RuntimeError(f"refused while grading: {event} {args!r}")

    sys.dont_write_bytecode = True
    sys.addaudithook(refuse)


# math-verify leaves out units, and takes letters at the end for some: those of `6m` and of `\frac12 ab`.
_WITH_UNITS = LatexExtractionConfig()
_WITHOUT_UNITS = replace(_WITH_UNITS, normalization_config=replace(_WITH_UNITS.normalization_config, units=False))
_UPRIGHT = re.compile(r"\\(?:text(?:bf|it|rm)?|mbox|hbox|mathrm)\{")


def _parse(latex: str) -> list:
    config = _WITH_UNITS if _UPRIGHT.search(latex) else _WITHOUT_UNITS
    return parse(f"${latex}$", [config], parsing_timeout=None)


def _value(parsed: list) -> Any:
    """What was parsed, or the right side of an equation; None if nothing was."""
    first = parsed[0] if parsed else None
    return first.rhs if isinstance(first, Eq) else first


def _kind(value: Any) -> str | None:
    if isinstance(value, FiniteSet):
        return "set"
    # math-verify reads the pair (1,2) as an interval, since 1 < 2.
    return "tuple" if isinstance(value, Interval | Tuple) else None


def _kinds_within(value: Any) -> Counter:
    elements = value.args if _kind(value) else ()
    return Counter(kind for kind in map(_kind, elements) if kind)


def _confuses_set_and_tuple(truth: str, truth_value: Any, answer: str, answer_value: Any) -> bool:
    r"""Whether a set is compared with a tuple or interval: math-verify ignores the difference.

    A set written as a list without braces, such as `1,2`, may stand for either.
    """
    sides = ((truth, truth_value), (answer, answer_value))
    bare_list = any(_kind(value) == "set" and r"\{" not in latex for latex, value in sides)
    kinds = {_kind(truth_value), _kind(answer_value)}
    return (kinds == {"set", "tuple"} and not bare_list) or _kinds_within(truth_value) != _kinds_within(answer_value)


def _agree(left: tuple[str, Any], right: tuple[str, Any], approximately: bool) -> bool:
    """Whether two numbers, each as LaTeX and as value, are equal or differ by rounding.

    A number with a decimal point, and any number after `\\approx`, may be rounded: it must differ by less than one
    unit of its last digit.
    """
    if verify(left[1], right[1], timeout_seconds=None):
        return True
    numbers = [number for latex, _ in (left, right) if (number := _NUMBER.fullmatch(latex.strip()))]
    units = [10.0 ** (int(n[2] or 0) - len(n[1] or "")) for n in numbers if approximately or n[1]]
    difference = abs(left[1] - right[1])
    return bool(units and difference.is_comparable and difference < max(units))


def _contradicts_itself(answer: str) -> bool:
    r"""Whether `answer` equates different numbers, such as `6=5` and `5 \approx 6`: math-verify reads one of them."""
    for chain in re.split("[,;]", answer):
        constants = [(side, _value(_parse(side))) for side in _EQUATES.split(chain) if _CONSTANT.fullmatch(side)]
        numbers = [(side, value) for side, value in constants if isinstance(value, Expr)]
        if not all(_agree(*pair, approximately="approx" in chain) for pair in pairwise(numbers)):
            return True
    return False


def _differ_though_small(left: Any, right: Any) -> bool:
    """Whether two small numbers differ, which math-verify finds by their difference, and this function by their ratio.

    math-verify rounds decimals to six places, and takes an exact difference below 1e-17 for zero.
    """
    if not all(isinstance(value, Expr) and value.is_comparable for value in (left, right)):
        return False
    if abs(left) >= _SMALL or any(abs(value.evalf()) < _ZERO for value in (left, right)):
        return False
    ratio = left / right
    if ratio.has(Float):
        return bool(abs(ratio.evalf() - 1) > _CLOSE)
    return not verify(ratio, Integer(1), timeout_seconds=None)


def equivalent(truth: str, answer: str) -> bool:
    """Whether math-verify finds the LaTeX strings `truth` and `answer` equal, and rightly so. Unbounded in time.

    An inequality such as `x>2` equals the interval `(2,\\infty)` as truth only.
    """
    parsed_truth, parsed_answer = _parse(truth), _parse(answer)
    return (
        verify(parsed_truth, parsed_answer, timeout_seconds=None)
        and not _differ_though_small(_value(parsed_truth), _value(parsed_answer))
        and not _confuses_set_and_tuple(truth, _value(parsed_truth), answer, _value(parsed_answer))
        and not _contradicts_itself(answer)
    )


def main() -> None:
    """Answer requests `(truth, answer, timeout)` with b"1" or b"0" until the parent closes its end of the pipe."""
    resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))  # bytes of address space
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The default action ends the process even inside one long C call.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    logging.disable()
    # The first uses import most of sympy, which must not count against the first request.
    for pair in WARM_UP:
        equivalent(*pair)
    raise_fence()
    connection = Connection(sys.stdin.fileno())
    with contextlib.suppress(EOFError, ConnectionError):
        connection.send_bytes(b"ready")
        while True:
            truth, answer, timeout = connection.recv()
            signal.setitimer(signal.ITIMER_PROF, timeout)  # counts CPU time
            verdict = equivalent(truth, answer)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send_bytes(b"1" if verdict else b"0")


if __name__ == "__main__":
    main()
