# SPDX-License-Identifier: Apache-2.0
"""A run's files, model and reward function: what is missing or wrong is named before Ray starts."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from configurations import ACTOR, ROW, resolved
from verl.steer.requirements import check_and_complete, rewards
from verl.steer.requirements import run as run_checks
from verl.steer.requirements.files import check_data
from verl.steer.requirements.model import check_critic_model, check_model
from verl.steer.requirements.rewards import check_data_sources


def check_data_and_model(config):
    """In `main`'s order."""
    for key in ("train_files", "val_files"):
        check_data(config, key)
    check_model(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train_files=/no/train.parquet"], "data.train_files: no file /no/train.parquet: expected one of da"),
        (["data.val_files=[/no/a.parquet,/no/b.parquet]"], "data.val_files: no file /no/a.parquet, /no/b.parquet: exp"),
        (["data.train_batch_size=41"], "data.train_batch_size=41: expected at most 40, the rows of data.train_files"),
        (["data.train_max_samples=8"], "data.train_batch_size=16: expected at most 8, the rows of data.train_files"),
        (["data.gen_batch_size=5"], "data.gen_batch_size=5: expected a divisor of data.train_batch_size=16"),
        (["data.gen_batch_size=64"], "data.gen_batch_size=64: expected at most 40, the rows of data.train_files"),
        (
            ["data.train_batch_size=41", "data.gen_batch_size=1"],
            "data.train_batch_size=41: expected at most 40, the r",
        ),
        (["data.val_files=null"], "data.val_files=None: expected a file at least"),
        (
            ["data.train_files={tmp}/model"],
            "data.train_files: {tmp}/model: expected a file whose name ends with .parquet",
        ),
        (
            ["actor_rollout_ref.model.path=null"],
            "actor_rollout_ref.model.path=null: expected the folder of a model, or",
        ),
        (["data.train_files=[]"], "data.train_files=[]: expected a file at least"),
        (["actor_rollout_ref.model.path=/no/model"], "actor_rollout_ref.model.path=/no/model: expected the folder of"),
        (["actor_rollout_ref.model.path=runs/x/hf"], "actor_rollout_ref.model.path=runs/x/hf: expected the folder of"),
    ],
)
def test_missing_files_are_named(laptop_files, overrides, message):
    overrides = [override.replace("{tmp}", str(laptop_files)) for override in overrides]
    with pytest.raises(ValueError, match="^" + re.escape(message.replace("{tmp}", str(laptop_files)))):
        check_data_and_model(resolved("grpo", "hardware=cpu", "task=arithmetic", *overrides))


LENGTHS = "data.max_prompt_length + data.max_response_length"
NO_LIMIT = "actor_rollout_ref.rollout.max_model_len=null"
POSITIONS = "actor_rollout_ref.model.override_config.max_position_embeddings"


@pytest.mark.parametrize(
    ("model", "overrides", "message"),
    [
        ('{"max_position_embeddings": 80}', [NO_LIMIT], None),
        ('{"max_position_embeddings": 79}', [NO_LIMIT], f"{LENGTHS}=80: expected at most 79, the model's max_position"),
        ('{"text_config": {"max_position_embeddings": 79}}', [NO_LIMIT], f"{LENGTHS}=80: expected at most 79, the"),
        ('{"max_position_embeddings": 95}', [], "rollout.max_model_len=96: expected at most 95, the model's max_pos"),
        ('{"max_position_embeddings": 79}', [NO_LIMIT, f"+{POSITIONS}=80"], None),
        ('{"max_position_embeddings": 80}', [NO_LIMIT, f"+{POSITIONS}=79"], f"{LENGTHS}=80: expected at most 79, "),
        ("{}", [NO_LIMIT], None),
        ("", [], "{folder}/model/config.json: expected JSON, the configuration of a model: "),
    ],
)
def test_a_response_fits_the_models_positions(laptop_files, model, overrides, message):
    (laptop_files / "model/config.json").write_text(model)
    config = resolved("grpo", "hardware=cpu", "task=arithmetic", *overrides)
    if message is None:
        check_data_and_model(config)
        return
    with pytest.raises(ValueError, match="^" + re.escape(message.replace("{folder}", str(laptop_files)))):
        check_data_and_model(config)


