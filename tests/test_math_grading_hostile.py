# SPDX-License-Identifier: Apache-2.0
"""Responses made to stall, crash or subvert the grader: each is graded within its bound, and so is the next one."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from verl.steer.grading import score, symbolic

TIMEOUT = 0.5  # seconds of CPU time that a symbolic comparison may take here
RETURNS = 600.0  # seconds after which a grader that hasn't returned counts as stuck, on a busy machine too
SERVER = Path(symbolic.__file__).with_name("symbolic_server.py")


def box(answer: str) -> str:
    return rf"Therefore \boxed{{{answer}}}."


def nested(command: str, depth: int, core: str = "x") -> str:
    return command * depth + core + "}" * depth


HOSTILE = {
    # Size
    "a megabyte of opening braces": "{" * 1_000_000,
    "a megabyte of closing braces": "}" * 1_000_000,
    "a megabyte of braces in a box": box("{}" * 500_000),
    "a megabyte of boxes": r"\boxed{1}" * 120_000,
    "a megabyte of unclosed boxes": r"\boxed{" * 150_000,
    "a megabyte of backslashes": "\\" * 1_000_000,
    "a megabyte of dollars": "$" * 1_000_000,
    "a megabyte of answer lines": "Answer: " * 130_000,
    "a megabyte of answers in displays": "Answer:\n$$\n" * 90_000,
    "a megabyte of spaces after boxed": r"\boxed" + " " * 1_000_000,
    "a megabyte of zeros": box("0." + "0" * 1_000_000),
    "a million digits": box("9" * 1_000_000),
    "five hundred digits": box("9" * 500),
    "ten thousand commas": box("," * 1_900),
    "many spaces and commas": box(" ," * 900 + "and"),
    # Shape
    "an unclosed box": r"\boxed{7",
    "a box closed too often": r"\boxed{7}}}}}}}",
    "a box in a box": nested(r"\boxed{", 1_000, "7"),
    "deep braces": box(nested("{", 400)),
    "deep parentheses": box("(" * 400 + "x" + ")" * 400),
    "parentheses at the allowed depth": box("(" * 20 + "x" + ")" * 20),
    "unbalanced parentheses": box("((((((((((1+2"),
    "deep fractions": box(nested(r"\frac{1}{", 200)),
    "fractions at the allowed depth": box(nested(r"\frac{1}{1+", 19)),
    "deep roots": box(nested(r"\sqrt{", 200)),
    "absolute bars": box("|" * 101 + "x" + "|" * 101),
    "only operators": box("+-*/^_" * 60),
    "many fraction commands": box(r"\frac" * 80),
    # Arithmetic
    "an exponent tower": box("9^{9^{9^{9}}}"),
    "a taller tower": box("9^{9^{9^{9^{9^{9^{9}}}}}}"),
    "a flat tower": box("9^9^9^9^9"),
    "a negative tower": box("-7^{-7^{-7^{7^{7}}}}"),
    "a big root of a tower": box(r"\sqrt[3]{9^{9^{9}}}"),
    "a factorial": box("(10^9)!"),
    "factorials of factorials": box("((((9!)!)!)!)!"),
    "a binomial": box(r"\binom{10^{12}}{10^{11}}"),
    "a long sum": box(r"\sum_{i=1}^{10^{12}} \frac{1}{i^i}"),
    "a long product": box(r"\prod_{k=1}^{10^{9}} (k^2+1)"),
    "a hard integral": box(r"\int_0^{\infty} \frac{e^{-x^2}\sin(x^x)}{\ln(1+x^\pi)} dx"),
    "nested integrals": box(r"\int_0^1\int_0^1\int_0^1\int_0^1 \sin(xyzw)^{xyzw} dx dy dz dw"),
    "a hard limit": box(r"\lim_{n\to\infty} (1+\frac{1}{n^n})^{n^{n!}}"),
    "an expansion": box("(a+b+c+d+f)^{400}-(f+d+c+b+a)^{400}+1"),
    "a multivariate expansion": box("(x+y+z+1)^{60}(x-y+z-1)^{60}"),
    "signs": box(r"\pm1" * 60),
    "a huge modulus": box(r"7^{10^{10^{10}}} \mod 11"),
    "logarithms": box(r"\log_{2}" * 40 + "2"),
    "a tower in a matrix": box(r"\begin{pmatrix}9^{9^{9^9}}\\2\end{pmatrix}"),
    "a wide matrix": box(r"\begin{pmatrix}" + "1&" * 200 + r"1\end{pmatrix}"),
    "a determinant": box(r"\det\begin{pmatrix}a&b&c&d\\b&c&d&a\\c&d&a&b\\d&a&b&c\end{pmatrix}^{99}"),
    "equations to solve": box("x^{17}+y^{13}+xy+z^{11}=x^{19}y^{7}z^{5}+1"),
    "an inequality chain": box("<".join("abcdfghjklmnpqrstuvwz")),
    "many elements": box(",".join(rf"\sqrt{{{n}}}" for n in range(60))),
    "scientific notation": box("1e999999999"),
    "a percentage of a tower": box(r"9^{9^{9^{9}}}\%"),
    # Characters
    "null bytes": box("7\x00\x00") + "\x00" * 1_000,
    "lone surrogates": box("\ud800\udfff7"),
    "right-to-left text": box("\u202e\u05e9\u05dc\u05d5\u05dd \u0663"),
    "other digits": box("\u0661\u0662\u0663"),
    "superscript digits": box("2\u2079\u2079\u2079"),
    "combining marks": box("x" + "\u0301" * 500),
    "emoji": box("\U0001f600" * 200),
    "control characters": box("\x1b[2J\x07\r\n\x7f"),
    # Code
    "an import": box("__import__('os').system('touch pwned')"),
    "an import as text": box(r"\text{__import__('os').system('touch pwned')}"),
    "an operator": box(r"\operatorname{exec}(open('pwned','w'))"),
    "a lambda": box("(lambda:open('pwned','w'))()"),
    "attribute access": box("().__class__.__bases__[0].__subclasses__()"),
    "attributes without underscores": box("os.system(chr(116))"),
    "a sympy call": box("sympify(open)(1)"),
    "a TeX file": box(r"\input{/etc/passwd}\write18{touch pwned}"),
    "format fields": box("{0.__class__}%s%n"),
    "an answer line with code": "Answer: exec(open('pwned','w'))",
}
TRUTHS = ["7", r"\frac{x^2+1}{2}"]
#: These say 7, by either rule, but for null bytes: of them the training rule reads the last 300 alone.
RIGHT = {"a box closed too often", "lone surrogates", "null bytes"}


def grade(response: str, truth: str, rule: str = "eval", timeout: float = TIMEOUT) -> dict:
    return score.compute_score("math_dapo", response, truth, rule=rule, timeout=timeout)


def assert_grading_works() -> None:
    assert grade(box(r"\sqrt{8}"), r"2\sqrt{2}", timeout=60.0)["acc"]
    assert not grade(box(r"\sqrt{9}"), r"2\sqrt{2}", timeout=60.0)["acc"]


@pytest.fixture(scope="module")
def thread():
    """One thread that isn't the main one, where signals can't be used."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_response_is_graded_and_the_next_one_too(thread, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for truth in TRUTHS:
        for rule in ("train", "eval"):
            starts = symbolic.comparer.starts
            result = thread.submit(grade, HOSTILE[name], truth, rule).result(timeout=RETURNS)
            right = name in RIGHT and truth == "7" and (name, rule) != ("null bytes", "train")
            assert result["acc"] is right
            assert result.keys() == {"score", "acc", "pred", "timed_out"}
            json.dumps(result, ensure_ascii=False).encode()
            assert len(result["pred"]) <= score.MAX_PRED
            assert symbolic.comparer.starts - starts <= 2, "one response replaced the child more than once"
        assert_grading_works()
    assert not list(tmp_path.iterdir())


