# SPDX-License-Identifier: Apache-2.0
"""The arithmetic problems, the rule that grades them, and the program that makes the laptop task."""

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl.steer.tasks import arithmetic, countdown, rows
from verl.steer.tasks.arithmetic import (
    DEFAULT_DIFFICULTY,
    DIFFICULTIES,
    compute_score,
    make_problem,
    worked_solution,
)
from verl.steer.tasks.rows import split_of

PROGRAM = Path(__file__).parents[1] / "scripts" / "make_laptop_task.py"

make_rows = partial(rows.make_rows, arithmetic)
seeds = st.integers(0, 2**32)
difficulties = st.sampled_from(sorted(DIFFICULTIES))


def steps_of(solution: str) -> list[tuple[str, int]]:
    """The written steps, as (expression, result)."""
    return [(left, int(result)) for left, result in re.findall(r"([^;#]+)=(-?\d+);", solution)]


def value(expression: str) -> int:
    return sum(int(number) for number in re.findall(r"[+-]?\d+", expression))


@given(seeds, difficulties)
def test_worked_solutions_are_right_and_graded_so(seed: int, difficulty: int) -> None:
    problem = make_problem(random.Random(seed), difficulty)
    assert value(problem.prompt) == sum(problem.terms) == int(problem.ground_truth) >= 0
    steps = steps_of(problem.solution)
    assert len(steps) == DIFFICULTIES[difficulty].terms - 1
    assert all(value(expression) == result >= 0 for expression, result in steps)
    graded = compute_score(problem.solution, problem.ground_truth)
    assert graded == {"score": 1.0, "acc": True, "pred": problem.ground_truth}


@given(seeds, difficulties)
def test_slipped_solutions_have_only_wrong_steps(seed: int, difficulty: int) -> None:
    rng = random.Random(seed)
    steps = steps_of(worked_solution(make_problem(rng, difficulty).terms, rng, slip=1.0))
    assert len(steps) == DIFFICULTIES[difficulty].terms - 1
    assert all(value(expression) != result >= 0 for expression, result in steps)


def test_a_problem_has_many_solutions() -> None:
    """Four positive terms: 4! orders times 2^3 orders of the operands, of which the first sum has each twice."""
    rng = random.Random(0)
    assert len({worked_solution((7, 8, 5, 9), rng) for _ in range(2000)}) == 96


def test_default_difficulty_takes_20_to_40_tokens() -> None:
    rng = random.Random(0)
    # One token a character, and one that ends the response.
    lengths = [len(make_problem(rng).solution) + 1 for _ in range(5000)]
    assert 20 <= min(lengths) and max(lengths) <= 40


@pytest.mark.parametrize("difficulty", sorted(DIFFICULTIES))
def test_train_and_test_share_no_problem_in_any_order(difficulty: int) -> None:
    splits = [
        {tuple(sorted(re.findall(r"[+-]?\d+", "+" + row["extra_info"]["raw_problem"]))) for row in split}
        for split in (make_rows("train", 1500, 1, difficulty), make_rows("test", 150, 2, difficulty))
    ]
    assert not splits[0] & splits[1]


def test_about_one_problem_in_ten_is_a_test_problem() -> None:
    rng = random.Random(0)
    share = sum(split_of(make_problem(rng, 4).terms) == "test" for _ in range(5000)) / 5000
    assert 0.08 < share < 0.12


def test_rows_follow_the_format_and_the_seed() -> None:
    made = make_rows("test", 20, 3)
    assert made == make_rows("test", 20, 3)
    assert made != make_rows("test", 20, 4)
    assert len({row["extra_info"]["raw_problem"] for row in made}) == 20
    for index, row in enumerate(made):
        problem = row["extra_info"]["raw_problem"]
        assert row == {
            "data_source": "arithmetic",
            "prompt": [{"role": "user", "content": problem}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(value(problem))},
            "extra_info": {"index": index, "raw_problem": problem, "split": "test"},
        }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_rows("valid", 1, 0), "split is 'valid'"),
        (lambda: make_rows("test", 1, 0, difficulty=9), "difficulty is 9"),
        (lambda: make_rows("test", 10_000, 0, difficulty=1), "size is 10000, expected at most about 2"),
    ],
)
def test_impossible_requests_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("solution", "pred"),
    [
        ("", ""),
        ("42", ""),
        ("#", ""),
        ("#41", "41"),
        ("#42#41", "41"),
        ("#42 or 43", "42 or 43"),
        ("#042", "042"),
        ("#+42", "+42"),
        ("#42.0", "42.0"),
        ("#21+21", "21+21"),
        ("#４２", "４２"),
        ("#int('42')", "int('42')"),
        ("#42" + "0" * 100, ""),
        ("#" + "9" * 10_000_000, ""),
        ("#42" + " " * 10_000_000, ""),
    ],
)
def test_wrong_and_hostile_answers(solution: str, pred: str) -> None:
    assert compute_score(solution, "42") == {"score": -1.0, "acc": False, "pred": pred}


@given(st.text())
def test_any_text_is_graded(solution: str) -> None:
    graded = compute_score(solution, "42")
    assert graded["score"] == (1.0 if graded["acc"] else -1.0)
    assert len(graded["pred"]) < 64


@pytest.mark.parametrize("solution", ["#42", "#42\n", "40+2=41;# 42 ", "#7 #42", "x" * 10_000_000 + "#42"])
def test_right_answers(solution: str) -> None:
    assert compute_score(solution, "42") == {"score": 1.0, "acc": True, "pred": "42"}


