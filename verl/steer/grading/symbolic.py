# SPDX-License-Identifier: Apache-2.0
"""Symbolic equivalence of two answers by math-verify, bounded in CPU time and memory whatever a model wrote.

math-verify's own time-outs are signals, which Python delivers to the main thread only, while verl grades in a thread
pool; and no thread can be stopped inside one long integer operation. So the comparison runs in a child process, which
is started on first use and serves the worker for its whole life. The system ends it when a comparison has used its
seconds of CPU time, and a new one takes its place. Seconds of wall time would count answers as wrong because the
machine is busy. The child is a fresh interpreter (a fork of a threaded process may deadlock) that imports math-verify
and nothing of verl.
"""

import atexit
import contextlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

MAX_LENGTH = 512  # characters of one answer
MAX_DEPTH = 20  # nested brackets
MAX_DIGITS = 100  # digits in a row
START_LIMIT = 120.0  # seconds until a new child must be ready
WALL_PER_CPU = 60.0  # seconds to wait for each second of CPU time that a comparison may use
ATTEMPTS = 2  # at a comparison whose child got next to no CPU time

_SERVER = Path(__file__).with_name("symbolic_server.py")
_INTEGER = re.compile(r"-?\d+")
_WORD = re.compile(r"[a-zA-Z ]{3,}")
_NUMBER_IN_BASE = re.compile(r"\d *_")
# But for the arguments in `\log_2 3` and `\frac 1 2`.
_SPACED_DIGITS = re.compile(r"(?<![\^_])(?<!frac)(?<!frac )(?<!binom)(?<!binom )\d +\d")
_LONG_DIGITS = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")
_PERCENTAGE = re.compile(r"([^,%]+?) *\\?%")


def _depth(text: str) -> int:
    deepest = depth = 0
    for char in text:
        depth += (char in "{([") - (char in "})]")
        deepest = max(deepest, depth)
    return deepest


def worth_asking(truth: str, answer: str) -> bool:
    """Whether a symbolic comparison could find two differently written answers equal, and is fit to be tried.

    False where an answer is empty, too long or too deep; where both are integers; and where math-verify would misread
    one: a word as the product of its letters, a number without its base, `1 2` as 1 + 2, and only a part of a text with
    a box that has no braces or a backslash at its end.
    """
    if _INTEGER.fullmatch(truth) and _INTEGER.fullmatch(answer):
        return False
    return all(
        0 < len(text) <= MAX_LENGTH
        and _depth(text) <= MAX_DEPTH
        and "__" not in text
        and not _LONG_DIGITS.search(text)
        and not _NUMBER_IN_BASE.search(text)
        and not _SPACED_DIGITS.search(text)
        and "boxed" not in text
        and "fbox" not in text
        and not text.endswith("\\")
        and not _WORD.fullmatch(text)
        for text in (truth, answer)
    )


def _percentage_as_fraction(text: str) -> str:
    percentage = _PERCENTAGE.fullmatch(text)
    return rf"\frac{{{percentage[1]}}}{{100}}" if percentage else text


@dataclass
class _Child:
    process: subprocess.Popen
    connection: Connection
    ready: bool = False

    @classmethod
    def start(cls) -> "_Child":
        ours, theirs = multiprocessing.Pipe()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-I", str(_SERVER), json.dumps(sys.path), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C ends the parent, whose end of the pipe then ends the child.
            )
        return cls(process, ours)

    def wait_until_ready(self) -> None:
        with contextlib.suppress(EOFError, ConnectionError):
            self.ready = self.ready or (self.connection.poll(START_LIMIT) and self.connection.recv_bytes() == b"ready")
        if not self.ready:
            self.kill()
            raise RuntimeError(
                f"math-verify's process was not ready in {START_LIMIT:.0f} s (exit status {self.process.returncode})."
                f" Its own message is above; `{sys.executable} -c 'import math_verify'` must work."
            )

    def ask(self, request: bytes, timeout: float) -> bool | None:
        """The verdict; None where the comparison used up its CPU time, False where it ended the child in another way
        (out of memory or stack).

        Raises:
            TimeoutError: the child neither answers nor has used up its CPU time, as on a machine that is too busy.
        """
        with contextlib.suppress(EOFError, ConnectionError):
            self.connection.send_bytes(request)
            if not self.connection.poll(timeout * WALL_PER_CPU):
                raise TimeoutError
            return self.connection.recv_bytes() == b"1"
        return None if self.process.wait() == -signal.SIGPROF else False

    def kill(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


class SymbolicComparer:
    """Compares answers one at a time in a child process. May be called from any thread.

    Attributes:
        starts: how many children have been started, the first included.
    """

    def __init__(self) -> None:
        self.starts = 0
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def equivalent(self, truth: str, answer: str, timeout: float = 2.0) -> bool | None:
        """Whether `answer` equals `truth` symbolically; None where `timeout` seconds of CPU time don't suffice to tell.

        The limit holds for the comparison itself. A caller also waits for those of other threads before it, and for a
        new child to start (about a second) after one ended.

        Raises:
            RuntimeError: the child can't be started, for instance because math-verify isn't installed.
        """
        if not worth_asking(truth, answer):
            return False
        pair = _percentage_as_fraction(truth), _percentage_as_fraction(answer)
        request = json.dumps([*pair, timeout]).encode()
        with self._lock:
            for _ in range(ATTEMPTS):
                child = self._child
                if child is None or child.process.poll() is not None:
                    child = self._replace()
                child.wait_until_ready()
                try:
                    verdict = child.ask(request, timeout)
                except TimeoutError:
                    self._replace()
                    continue
                if child.process.poll() is not None:
                    self._replace()
                return verdict
        return None

    def close(self) -> None:
        """End the child; a later comparison starts another."""
        with self._lock:
            self._stop()

    def _replace(self) -> _Child:
        self._stop()
        self._child = _Child.start()
        self.starts += 1
        return self._child

    def _stop(self) -> None:
        if self._child is not None:
            self._child.kill()
        self._child = None


comparer = SymbolicComparer()


def _renew() -> None:
    # A forked process must not talk to its parent's child, and may have inherited a held lock.
    global comparer
    comparer = SymbolicComparer()


os.register_at_fork(after_in_child=_renew)
atexit.register(lambda: comparer.close())
