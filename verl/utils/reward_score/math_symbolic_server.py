# SPDX-License-Identifier: Apache-2.0
"""The process that asks math-verify whether two answers are equal. Started by `math_symbolic`, never imported.

Usage: python -I math_symbolic_server.py SYS_PATH_AS_JSON FILE_DESCRIPTOR

What a model wrote goes through math-verify's LaTeX grammar only. math-verify's other route, plain expressions, hands
the text to sympy's parse_expr, which evaluates it as Python, and so isn't used. On the LaTeX route sympy evaluates
nothing but the number tokens of the grammar (`Integer (12 )`). A fence refuses processes, sockets and writing all the
same.
"""

import contextlib
import json
import logging
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection

MEMORY_LIMIT = 4 * 2**30  # bytes of address space
IDLE_POLL = 5.0  # seconds between looks at whether the parent lives
ALARM_MARGIN = 1.0  # seconds after the parent's limit at which the process ends itself

WARM_UP = [("(x+1)^2", "x^2+2x+1"), (r"[0,1)\cup\{2\}", r"\{2\}\cup[0,1)"), ("y=2x", "2x=y"), (r"\sin 2", "0.5")]

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


def equivalent(truth: str, answer: str) -> bool:
    """Whether math-verify finds the LaTeX strings `truth` and `answer` equal. Unbounded in time."""
    from math_verify import LatexExtractionConfig, parse, verify

    latex_only = [LatexExtractionConfig()]
    parsed_truth = parse(f"${truth}$", latex_only, parsing_timeout=None)
    parsed_answer = parse(f"${answer}$", latex_only, parsing_timeout=None)
    return verify(parsed_truth, parsed_answer, timeout_seconds=None)


def serve(connection: Connection) -> None:
    """Answer requests `[truth, answer, timeout]` with b"1" or b"0" until the parent closes its end or dies."""
    parent = os.getppid()
    connection.send_bytes(b"ready")
    while True:
        while not connection.poll(IDLE_POLL):
            if os.getppid() != parent:
                return
        truth, answer, timeout = json.loads(connection.recv_bytes())
        # The default action of SIGALRM ends the process even inside one long C call, so none outlives a killed parent.
        signal.setitimer(signal.ITIMER_REAL, timeout + ALARM_MARGIN)
        verdict = equivalent(truth, answer)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send_bytes(b"1" if verdict else b"0")


def main() -> None:
    sys.path[:] = json.loads(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    logging.disable()
    # The first uses import most of sympy, which must not count against the first request.
    for truth, answer in WARM_UP:
        equivalent(truth, answer)
    raise_fence()
    with contextlib.suppress(EOFError, ConnectionError):
        serve(Connection(int(sys.argv[2])))


if __name__ == "__main__":
    main()