def test_fused_kernels_need_a_last_layer_that_fsdp2_does_not_shard(laptop_files):
    fused = ["actor_rollout_ref.model.use_fused_kernels=true"]
    for tied, strategy, passes in ((True, "fsdp2", True), (False, "fsdp", True), (False, "fsdp2", False)):
        (laptop_files / "model/config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
        config = resolved("grpo", "hardware=cpu", "task=arithmetic", *fused, f"{ACTOR}.strategy={strategy}")
        if passes:
            check_model(config)
            continue
        with pytest.raises(ValueError, match="^model.use_fused_kernels=true: expected false, or actor.strategy=fsdp, "):
            check_model(config)


@pytest.mark.parametrize("key", ["train_files", "val_files"])
@pytest.mark.parametrize("content", [None, b"", b"version https://git-lfs.github.com/spec/v1", b"PAR1" + bytes(20)])
def test_a_broken_file_is_named(laptop_files, tmp_path, content, key):
    file = tmp_path / "broken.parquet"
    file.mkdir() if content is None else file.write_bytes(content)
    config = resolved("grpo", "hardware=cpu", "task=arithmetic", f"data.{key}={tmp_path}/broken.parquet")
    message = f"data.{key}: {tmp_path}/broken.parquet: expected a whole parquet file: "
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        check_data_and_model(config)


@pytest.mark.parametrize("key", ["train_files", "val_files"])
@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("prompt", None, "no column prompt: add it as the README describes"),
        ("reward_model", None, "no column reward_model: add it as the README describes"),
        ("prompt", "1+1=", "column prompt of type string: expected a list of chat messages"),
        ("prompt", ["1+1="], "column prompt of type list<element: string>: expected a list of chat messages"),
        (
            "prompt",
            [{"role": "user"}],
            "column prompt of type list<element: struct<role: string>>: expected a list of c",
        ),
        ("extra_info", "x", "column extra_info of type string: expected a struct or nothing"),
        ("reward_model", "2", "column reward_model of type string: expected a struct with ground_truth"),
        ("reward_model", {"answer": "2"}, "column reward_model of type struct<answer: string>: expected a struct with"),
    ],
)
def test_columns_that_verl_cannot_read_are_named(laptop_files, key, column, value, message):
    file = laptop_files / "mine.parquet"
    row = {name: one for name, one in (ROW | {column: value}).items() if one is not None}
    pq.write_table(pa.table({name: [one] * 40 for name, one in row.items()}), file)
    named = f"data.{key}={file}"
    with pytest.raises(ValueError, match="^" + re.escape(f"data.{key}: {file}: {message}")):
        check_data_and_model(resolved("grpo", "hardware=cpu", "task=arithmetic", named))
    own = "data.custom_cls.path=mine.py"
    check_data_and_model(resolved("grpo", "hardware=cpu", "task=arithmetic", named, own))


REWARD = "reward.custom_reward_function"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def compute_score(data_source, solution_str, ground_truth, extra_info): ...", None),
        ("def compute_score(data_source, solution_str, ground_truth, extra_info=None, *, mine=1): ...", None),
        ("async def compute_score(solution_str, **others): ...", None),
        ("@decorated\ndef compute_score(): ...", None),
        ("def score(): ...\nclass A:\n    def compute_score(self): ...\ncompute_score = score", None),
        (
            "def compute_score(solution_str, ground_truth): ...",
            f"{REWARD}.name=compute_score: expected the parameters data_source, solution_str, ground_truth and extra_i",
        ),
        (
            "def compute_score(data_source, solution_str, ground_truth, extra_info, weight): ...",
            f"{REWARD}.name=compute_score: expected the parameters data_source, solution_str, ground_truth and extra_i",
        ),
        (
            "def compute_score(data_source, /, solution_str, ground_truth, extra_info): ...",
            f"{REWARD}.name=compute_score: expected the parameters data_source, solution_str, ground_truth and extra_i",
        ),
        (
            "def compute_score(*, mine, **others): ...",
            f"{REWARD}.name=compute_score: expected the parameters data_source, solution_str, ground_truth and extra_i",
        ),
        ("compute_score = print", None),
        ("from math import sqrt as compute_score", None),
        ("try:\n    from math import no as compute_score\nexcept ImportError:\n    compute_score = None", None),
        ("raise SystemExit\nclass compute_score: ...", None),  # it is not run
        ("from math import *", None),
        ("def __getattr__(name): ...", None),
        ("def score(): compute_score()", f"{REWARD}.name=compute_score: expected a function of {{file}}"),
        ("def compute_score(:", f"{REWARD}.path={{file}}: expected Python: invalid syntax ("),
    ],
)
def test_the_file_of_a_reward_function_defines_it(tmp_path, source, message):
    file = tmp_path / "mine.py"
    file.write_text(source)
    config = resolved("grpo", "hardware=cpu", "task=arithmetic", f"{REWARD}.path={file}")
    if message is None:
        check_and_complete(config)
        return
    with pytest.raises(ValueError, match="^" + re.escape(message.replace("{file}", str(file)))):
        check_and_complete(config)


