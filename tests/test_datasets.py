# SPDX-License-Identifier: Apache-2.0
"""`datasets/make_datasets.py`: what it builds from raw files, and what it does when something is wrong or is killed."""

import base64
import json
import os
import pickle
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import datasets
import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from verl.steer.grading.score import compute_score

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "datasets" / "make_datasets.py"
PROGRAM = runpy.run_path(str(SCRIPT))
SPECS = PROGRAM["BY_NAME"]

ASK_ANSWER = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
ASK_BOX = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "\\boxed{{Answer}} where Answer is the answer to the problem.\n\n{}\n\n"
    "Remember to put your answer in \\boxed{{...}} format on its own line."
)


ASK_PROGRAM = "{}\n\nWrite the solution in Python, as one block:\n\n```python\n{}\n```\n"

# EvalPlus's tests as the hub has them, shortened.
EVALPLUS_TEST = """import numpy as np

def is_floats(x) -> bool:
    return isinstance(x, float)

def assertion(out, exp, atol):
    exact_match = out == exp
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if not exact_match and atol != 0:
        np.testing.assert_allclose(out, exp, atol=atol)
    else:
        assert exact_match

"""
HUMANEVAL_TEST = (
    EVALPLUS_TEST
    + """
def check(candidate):
    inputs = [[1.0], [2.5]]
    results = [2.0, 5.0]
    for i, (inp, exp) in enumerate(zip(inputs, results)):
        assertion(candidate(*inp), exp, 0)
"""
)
MBPP_TEST = (
    EVALPLUS_TEST
    + """
inputs = [[3], [-4]]
results = [6, -8]
for i, (inp, exp) in enumerate(zip(inputs, results)):
    assertion(twice(*inp), exp, 0)
"""
)
SHAPES = "def assertion(out, exp, atol):\n    assert out == exp or np.shape(out) == np.shape(exp)\n"


def with_shapes(test):
    return test.replace("def assertion(out, exp, atol):\n", SHAPES)


