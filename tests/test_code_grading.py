# SPDX-License-Identifier: Apache-2.0
"""Programs against their tests: verl's forms of tests, what counts as equal, scores, options and refusals."""

import base64
import json
import os
import re
import shutil
import subprocess
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
from configurations import resolved
from omegaconf import OmegaConf
from verl.steer.grading import code, code_driver, sandbox
from verl.steer.grading.score import compute_score
from verl.steer.requirements import check_and_complete
from verl.trainer.ppo.reward import get_custom_reward_fn
from verl.utils import reward_score
from verl.utils.reward_score import prime_code, sandbox_fusion

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bwrap: apt-get install bubblewrap")
KWARGS = "+reward.custom_reward_function.reward_kwargs"


def fenced(program):
    return f"Thus\n```python\n{program}\n```\nwhich is right."


def grade(program, tests, source="humaneval", **options):
    return compute_score(source, fenced(program), json.dumps(tests), {"index": 0}, code=options or None)


def right(program, tests, **options):
    result = grade(program, tests, **options)
    assert not result["timed_out"]
    assert result["score"] == (1.0 if result["acc"] else -1.0)
    return result["acc"]


@pytest.mark.parametrize(
    "response, program",
    [
        ("a\n```python\nx\n```\nb\n```python\ny\nz\n```\nc", "y\nz\n"),
        ("```python\nx\n```\n```\nno\n```", "x\n"),
        ("```py\nx\n```", "x\n"),
        ("```python3 title\nx```", "x"),
        ("```python\nx = 1", "x = 1"),
        ("```python\n```", ""),
        ("```python\nx\n```\nIt prints:\n```pycon\n>>> 1\n```", "x\n"),
        ("```python\nx\n```\nThe ```python ``` block above\nsolves it.", "x\n"),
        ("Here: ```python\nx\n```", "x\n"),
        ("```python", None),
        ("```\nx\n```", None),
        ("x", None),
        ("", None),
    ],
)
def test_the_last_block_is_the_program(response, program):
    assert code.last_program(response) == program


@pytest.mark.parametrize(
    "printed, expected, same",
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("  1 2 \r\n\n3", "1 2\n3\n\n", True),
        ("1 2 3", "1 2\n3", False),
        ("1\n2", "1", False),
        ("1 2 3", "1 2", False),
        ("", "", True),
        ("", "0", False),
        ("YES", "yes", False),
        ("1.0000001 x", "1 x", True),
        ("0.33333", "0.3333333333", True),  # within 1e-5 of a third
        ("0.3333", "0.3333333333", False),
        ("100000001", "100000002", False),  # integers, although their ratio is within 1e-5
        ("100000001.0", "100000002", True),
        ("1e2", "100", True),
        ("nan", "1", False),
        ("inf", "1e999", False),
        ("0.0", "1" * 400, False),
        ("1" * 400, "1" * 400, True),
        ("1_0", "10", False),
        ("\u0661", "1", False),
        ("a\x0cb", "a\nb", False),
        ("1\n2", ["1", "2"], True),
    ],
)
def test_outputs_agree(printed, expected, same):
    assert code.same_output(printed, expected) is same


def test_an_output_of_digits_is_read_once():
    """Were it read anew from each digit, this would take hours."""
    assert not code.same_output("1" * 1_000_000 + "x", "5")


