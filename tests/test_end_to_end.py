# SPDX-License-Identifier: Apache-2.0
"""Real runs of a few steps: Ray, vLLM and FSDP2 on the CPU. What came out is checked, not how long it took."""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import verl_steer

pytestmark = pytest.mark.e2e

# Four prompts of eight rollouts a step, in two updates; micro-batches that divide one rank's share of either.
SMALL = (
    "data.train_batch_size=4",
    "data.val_max_samples=16",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16",
)

# Validation without chance, and what was generated there.
GREEDY = (
    "actor_rollout_ref.rollout.val_kwargs.temperature=0",
    "trainer.validation_data_dir=${trainer.default_local_dir}/validation",
)


@pytest.fixture(scope="module")
def task(tmp_path_factory, command, root):
    """The laptop task; its model solves a quarter of the problems, so that a step without advantages is rare."""
    folder = tmp_path_factory.mktemp("task") / "laptop"
    program = root / "scripts/make_laptop_task.py"
    result = command(sys.executable, program, "--out", folder, "--quiet", "--train-size", 64)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory, command, root, task):
    """The README's first command, with one more method, for two steps with a checkpoint each."""
    out = tmp_path_factory.mktemp("quickstart")
    overrides = (
        *SMALL, *GREEDY, "trainer.total_training_steps=2", "trainer.test_freq=1", "trainer.save_freq=1",
        "actor_rollout_ref.rollout.full_determinism=true",
        "ray_kwargs.ray_init.num_cpus=6",  # no more than are counted before a run: one fewer is refused
    )  # fmt: skip
    venv = str(Path(sys.executable).parents[1])
    environment = {"OUTPUT_DIR": str(out), "TASK_DIR": str(task), "STEER_VENV": venv, "COLUMNS": "160"}
    environment["METHODS"] = "grpo steer_exp influence_target"
    result = command("bash", root / "run/quickstart.sh", *overrides, cwd="/", **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return out, result.stdout, lambda: command("bash", root / "run/quickstart.sh", *overrides, **environment)


def test_preflight_of_the_laptop_task(tmp_path, command, root, task):
    """The README's command, from another folder; it leaves nothing where the run's checkpoints go.

    The folder's name has characters of Hydra's grammar.
    """
    out = tmp_path / "lr=1, [a]"
    environment = {"OUTPUT_DIR": str(out), "TASK_DIR": str(task), "PREFLIGHT_SECONDS": "1100", "COLUMNS": "200"}
    result = command("bash", root / "run/preflight.sh", "--cpu", "trainer.save_freq=10", cwd="/", **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("\nready\n")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    names = "configuration GPUs attention memory training_data validation_data disk vLLM collectives kernels log-probs"
    assert [name.replace(" ", "_") for name, *_ in rows] == [*names.split(), "checkpoint"]
    details = {name: detail for name, result, detail in rows if result == "ok"}
    assert details["attention"].startswith("packed_sdpa") and details["collectives"] == "gloo, ranks: 1"
    assert details["disk"].startswith("4 checkpoints") and "on 16 tokens" in details["log-probs"]
    assert not list((out / "grpo").iterdir())


def metrics(run: Path) -> dict[int, dict[str, float]]:
    """Step -> metrics, from all files of a run."""
    records = [json.loads(line) for file in run.glob("metrics*.jsonl") for line in file.read_text().splitlines()]
    return {record["step"]: record["data"] for record in records}


def test_quickstart_shows_steps_table_and_picture(quickstart):
    out, printed, again = quickstart
    for method in ("grpo", "steer_exp", "influence_target"):
        assert f"{method:<12} step   2/2" in printed
        assert len(printed.splitlines()) < 60 < len((out / method / "train.log").read_text().splitlines())
    assert "mean token weight" in printed and str(out) in printed
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    repeated = again()
    assert repeated.returncode == 0 and "steer_exp is trained already" in repeated.stdout


def test_steer_weights_and_entropy_are_logged(quickstart):
    out, *_ = quickstart
    steer, grpo = metrics(out / "steer_exp"), metrics(out / "grpo")
    assert set(steer) == set(grpo) == {0, 1, 2}
    for step in (1, 2):
        data = steer[step]
        assert 0.8 - 1e-6 <= data["actor/token_weights_min"] <= data["actor/token_weights_mean"] <= 1.0
        # With advantages the token with a micro-batch's greatest estimate has the least weight.
        learns = data["critic/advantages/max"] > 0
        assert data["actor/token_weights_min"] == pytest.approx(0.8 if learns else 1.0)
        assert (data["actor/grad_norm"] > 0) == learns
        assert data["actor/token_weights_max"] <= 1.0 and data["actor/entropy_change_max"] >= 0
        assert 0 < data["actor/entropy"] < math.log(300)
        # vLLM samples from the very weights that FSDP trains
        assert data["training/rollout_probs_diff_max"] < 1e-4
        assert "actor/token_weights_mean" not in grpo[step]
    # the same start and the same data: the first rollouts are scored alike
    assert steer[1]["actor/entropy"] == pytest.approx(grpo[1]["actor/entropy"], rel=0.2)


def test_checkpoint_loads(quickstart, task):
    out, *_ = quickstart
    saved = out / "steer_exp/global_step_2/actor/huggingface"
    model = AutoModelForCausalLM.from_pretrained(saved)
    start = AutoModelForCausalLM.from_pretrained(task / "model")
    changed = [not a.equal(b) for a, b in zip(model.parameters(), start.parameters(), strict=True)]
    assert any(changed) and AutoTokenizer.from_pretrained(saved).encode("1+2")


def test_a_controlled_run_logs_what_it_asked_for_and_what_it_predicts(quickstart):
    out, *_ = quickstart
    for data in (metrics(out / "influence_target")[step] for step in (1, 2)):
        assert 0 <= data["actor/token_weights_min"] <= data["actor/token_weights_max"] <= 2
        assert data["actor/target_entropy"] == data["actor/entropy_control/target"] == 0.2
        assert data["actor/entropy_control/entropy"] == pytest.approx(data["actor/entropy"], rel=0.3)
        wanted, predicted = (data[f"actor/entropy_control/{name}_change"] for name in ("wanted", "predicted"))
        assert wanted == pytest.approx(0.5 * (0.2 - data["actor/entropy_control/entropy"]))  # target_gain, target
        assert math.isfinite(predicted) and data["actor/entropy_control/shortfall"] >= 0


@pytest.mark.parametrize("method", ["steer_exp", "influence_target"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit_and_so_is_an_audited_one(
    quickstart, command, root, task, tmp_path, method
):
    """The run as if it had been killed after its first step goes on with an audit, which changes no weight."""
    out, *_ = quickstart
    run = tmp_path / method
    shutil.copytree(out / method, run, ignore=shutil.ignore_patterns("global_step_2", "metrics*", "validation"))
    (run / "latest_checkpointed_iteration.txt").write_text("1")
    ledger = json.loads((run / "checkpoint_ledger.json").read_text())
    assert ledger["saved_steps"] == [1, 2]
    (run / "checkpoint_ledger.json").write_text(json.dumps(ledger | {"saved_steps": [1]}))
    result = command(
        "bash", root / "run/launch.sh", method, "task=arithmetic", "hardware=cpu", *SMALL, "+seed=42",
        "actor_rollout_ref.rollout.full_determinism=true", "trainer.entropy_audit.freq=1",
        "trainer.entropy_audit.influence=true", "trainer.total_training_steps=2", "trainer.save_freq=1",
        "trainer.val_before_train=false", "trainer.test_freq=-1",
        OUTPUT_DIR=str(tmp_path), TASK_DIR=str(task), VERL_LOGGING_LEVEL="INFO",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    resumed = metrics(run)
    assert 2 in resumed and "entropy_audit/tokens" in resumed[2]
    assert "entropy_audit/tokens" not in metrics(out / method)[2]
    updates = pd.read_parquet(run / "audit/step_2_updates.parquet")
    assert updates["influence"].notna().all() and len(updates) == 2
    first, ours, theirs = (
        AutoModelForCausalLM.from_pretrained(folder / "actor/huggingface").state_dict()
        for folder in (run / "global_step_1", run / "global_step_2", out / f"{method}/global_step_2")
    )
    assert all(theirs[name].equal(weight) for name, weight in ours.items())
    assert not any(first[name].equal(weight) for name, weight in ours.items() if weight.dim() == 2)


def test_batched_rollouts_are_those_of_verls_agent_loops(quickstart, command, root, task, tmp_path):
    """The same run with one agent loop, reward call and TransferQueue write for each rollout."""
    out, *_ = quickstart
    result = command(
        "bash", root / "run/run_grpo.sh", "task=arithmetic", "hardware=cpu", *SMALL, *GREEDY, "trainer.test_freq=1",
        "trainer.save_freq=1", "trainer.total_training_steps=1", "data.seed=42",
        "actor_rollout_ref.rollout.agent.agent_loop_manager_class=null", OUTPUT_DIR=str(tmp_path), TASK_DIR=str(task),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    ours, theirs = out / "grpo", tmp_path / "grpo"

    def responses(run: Path) -> list[tuple[object, ...]]:
        rows = [json.loads(line) for line in (run / "validation/0.jsonl").read_text().splitlines()]
        return sorted((row["input"], row["output"], row["gts"], row["score"], row["acc"]) for row in rows)

    assert len(responses(ours)) == 16 and responses(ours) == responses(theirs)
    our_metrics, their_metrics = metrics(ours), metrics(theirs)
    for step in (0, 1):
        assert set(our_metrics[step]) == set(their_metrics[step])
    for key in ("actor/entropy", "response_length/mean", "prompt_length/mean"):
        assert our_metrics[1][key] == pytest.approx(their_metrics[1][key], rel=0.2)
    files = [{file.relative_to(run) for file in run.glob("global_step_1/**/*")} for run in (ours, theirs)]
    assert files[0] == files[1]


def test_one_update_a_step_needs_no_pass_for_old_log_probs(command, root, task, tmp_path):
    """Its ratios are 1, and the entropy is logged all the same."""
    result = command(
        "bash", root / "run/run_exp.sh", "task=arithmetic", "hardware=cpu", *SMALL, "trainer.total_training_steps=2",
        "trainer.skip_old_log_prob=true", "actor_rollout_ref.actor.ppo_mini_batch_size=4", "trainer.save_freq=-1",
        "actor_rollout_ref.rollout.calculate_log_probs=false", "trainer.val_before_train=false", "trainer.test_freq=-1",
        "trainer.logger=[console,file]", OUTPUT_DIR=str(tmp_path), TASK_DIR=str(task),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    steps = metrics(tmp_path / "steer_exp")
    for step in steps.values():
        assert step["actor/ppo_kl"] == step["actor/pg_clipfrac"] == 0
        assert 0.8 <= step["actor/token_weights_min"] <= step["actor/token_weights_max"] <= 1
        assert step["actor/entropy"] == step["actor/entropy_loss"] > 0
        assert "training/rollout_probs_diff_max" not in step
    assert max(step["actor/grad_norm"] for step in steps.values()) > 0
    change = steps[2]["actor/entropy"] - steps[1]["actor/entropy"]
    assert steps[2]["actor/entropy_change_per_step"] == pytest.approx(change)


def test_real_rows_of_dapo_math(command, root, task, tmp_path):
    """The 8-GPU configuration's own task, cut to what a tiny model takes."""
    data = os.environ.get("STEER_REAL_DATA")
    if not data or not (Path(data) / "DAPO-Math-17k.parquet").is_file():
        pytest.skip("STEER_REAL_DATA names no folder with DAPO-Math-17k.parquet")
    result = command(
        "bash", root / "run/run_exp.sh", "hardware=cpu", *SMALL, "data.max_prompt_length=512",
        "data.max_response_length=32", "data.train_max_samples=64", "data.filter_overlong_prompts=true",
        "actor_rollout_ref.rollout.max_model_len=640", "trainer.logger=[console,file]", "trainer.save_freq=-1",
        "trainer.total_training_steps=2", "trainer.val_before_train=false", "trainer.test_freq=-1",
        OUTPUT_DIR=str(tmp_path), DATA_DIR=data, MODEL_PATH=str(task / "model"),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert set(metrics(tmp_path / "steer_exp")) == {1, 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, command, root, task):
    """Four steps of STEER's linear map on two ranks over gloo, with two vLLM replicas.

    Only the best checkpoint is saved, and the one before it deleted.
    """
    out = tmp_path_factory.mktemp("best")
    result = command(
        "bash", root / "run/run_linear.sh", "task=arithmetic", "hardware=cpu", *SMALL, "trainer.n_gpus_per_node=2",
        "trainer.total_training_steps=4", "trainer.test_freq=1", "trainer.save_freq=1", "trainer.save_best_only=true",
        "trainer.save_after=2", "trainer.delete_old_best_checkpoint=true", "trainer.entropy_audit.freq=2",
        "trainer.logger=[console,file,tensorboard,wandb]",
        OUTPUT_DIR=str(out), TASK_DIR=str(task), WANDB_MODE="offline", WANDB_DIR=str(out),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return out / "steer_linear"


def test_two_ranks(trained):
    steps = metrics(trained)
    assert set(steps) == {0, 1, 2, 3, 4}
    for step in range(1, 5):
        data = steps[step]
        assert 0.8 - 1e-6 <= data["actor/token_weights_min"] <= data["actor/token_weights_max"] <= 1.2 + 1e-6
        assert data["training/rollout_probs_diff_max"] < 1e-4 and math.isfinite(data["actor/grad_norm"])


def test_only_the_best_checkpoint_stays(trained):
    steps = metrics(trained)
    accuracy = {step: data["val-core/arithmetic/acc/mean@1"] for step, data in steps.items() if step >= 2}
    best = max(accuracy, key=lambda step: (accuracy[step], -step))
    assert [path.name for path in trained.glob("global_step_*")] == [f"global_step_{best}"]
    assert steps[4]["training/best_metric"] == max(accuracy.values())
    assert list((trained / "tensorboard").iterdir()) and list((trained.parent / "wandb").glob("offline-run-*"))


def test_audited_steps_and_their_report(trained, command, root, tmp_path):
    steps = metrics(trained)
    for step, data in steps.items():
        # Without correlations where no token of a step has an advantage.
        assert ("entropy_audit/exact/mse" in data) == (step in (2, 4))
        assert step == 0 or 0 <= data["actor/quadrant/positive_likely/tokens"] <= 1
    tokens = pd.concat(map(pd.read_parquet, (trained / "audit").glob("step_*_rank_*.parquet")))
    updates = pd.concat(map(pd.read_parquet, (trained / "audit").glob("step_*_updates.parquet")))
    assert set(updates["step"]) == {2, 4} and updates["true_change"].notna().all()
    assert set(tokens["step"]) == {2, 4} and tokens["weight"].between(0.8 - 1e-6, 1.2 + 1e-6).all()
    result = command(sys.executable, root / "scripts/report.py", trained, "--out", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "covariance" in (tmp_path / "report.html").read_text() and len(list(tmp_path.rglob("*.svg"))) >= 5


def test_evaluation_of_the_best_checkpoint(trained, command, root, task, tmp_path):
    """Three benchmarks, two samples a problem; a second call does nothing but tell the results again."""
    data = tmp_path / "data"
    data.mkdir()
    rows = pd.read_parquet(task / "test.parquet").head(12)
    for name in ("first", "second", "third"):
        pd.concat([rows, rows]).to_parquet(data / f"{name}.parquet")
    (checkpoint,) = trained.glob("global_step_*")
    arguments = ("bash", root / "run/eval.sh", "--only", "first,second,third", "hardware=cpu", "task=arithmetic")
    environment = {"MODEL_PATH": str(checkpoint), "DATA_DIR": str(data), "OUTPUT_DIR": str(tmp_path)}
    result = command(*arguments, **environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (folder,) = (tmp_path / "eval").glob(f"steer_linear-{checkpoint.name}-*")
    results = json.loads((folder / "results.json").read_text())
    for name in ("first", "second", "third"):
        benchmark = results["benchmarks"][name]
        assert (benchmark["n"], benchmark["k"], benchmark["complete"]) == (12, 2, True)
        low, high = benchmark["mean"]["interval"]
        assert low <= benchmark["mean"]["value"] <= high and benchmark["maj"]["value"] <= benchmark["pass"]["value"]
    responses = pd.read_parquet(folder / "responses.parquet")
    assert len(responses) == 72 and {"input", "output", "gts", "score", "acc", "pred", "benchmark"} <= set(responses)
    again = command(*arguments, **environment)
    assert again.returncode == 0 and "average" in again.stdout and "Ray" not in again.stdout


# Those of the extreme clip range differ in numbers only.
METHODS = sorted(
    file.stem
    for file in (verl_steer.OVERLAY / "trainer/config/method").glob("*.yaml")
    if not file.stem.endswith("_extreme")
)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method, command, root, task, tmp_path):
    """One step, in two updates."""
    result = command(
        "bash", root / "run/launch.sh", method, "task=arithmetic", "hardware=cpu", *SMALL, "trainer.save_freq=-1",
        "trainer.total_training_steps=1", "trainer.val_before_train=false", "trainer.test_freq=-1",
        OUTPUT_DIR=str(tmp_path), TASK_DIR=str(task),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    data = metrics(tmp_path / method)[1]
    assert math.isfinite(data["actor/pg_loss"]) and math.isfinite(data["actor/grad_norm"])
    weighs = method.startswith(("steer", "influence", "pi_"))
    assert ("actor/token_weights_mean" in data) == weighs
