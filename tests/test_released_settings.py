# SPDX-License-Identifier: Apache-2.0
"""docs/released_settings.md: every key of the authors' launchers, its value there, and the effective one here."""

import re
from pathlib import Path

import yaml
from configurations import configuration_of, resolved
from omegaconf import OmegaConf
from verl.utils.config import omega_conf_to_dataclass

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/released_settings.md").read_text()

#: Launcher of the authors -> configuration here.
TRAINING = {
    "run_linear": "steer_linear",
    "run_exp": "steer_exp",
    "run_linear_extreme": "steer_linear_extreme",
    "run_exp_extreme": "steer_exp_extreme",
}

#: What the four training launchers of github.com/zz-haooo/STEER (commit b31df71) set alike; files without folders.
AUTHORS = yaml.safe_load("""
    algorithm: {adv_estimator: grpo, use_kl_in_reward: false}
    data: {train_files: DAPO-Math-17k.parquet, val_files: aime24.parquet, train_batch_size: 512,
      max_prompt_length: 1024, max_response_length: 3072, filter_overlong_prompts: true, truncation: left}
    A:
      model: {path: Qwen/Qwen2.5-Math-7B, use_remove_padding: true, enable_gradient_checkpointing: true}
      actor: {ppo_mini_batch_size: 32, ppo_micro_batch_size_per_gpu: 8, use_kl_loss: false, kl_loss_coef: 0.001,
        kl_loss_type: low_var_kl, entropy_coeff: 0, clip_ratio_c: 10.0, optim: {lr: 0.000001},
        policy_loss: {loss_mode: entropy_control}, checkpoint: {save_contents: [hf_model]},
        fsdp_config: {param_offload: false, optimizer_offload: false}}
      rollout: {name: vllm, n: 8, log_prob_micro_batch_size_per_gpu: 8, tensor_model_parallel_size: 4,
        gpu_memory_utilization: 0.6}
      ref: {log_prob_micro_batch_size_per_gpu: 8, fsdp_config: {param_offload: false}}
    trainer: {rollout_data_dir: a folder, critic_warmup: 0, logger: [console, wandb], project_name: STEER,
      n_gpus_per_node: 8, nnodes: 1, save_freq: 10, test_freq: 1, total_epochs: 10, resume_mode: disable,
      save_best_only: false, delete_old_best_checkpoint: true, save_after: 80,
      best_metric_key: val-core/math_dapo/acc/mean@32}
""")

#: What they set differently, in the order of `TRAINING`.
BY_LAUNCHER = {
    "A.actor.clip_ratio_low": [0.2, 0.2, 0.99, 0.99],
    "A.actor.clip_ratio_high": [0.28, 0.28, 5, 5],
    "A.actor.policy_loss.linear": [True, False, True, False],
    "A.actor.policy_loss.token_weight_min": [0.8, 0.8, 0.8, 0.8],
    "A.actor.policy_loss.token_weight_max": [1.2, 1.0, 1.2, 1.0],
}

#: What their evaluation (commit bfc8d2e) sets otherwise or alone; verl's default of the loss, which it leaves.
EVALUATION = yaml.safe_load("""
    data: {val_files: all eight benchmarks, train_batch_size: 512, filter_overlong_prompts: true, truncation: left}
    A: {model: {path: zzzzzzzzzzhao/STEER}, actor: {policy_loss: {loss_mode: vanilla}},
      rollout: {gpu_memory_utilization: 0.8, val_kwargs: {n: 1, do_sample: true, temperature: 1.0, top_p: 0.7}}}
    trainer: {logger: [console, wandb], project_name: STEER_evaluation, total_epochs: 50, val_only: true,
      resume_mode: disable}
""")


def flat(node, path=""):
    if not isinstance(node, dict):
        return {path: node}
    return {key: value for name in node for key, value in flat(node[name], f"{path}.{name}".lstrip(".")).items()}


def cell(text):
    """A table's value; text without backticks stands for itself."""
    return yaml.safe_load(text.strip("`")) if text.startswith("`") else text