@pytest.mark.parametrize(
    ("source", "path", "message"),
    [
        ("mine", "pkg://verl.steer.grading.score", "Reward function is not implemented for data_source='mine'"),
        ("mine", "null", "Reward function is not implemented for data_source='mine'"),
        ("arithmetic", "null", "Reward function is not implemented for data_source='arithmetic'"),
        ("arithmetic", "pkg://verl.steer.grading.score", None),
        ("math500", "pkg://verl.steer.grading.score", None),
        ("math_dapo", "pkg://verl.steer.grading.score", None),
        ("lighteval/MATH", "pkg://verl.steer.grading.score", None),
        ("openai/gsm8k", "null", None),
        ("searchR1_nq", "null", None),  # its grader fails on an answer that is no mapping
        ("apps", "null", None),
        ("humaneval", "null", "Reward function is not implemented for data_source='humaneval'"),
        ("humaneval", "pkg://verl.steer.grading.score", None),
        ("mine", "/of/the/user.py", None),
    ],
)
def test_a_source_without_a_grader_is_named(laptop_files, capfd, source, path, message):
    file = laptop_files / "mine.parquet"
    pq.write_table(pa.table({name: [one] for name, one in (ROW | {"data_source": source}).items()}), file)
    named = [f"data.train_files={file}", f"data.val_files={file}", f"{REWARD}.path={path}"]
    config = resolved("grpo", "hardware=cpu", "task=arithmetic", *named)
    if message is None:
        check_data_sources(config)
        assert "Traceback" not in capfd.readouterr().err
        return
    with pytest.raises(ValueError, match=f"^data_source={source} in the data: {re.escape(message)}: expected a source"):
        check_and_complete(config)


@pytest.mark.parametrize(
    "override",
    [
        "data.custom_cls.path=mine.py",
        "reward.reward_manager.source=importlib",
        f"{REWARD}.path=null reward.reward_model.enable=true",
    ],
)
def test_a_source_needs_no_grader_where_another_gives_the_rewards(laptop_files, override):
    file = laptop_files / "mine.parquet"
    pq.write_table(pa.table({name: [one] for name, one in (ROW | {"data_source": "mine"}).items()}), file)
    check_data_sources(
        resolved("grpo", "hardware=cpu", f"data.train_files={file}", f"data.val_files={file}", *override.split())
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "data_source=None in the data: expected the name of a source, a text"),
        (7, "data_source=7 in the data: expected the name of a source, a text"),
        (["math500"], "column data_source of type list<element: string>: expected texts"),
    ],
)
def test_a_source_is_a_text(laptop_files, value, message):
    file = laptop_files / "mine.parquet"
    pq.write_table(pa.table({name: [one] for name, one in (ROW | {"data_source": value}).items()}), file)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_and_complete(resolved("grpo", "hardware=cpu", f"data.train_files={file}", f"data.val_files={file}"))


def test_a_reward_function_may_be_compiled_and_a_package_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "compiled_rewards").mkdir()
    (tmp_path / "compiled_rewards/mine.so").write_bytes(b"\0")
    (tmp_path / "compiled_rewards/__init__.py").write_text("")
    config = resolved("grpo", "hardware=cpu", "task=arithmetic", f"{REWARD}.path={tmp_path}/compiled_rewards/mine.so")
    check_and_complete(config)
    (tmp_path / "failing_rewards").mkdir()
    (tmp_path / "failing_rewards/__init__.py").write_text("raise RuntimeError('no licence')")
    config = resolved("grpo", "hardware=cpu", "task=arithmetic", f"{REWARD}.path=pkg://failing_rewards.mine")
    with pytest.raises(ValueError, match=f"^{REWARD}.path=pkg://failing_rewards.mine: RuntimeError: no licence"):
        check_and_complete(config)