@needs_bwrap
@pytest.mark.parametrize(
    "program, correct",
    [
        ("print(int(input()) + int(input()))", True),
        ("import sys\nprint(sum(map(int, sys.stdin.read().split())))", True),
        ("import sys\nprint(sum(int(line) for line in sys.stdin))\nsys.exit(3)", True),
        ("print(sum(map(int, open(0))))\nexit()", True),
        ("if __name__ == '__main__':\n    print(sum(map(int, open(0))))", True),
        ("def main():\n    print(reduce(add, map(int, sys.stdin)))\nmain()", True),  # without imports, as in verl
        (
            "import threading\nt = threading.Thread(target=lambda: print(sum(map(int, open(0)))))\nt.start()\nt.join()",
            True,
        ),
        ("import numpy as np\nprint(np.array([int(x) for x in open(0)]).sum())", True),
        ("def f(n): return n and 1 + f(n - 1)\nf(50_000)\nprint(sum(map(int, open(0))))", True),
        ("import asyncio\nasync def f(): print(sum(map(int, open(0))))\nasyncio.run(f())", True),
        ("print(sum(map(int, open(0))))\nraise ValueError", False),
        ("print(sum(map(int, open(0))) + 1)", False),
        ("print(3)", False),
        ("", False),
        ("print(", False),
    ],
)
def test_standard_input(program, correct):
    assert right(program, {"inputs": ["1\n2\n", ["20", "22"]], "outputs": ["3\n", ["42"]]}) is correct


@needs_bwrap
@pytest.mark.parametrize(
    "program, given, expected, correct",
    [
        ("def f(x, y): return x + y", "[1]\n[2]", "[1, 2]", True),
        ("class Solution:\n    def f(self, x: List[int]) -> int: return max(x)", "[1, 3]", "3", True),
        ("def f(x): return tuple(x)", "[1, 2]", "[1, 2]", True),
        ("def f(x): return [(1, (2,))]", "0", "[[1, [2]]]", True),
        ("def f(x): return {n: True for n in x}", "[1, 2]", '{"1": true, "2": true}', True),
        ("def f(x): return sum(x) * len(x[1])", '{"1": "ab", "2": "c"}', "6", True),  # integers as keys
        ("def f(x): return len(x['a'])", '{"a": "xy"}', "2", True),
        ("def f(x): return x / 2", "4", "2", True),
        ("def f(x): return x", "null", "null", True),
        ("def f(x): return 5", "0", "[5]", True),  # as APPS writes some results
        ("def f(x): return 1", "0", "[1, 2]", False),
        ("def f(x): return str(x)", "5", "5", False),
        ("def f(x): return 7 ** x", "6000", str(7**5000 * 7**1000 % 10**9), False),
        ("def f(): return 'é\\ud800'", "", json.dumps("é\ud800"), True),
        ("def g(x): return x", "5", "5", False),
        ("def f(x): x.append(1)", "[]", "null", True),
        ("import numpy as np\ndef f(x): return np.array(x) * 2", "[[1], [2]]", "[[2], [4]]", True),
        ("def f(x):\n    print('noise')\n    return x", "5", "5", True),
    ],
)
def test_functions(program, given, expected, correct):
    assert right(program, {"fn_name": "f", "inputs": [given], "outputs": [expected]}) is correct


@needs_bwrap
@pytest.mark.parametrize(
    "program, name, given, expected, correct",
    [
        ("class Solution:\n    def search(self, x): return x + 1", "search", "1", "2", True),  # not re's
        ("def search(x): return x + 1", "search", "1", "2", True),
        ("def f(x): return x\nclass Solution:\n    def f(self, x): return x + 1", "f", "1", "2", True),
        ("pass", "factorial", "5", "120", False),  # math's is no answer
        ("class Solution: pass\ndef f(x): return x", "f", "1", "1", True),
    ],
)
def test_functions_are_the_programs_own(program, name, given, expected, correct):
    assert right(program, {"fn_name": name, "inputs": [given], "outputs": [expected]}) is correct


@needs_bwrap
@pytest.mark.parametrize(
    "program, tests",
    [
        ("print(int(input()) + 1)", {"inputs": ["9" * 5000], "outputs": ["1" + "0" * 5000]}),
        ("def f(x): return x + 1", {"fn_name": "f", "inputs": ["9" * 5000], "outputs": ["1" + "0" * 5000]}),
        ("def f(x): return x + 1", {"assert_case": [f"assert f({'9' * 5000}) == 1{'0' * 5000}"]}),
    ],
)
def test_integers_of_any_length(program, tests):
    assert right(program, tests)
    assert not right(program.replace("+ 1", "+ 2"), tests)


