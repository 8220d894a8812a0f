# SPDX-License-Identifier: Apache-2.0
"""The learned reward: a reward model's logit, and the model that the script makes."""

import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from configurations import resolved
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from verl.steer.grading import learned
from verl.steer.requirements import check_and_complete

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import make_reward_model
from make_reward_model import margins, pair_accuracy, preference_pairs, quality

ROW = ("countdown", "3*8=24;24-7=17;17+2=19", "3,7,8,2=19", {"raw_problem": "3,7,8,2=19"})


@pytest.fixture(scope="module")
def task(tmp_path_factory, root, command):
    folder = tmp_path_factory.mktemp("learned") / "task"
    sizes = ["--train-size", "64", "--test-size", "32", "--steps", "300", "--quiet"]
    command(sys.executable, root / "scripts/make_laptop_task.py", "--task", "countdown", "--out", folder, *sizes)
    return folder


@pytest.fixture(scope="module")
def reward_model(task, root, command):
    sizes = ["--problems", "64", "--samples", "6", "--steps", "20", "--quiet"]
    result = command(sys.executable, root / "scripts/make_reward_model.py", "--task-dir", task, *sizes)
    assert "test pairs" in result.stdout, result.stderr
    return task / "reward_model"


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("3*8=24;24-7=17;17+2=19", 1.0),
        (" 3*8=24;24-7=17;17+2=19\n", 1.0),  # white space, which the rule ignores too
        ("3*8=24;24-7=17;17-2=15", 1 / 5),  # right steps to 15, 4 away from 19
        ("3+8=11;11-7=4;4*2=8", 1 / 12),
        ("3*8=25;25-7=18;18+1=19", 0.0),  # a wrong product
        ("3*8=24;24-7=17", 0.0),  # the 2 is left
        ("19", 0.0),
        ("3*8=24;24-7=17;17+2=²", 0.0),
        ("", 0.0),
    ],
)
def test_quality_of_an_answer(answer, expected):
    assert quality("3,7,8,2=19", answer) == pytest.approx(expected)


def test_pairs_have_the_better_answer_first_and_leave_out_equal_ones():
    right, near, wrong, other_wrong = "3+2=5", "3*2=6", "3+2=6", "x"
    assert preference_pairs("1,1=2", ["1+1=2", "1+1=2"]) == []
    assert sorted(preference_pairs("3,2=5", [wrong, near, right, near, other_wrong])) == sorted(
        ("3,2=5", better, worse)
        for better, worse in [(near, wrong), (right, wrong), (right, near), (near, other_wrong), (right, other_wrong)]
    )


def test_the_score_is_the_logit_of_the_dialogue_and_accuracy_the_rules(reward_model):
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    text = "<|user|>3,7,8,2=19<|im_end|><|assistant|>{}<|im_end|>"
    for answer, right in ((ROW[1], True), ("3*8=24", False)):
        with torch.no_grad():
            expected = model(torch.tensor([tokenizer.encode(text.format(answer))])).logits.item()
        grade = learned.compute_score(ROW[0], answer, *ROW[2:], model_path=str(reward_model))
        assert grade["score"] == pytest.approx(expected, rel=1e-5)
        assert grade["acc"] is right and set(grade) == {"score", "acc", "pred", "timed_out"}


def test_margins_do_not_depend_on_padding(reward_model):
    tokenizer, model = learned.load(str(reward_model))
    pairs = [("1,1=2", "1+1=2", "1"), ("3,7,8,2=19", ROW[1], "3*8=24;24-7=17;17-2=15")]
    together = margins(model, tokenizer, pairs)
    alone = torch.cat([margins(model, tokenizer, [pair]) for pair in pairs])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_training_learns_the_preferences_it_is_given(task):
    tokenizer = AutoTokenizer.from_pretrained(task / "model")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(task / "model", num_labels=1, dtype=torch.float32)
    pairs = [("1,1=2", "1+1=2", "1-1=0"), ("2,2=4", "2+2=4", "2-2=0"), ("3,1=4", "3+1=4", "3-1=2")]
    options = type("Options", (), {"seed": 0, "steps": 30, "quiet": True})
    make_reward_model.train(model, tokenizer, pairs, options)
    assert pair_accuracy(model.eval(), tokenizer, pairs) == 1.0
    reversed_pairs = [(prompt, worse, better) for prompt, better, worse in pairs]
    assert pair_accuracy(model, tokenizer, reversed_pairs) == 0.0


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--samples", "1"], "--samples 1: expected at least 2"),
        (["--problems", "0"], "--problems 0: expected at least 1"),
        (["--steps", "-1"], "--steps -1: expected at least 0"),
        (
            ["--task-dir", "nowhere"],
            "nowhere/train.parquet: no such file; expected a task that make_laptop_task.py made",
        ),
    ],
)
def test_the_script_names_what_it_cannot_use(words, expected, program):
    result = program("make_reward_model.py", "--task-dir", "nowhere", *words)
    assert result.returncode != 0 and expected in result.stderr


def test_answers_that_are_all_alike_are_named(monkeypatch):
    monkeypatch.setattr(make_reward_model, "sample", lambda *_: ["x", "y"])
    with pytest.raises(SystemExit, match="2 answers, none better than another"):
        make_reward_model.sampled_pairs(None, None, ["1,1=2"], 2)


def test_rows_of_another_task_are_named(tmp_path):
    file = tmp_path / "train.parquet"
    pd.DataFrame({"data_source": ["countdown", "arithmetic"], "extra_info": [{"raw_problem": "1,1=2"}] * 2}).to_parquet(
        file
    )
    with pytest.raises(SystemExit, match=r"data_source is \['arithmetic', 'countdown'\], expected 'countdown'"):
        make_reward_model.prompts_of(file, 9)


def test_a_classifier_with_several_labels_is_refused(reward_model, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(reward_model, num_labels=2, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(reward_model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="2 labels: expected a reward model with one"):
        learned.load(str(tmp_path))


def test_the_task_trains_with_the_model_in_its_folder(reward_model, monkeypatch):
    monkeypatch.setenv("TASK_DIR", str(reward_model.parent))
    config = resolved("grpo", "task=countdown_learned", "hardware=cpu")
    check_and_complete(config)
    assert config.reward.custom_reward_function.reward_kwargs.model_path == str(reward_model)
