# SPDX-License-Identifier: Apache-2.0
"""Configurations and launchers: what they resolve to, and that a bad value gives one clear line."""

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from verl.trainer import main_ppo
from verl.workers.config import PolicyLossConfig

import verl_steer

POLICY_LOSS = "actor_rollout_ref.actor.policy_loss"

RELEASED = {
    "data.train_batch_size": 512,
    "data.max_prompt_length": 1024,
    "data.max_response_length": 3072,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 32,
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 8,
    "actor_rollout_ref.actor.optim.lr": 1e-6,
    "actor_rollout_ref.actor.use_kl_loss": False,
    "actor_rollout_ref.actor.entropy_coeff": 0,
    "actor_rollout_ref.actor.clip_ratio_low": 0.2,
    "actor_rollout_ref.actor.clip_ratio_high": 0.28,
    "actor_rollout_ref.actor.clip_ratio_c": 10.0,
    "actor_rollout_ref.rollout.n": 8,
    "actor_rollout_ref.rollout.temperature": 1.0,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 4,
    "actor_rollout_ref.rollout.gpu_memory_utilization": 0.6,
    "algorithm.adv_estimator": "grpo",
    "algorithm.use_kl_in_reward": False,
    "trainer.n_gpus_per_node": 8,
    "trainer.nnodes": 1,
    "trainer.save_freq": 10,
    "trainer.save_after": 80,
    "trainer.test_freq": 1,
}


def resolved(name, *overrides):
    with initialize_config_dir(str(verl_steer.OVERLAY / "trainer/config"), version_base=None):
        return compose(name, list(overrides))


LAUNCHERS = {path.stem: path for path in (Path(__file__).parents[1] / "run").glob("run_*.sh")}


def configuration_of(launcher):
    """The configuration that a launcher names."""
    return re.search(r'launch.sh" (\w+) "\$@"', LAUNCHERS[launcher].read_text())[1]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_keep_the_released_hyper_parameters(launcher):
    config = resolved(configuration_of(launcher))
    extreme = {"actor_rollout_ref.actor.clip_ratio_low": 0.99, "actor_rollout_ref.actor.clip_ratio_high": 5.0}
    expected = RELEASED | (extreme if "extreme" in launcher else {})
    assert {key: OmegaConf.select(config, key) for key in expected} == expected
    loss_mode = OmegaConf.select(config, f"{POLICY_LOSS}.loss_mode")
    assert loss_mode == ("vanilla" if launcher == "run_grpo" else "entropy_control")


def test_evaluation_keeps_the_released_sampling():
    config = resolved("eval", "data.val_files=[a.parquet]")
    assert config.trainer.val_only and config.actor_rollout_ref.rollout.gpu_memory_utilization == 0.8
    sampling = config.actor_rollout_ref.rollout.val_kwargs
    assert (sampling.temperature, sampling.top_p, sampling.n, sampling.do_sample) == (1.0, 0.7, 1, True)


@pytest.mark.parametrize("launcher", [name for name in LAUNCHERS if name != "run_grpo"])
def test_weights_of_the_launchers(launcher):
    linear, bounds = (True, (0.8, 1.2)) if "linear" in launcher else (False, (0.8, 1.0))
    options = OmegaConf.to_container(OmegaConf.select(resolved(configuration_of(launcher)), POLICY_LOSS))
    options.pop("_target_")
    policy_loss = PolicyLossConfig(**options)
    assert policy_loss.loss_mode == "entropy_control" and policy_loss.linear is linear
    assert (policy_loss.token_weight_min, policy_loss.token_weight_max) == bounds
    assert policy_loss.entropy_change_estimator == "released"


@pytest.mark.parametrize("plus", ["", "+"])
def test_options_are_taken_with_and_without_plus(plus):
    config = resolved("steer_exp", f"{plus}{POLICY_LOSS}.token_weight_min=0.7")
    assert OmegaConf.select(config, f"{POLICY_LOSS}.token_weight_min") == 0.7


@pytest.mark.parametrize("hardware", ["cpu", "gpu1", "gpu8"])
@pytest.mark.parametrize("task", ["dapo_math", "arithmetic"])
def test_every_hardware_goes_with_every_task(hardware, task, monkeypatch):
    config = resolved("steer_exp", f"hardware={hardware}", f"task={task}")
    OmegaConf.resolve(config)
    if hardware == "cpu":
        main_ppo.prepare(config)
        assert config.trainer.device == "cpu" and config.ray_kwargs.ray_init.num_gpus == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"token_weight_min": -1.0}, "policy_loss.token_weight_min=-1.0: expected 0 < token_weight_min"),
        ({"token_weight_min": 0.0}, "policy_loss.token_weight_min=0.0: expected 0 <"),
        ({"token_weight_min": 1.5}, "token_weight_min=1.5: expected 0 < token_weight_min <= token_weight_max=1.2"),
        ({"linear": False, "token_weight_max": 1.1}, "policy_loss.token_weight_max=1.1: expected at most 1"),
        ({"linear": "yes"}, "policy_loss.linear='yes': expected true or false"),
        ({"entropy_change_estimator": "best"}, "entropy_change_estimator='best': expected one of released"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PolicyLossConfig(**options)


def test_bad_value_ends_a_launcher_in_one_line(command, root):
    """From the command line to the message, without Ray."""
    result = command("bash", root / "run/run_exp.sh", "hardware=cpu", f"+{POLICY_LOSS}.token_weight_min=-1")
    assert result.returncode == 1 and "ray" not in result.stdout.lower()
    assert result.stderr.strip().splitlines()[-1].startswith("steer-verl: policy_loss.token_weight_min=-1: expected")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "overrides, message",
    [
        ([f"{POLICY_LOSS}.loss_mode=nothing"], "Unsupported loss mode: nothing"),
        (
            ["task=arithmetic", "data.train_batch_size=8"],
            "rollout.log_prob_micro_batch_size_per_gpu=128: expected a divisor of the 64 rollouts of a rank",
        ),
        (["hardware=gpu8"], "trainer.device=cuda: verl's platform here is cpu; expected hardware=cpu"),
        (
            ["++algorithm.rollout_correction.bypass_mode=true", "actor_rollout_ref.actor.strategy=mine"],
            "actor.strategy=mine: expected one of fsdp, fsdp2",
        ),
    ],
)
def test_runs_that_cannot_work_are_refused(overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        main_ppo.prepare(resolved("steer_exp", "hardware=cpu", *overrides))


def test_bypass_mode_asks_for_the_current_entropy():
    """There the trainer takes the rollout's log-probs and no old entropies exist."""
    for bypass in (True, False):
        config = resolved("steer_exp", "hardware=cpu", f"++algorithm.rollout_correction.bypass_mode={bypass}")
        main_ppo.prepare(config)
        assert config.actor_rollout_ref.actor.calculate_entropy is bypass


def test_cfg_prints_the_resolved_configuration(command, root):
    result = command("bash", root / "run/run_exp.sh", "--cfg", "job", cwd="/")
    assert result.returncode == 0 and "loss_mode: entropy_control" in result.stdout