@needs_bwrap
def test_all_calls_together_have_an_end(monkeypatch):
    """Of 2 s, in which no single call comes near its own of 20 s."""
    monkeypatch.setattr(code, "CALLS", 0.1)
    case = "for n in range(15): assert f(n) == n"
    found = grade("import time\ndef f(x):\n    time.sleep(0.2)\n    return x", {"assert_case": [case]}, wall=20)
    assert not found["acc"] and found["timed_out"]


@needs_bwrap
@pytest.mark.parametrize(
    "program, case, correct",
    [
        ("def f(x): return x * 2", "assert f(2) == 4 and f('a') == 'aa'", True),
        ("def f(x): return x * 2", "assert f(2) == 5", False),
        ("def f(x): return x", "x = (1, [2.5, {3}], {(4,): b'5'}, 6j, None, True, frozenset({frozenset({7})}), 8**99)\n"
         "y = f(x)\nassert y == x and type(y[0]) is int and type(y[5]) is bool and type(y[1]) is list", True),
        ("def f(x): return 9 ** x", "assert f(6000) == 9 ** 6000", True),  # more digits than Python converts
        ("def f(x): return float(x)", "import math\nassert math.isinf(f('inf')) and math.isnan(f('nan'))", True),
        ("def f(x): return float(x)", "assert math.isinf(f('inf'))", True),  # a module of the prelude
        ("def f(x):\n    if x < 0: raise ValueError('no')\n    return x",
         "try:\n    f(-1)\n    assert False\nexcept ValueError:\n    pass\nassert f(1) == 1", True),
        ("def f(x): return x", "try:\n    f(-1)\n    assert False\nexcept ValueError:\n    pass", False),
        ("def f(x): return {frozenset(x): 1}, {(1, frozenset(x))}",
         "assert f([1, 2]) == ({frozenset({1, 2}): 1}, {(1, frozenset({1, 2}))})", True),
        ("def f(x): raise type('Odd', (Exception,), {})", "try:\n    f(1)\nexcept RuntimeError:\n    pass", True),
        ("def f(x): return x\ndef g(x): return f(x) + 1", "assert [g(x) for x in (1, 2)] == [2, 3] and g(f(1)) == 2",
         True),
        ("def f(x): return (n for n in x)", "assert list(f([1])) == [1]", False),
        ("def f(x): return x", "def check(c):\n    for n in range(500): assert c(n) == n\ncheck(f)", True),
        ("def f(x): return x", "raise SystemExit(0)", False),
        ("class Solution:\n    def f(self, x): return x", "assert f(1) == 1", True),
    ],
)  # fmt: skip
def test_assertions(program, case, correct):
    assert right(program, {"assert_case": [case]}) is correct


VALUES = [
    None,
    True,
    0,
    -3,
    2**53 - 1,
    2**53,
    -(10**5000),
    1.5,
    "é\ud800",
    [1, (2, [3])],
    (),
    set(),
    {(1, "a"), b"x"},
    {(1, frozenset({2})), frozenset({frozenset()})},
    {frozenset({1}): frozenset()},
    2j,
]
VALUES += [{1: {"2": (3,)}, (4,): [5]}, {"int": "0x1"}, {"dict": 1}, {"set": [1]}, [float("inf"), -0.5]]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_values_return_as_they_were(value):
    back = code_driver.decode(json.loads(json.dumps(code_driver.encode(value))))
    assert back == value and type(back) is type(value)


