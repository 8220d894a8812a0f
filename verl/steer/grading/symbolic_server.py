# SPDX-License-Identifier: Apache-2.0
"""The process that asks math-verify whether two answers are equal. Started by `symbolic`, never imported.

Usage: python -I symbolic_server.py SYS_PATH_AS_JSON FILE_DESCRIPTOR

What a model wrote goes through math-verify's LaTeX grammar only. math-verify's other route, plain expressions, hands
the text to sympy's parse_expr, which evaluates it as Python, and so isn't used. On the LaTeX route sympy evaluates
nothing but the number tokens of the grammar (`Integer (12 )`). A fence refuses processes, sockets and writing all the
same.
"""

import contextlib
import json
import logging
import os
import re
import resource
import signal
import sys
from collections import Counter
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

MEMORY_LIMIT = 4 * 2**30  # bytes of address space
IDLE_POLL = 5.0  # seconds between looks at whether the parent lives

WARM_UP = [("(x+1)^2", "x^2+2x+1"), (r"[0,1)\cup\{2\}", r"\{2\}\cup[0,1)"), ("y=2x", "2x=y"), (r"\sin 2", "0.5")]

_EQUATES = re.compile(r"(?<![\\<>!~])=|~=|\\(?:approx|equiv)(?![a-zA-Z])")
# Without letters, which may be units, and without degrees.
_CONSTANT = re.compile(
    r"(?:[\d\s.+\-*/^_(){}\[\]!]"
    r"|\\(?:[dt]?frac|sqrt|cdot|times|div|binom|log|ln|pi|infty|left|right)(?![a-zA-Z]))+"
)
_NUMBER = re.compile(r"-?\d*(?:\.(\d+))?(?: *\\(?:times|cdot) *10\^\{?(-?\d+)\}?)?")

_HARMLESS_OS_EVENTS = {"os.listdir", "os.scandir", "os.walk"}
_REFUSED_PREFIXES = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "fcntl.", "signal.pthread_kill")
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def raise_fence() -> None:
    """Refuse from here on, for the whole process, to start processes, open sockets, or write or remove files.

    A refused action raises RuntimeError. There is no way to lift the fence (an audit hook can't be removed).
    """

    def refuse(event: str, args: tuple) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & _WRITE_FLAGS
        if writes or (event.startswith(_REFUSED_PREFIXES) and event not in _HARMLESS_OS_EVENTS):
            raise RuntimeError(f"refused while grading: {event} {args!r}")

    sys.dont_write_bytecode = True
    sys.addaudithook(refuse)


def _parse(latex: str) -> list:
    from math_verify import LatexExtractionConfig, parse

    return parse(f"${latex}$", [LatexExtractionConfig()], parsing_timeout=None)


def _verify(truth: Any, answer: Any) -> bool:
    from math_verify import verify

    return verify(truth, answer, timeout_seconds=None)


def _value(parsed: list) -> Any:
    """What was parsed, or the right side of an equation."""
    from sympy import Eq

    first = parsed[0] if parsed else None
    return first.rhs if isinstance(first, Eq) else first


def _kind(value: Any) -> str | None:
    from sympy import FiniteSet, Interval, Tuple

    if isinstance(value, FiniteSet):
        return "set"
    # math-verify reads the pair (1,2) as an interval, since 1 < 2.
    return "tuple" if isinstance(value, Interval | Tuple) else None


def _kinds_within(value: Any) -> Counter:
    elements = value.args if _kind(value) else ()
    return Counter(kind for kind in map(_kind, elements) if kind)


def _mixes_sets_and_tuples(truth: str, parsed_truth: list, answer: str, parsed_answer: list) -> bool:
    r"""Whether a set faces a tuple or interval, of which math-verify compares the elements only.

    Not where the set is a list without braces: `1,2` may stand for either.
    """
    values = _value(parsed_truth), _value(parsed_answer)
    braced = [r"\{" in latex for latex, value in zip((truth, answer), values, strict=True) if _kind(value) == "set"]
    faced = {_kind(value) for value in values} == {"set", "tuple"} and all(braced)
    return faced or _kinds_within(values[0]) != _kinds_within(values[1])


def _agree(left: str, right: str, approximately: bool) -> bool:
    values = _value(_parse(left)), _value(_parse(right))
    if _verify(*values):
        return True
    numbers = [number for side in (left, right) if (number := _NUMBER.fullmatch(side.strip()))]
    units = [10.0 ** (int(n[2] or 0) - len(n[1] or "")) for n in numbers if approximately or n[1]]
    difference = abs(values[0] - values[1])
    return bool(units and difference.is_comparable and difference < max(units))


def _contradicts_itself(answer: str) -> bool:
    r"""Whether `answer` equates numbers that differ, as `6=5` and `5 \approx 6` do: math-verify reads one of them.

    A number with a decimal point, and any number after `\approx`, may be rounded: it must differ by less than one
    unit of its last digit.
    """
    for chain in re.split("[,;]", answer):
        sides = [side for side in _EQUATES.split(chain) if _CONSTANT.fullmatch(side) and _is_number(side)]
        if not all(_agree(*pair, approximately="approx" in chain) for pair in pairwise(sides)):
            return True
    return False


def _is_number(side: str) -> bool:
    from sympy import Expr

    return isinstance(_value(_parse(side)), Expr)


def equivalent(truth: str, answer: str) -> bool:
    """Whether math-verify finds the LaTeX strings `truth` and `answer` equal, and rightly so. Unbounded in time."""
    parsed_truth, parsed_answer = _parse(truth), _parse(answer)
    return (
        _verify(parsed_truth, parsed_answer)
        and not _mixes_sets_and_tuples(truth, parsed_truth, answer, parsed_answer)
        and not _contradicts_itself(answer)
    )


def serve(connection: Connection) -> None:
    """Answer requests `[truth, answer, timeout]` with b"1" or b"0" until the parent closes its end or dies."""
    parent = os.getppid()
    connection.send_bytes(b"ready")
    while True:
        while not connection.poll(IDLE_POLL):
            if os.getppid() != parent:
                return
        truth, answer, timeout = json.loads(connection.recv_bytes())
        # Counts CPU time. The default action of its signal ends the process even inside one long C call.
        signal.setitimer(signal.ITIMER_PROF, timeout)
        verdict = equivalent(truth, answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(b"1" if verdict else b"0")


def main() -> None:
    sys.path[:] = json.loads(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    logging.disable()
    # The first uses import most of sympy, which must not count against the first request.
    for truth, answer in WARM_UP:
        equivalent(truth, answer)
    raise_fence()
    with contextlib.suppress(EOFError, ConnectionError):
        serve(Connection(int(sys.argv[2])))


if __name__ == "__main__":
    main()
