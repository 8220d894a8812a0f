# SPDX-License-Identifier: Apache-2.0
"""Symbolic equivalence of two answers by math-verify, bounded in CPU time and memory for any response.

math-verify's own time-outs are signals, which Python delivers to the main thread only, but verl grades in a thread
pool; and no thread can be stopped inside one long integer operation. So a child process compares, started at the first
comparison and then reused. The system kills it when a comparison has used its seconds of CPU time; with wall time a
busy machine would make answers wrong. The child is a new interpreter that imports nothing of verl: a fork of a threaded
process may deadlock, and multiprocessing's `spawn` imports the parent's program, and torch with it.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path
from string import ascii_uppercase
from typing import NamedTuple

from verl.steer.grading.normalize import MAGNITUDES, without_unit

MAX_LENGTH = 512  # characters of one answer
MAX_DEPTH = 20  # nested brackets
START_LIMIT = 120.0  # seconds until a new child must be ready
WALL_PER_CPU = 60.0  # seconds of wall time that one second of CPU time may take
ATTEMPTS = 2  # at a comparison that exceeded its wall time

_SERVER = Path(__file__).with_name("symbolic_server.py")
_INTEGER = re.compile(r"-?\d+")
_DECIMAL = re.compile(r"[-+]?\d*\.\d+")
_PERCENTAGE = re.compile(r"\A([^,%]+?) *\\?%\Z")
# A symbol, or what contains no symbols.
_SYMBOL = re.compile(r"\\(?:mathbb|begin|end|text|mbox|hbox|textrm|operatorname)\{[^{}]*\}|\\[a-zA-Z]+|[a-zA-Z]")
_GREEK = "Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega".split()
_CAPITALS = {*ascii_uppercase, *(f"\\{name}" for name in _GREEK)}
_CHOICE = re.compile(r"(?:\\(?:text|textbf|mathrm)\{)?\(?[a-zA-Z]\)?\}?")
_NAMES = "abcfghjklmnopqrstuvwxyz"  # not d, e and i, which may be more than names
# Text that math-verify misreads, or that takes it too long.
_UNFIT = re.compile(
    rf"""
    \A\Z
    | \A[a-zA-Z\ ]{{3,}}\Z  # a word: read as the product of its letters
    | \d\ *_  # a number with a base: read without the base
    | (?<![\^_])(?<!frac)(?<!frac\ )(?<!binom)(?<!binom\ )\d\ +\d  # `1 2`: read as 1 + 2, except in `\frac 1 2`
    | \d{{101}}  # a number of more than 100 digits
    | {MAGNITUDES}  # `5 \text{{ million}}`: read as 5
    # `5 \text{{ h }} 30 \text{{ min}}` and `5 \text{{ if }} n>2` are read as 5
    | \d[\ )}}]*\\(?:text|mbox|hbox|textrm|mathrm)\{{(?!\ *(?:and|or)\ *\}})[^{{}}]*\}}(?:[\ ,~]|\\[,;:\ ])*\d
    | \\text\{{[^{{}}]*\b(?:if|otherwise)\b
    | :.*:  # ratios of three terms: read as divisions
    | \\mod(?![a-zA-Z]) | \\l?dots(?![a-zA-Z]) | \d'  # only the part before is read
    | boxed | fbox | \\\Z  # a box without braces, or a backslash at the end: only a part of the text is read
    | __  # not mathematics, but common in Python code
    """,
    re.VERBOSE,
)


def _may_be_equal(truth: str, answer: str) -> bool:
    """Whether a comparison by math-verify is safe and may succeed. Two integers are equal only as text."""
    if _INTEGER.fullmatch(truth) and _INTEGER.fullmatch(answer):
        return False
    return not any(
        len(text) > MAX_LENGTH or _depth(text) > MAX_DEPTH or _UNFIT.search(text) for text in (truth, answer)
    )


def _with_cases_apart(*texts: str) -> list[str]:
    """The texts with other names for capitals whose small letter occurs too: math-verify reads both as one symbol.

    So they stay where each text is a single letter, as the answer to a question with choices is.
    """
    if all(_CHOICE.fullmatch(text) for text in texts):
        return list(texts)
    symbols = {symbol for text in texts for symbol in _SYMBOL.findall(text)}
    capitals = sorted(symbol for symbol in symbols & _CAPITALS if symbol.lower() in symbols)
    free = (name for name in _NAMES if not {name, name.upper()} & symbols)
    names = dict(zip(capitals, free, strict=False))
    return [_SYMBOL.sub(lambda found: names.get(found[0], found[0]), text) for text in texts]


def _as_fraction(percentage: re.Match) -> str:
    """The fraction of a percentage, without decimals, which math-verify does not compare with fractions."""
    number, places = percentage[1], 2
    if _DECIMAL.fullmatch(number):
        before, _, decimals = number.partition(".")
        number, places = before + decimals, 2 + len(decimals)
    return rf"\frac{{{number}}}{{{10**places}}}"


def _depth(text: str) -> int:
    return max(accumulate(((char in "{([") - (char in "})]") for char in text), initial=0))


class _Child(NamedTuple):
    process: subprocess.Popen
    connection: Connection


class SymbolicComparer:
    """Compares answers one at a time in a child process. Any thread may call it.

    Attributes:
        starts: number of children started so far.
    """

    def __init__(self) -> None:
        self.starts = 0
        self._child: _Child | None = None
        self._lock = threading.Lock()

    def equivalent(self, truth: str, answer: str, timeout: float = 2.0) -> bool | None:
        """Whether `answer` equals `truth` symbolically; None if `timeout` seconds of CPU time were not enough.

        The caller also waits for the comparisons of other threads, and about a second if a child must be started.
        A comparison that ends the child in another way, such as a stack overflow, is False.

        Raises:
            RuntimeError: the child doesn't start, for instance because math-verify isn't installed.
        """
        if not _may_be_equal(truth, answer):
            return False
        sides = (_PERCENTAGE.sub(_as_fraction, without_unit(text)) for text in (truth, answer))
        request = (*_with_cases_apart(*sides), timeout)
        with self._lock:
            for _ in range(ATTEMPTS):
                child = self._child
                if child is None or child.process.poll() is not None:
                    child = self._start()
                try:
                    child.connection.send(request)
                    if child.connection.poll(timeout * WALL_PER_CPU):
                        return child.connection.recv_bytes() == b"1"
                except (EOFError, ConnectionError):
                    return None if child.process.wait() == -signal.SIGPROF else False
                self.stop()
        return None

    def stop(self) -> None:
        """Kill the child; the next comparison starts another."""
        if self._child is not None:
            self._child.connection.close()
            self._child.process.kill()
            self._child.process.wait()
        self._child = None

    def _start(self) -> _Child:
        self.stop()
        connection, theirs = multiprocessing.Pipe()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-I", _SERVER, *sys.path],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C ends the parent, and the end of the pipe then ends the child.
            )
        self.starts += 1
        self._child = _Child(process, connection)
        with contextlib.suppress(EOFError, ConnectionError):
            if connection.poll(START_LIMIT) and connection.recv_bytes() == b"ready":
                return self._child
        self.stop()
        raise RuntimeError(f"{_SERVER} did not start: expected that `{sys.executable} -c 'import math_verify'` works")


comparer = SymbolicComparer()


def _renew() -> None:
    # A forked process may not use its parent's child, keep its pipe open, or wait for a lock that a thread held.
    global comparer
    if comparer._child is not None:
        comparer._child.connection.close()
    comparer = SymbolicComparer()


os.register_at_fork(after_in_child=_renew)