@needs_bwrap
def test_partial_credit_is_that_of_the_first_ten():
    tests = {"inputs": [str(n) for n in range(12)], "outputs": [str(n) for n in range(12)]}
    some = "n = int(input())\nprint(n if n {} else -1)"
    for condition, share in (("> 6", 0.3), ("< 10", 1.0), ("< 0", 0.0)):
        assert grade(some.format(condition), tests) == {"score": -1.0, "acc": False, "pred": "", "timed_out": False}
        result = grade(some.format(condition), tests, continuous=True)  # as in verl, where 1 may miss later tests
        assert (result["score"], result["acc"]) == (share, False)
    assert grade("print(input())", tests, continuous=True)["score"] == 1.0
    for source, score in (("taco", 0.3), ("codecontests", 0.3), ("livecodebench_v6", -1.0), ("mbpp_plus", -1.0)):
        assert grade(some.format("> 6"), tests, source)["score"] == score
    calls = {"fn_name": "f", "inputs": ["1", "2", "3", "4"], "outputs": ["1", "0", "3", "4"]}
    crash = "import os\ndef f(n): return n if n != 2 else os._exit(0)"
    assert grade(crash, calls, continuous=True)["score"] == 0.75
    assertions = {"assert_case": [f"assert f({n}) == {n}" for n in (1, 2, 3, 4)]}
    assert grade(crash, assertions, continuous=True)["score"] == 0.75


@needs_bwrap
def test_limits_are_options():
    tests = {"inputs": ["1"], "outputs": ["1"]}
    assert grade("x = bytearray(400 << 20)\nprint(1)", tests)["acc"]
    assert not grade("x = bytearray(400 << 20)\nprint(1)", tests, memory_mb=256)["acc"]
    long = {"inputs": [""], "outputs": ["1" * (3 << 20)]}
    assert grade("print('1' * (3 << 20))", long)["acc"]
    assert not grade("print('1' * (3 << 20))", long, output_mb=1)["acc"]
    busy = "import time\nwhile time.process_time() < 3: pass\nprint(1)"
    assert grade(busy, tests)["acc"]
    assert grade(busy, tests, timeout=1) == {"score": -1.0, "acc": False, "pred": "", "timed_out": True}
    call = {"fn_name": "f", "inputs": ["1"] * 4, "outputs": ["1"] * 4}
    slow = "def f(n):\n    end = time() + 1\n    while time() < end: pass\n    return n"
    slow = f"from time import process_time as time\n{slow}"
    assert grade(slow, call, timeout=1)["acc"], "a call's time is the call's own"


@needs_bwrap
def test_an_unprivileged_grader(monkeypatch):
    """Another user's bubblewrap makes a user namespace, whose number inside is the grader's."""
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert right("import os\nprint(int(input()) + 1)", {"inputs": ["1"], "outputs": ["2"]})
    assert not right("import os\nos.fork()\nprint(int(input()) + 1)", {"inputs": ["1"], "outputs": ["2"]})