def packed(value):
    """As LiveCodeBench packs its private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def cases(*pairs, kind="stdin"):
    return json.dumps([{"input": given, "output": expected, "testtype": kind} for given, expected in pairs])


def chat(content):
    return [{"content": content, "role": "user"}]


def dapo_row(content, truth, index):
    return {
        "data_source": "math_dapo",
        "prompt": chat(content),
        "ability": "MATH",
        "reward_model": {"ground_truth": truth, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def aime24_row(problem, truth, index):
    row = dapo_row(ASK_ANSWER.format(problem), truth, index)
    return {**row, "extra_info": {"index": index, "raw_problem": problem, "split": None}}


def amc_row(number, year, problem, answer):
    url = f"https://artofproblemsolving.com/wiki/index.php/{year}_AMC_12A_Problems/Problem_{number}"
    return {"id": number, "problem": problem, "answer": answer, "url": url}


# Rows as the hub has them, and what they become: (index, problem, prompt, ground truth), before repetition.
RAW = {
    "DAPO-Math-17k": [
        dapo_row(ASK_ANSWER.format("What is 1+1?"), "2", "a"),
        dapo_row('求 1+2 的值.\n请以"Answer: \\boxed{<final_answer>}"的格式输出最终答案。', "3", "b"),
        dapo_row(ASK_ANSWER.format("What is 1+1?"), "-2", "c"),
        dapo_row(ASK_ANSWER.format("What is 1+1? "), "2", "d"),
    ],
    "aime24": [aime24_row("P", "7", 5), aime24_row("Q", "8", 2), aime24_row("P", "7", 5)],
    "aime25": [{"problem": "P", "answer": "7", "id": "x"}, {"problem": "Q", "answer": "08", "id": "y"}],
    "amc23": [amc_row(1, 2022, "old", 4.0), amc_row(43, 2023, "P", 27.0), amc_row(44, 2023, "Q ", -1.0)],
    "math500": [
        {"problem": "P", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "unique_id": "test/precalculus/807.json"},
        {"problem": "Q", "answer": "4", "unique_id": "test/algebra/1004.json"},
        {"problem": "R", "answer": "\\sqrt{51}", "unique_id": "test/precalculus/1303.json"},
    ],
    "minerva_math": [{"question": "P", "answer": "1.2e-5"}, {"question": "Q", "answer": "\\pi"}],
    "olympiadbench": [
        {"id": 1606, "question": "\nP", "final_answer": ["$69$,$84$"], "context": None},
        {"id": 1610, "question": "Q", "final_answer": ["2"], "context": None},
    ],
    "gsm8k_test": [{"question": "P", "answer": "12*100=<<12*100=1200>>1200\n#### 1,200"}],
    "omni": [{"problem": "P", "answer": "x", "source": "s"}, {"problem": "Q", "answer": "", "source": "s"}],
    "humaneval": [
        {
            "task_id": "HumanEval/7",
            "prompt": '\ndef twice(x: float) -> float:\n    """Twice x."""\n',
            "canonical_solution": "    return 2 * x\n",
            "entry_point": "twice",
            "test": HUMANEVAL_TEST,
        }
    ],
    "mbpp": [
        {
            "task_id": 2,
            "code": "def twice(x):\n  return 2 * x",
            "prompt": "Write a function to double.",
            "test_imports": ["import math"],
            "test_list": ["assert twice(1) == 2", "assert twice(0) == 0"],
            "test": MBPP_TEST,
        }
    ],
    "livecodebench": [
        {
            "question_content": "Double a number.\n",
            "question_id": "1_A",
            "starter_code": "",
            "public_test_cases": cases(("1\n", "2\n")),
            "private_test_cases": packed(cases(("20", "40"), ("-3", "-6"))),
            "metadata": "{}",
        },
        {
            "question_content": "Double a list.",
            "question_id": "2",
            "starter_code": "class Solution:\n    def double(self, x: List[int]) -> List[int]:\n        ",
            "public_test_cases": cases(("[1, 2]", "[2, 4]"), kind="functional"),
            "private_test_cases": cases(("[]", "[]"), kind="functional"),
            "metadata": '{"func_name": "double"}',
        },
    ],
}
LIVECODEBENCH_TESTS = [
    {"inputs": ["1\n", "20", "-3"], "outputs": ["2\n", "40", "-6"]},
    {"inputs": ["[1, 2]", "[]"], "outputs": ["[2, 4]", "[]"], "fn_name": "double"},
]
CODE = ("humaneval", "mbpp", "livecodebench")
BUILT = {
    "DAPO-Math-17k": [
        ("a", "What is 1+1?", ASK_BOX.format("What is 1+1?"), "2"),
        ("b", RAW["DAPO-Math-17k"][1]["prompt"][0]["content"], RAW["DAPO-Math-17k"][1]["prompt"][0]["content"], "3"),
        ("d", "What is 1+1? ", ASK_BOX.format("What is 1+1? "), "2"),
    ],
    "aime24": [
        (5, "P", ASK_ANSWER.format("P"), "7"),
        (2, "Q", ASK_ANSWER.format("Q"), "8"),
        (5, "P", ASK_ANSWER.format("P"), "7"),
    ],
    "aime25": [(0, "P", ASK_ANSWER.format("P"), "7"), (1, "Q", ASK_ANSWER.format("Q"), "08")],
    "amc23": [(43, "P", ASK_ANSWER.format("P"), "27"), (44, "Q ", ASK_ANSWER.format("Q "), "-1")],
    "math500": [(0, "Q", "Q", "4"), (1, "R", "R", "\\sqrt{51}"), (2, "P", "P", "(3,\\frac{\\pi}{2})")],
    "minerva_math": [(0, "P", "P", "1.2e-5"), (1, "Q", "Q", "\\pi")],
    "olympiadbench": [(1606, "\nP", "\nP", "69$,$84"), (1610, "Q", "Q", "2")],
    "gsm8k_test": [(0, "P", "P", "1200")],
    "omni": [(0, "P", "P", "x"), (1, "Q", "Q", "")],
    "humaneval": [
        (
            7,
            RAW["humaneval"][0]["prompt"],
            ASK_PROGRAM.format("Complete this function.", 'def twice(x: float) -> float:\n    """Twice x."""'),
            json.dumps({"assert_case": [with_shapes(HUMANEVAL_TEST) + "\ncheck(twice)\n"]}),
        )
    ],
    "mbpp": [
        (
            2,
            "Write a function to double.",
            ASK_PROGRAM.format(
                "Write a function to double.\nThe function must pass this test: assert twice(1) == 2", "# your code"
            ),
            json.dumps({"assert_case": ["import math\n" + with_shapes(MBPP_TEST)]}),
        )
    ],
    "livecodebench": [
        (
            0,
            "Double a number.\n",
            ASK_PROGRAM.format("Double a number.\n\nRead standard input, print the answer.", "# your code"),
            json.dumps({"zlib": base64.b64encode(zlib.compress(json.dumps(LIVECODEBENCH_TESTS[0]).encode())).decode()}),
        ),
        (
            1,
            "Double a list.",
            ASK_PROGRAM.format("Double a list.", "class Solution:\n    def double(self, x: List[int]) -> List[int]:"),
            json.dumps({"zlib": base64.b64encode(zlib.compress(json.dumps(LIVECODEBENCH_TESTS[1]).encode())).decode()}),
        ),
    ],
}
REPEATS = {"aime25": 32, "amc23": 32}
LABELS = {
    "DAPO-Math-17k": ("math_dapo", "MATH", "rule-lighteval/MATH_v2", "train"),
    "aime24": ("aime_2024_dapo_boxed", "MATH", "rule-lighteval/MATH_v2", "test"),
    "aime25": ("aime_2025_dapo_boxed", "math", "rule", "test"),
    "amc23": ("amc2023_dapo_boxed", "math", "rule", "test"),
    "math500": ("math500", "MATH", "rule_mine", "test"),
    "minerva_math": ("minerva_math", "math", "rule", "test"),
    "olympiadbench": ("olympiadbench", "math", "rule", "test"),
    "gsm8k_test": ("gsm8k_test", "math", "rule", "test"),
    "omni": ("omni", "math", "rule", "test"),
    **{name: (name, "code", "rule", "test") for name in ("humaneval", "mbpp", "livecodebench")},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keeps what `load_dataset` caches inside the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def raw(tmp_path):
    """A folder with every raw file, as parquet."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for name, rows in RAW.items():
        write_raw(folder, name, rows)
    return folder