def make_task(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, PROGRAM, "--out", out, "--train-size", "12", "--test-size", "6", "--steps", "2"]
    return subprocess.run([*command, "--quiet", *options], capture_output=True, text=True)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("laptop") / "task"
    result = make_task(out)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1 and f"made in {out}" in result.stdout
    return out


def test_program_makes_everything_and_leaves_nothing_beside_it(task: Path) -> None:
    assert {path.name for path in task.iterdir()} == {"train.parquet", "test.parquet", "model", "laptop_task.json"}
    assert list(task.parent.iterdir()) == [task]
    assert len(pd.read_parquet(task / "train.parquet")) == 12
    raw = [info["raw_problem"] for info in pd.read_parquet(task / "test.parquet")["extra_info"]]
    assert raw == [row["extra_info"]["raw_problem"] for row in make_rows("test", 6, 0, DEFAULT_DIFFICULTY)]


def test_program_is_cached_deterministic_and_atomic(task: Path, tmp_path: Path) -> None:
    stamp = (task / "laptop_task.json").stat().st_mtime_ns
    assert "already made" in make_task(task).stdout
    assert (task / "laptop_task.json").stat().st_mtime_ns == stamp

    again = tmp_path / "again"
    again.mkdir()
    (again / "laptop_task.json").write_text(json.dumps({"settings": {"seed": 1}, "sampled_accuracy": 0.5}))
    (again / "of_other_settings").touch()
    make_task(again)
    assert not (again / "of_other_settings").exists()
    assert list(tmp_path.iterdir()) == [again]
    for name in ("train.parquet", "test.parquet", "laptop_task.json", "model/model.safetensors"):
        assert (again / name).read_bytes() == (task / name).read_bytes(), name


def test_program_makes_another_task_with_a_larger_model(tmp_path: Path) -> None:
    out = tmp_path / "task"
    assert make_task(out, "--task", "countdown", "--layers", "3", "--hidden-size", "64").returncode == 0
    raw = [info["raw_problem"] for info in pd.read_parquet(out / "test.parquet")["extra_info"]]
    assert raw == [row["extra_info"]["raw_problem"] for row in rows.make_rows(countdown, "test", 6, 0)]
    config = AutoModelForCausalLM.from_pretrained(out / "model").config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (3, 64, 2)


@pytest.mark.parametrize(
    "option, value, expected",
    [
        *(
            ("hidden-size", 32, "a multiple of 64"),
            ("hidden-size", 100, "a multiple of 64"),
            ("test-size", 0, "at least"),
        ),
        *(
            ("train-size", -5, "at least 1"),
            ("layers", 0, "at least 1"),
            ("steps", -1, "at least 0"),
            ("steps", 9, "at"),
        ),
        *(("slip", 7.0, "a probability"), ("slip", -0.5, "a probability")),
    ],
)
def test_program_refuses_sizes_without_a_model_or_test(
    program: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    option: str,
    value: float,
    expected: str,
) -> None:
    sizes = {"train-size": 12, "test-size": 6, "steps": 2, option: value}
    words = [f"--{name}={number}" for name, number in sizes.items()]
    result = program("make_laptop_task.py", "--out", tmp_path / "task", "--quiet", *words)
    assert result.returncode == 2 and f"error: --{option} {value}: expected {expected}" in result.stderr
    assert not (tmp_path / "task").exists()


def test_program_refuses_a_file_for_its_folder(
    program: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "task").write_text("x")
    result = program("make_laptop_task.py", "--out", tmp_path / "task")
    assert result.returncode == 2 and f"error: --out {tmp_path / 'task'}: expected a folder" in result.stderr


def test_program_makes_a_task_again_that_lost_a_file(
    program: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    words = ["--out", tmp_path / "task", "--train-size=12", "--test-size=6", "--steps=2", "--quiet"]
    assert "task made in" in program("make_laptop_task.py", *words).stdout
    for lost in ("train.parquet", "test.parquet", "model/config.json"):
        (tmp_path / "task" / lost).unlink()
        assert "task made in" in program("make_laptop_task.py", *words).stdout
    assert "task already made in" in program("make_laptop_task.py", *words).stdout


def test_program_keeps_a_folder_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    result = make_task(tmp_path)
    assert result.returncode != 0 and "is not empty and has no laptop_task.json" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_tokenizer_takes_any_text_and_has_a_chat_template(task: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(task / "model")
    assert len(tokenizer.encode("\n", add_special_tokens=False)) == 1
    text = "7+8=15;\n  Let $x \\in \\mathbb{R}$, naïve 数学 — √2 🙂\t\\boxed{42}"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    messages = [{"role": "user", "content": "7+8"}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(chat) == "<|user|>7+8<|im_end|><|assistant|>"
    # Three characters and three special tokens.
    assert len(chat) == 6
    assert tokenizer.decode(chat, skip_special_tokens=True) == "7+8"


def test_model_is_one_that_vllm_takes_on_a_cpu(task: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(task / "model")
    model = AutoModelForCausalLM.from_pretrained(task / "model")
    config = model.config
    assert config.architectures == ["Qwen2ForCausalLM"] and config.tie_word_embeddings
    assert config.hidden_size // config.num_attention_heads in (32, 64, 128)
    assert config.max_position_embeddings >= 1024
    assert str(model.dtype) == "torch.float32"
    assert (
        model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    )