@needs_bwrap
def test_a_parquet_from_eight_threads(tmp_path):
    """Rows of all forms, right and wrong by turns, through verl's hook."""
    packed = {
        "zlib": base64.b64encode(zlib.compress(json.dumps({"inputs": ["1"], "outputs": ["2"]}).encode())).decode()
    }
    forms = {
        "livecodebench": (packed, "print(int(input()) + {})"),
        "humaneval": ({"assert_case": ["assert f(1) == 2"]}, "def f(n): return n + {}"),
        "apps": ({"fn_name": "f", "inputs": ["1"], "outputs": ["2"]}, "def f(n): return n + {}"),
    }
    rows = [
        {
            "data_source": source,
            "reward_model": {"ground_truth": json.dumps(tests)},
            "response": fenced(text.format(n % 2)),
        }
        for n in range(8)
        for source, (tests, text) in forms.items()
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    hook = {
        "path": "pkg://verl.steer.grading.score",
        "name": "compute_score",
        "reward_kwargs": {"code": {"timeout": 30}},
    }
    score = get_custom_reward_fn(OmegaConf.create({"reward": {"custom_reward_function": hook}}))
    barrier = threading.Barrier(8)

    def one(row):
        if row.Index < 8:
            barrier.wait()
        return score(row.data_source, row.response, row.reward_model["ground_truth"], extra_info={"index": row.Index})

    with ThreadPoolExecutor(8) as pool:
        graded = list(pool.map(one, pd.read_parquet(tmp_path / "rows.parquet").itertuples()))
    assert [result["acc"] for result in graded] == [n % 2 == 1 for n in range(8) for _ in forms]


@pytest.mark.parametrize(
    "tests",
    [
        {},
        {"inputs": ["1"]},
        {"inputs": [], "outputs": []},
        {"inputs": ["1", "2"], "outputs": ["1"]},
        {"assert_case": []},
        {"assert_case": None, "inputs": None, "zlib": None},
        {"assert_case": [], "fn_name": "", "inputs": ["1"], "outputs": []},
    ],
)
def test_rows_without_tests_are_refused(tests):
    with pytest.raises(ValueError, match="ground_truth with .*: expected as many inputs as outputs, or assert_case"):
        grade("print(1)", tests)


@pytest.mark.parametrize(
    "ground_truth, expected",
    [
        ([1], "ground_truth=[1]: expected a JSON object with tests"),
        (None, "ground_truth=None: expected a JSON object with tests"),
        ({"zlib": "eJw="}, "ground_truth.zlib='eJw=': expected base64 of compressed JSON: Error -5"),
        ({"zlib": 3}, "ground_truth.zlib=3: expected base64 of compressed JSON: argument should be"),
        ({"inputs": [1], "outputs": ["1"]}, "ground_truth with 1 as an input or output: expected text or a list of it"),
        ({"inputs": "1\n", "outputs": "2\n"}, "ground_truth with inputs='1\\n': expected a list"),
        ({"assert_case": "1"}, "ground_truth with assert_case='1': expected a list"),
        ({"inputs": ["1"], "outputs": [[2]]}, "ground_truth with [2] as an input or output: expected text or a list"),
        ({"fn_name": "f", "inputs": ["a"], "outputs": ["1"]}, "ground_truth with 'a': expected JSON: Expecting value"),
    ],
)
def test_tests_of_another_form_are_named(ground_truth, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        grade("print(1)", ground_truth)


@needs_bwrap
def test_forms_that_are_empty_do_not_count():
    """A table of rows with tests of several forms fills the others' columns."""
    tests = {"inputs": ["1"], "outputs": ["2"]}
    for others in ({"assert_case": [], "fn_name": ""}, {"assert_case": None, "fn_name": None, "zlib": None}):
        assert right("print(int(input()) + 1)", tests | others)
        assert not right("syntax error(", tests | others)
        assert right("def f(n): return n", {"inputs": [], "outputs": []} | others | {"assert_case": ["assert f(1)"]})


@needs_bwrap
def test_what_a_program_does_before_the_first_call_has_the_time_of_a_call():
    busy = "import time\nwhile time.process_time() < 5: pass\ndef f(n): return n"
    found = grade(busy, {"assert_case": ["assert f(1) == 1"]}, timeout=1, wall=10**6)
    assert not found["acc"] and found["timed_out"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"timeout": 0}, "reward_kwargs.code.timeout=0: expected a number above 0 and at most 1e+06"),
        ({"wall": "x"}, "reward_kwargs.code.wall='x': expected a number above 0 and at most 1e+06"),
        ({"memory_mb": 10}, "reward_kwargs.code.memory_mb=10: expected an integer of at least 256"),
        ({"output_mb": 1.5}, "reward_kwargs.code.output_mb=1.5: expected an integer of at least 1"),
        ({"sandbox": "none"}, "reward_kwargs.code.sandbox='none': expected one of bwrap, prime_code"),
        ({"continuous": 1}, "reward_kwargs.code.continuous=1: expected one of true, false"),
        ({"time": 1}, "reward_kwargs.code.time: unknown; expected one of"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        grade("print(1)", {"inputs": ["1"], "outputs": ["1"]}, **options)
    overrides = [f"{KWARGS}.code.{key}={value}" for key, value in options.items()]
    with pytest.raises(ValueError, match=re.escape(message)):
        check_and_complete(resolved("grpo", "hardware=cpu", *overrides))


def test_verls_graders_are_reached(monkeypatch):
    calls = []
    monkeypatch.setattr(prime_code, "compute_score", lambda *args, **kwargs: calls.append((args, kwargs)) or (0.5, []))
    monkeypatch.setattr(
        sandbox_fusion, "compute_score", lambda *args, **kwargs: calls.append((args, kwargs)) or (1.0, [])
    )
    tests = {"inputs": ["1"], "outputs": ["1"]}
    packed = {"zlib": base64.b64encode(zlib.compress(json.dumps(tests).encode())).decode()}
    assert grade("print(1)", tests, "taco", sandbox="prime_code") == {
        "score": 0.5, "acc": False, "pred": "", "timed_out": False
    }  # fmt: skip
    assert calls.pop() == ((fenced("print(1)"), tests), {"continuous": True})
    for found, passed in ((1.0, False), (True, True)):  # a share of the first ten tests, and all
        monkeypatch.setattr(prime_code, "compute_score", lambda *_, found=found, **__: (found, []))
        assert grade("print(1)", tests, "livecodebench", sandbox="prime_code")["acc"] is passed
    with pytest.raises(ValueError, match="sandbox=prime_code: expected bwrap"):
        grade("print(1)", {"assert_case": ["assert f(1)"]}, sandbox="prime_code")

    service = {"sandbox_fusion_url": "http://x", "memory_limit_mb": 99, "max_concurrent": 3}
    result = compute_score("livecodebench", fenced("print(1)"), json.dumps(packed), **service)
    assert (result["score"], result["acc"]) == (1.0, True)
    (url, semaphore, memory, response, given), kwargs = calls.pop()
    assert (url, memory, response, given, kwargs) == ("http://x", 99, fenced("print(1)"), tests, {"timeout": 10})
    assert semaphore._value == 3


def test_other_sources_stay_verls(monkeypatch):
    monkeypatch.setattr("verl.steer.grading.score.default_compute_score", lambda *args, **kwargs: (args[0], kwargs))
    assert compute_score("other", "x", "y", sandbox_fusion_url="u") == ("other", {"sandbox_fusion_url": "u"})
    assert not code.is_code("math500") and not code.is_code("math_dapo")
    assert reward_score.default_compute_score is not compute_score


def fake_bwrap(folder, script):
    (folder / "bwrap").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bwrap").chmod(0o755)
    return str(folder)


@pytest.fixture
def without_bwrap(monkeypatch, tmp_path):
    """A PATH without bwrap, to which a test may add one."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    sandbox._command.cache_clear()
    yield tmp_path / "bin"
    sandbox._command.cache_clear()


def test_a_machine_without_the_sandbox_is_told_the_way_out(without_bwrap, monkeypatch):
    way_out = "or set reward.sandbox_fusion.url (docs/code_rewards.md)"
    with pytest.raises(
        ValueError, match=re.escape(f"no bwrap: expected `apt-get install bubblewrap` or the like, {way_out}")
    ):
        sandbox.check()
    with pytest.raises(sandbox.SandboxError, match="no bwrap"):
        grade("print(1)", {"inputs": ["1"], "outputs": ["1"]})

    fake_bwrap(without_bwrap, "echo 'bwrap: No permissions to create new namespace' >&2; exit 1")
    sandbox._command.cache_clear()
    with pytest.raises(
        ValueError, match="no sandbox: bwrap: No permissions to create new namespace: expected root with"
    ):
        sandbox.check()
    with pytest.raises(sandbox.SandboxError, match="No permissions"):
        grade("print(1)", {"inputs": ["1"], "outputs": ["1"]})
    with pytest.raises(sandbox.SandboxError, match="No permissions"):
        grade("def f(x): return x", {"assert_case": ["assert f(1) == 1"]})

    fake_bwrap(without_bwrap, "exit 0")
    with pytest.raises(ValueError, match="printed b'' in the sandbox: expected 42"):
        sandbox.check()
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "aarch64")
    with pytest.raises(ValueError, match="linux aarch64: expected linux x86_64"):
        sandbox.check()


def test_a_run_that_needs_the_sandbox_tries_it_before_ray_starts(without_bwrap, tmp_path):
    for name, source in (("code", "taco"), ("math", "math500")):
        pd.DataFrame({"data_source": [source, "math_dapo"]}).to_parquet(tmp_path / f"{name}.parquet")
    pd.DataFrame({"prompt": ["x"]}).to_parquet(tmp_path / "bare.parquet")
    (tmp_path / "rows.jsonl").write_text('{"data_source": "taco"}')

    def check(train, val, *overrides):
        files = [f"data.train_files={tmp_path}/{train}.parquet", f"data.val_files=[{tmp_path}/{val}.parquet]"]
        config = resolved("grpo", "hardware=cpu", "trainer.save_after=0", *files, *overrides)
        check_and_complete(config)
        return config.reward.custom_reward_function

    for train, val in (("code", "math"), ("math", "code")):
        with pytest.raises(ValueError, match="code rewards: no bwrap"):
            check(train, val)
        check(train, val, f"{KWARGS}.code.sandbox=prime_code")
        own = "reward.custom_reward_function"
        check(train, val, f"{own}.path={__file__}", f"{own}.name=KWARGS")
    check("code", "math", "trainer.val_only=true")
    check("math", "bare")
    check("absent", "math")
    check("math", "math", f"data.train_files={tmp_path}/rows.jsonl")
    (tmp_path / "broken.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=rf"^data.val_files: {tmp_path}/broken.parquet: expected a whole parquet file"):
        check("math", "broken")
    given = ("reward.sandbox_fusion.url=http://x", "reward.sandbox_fusion.max_concurrent=40", "reward.num_workers=8")
    function = check("code", "code", *given, f"{KWARGS}.rule=eval")
    assert function.reward_kwargs == {
        "rule": "eval", "sandbox_fusion_url": "http://x", "memory_limit_mb": 1024, "max_concurrent": 5
    }  # fmt: skip


def test_numbers_of_system_calls():
    header = "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"
    if not os.path.exists(header):
        pytest.skip("this machine has no header with the numbers")
    numbers = dict(re.findall(r"#define __NR_(\w+) (\d+)", open(header).read()))
    denied = {**sandbox._DENIED, "clone": sandbox._CLONE, "clone3": sandbox._CLONE3}
    known = {name: number for name, number in denied.items() if name in numbers}
    assert known == {name: int(numbers[name]) for name in known} and len(known) > 15


def test_setup_installs_or_names_bubblewrap(root, tmp_path):
    """The part of run/setup.sh that sees to it, with programs that record what is asked of them."""
    text = (root / "run/setup.sh").read_text()
    part = re.search(r"^if ! command -v bwrap.*?^fi$", text, re.M | re.S)[0]
    for program, body in {"apt-get": 'echo "$@" >>"$ASKED"', "id": 'echo "$USER_ID"'}.items():
        (tmp_path / program).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / program).chmod(0o755)
    script = f'say() {{ echo "$*"; }}\n{part}'
    for user, asked, said in (("0", 2, "installed bubblewrap"), ("1000", 0, "run `apt-get install bubblewrap`")):
        record = tmp_path / f"asked_{user}"
        environment = {"PATH": str(tmp_path), "ASKED": str(record), "USER_ID": user}
        run = subprocess.run(["/bin/bash", "-c", script], env=environment, capture_output=True, text=True)
        assert said in run.stdout, run
        assert (len(record.read_text().splitlines()) if record.exists() else 0) == asked
