# SPDX-License-Identifier: Apache-2.0
"""What the check of a run's model finds before Ray starts."""

import json
import re

import pytest
from configurations import resolved
from verl.steer.requirements import model as module
from verl.steer.requirements.model import check_model

HUB = "actor_rollout_ref.model.path=Qwen/Qwen2.5-0.5B"
ACTOR, ROLLOUT, MODEL = (f"actor_rollout_ref.{name}" for name in ("actor", "rollout", "model"))
TENSOR, SEQUENCE = "rollout.tensor_model_parallel_size", "actor.ulysses_sequence_parallel_size"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model's folder, in place of the task's."""
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("TASK_DIR", str(tmp_path))
    return tmp_path / "model"


def check(*overrides):
    check_model(resolved("grpo", "hardware=cpu", "task=arithmetic", *overrides))


@pytest.mark.parametrize(
    "heads, groups, size, fits",
    [(28, 4, 4, True), (28, 4, 2, True), (14, 2, 4, False), (28, 4, 8, False), (28, 4, 7, False), (16, 4, 8, True)],
)
@pytest.mark.parametrize("key", [TENSOR, SEQUENCE])
@pytest.mark.parametrize("nested", [False, True])
def test_each_rank_has_as_many_heads(folder, heads, groups, size, fits, key, nested):
    """7 divides 28 heads, but neither divides 4 groups nor is a multiple of them."""
    found = {"num_attention_heads": heads, "num_key_value_heads": groups}
    (folder / "config.json").write_text(json.dumps({"text_config": found} if nested else found))
    if fits:
        check(f"actor_rollout_ref.{key}={size}")
        return
    message = f"{key}={size}: expected a divisor of the model's {heads} attention heads that divides its {groups} heads"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        check(f"actor_rollout_ref.{key}={size}")


def test_heads_without_groups_are_their_own(folder):
    (folder / "config.json").write_text('{"num_attention_heads": 12}')
    check(f"{ROLLOUT}.tensor_model_parallel_size=6")
    with pytest.raises(ValueError, match="expected a divisor of the model's 12 attention heads"):
        check(f"{ROLLOUT}.tensor_model_parallel_size=8")
    check(f"{ACTOR}.ulysses_sequence_parallel_size=8", "trainer.val_only=true")


def test_a_name_on_the_hub_is_read_from_there(tmp_path, monkeypatch):
    """Its configuration alone is fetched, or found in the cache."""
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 95}')
    asked = []

    def download(*words):
        asked.append(words)
        return str(tmp_path / "config.json")

    monkeypatch.setattr(module, "hf_hub_download", download)
    with pytest.raises(ValueError, match="^rollout.max_model_len=96: expected at most 95, the model's max_position"):
        check(HUB)
    assert asked == [("Qwen/Qwen2.5-0.5B", "config.json")]
    monkeypatch.setenv("VERL_USE_MODELSCOPE", "True")
    check(HUB)
    assert len(asked) == 1


def test_a_name_that_the_hub_does_not_have_is_named(monkeypatch):
    def download(*words):
        raise FileNotFoundError("404 Client Error.\nRepository Not Found")

    monkeypatch.setattr(module, "hf_hub_download", download)
    message = "^actor_rollout_ref.model.path=Qwen/Qwen2.5-0.5B: expected a folder, or a name on .*: 404 Client Error.$"
    with pytest.raises(ValueError, match=message):
        check(HUB)


@pytest.mark.parametrize(
    "files, overrides",
    [
        ({"tokenizer_config.json": '{"chat_template": "{{ messages }}"}'}, []),
        ({"tokenizer_config.json": "{}", "chat_template.jinja": "{{ messages }}"}, []),
        ({"tokenizer_config.json": "{}", "additional_chat_templates/tools.jinja": "{{ messages }}"}, []),
        ({"tokenizer_config.json": "{}"}, [f"{MODEL}.custom_chat_template='a template {{{{ messages }}}}'"]),
        ({"tokenizer_config.json": "{}"}, [f"{MODEL}.trust_remote_code=true"]),
        ({"tokenizer_config.json": "{}"}, ["data.custom_cls.path=mine.py"]),
        ({"tokenizer_config.json": "{}"}, [f"{MODEL}.tokenizer_path=Qwen/Qwen2.5-0.5B"]),
        ({}, []),
    ],
)
def test_a_chat_template_may_be_in_many_places(folder, files, overrides):
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "config.json").write_text("{}")
    check(*overrides)


def test_a_model_without_a_chat_template_is_named(folder):
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"chat_template": null}')
    with pytest.raises(ValueError, match=f"^{folder}: no chat template, in chat_template.jinja or tokenizer_config"):
        check()