@pytest.fixture
def make(monkeypatch, capsys):
    """Runs the program in this process; returns its exit code, its output and the lines it wrote as errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        code = PROGRAM["main"]()
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run


def write_raw(folder, name, rows, suffix=".parquet"):
    path = folder / (name + suffix)
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


def start(*command, home, **environment):
    """Runs a command as a process of its own, without the network."""
    variables = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", **environment.pop("variables", {})}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=variables, **environment)


def one_line(result, *parts):
    """Asserts a failure told in one line that has all the parts."""
    code, _, errors = result
    assert code == 1
    assert len(errors) == 1, errors
    for part in parts:
        assert str(part) in errors[0], errors[0]


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
def test_rows(name, suffix, tmp_path, make):
    write_raw(tmp_path, name, RAW[name], suffix)
    code, output, errors = make("--only", name, "--source", tmp_path, "--out", tmp_path / "out", "--allow-partial")
    assert (code, errors) == (0, [])
    assert f"{name}.parquet: {len(BUILT[name]) * REPEATS.get(name, 1)} rows, made" in output

    data_source, ability, style, split = LABELS[name]
    expected = [
        {
            "data_source": data_source,
            "prompt": chat(prompt),
            "ability": ability,
            "reward_model": {"ground_truth": truth, "style": style},
            "extra_info": {"index": index, "raw_problem": problem, "split": split},
        }
        for index, problem, prompt, truth in BUILT[name] * REPEATS.get(name, 1)
    ]
    assert pq.read_table(tmp_path / "out" / f"{name}.parquet").to_pylist() == expected


def test_everything_at_once(raw, tmp_path, make):
    code, output, errors = make("--source", raw, "--out", tmp_path / "out", "--allow-partial")
    assert (code, errors) == (0, [])
    made = sorted(f"{name}.parquet" for name in RAW if name not in CODE)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == made
    assert len(output.splitlines()) == 9


def test_benchmarks_can_be_read_together(raw, tmp_path, make):
    names = [name for name in RAW if name != "DAPO-Math-17k"]
    make("--only", *names, "--source", raw, "--out", tmp_path / "out", "--allow-partial")
    benchmarks = [pq.read_table(tmp_path / "out" / f"{name}.parquet") for name in names]
    assert pa.concat_tables(benchmarks).num_rows == sum(table.num_rows for table in benchmarks)
    files = [str(tmp_path / "out" / f"{name}.parquet") for name in names]
    parts = [datasets.load_dataset("parquet", data_files=file, split="train") for file in files]
    assert len(datasets.concatenate_datasets(parts)) == sum(table.num_rows for table in benchmarks)


def test_same_bytes_every_time(raw, tmp_path, make):
    for out in ("one", "two"):
        make("--only", "amc23", "math500", "--source", raw, "--out", tmp_path / out, "--allow-partial")
    for name in ("amc23", "math500"):
        first, second = (tmp_path / out / f"{name}.parquet" for out in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()


# The left column is what MATH-500 has on the hub, the right one what the published file has for the same problem.
MATH_ANSWERS = {
    "\\left( 3, \\frac{\\pi}{2} \\right)": "(3,\\frac{\\pi}{2})",
    "p - q": "p-q",
    "\\frac{14}{3}": "\\frac{14}{3}",
    "\\text{Evelyn}": "Evelyn",
    "90^\\circ": "90",
    "3\\sqrt{13}": "3\\sqrt{13}",
    "6 - 5i": "6-5i",
    "-50": "-50",
}


@pytest.mark.parametrize(
    ("latex", "plain"),
    [
        *MATH_ANSWERS.items(),
        ("x \\in [-2,7]", "[-2,7]"),
        ("\\$32,\\!348", "32348"),
        ("11,\\! 111,\\! 111,\\! 100", "11,111,111,100"),
        ("\\frac{270}7\\text{ degrees}", "\\frac{270}7"),
        ("5.4 \\text{ cents}", "5.4"),
        ("15\\mbox{ cm}^2", "15"),
        ("10\\%", "10"),
        ("\\cot x", "\\cotx"),
        ("\\leftarrow", "\\leftarrow"),
        ("y = -2x", "y=-2x"),
        ("\\infty", "\\infty"),
    ],
)
def test_math_answers(latex, plain):
    assert PROGRAM["plain_answer"](latex) == plain
    assert PROGRAM["plain_answer"](plain) == plain


def test_second_run_does_nothing(raw, tmp_path, make):
    arguments = ("--only", "aime25", "--out", tmp_path / "out", "--allow-partial")
    assert make(*arguments, "--source", raw)[0] == 0
    path = tmp_path / "out" / "aime25.parquet"
    before = path.stat()
    code, output, errors = make(*arguments, "--source", tmp_path / "nowhere")
    assert (code, errors) == (0, [])
    assert "64 rows, already there" in output
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_a_file_with_other_columns_or_rows_is_made_again(raw, tmp_path, make):
    path = tmp_path / "out" / "math500.parquet"
    path.parent.mkdir()
    arguments = ("--only", "math500", "--source", raw, "--out", path.parent)
    for broken in (b"", b"PAR1 and then nothing", None):
        if broken is None:
            pq.write_table(pa.table({"prompt": ["x"] * 500}), path)
        else:
            path.write_bytes(broken)
        assert make(*arguments, "--allow-partial")[0] == 0
        assert pq.read_table(path).num_rows == 3
    one_line(make(*arguments), path, "gives 3 rows, expected 500")
    assert pq.read_table(path).num_rows == 3


@pytest.mark.parametrize("name", RAW)
def test_another_number_of_rows(name, raw, tmp_path, make):
    result = make("--only", name, "--source", raw, "--out", tmp_path / "out")
    built = len(BUILT[name]) * REPEATS.get(name, 1)
    one_line(result, f"{name}.parquet", f"gives {built} rows, expected {SPECS[name].rows}", f"--revision {name}=COMMIT")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", RAW)
def test_other_columns(name, tmp_path, make):
    write_raw(tmp_path, name, [{"something": 1, "extra_info": {"index": "a"}}])
    one_line(
        make("--only", name, "--source", tmp_path, "--out", tmp_path / "out"),
        f"{name}.parquet",
        "has changed",
        "something",
        "--source DIR",
    )


def test_a_column_missing_inside_a_struct(tmp_path, make):
    rows = [{**row, "extra_info": {"index": 1}} for row in RAW["aime24"]]
    write_raw(tmp_path, "aime24", rows)
    result = make("--only", "aime24", "--source", tmp_path, "--out", tmp_path / "out")
    one_line(result, "no column extra_info.raw_problem")


@pytest.mark.parametrize(
    ("name", "rows", "part"),
    [
        ("DAPO-Math-17k", [dapo_row("no wrapper", "1", "a")], "none of its 1 prompts begins with"),
        ("amc23", [amc_row(43, 2023, "P", 27.5)], "problem 43 has the answer 27.5"),
        ("gsm8k_test", [{"question": "P", "answer": "twelve"}], "no '####' in its answer 'twelve'"),
        ("olympiadbench", [{"id": 3, "question": "P", "final_answer": ["1", "2"]}], "problem 3 has 2 final answers"),
        ("aime25", [{"problem": "P", "answer": "7"}, {"problem": "Q", "answer": None}], "problem 1 has no text or no"),
        ("minerva_math", [{"question": "", "answer": "7"}], "problem 0 has no text or no answer"),
    ],
)
def test_other_content(name, rows, part, tmp_path, make):
    write_raw(tmp_path, name, rows)
    result = make("--only", name, "--source", tmp_path, "--out", tmp_path / "out", "--allow-partial")
    one_line(result, f"{name}.parquet", part)
    assert not (tmp_path / "out").exists()


def test_no_raw_file(tmp_path, make):
    result = make("--only", "omni", "--source", tmp_path, "--out", tmp_path / "out")
    one_line(result, "omni.parquet", "has none of omni.parquet, omni.jsonl, omni.json", "KbsdJames/Omni-MATH")


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
def test_broken_raw_file(suffix, tmp_path, make):
    (tmp_path / f"omni{suffix}").write_text('{"problem": ')
    one_line(make("--only", "omni", "--source", tmp_path, "--out", tmp_path / "out"), "omni.parquet", "can't be read")


def test_the_library_adds_no_lines_of_its_own(tmp_path):
    (tmp_path / "omni.jsonl").write_text('{"problem": ')
    result = start(sys.executable, SCRIPT, "--only", "omni", "--source", tmp_path, "--out", tmp_path, home=tmp_path)
    one_line((result.returncode, "", result.stderr.splitlines()), "can't be read (JSON parse error")


def test_one_bad_source_does_not_stop_the_others(raw, tmp_path, make):
    (raw / "aime25.parquet").unlink()
    result = make("--only", "aime24", "aime25", "omni", "--source", raw, "--out", tmp_path / "out", "--allow-partial")
    one_line(result, "aime25.parquet")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["aime24.parquet", "omni.parquet"]


def test_no_network(tmp_path):
    result = start(sys.executable, SCRIPT, "--out", tmp_path / "out", home=tmp_path)
    assert result.stdout == ""
    one_line(
        (result.returncode, "", result.stderr.splitlines()),
        "DAPO-Math-17k.parquet",
        "connect to the network",
        "--source",
    )


def test_no_network_for_files_that_are_read_one_by_one(tmp_path, make, monkeypatch):
    """`datasets` passes on what the hub's client raises there."""

    def refuse(*args, **kwargs):
        raise httpx.ConnectError("[Errno 111] Connection refused")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    result = make("--only", "livecodebench", "--out", tmp_path)
    one_line(result, "livecodebench.parquet", "Connection refused", "connect to the network", "--source")