def tables():
    """All tables of the page, as rows of cells without their headings."""
    found = [re.findall(r"^\| (.*?) ?\|$", block, re.M) for block in re.findall(r"(?:^\|.*\n)+", PAGE, re.M)]
    return [[re.split(r" ?\| ?", row) for row in rows[2:]] for rows in found]


TRAINED, DIFFERENT, EVALUATED, DEFAULTS = tables()


def effective(name, key):
    """What a run of a configuration here has; paths of data without their folder."""
    files = [f"data/{file}.parquet" for file in BENCHMARKS]
    config = resolved(name, f"data.val_files=[{','.join(files)}]") if name == "eval" else resolved(name)
    key = re.sub(r"^A\.", "actor_rollout_ref.", key)
    section, _, option = key.rpartition(".policy_loss.")
    if section:
        return getattr(omega_conf_to_dataclass(OmegaConf.select(config, f"{section}.policy_loss")), option)
    assert OmegaConf.select(config, key, default="missing") != "missing", key
    value = OmegaConf.select(config, key)
    if key == "data.val_files" and not isinstance(value, str):
        return "all eight benchmarks" if list(value) == files else value
    return Path(value).name if key.endswith("_files") else OmegaConf.to_container(OmegaConf.create([value]))[0]


(BENCHMARKS,) = (line.split(",") for line in re.findall(r"^benchmarks=(.*)$", (ROOT / "run/eval.sh").read_text(), re.M))


def check(rows, authors, names):
    """The rows are the authors' keys and values, and the values here; a remark stands where these two differ."""
    assert {cell(key): cell(theirs) for key, theirs, *_ in rows} == authors
    for key, theirs, here, *remark in rows:
        assert all(effective(name, cell(key)) == cell(here) for name in names), (key, here)
        assert (cell(theirs) == cell(here)) == (remark in ([], [""])), key


def test_training_launchers():
    assert len(TRAINED) == 45
    check(TRAINED, flat(AUTHORS), TRAINING.values())
    assert {name: configuration_of(name) for name in TRAINING} == TRAINING
    estimator = "A.actor.policy_loss.entropy_change_estimator"
    assert {effective(name, estimator) for name in TRAINING.values()} == {"released"}


def test_keys_that_differ_between_the_launchers():
    assert {cell(key): [cell(value) for value in values] for key, *values in DIFFERENT} == BY_LAUNCHER
    for key, values in BY_LAUNCHER.items():
        assert [effective(name, key) for name in TRAINING.values()] == values


def test_the_later_launcher():
    assert configuration_of("run_asymmetric") == "steer_asymmetric"
    values = {"entropy_control_mode": "asymmetric", "linear": True, "token_weight_min": 0.9, "token_weight_max": 1.0}
    assert {key: effective("steer_asymmetric", f"A.actor.policy_loss.{key}") for key in values} == values
    same = [
        key for key, *_ in TRAINED if effective("steer_asymmetric", cell(key)) == effective("steer_linear", cell(key))
    ]
    assert len(same) == len(TRAINED)
    assert effective("steer_linear", "A.actor.policy_loss.entropy_control_mode") == "symmetric"


def test_evaluation():
    check(EVALUATED, flat(EVALUATION), ["eval"])


def test_grpo_differs_in_the_loss_alone():
    assert configuration_of("run_grpo") == "grpo"
    different = [key for key, _, here, *_ in TRAINED if effective("grpo", cell(key)) != cell(here)]
    assert [cell(key) for key in different] == ["A.actor.policy_loss.loss_mode"]
    clip = [f"A.actor.clip_ratio_{side}" for side in ("low", "high")]
    assert [effective("grpo", key) for key in clip] == [BY_LAUNCHER[key][0] for key in clip]


def test_defaults_of_their_configuration():
    assert len(DEFAULTS) == 5
    for key, theirs, here, remark in DEFAULTS:
        assert effective("steer_exp", cell(key)) == cell(here) != cell(theirs) and remark, key
    same = re.findall(r"`((?:A|data|algorithm|trainer)\.[\w.]+)=([\w.-]+)`", PAGE.split("These are the same:")[1])
    same = [(key, value) for key, value in same if key != "A.rollout.full_determinism"]
    assert len(same) == 19  # the last repeats a key
    for key, value in same:
        assert effective("steer_exp", key) == yaml.safe_load(value), key