def test_hostile_responses_from_eight_threads_at_once():
    names = ["an exponent tower", "a factorial", "a hard integral", "an import", "an unclosed box", "a long product"]
    jobs = [(HOSTILE[name], TRUTHS[1]) for name in names] + [(box("\\frac{1+x^{2}}{2}"), TRUTHS[1])] * 10
    with ThreadPoolExecutor(8) as pool:
        graded = list(pool.map(lambda job: grade(*job), jobs, timeout=RETURNS))
    assert [result["acc"] for result in graded] == [False] * len(names) + [True] * 10
    assert not any(result["timed_out"] for result in graded[len(names) :])
    assert_grading_works()


def test_a_comparison_that_uses_up_its_cpu_time_says_so():
    result = grade(box("(10^9)!"), "5")
    assert (result["acc"], result["timed_out"]) == (False, True)
    assert not grade(box("6"), "x")["timed_out"]
    assert not grade(box("(10^9)!"), "5", "train")["timed_out"]


def test_time_that_the_machine_withholds_does_not_count(monkeypatch):
    comparer = symbolic.SymbolicComparer()
    assert comparer.equivalent("1/2", "0.5", timeout=60.0)
    child = comparer._child.process
    child.send_signal(signal.SIGSTOP)
    threading.Timer(4 * TIMEOUT, child.send_signal, [signal.SIGCONT]).start()
    assert comparer.equivalent("1/4", "0.25", TIMEOUT) is True
    assert comparer.starts == 1

    monkeypatch.setattr(symbolic, "WALL_PER_CPU", 0.1)
    comparer._child.process.send_signal(signal.SIGSTOP)
    assert comparer.equivalent("1/4", "0.25", timeout=60.0) is True
    assert comparer.starts == 2

    monkeypatch.setattr(symbolic, "ATTEMPTS", 1)
    comparer._child.process.send_signal(signal.SIGSTOP)
    assert comparer.equivalent("1/4", "0.25", timeout=5.0) is None
    assert comparer.equivalent("1/4", "0.25", timeout=60.0) is True
    comparer.stop()


