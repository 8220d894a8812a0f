# SPDX-License-Identifier: Apache-2.0
"""What runs inside the sandbox. `sandbox` starts it; outside, only `encode` is used.

Usage: python code_driver.py FD, with a JSON object at the descriptor: `mode`, the limits `timeout`, `memory` and `user`
(what `sandbox.Process` adds), and

- mode `program`: `program`, which runs with the test's input as standard input.
- mode `calls`: `program`, whose functions are called as lines {"name", "args"} at standard input ask for. A line
  {"value"} or {"error"} answers each.
- mode `tests`: `cases`, tests that are trusted, each code or [name, arguments, right results], both encoded. The
  functions of the program, which this process doesn't hold, are proxies: a proxy writes a line `c` + {"name", "args"}
  and reads the answer; the grader carries both to and fro. A line `v1` or `v0` says whether a case passed. So nothing
  but values comes from the program to the tests.
"""

import ast
import builtins
import contextlib
import json
import os
import resource
import sys
import time
from types import ModuleType
from typing import IO, Any

#: Modules whose names a program may use without an import, as in verl's and LiveCodeBench's graders.
PRELUDE = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json"
    " builtins typing"
).split()
CALLS = 10  # all calls together may take this many times the CPU time of one
THREADS = 64


def encode(value: Any) -> Any:
    """A value as JSON can hold it without loss.

    Raises:
        TypeError: it is not made of None, bool, int, float, complex, str, bytes, list, tuple, set, dict and arrays.
    """
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < 2**53 else {"int": hex(value)}  # of any length, unlike decimal text
    if isinstance(value, list):
        return [encode(item) for item in value]
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return encode(value.tolist())
    raise TypeError(f"a value of type {type(value).__name__} can't leave the sandbox")


def decode(value: Any) -> Any:
    """The inverse of `encode`; arrays become lists."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "int":
        return int(content, 16)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    if kind == "dict":
        return {decode(key): decode(item) for key, item in content}
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](map(decode, content))


def as_json(value: Any) -> Any:
    """A value as JSON would have it: lists for tuples, text for keys."""
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return {str(key): as_json(item) for key, item in value.items()} if isinstance(value, dict) else value


def limit(job: dict[str, Any]) -> None:
    """Put the limits on this process and give up its rights; a program can't undo either."""
    if job["user"] is not None:
        os.setgroups([])
        os.setgid(job["user"])
        os.setuid(job["user"])
    cpu = job["timeout"] * (1 if job["mode"] == "program" else CALLS) + 1
    limits = {"AS": job["memory"], "CPU": cpu, "NPROC": THREADS, "NOFILE": 64, "FSIZE": 2**24, "STACK": 2**27}
    # A program that handles the host's core dumps is called with a limit of 0, but not with one of 1 byte.
    for name, value in {**limits, "SIGPENDING": 256, "CORE": 1, "MEMLOCK": 0, "MSGQUEUE": 0}.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        most = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (value if most == resource.RLIM_INFINITY else min(value, most),) * 2)


def load(program: str, name: str) -> dict[str, Any]:
    """Run a program as a module, and return the names that it sets, without those that it is given."""
    module = sys.modules[name] = ModuleType(name)
    for imported in PRELUDE:
        exec(f"from {imported} import *; import {imported}", module.__dict__)
    sys.setrecursionlimit(600_000)
    sys.set_int_max_str_digits(0)  # the limit on the CPU time is enough
    given = dict(module.__dict__)
    exec(compile(program, "program.py", "exec"), module.__dict__)
    return {key: value for key, value in module.__dict__.items() if key not in given or value is not given[key]}


def channel() -> tuple[IO[bytes], IO[bytes]]:
    """Standard input and output under new numbers; programs and tests get empty ones."""
    lines = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    return lines


def write(file: IO[bytes], line: str) -> None:
    file.write(line.encode() + b"\n")
    file.flush()


def serve_calls(job: dict[str, Any]) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_CPU)

    def start_clock() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (min(most, int(time.process_time()) + job["timeout"] + 1), most))

    asked, answers = channel()
    start_clock()
    names = load(job["program"], "program")
    for line in asked:
        start_clock()
        call = json.loads(line)
        try:
            name, solution = call["name"], names.get("Solution", object)
            function = getattr(solution(), name) if hasattr(solution, name) else names[name]
            answer = {"value": encode(function(*decode(call["args"])))}
        except (Exception, SystemExit) as error:
            answer = {"error": type(error).__name__}
        write(answers, json.dumps(answer))


def run_tests(job: dict[str, Any]) -> None:
    answers, asked = channel()
    sys.set_int_max_str_digits(0)

    def proxy(name: str) -> Any:
        def call(*args: Any) -> Any:
            write(asked, "c" + json.dumps({"name": name, "args": encode(list(args))}))
            answer = json.loads(answers.readline())
            if "value" in answer:
                return decode(answer["value"])
            kind = getattr(builtins, answer["error"], None)
            raise kind() if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError

        return call

    def run(case: Any) -> None:
        if isinstance(case, list):
            name, arguments, right = case
            assert as_json(proxy(name)(*decode(arguments))) in decode(right)
            return
        tree = ast.parse(case)
        loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - set(dir(builtins))
        names = {name: __import__(name) if name in PRELUDE else proxy(name) for name in loaded}
        exec(compile(tree, "test.py", "exec"), {**names, "__name__": "test"})

    for case in job["cases"]:
        try:
            run(case)
        except BaseException:
            write(asked, "v0")
        else:
            write(asked, "v1")


def main() -> None:
    with open(int(sys.argv[1]), encoding="utf-8") as file:
        job = json.load(file)
    os.closerange(3, 64)
    sys.argv[:], sys.path[:] = ["program.py"], [*sys.path[1:], "/packages"]
    # Without the module `site` these two are absent.
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]
    limit(job)
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 2)
    if job["mode"] == "program":
        with contextlib.suppress(SystemExit):
            load(job["program"], "__main__")
    else:
        {"calls": serve_calls, "tests": run_tests}[job["mode"]](job)


if __name__ == "__main__":
    main()