def test_a_grader_that_fails_on_an_empty_answer_is_a_grader(laptop_files, monkeypatch):
    def fails(*arguments):
        raise ValueError("empty")

    monkeypatch.setattr(rewards, "default_compute_score", fails)
    file = laptop_files / "mine.parquet"
    pq.write_table(pa.table({name: [one] for name, one in (ROW | {"data_source": "geo"}).items()}), file)
    check_data_sources(resolved("grpo", "hardware=cpu", "task=arithmetic", f"data.val_files={file}"))


def test_a_grader_that_lacks_its_package_is_named(laptop_files, monkeypatch):
    def lacks_package(*arguments):
        raise ModuleNotFoundError("No module named 'grader'")

    monkeypatch.setattr(rewards, "default_compute_score", lacks_package)
    file = laptop_files / "mine.parquet"
    pq.write_table(pa.table({name: [one] for name, one in (ROW | {"data_source": "geo"}).items()}), file)
    config = resolved("grpo", "hardware=cpu", "task=arithmetic", f"data.val_files={file}")
    with pytest.raises(ValueError, match="^data_source=geo in the data: No module named 'grader': expected a source"):
        check_data_sources(config)


def test_a_folder_whose_path_looks_like_a_name_on_the_hub_is_a_folder(laptop_files, monkeypatch):
    monkeypatch.chdir(laptop_files.parent)
    path = f"{laptop_files.name}/model"
    config = resolved("grpo", "hardware=cpu", "task=arithmetic", f"actor_rollout_ref.model.path={path}")
    check_data_and_model(config)
    (laptop_files / "model/config.json").unlink()
    with pytest.raises(ValueError, match=f"^actor_rollout_ref.model.path={path}: expected the folder of a model"):
        check_data_and_model(config)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data.train_files=${oc.env:TASK_DIR}/tr*.parquet"],
        ["data.train_files=hdfs://cluster/train.parquet"],
        ["actor_rollout_ref.model.path=hdfs://cluster/models/qwen"],
        ["data.train_batch_size=40", "data.gen_batch_size=1"],
        ["data.gen_batch_size=5", "trainer.v1.trainer_mode=separate_async"],
        ["data.gen_batch_size=48", "algorithm.filter_groups.enable=true"],
        ["data.train_batch_size=41", "trainer.val_only=true"],
    ],
)
def test_files_that_verl_finds_are_accepted(laptop_files, overrides):
    check_data_and_model(resolved("grpo", "hardware=cpu", "task=arithmetic", *overrides))


def test_a_missing_file_ends_a_launcher_in_one_line(command, root, tmp_path):
    folders = {"TASK_DIR": str(tmp_path), "OUTPUT_DIR": str(tmp_path / "outputs")}
    result = command("bash", root / "run/run_grpo.sh", "hardware=cpu", "task=arithmetic", **folders)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith(f"steer-verl: data.train_files: no file {tmp_path}/")


def test_the_model_of_a_critic_is_there(laptop_files):
    def check(*overrides):
        check_critic_model(resolved("grpo", "algorithm.adv_estimator=gae", *overrides))

    for path in ("~/models/critic", "/no/critic"):
        with pytest.raises(ValueError, match=f"^critic.model.path={path}: expected the folder of a model, with its"):
            check(f"critic.model.path='{path}'")
    check(f"critic.model.path={laptop_files}/model")
    check("critic.model.path=hdfs://node/critic")
    check("critic.model.path=/no/critic", "algorithm.adv_estimator=grpo")
    check("critic.model.path=/no/critic", "trainer.val_only=true")


def test_the_model_of_a_critic_is_looked_for_before_verls_own_check(monkeypatch):
    for check in ("check_added_keys", "check_kinds", "check_and_complete", "check_loggers"):
        monkeypatch.setattr(run_checks, check, lambda *arguments: None)
    with pytest.raises(ValueError, match="^critic.model.path=~/models/deepseek-llm-7b-chat: expected the folder of"):
        run_checks.check_run(resolved("grpo", "algorithm.adv_estimator=gae"))