def test_a_child_that_was_killed_from_outside_is_replaced():
    assert_grading_works()
    child = symbolic.comparer._child.process
    child.kill()
    child.wait()
    assert_grading_works()


def test_a_comparison_that_ends_the_child_counts_as_different(monkeypatch):
    comparer = symbolic.SymbolicComparer()
    assert comparer.equivalent("1/2", "0.5", timeout=60.0)
    child = comparer._child
    send = child.connection.send

    def send_and_end(request):
        send(request)
        threading.Timer(0.3, child.process.send_signal, [signal.SIGSEGV]).start()

    monkeypatch.setattr(child.connection, "send", send_and_end)
    assert comparer.equivalent("5", "(10^{9})!", timeout=60.0) is False
    assert comparer.equivalent("1/2", "0.5", timeout=60.0)
    assert comparer.starts == 2
    comparer.stop()


def test_a_forked_process_gets_a_child_of_its_own():
    assert_grading_works()
    ours = symbolic.comparer
    pid = os.fork()
    if pid == 0:
        renewed = symbolic.comparer is not ours and symbolic.comparer.starts == 0
        os._exit(0 if renewed and ours._child.connection.closed else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert_grading_works()


def _gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_the_child_runs_nothing_of_its_parent_and_dies_with_it(busy, tmp_path):
    # Without `if __name__ == "__main__"`, so that a child that imports the program would compare as well.
    program = tmp_path / "worker.py"
    program.write_text(
        "from verl.steer.grading.symbolic import comparer\n"
        "comparer.equivalent('1/2', '0.5', timeout=60.0)\n"
        "print(comparer._child.process.pid, flush=True)\n"
        + ("comparer.equivalent('5', '(10^{9})!', timeout=3.0)\n" if busy else "")
        + "import time; time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True) as worker:
        child = int(worker.stdout.readline())
        assert not _gone(child)
        assert "torch" in Path(f"/proc/{worker.pid}/maps").read_text(), "verl has no torch: this test can't fail"
        assert "torch" not in Path(f"/proc/{child}/maps").read_text()
        worker.kill()
    deadline = time.monotonic() + RETURNS
    while not _gone(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _gone(child)


def test_a_missing_library_is_named(monkeypatch):
    comparer = symbolic.SymbolicComparer()
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "site-packages" not in path])
    with pytest.raises(RuntimeError, match="import math_verify"):
        comparer.equivalent("1/2", "0.5")


FENCE = f"""
import runpy, sys
server = runpy.run_path({str(SERVER)!r})
server["raise_fence"]()
refused = 0
import os, socket, subprocess
for action in (
    lambda: os.system("true"),
    lambda: subprocess.run(["true"]),
    lambda: os.fork(),
    lambda: os.kill(os.getpid(), 0),
    lambda: open("pwned", "w"),
    lambda: os.remove("pwned"),
    lambda: socket.create_connection(("127.0.0.1", 9)),
):
    try:
        action()
    except RuntimeError as error:
        refused += "refused while grading" in str(error)
open(server["__file__"]).close()
print(refused)
"""


def test_the_fence_refuses_processes_files_and_sockets(tmp_path):
    run = subprocess.run([sys.executable, "-c", FENCE], cwd=tmp_path, capture_output=True, text=True)
    assert (run.stdout.strip(), list(tmp_path.iterdir())) == ("7", []), run.stderr


COMPILED = f"""
import json, runpy, sys
server = runpy.run_path({str(SERVER)!r})
for pair in server["WARM_UP"]:
    server["equivalent"](*pair)
compiled = []
sys.addaudithook(lambda event, args: compiled.append(str(args[0])) if event == "compile" else None)
for answer in json.loads(sys.stdin.read()):
    server["equivalent"]("zqx+1", answer)
print(json.dumps(compiled))
"""


def test_what_a_model_wrote_is_never_compiled_as_python():
    marked = ["zqx(1)", "x.zqx(1)", "zqx", "1+zqx", r"\text{zqx(1)}", r"\operatorname{zqx}(1)", "x_{zqx(1)}", "'zqx'"]
    marked += ["1/2+3*(2+1)", "zqx=1", "[zqx for zqx in (1)]", "lambda:zqx", r"\mathrm{zqx}\%", r"\sqrt{zqx}", "zqx!"]
    run = subprocess.run([sys.executable, "-c", COMPILED], input=json.dumps(marked), capture_output=True, text=True)
    compiled = json.loads(run.stdout)
    assert any("Integer" in source for source in compiled), "the hook saw nothing: this test can't fail"
    assert not [source for source in compiled if "zqx" in source or "+" in source.replace("+ b", "")], run.stderr