def test_no_access(tmp_path, make, monkeypatch):
    def refuse(hub_id, *args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{hub_id}' is a gated dataset on the Hub.\nLog in.")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    one_line(
        make("--only", "omni", "--out", tmp_path), "omni.parquet", "gated", "datasets/KbsdJames/Omni-MATH", "login"
    )


def test_no_such_revision(tmp_path, make, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("Couldn't find revision")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    one_line(make("--only", "omni", "--out", tmp_path), "omni.parquet", "find revision", "--revision omni=COMMIT")


def test_what_is_asked_of_the_hub(tmp_path, make, monkeypatch):
    asked = {}

    def load(hub_id, config, split, revision):
        name = next(spec.name for spec in SPECS.values() if spec.hub_id == hub_id)
        asked[name] = (config, split, revision)
        return datasets.Dataset.from_list(RAW[name])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert make("--out", tmp_path, "--allow-partial", "--revision", "omni=abc", "aime24=def")[0] == 0
    assert asked["omni"] == (None, "test", "abc")
    assert asked["aime24"] == (None, "train", "def")
    assert asked["gsm8k_test"] == ("main", "test", "e53f048856ff4f594e959d75785d2c2d37b678ee")
    assert asked["DAPO-Math-17k"] == (None, "train", None)
    assert len(asked) == 9


def test_livecodebench_is_read_without_its_loading_script(tmp_path, make, monkeypatch):
    asked = []

    def load(reader, data_files, split):
        asked.append((reader, split, data_files))
        return datasets.Dataset.from_list(RAW["livecodebench"])

    monkeypatch.setattr(datasets, "load_dataset", load)
    arguments = ("--only", "livecodebench", "--out", tmp_path, "--allow-partial")
    assert make(*arguments)[0] == 0
    (tmp_path / "livecodebench.parquet").unlink()
    assert make(*arguments, "--revision", "livecodebench=abc")[0] == 0
    for revision, (reader, split, files) in zip(("main", "abc"), asked, strict=True):
        assert (reader, split) == ("json", "train")
        parts = ["test", "test2", "test3", "test4", "test5"]
        place = f"hf://datasets/livecodebench/code_generation_lite@{revision}"
        assert files == [f"{place}/{part}.jsonl" for part in parts]


class Call:
    """Pickled, it is a call of `os.mkdir`."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("nested", [False, True], ids=["a call", "a call within"])
def test_private_tests_call_nothing(nested, tmp_path, make):
    called = tmp_path / "called"
    pickle.loads(zlib.decompress(base64.b64decode(packed(Call(tmp_path / "check")))))
    assert (tmp_path / "check").is_dir(), "the pickle calls nothing: this test can't fail"
    value = [Call(called)] if nested else Call(called)
    write_raw(tmp_path, "livecodebench", [{**RAW["livecodebench"][0], "private_test_cases": packed(value)}], ".jsonl")
    result = make("--only", "livecodebench", "--source", tmp_path, "--out", tmp_path / "out", "--allow-partial")
    one_line(result, "livecodebench.parquet", "posix.mkdir", "not those of LiveCodeBench")
    assert not called.exists()


@pytest.mark.parametrize("text", ["", "no base64!", base64.b64encode(b"not compressed").decode(), packed(7), "[{]"])
def test_broken_private_tests(text, tmp_path, make):
    write_raw(tmp_path, "livecodebench", [{**RAW["livecodebench"][0], "private_test_cases": text}], ".jsonl")
    result = make("--only", "livecodebench", "--source", tmp_path, "--out", tmp_path / "out", "--allow-partial")
    one_line(result, "livecodebench.parquet", "private tests that can't be read")


PROGRAMS = {
    "humaneval": ["def twice(x): return 2 * x"],
    "mbpp": ["def twice(x): return x + x"],
    "livecodebench": ["print(2 * int(input()))", "class Solution:\n    def double(self, x): return [2 * n for n in x]"],
}


@pytest.mark.parametrize("name", CODE)
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bwrap: apt-get install bubblewrap")
def test_made_rows_grade_programs(name, raw, tmp_path, make):
    """The reward function takes the rows as they are: right programs pass, an empty list or nothing does not."""
    make("--only", name, "--source", raw, "--out", tmp_path, "--allow-partial")
    rows = pq.read_table(tmp_path / f"{name}.parquet").to_pylist()
    wrong = "def twice(x): return []\nclass Solution:\n    def double(self, x): return x\nprint(7)"
    for row, program in zip(rows, PROGRAMS[name], strict=True):
        for text, right in ((program, True), (wrong, False), ("", False)):
            response = f"It is\n\n```python\n{text}\n```"
            result = compute_score(row["data_source"], response, row["reward_model"]["ground_truth"])
            assert (result["score"], result["acc"]) == (1.0 if right else -1.0, right), (text, result)


@pytest.mark.parametrize("pin", ["omni", "omni=", "other=abc"])
def test_a_pin_that_is_none(pin, make, capsys):
    with pytest.raises(SystemExit) as stop:
        make("--revision", pin)
    assert stop.value.code == 2
    assert "is not NAME=REV" in capsys.readouterr().err


KILLED = """
import os, runpy, signal, sys
import pyarrow.parquet as pq

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def rename(source, target, original=os.replace):
    die() if str(target).endswith("aime25.parquet") else original(source, target)

def write_half(table, file):
    file.write(b"PAR1" + bytes(1000))
    file.flush()
    die()

if sys.argv[1] == "before the rename":
    os.replace = rename
else:
    pq.write_table = write_half
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("moment", ["before the rename", "while writing"])
def test_killed(moment, raw, tmp_path, make):
    out = tmp_path / "out"
    arguments = ("--only", "aime25", "--source", raw, "--out", out, "--allow-partial")
    result = start(sys.executable, "-c", KILLED, moment, SCRIPT, *arguments, home=tmp_path)
    assert result.returncode == -signal.SIGKILL, result.stderr
    (leftover,) = out.iterdir()
    assert leftover.suffix == ".tmp" and leftover.name.startswith(".aime25.parquet.")

    assert make(*arguments)[0] == 0
    assert pq.read_table(out / "aime25.parquet").num_rows == 64
    assert leftover.exists()  # young enough to be another run's

    yesterday = time.time() - 86400
    os.utime(leftover, (yesterday, yesterday))
    (out / "aime25.parquet").unlink()
    assert make(*arguments)[0] == 0
    assert [path.name for path in out.iterdir()] == ["aime25.parquet"]
    assert (out / "aime25.parquet").stat().st_mode & 0o444 == 0o444


def test_check(raw, tmp_path, make):
    make("--only", "aime25", "--source", raw, "--out", tmp_path, "--allow-partial")
    table = pq.read_table(tmp_path / "aime25.parquet")
    one_line(make("--check", "--only", "aime25", "--out", tmp_path), "64 rows, expected 960")
    one_line(make("--check", "--only", "math500", "--out", tmp_path), "math500.parquet", "missing")

    pq.write_table(pa.concat_tables([table] * 15), tmp_path / "aime25.parquet")
    one_line(make("--check", "--only", "aime25", "--out", tmp_path), "prompts or truths differ")
    pq.write_table(table.drop_columns("prompt"), tmp_path / "aime25.parquet")
    one_line(make("--check", "--only", "aime25", "--out", tmp_path), "no column prompt")
    (tmp_path / "aime25.parquet").write_bytes(b"PAR1")
    one_line(make("--check", "--only", "aime25", "--out", tmp_path), "not a whole parquet file")


def test_checksum_tells_content_from_order():
    def table(*rows):
        columns = ("prompt", "reward_model")
        return pa.Table.from_pylist([dict(zip(columns, (chat(p), {"ground_truth": t}), strict=True)) for p, t in rows])

    checksum = PROGRAM["content_checksum"]
    assert checksum(table(("P", "1"), ("Q", "2"))) == checksum(table(("Q", "2"), ("P", "1")))
    assert checksum(table(("P", "1"), ("Q", "2"))) != checksum(table(("P", "2"), ("Q", "1")))
    assert checksum(table(("P", "1"))) != checksum(table(("P", "1"), ("P", "1")))
    # printf '%s\n' '[[["user","é"]],"1"]' | sha256sum
    assert checksum(table(("é", "1"))) == "b89e85d5dbb97ce454cc0fc95d6b6bdbe19efc7c6c7f6bc80413cb7d3f9136fc"


@pytest.mark.parametrize(
    ("folder", "command"),
    [
        (REPOSITORY, [SCRIPT, "--help"]),
        (REPOSITORY / "datasets", [SCRIPT.name, "--help"]),
        # The working directory comes first on the path here, as it does for `python -m`.
        (REPOSITORY, ["-c", "import datasets; datasets.load_dataset"]),
    ],
)
def test_the_folder_does_not_hide_the_library(folder, command, tmp_path):
    result = start(sys.executable, *command, home=tmp_path, cwd=folder, variables={"PYTHONPATH": str(REPOSITORY)})
    assert result.returncode == 0, result.stderr


def test_readme_has_the_facts_of_the_specs():
    lines = (SCRIPT.parent / "README.md").read_text().splitlines()
    for spec in SPECS.values():
        (line,) = [line for line in lines if line.startswith(f"| `{spec.name}.parquet` |")]
        columns = sorted({column.split(".")[0] for column in spec.columns})
        for fact in (f"{spec.rows:,}", spec.hub_id, spec.licence, *columns):
            assert fact in line, (fact, line)
        (line,) = [line for line in lines if line.startswith(f"| `{spec.name}` |")]
        for fact in (spec.checksum or "not verified", spec.data_source, spec.revision or "main"):
            assert fact in line, (fact, line)


# The published files, where they are at hand.

PUBLISHED = ("DAPO-Math-17k", "aime24", "aime25", "amc23", "math500", "olympiadbench")
# Where the problem was cut out of the prompt of these two files, the cut began too early.
CUT_TOO_EARLY = (
    " by step. The last line of your response should be of the form Answer: $Answer (without quotes) where $Answer is "
    "the answer to the problem.\n\n"
)
# Problems of MATH-500 by `unique_id`, as a public copy of the hub's file has them.
MATH500_IDS = {
    "test/algebra/1004.json": "If $2^8=4^x$, what is the value of $x$?",
    "test/algebra/2036.json": "What is the distance, in units, between the points $(2, -6)$ and $(-4, 3)$?",
    "test/intermediate_algebra/134.json": "Compute: $1-2+3-4+5- \\dots +99-100$.",
    "test/number_theory/1032.json": "What is the least positive integer multiple of 30",
    "test/number_theory/572.json": "How many positive whole-number divisors does 196 have?",
    "test/precalculus/1303.json": "Suppose $\\sin D = 0.7$",
    "test/precalculus/807.json": "Convert the point $(0,3)$ in rectangular coordinates",
}


@pytest.fixture(scope="module")
def published():
    folder = os.environ.get("STEER_REAL_DATA")
    if not folder or not (Path(folder) / "aime24.parquet").is_file():
        pytest.skip("STEER_REAL_DATA names no folder with the published parquet files")
    return Path(folder)


def between(text, template):
    """What stands in the template's place, None where the text is not of that form."""
    start_, end = template.format("\0").split("\0")
    return text[len(start_) : -len(end)] if text.startswith(start_) and text.endswith(end) else None


def hub_rows(name, rows):
    """Rows as the hub has them, taken back out of a published file, in an order that the file does not depend on."""
    shuffle = random.Random(0).shuffle
    solved = [(row["prompt"][0]["content"], row["reward_model"]["ground_truth"], row["extra_info"]) for row in rows]
    if name == "DAPO-Math-17k":
        first = []
        for prompt, truth, info in solved:
            problem = between(prompt, ASK_BOX)
            content = prompt if problem is None else ASK_ANSWER.format(problem)
            first.append(dapo_row(content, truth, info["index"]))
        again = [dapo_row(row["prompt"][0]["content"], "another", "another") for row in first]
        shuffle(again)
        return first + again
    if name == "aime24":
        return [aime24_row(between(prompt, ASK_ANSWER), truth, info["index"]) for prompt, truth, info in solved]
    if name == "aime25":
        return [{"problem": between(prompt, ASK_ANSWER), "answer": truth} for prompt, truth, _ in solved[:30]]
    if name == "amc23":
        old = [amc_row(number, 2022, "old", 1.0) for number in range(43)]
        new = [
            amc_row(info["index"], 2023, between(prompt, ASK_ANSWER), float(truth))
            for prompt, truth, info in solved[:40]
        ]
        return old + new
    if name == "math500":
        hub = [
            {"problem": prompt, "answer": truth, "unique_id": f"test/{info['index']:03}"}
            for prompt, truth, info in solved
        ]
        shuffle(hub)
        return hub
    return [{"id": info["index"], "question": prompt, "final_answer": [f"${truth}$"]} for prompt, truth, info in solved]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_file(name, published, tmp_path, make):
    table = pq.read_table(published / f"{name}.parquet")
    rows = table.to_pylist()
    write_raw(tmp_path, name, hub_rows(name, rows))
    assert make("--only", name, "--source", tmp_path, "--out", tmp_path / "out")[::2] == (0, [])
    made = pq.read_table(tmp_path / "out" / f"{name}.parquet")
    assert make("--check", "--only", name, "--out", tmp_path / "out")[::2] == (0, [])
    assert make("--check", "--only", name, "--out", published)[::2] == (0, [])

    # pandas wrote the row labels of one file as a column of their own.
    pandas_labels = {"__index_level_0__"} if name == "aime24" else set()
    assert set(table.column_names) - pandas_labels == set(made.column_names)
    for column in ("data_source", "prompt", "ability", "reward_model"):
        assert made[column].to_pylist() == table[column].to_pylist()
    for ours, theirs in zip(made["extra_info"].to_pylist(), table["extra_info"].to_pylist(), strict=True):
        assert ours["index"] == theirs["index"]
        if name in ("aime25", "amc23"):
            assert theirs["raw_problem"] == CUT_TOO_EARLY + ours["raw_problem"]
        elif name == "DAPO-Math-17k":
            assert set(theirs) == {"index"}
        else:
            assert theirs["raw_problem"] == ours["raw_problem"]
        split = {"aime24": None, "math500": "test"}.get(name, "dummy")
        assert theirs.get("split", split) == split


def test_math500_order(published):
    problems = [prompt[0]["content"] for prompt in pq.read_table(published / "math500.parquet")["prompt"].to_pylist()]
    places = [
        next(place for place, problem in enumerate(problems) if problem.startswith(MATH500_IDS[key]))
        for key in sorted(MATH500_IDS)
    ]
    assert places == sorted(places)


def test_math500_answers_are_plain_already(published):
    rewards = pq.read_table(published / "math500.parquet")["reward_model"].to_pylist()
    truths = {reward["ground_truth"] for reward in rewards}
    assert truths == {PROGRAM["plain_answer"](truth) for truth in truths}
    assert truths >= set(MATH_ANSWERS.values())
