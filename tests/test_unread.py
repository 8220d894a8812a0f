# SPDX-License-Identifier: Apache-2.0
"""Options that a run sets and does not read are named in a warning."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from configurations import resolved
from verl.steer import config as steer_config
from verl.steer.requirements import check_and_complete, unread

LOSS = "actor_rollout_ref.actor.policy_loss"
METHODS = sorted(path.stem for path in Path(steer_config.__file__).parents[1].glob("trainer/config/method/*.yaml"))


@pytest.fixture
def told(monkeypatch):
    """The warnings of a configuration; verl may keep its loggers' records from pytest."""
    lines = []
    logger = SimpleNamespace(warning=lambda text, *values: lines.append(text % values))
    monkeypatch.setattr(unread, "logger", logger)

    def checked(method, *overrides):
        lines.clear()
        check_and_complete(resolved(method, "hardware=cpu", "task=countdown", *overrides))
        return list(lines)

    return checked


@pytest.mark.parametrize("method", METHODS)
def test_methods_set_nothing_that_they_do_not_read(told, method):
    needed = {"influence_band": [f"{LOSS}.entropy_band=0.001"]}.get(method, [])
    assert told(method, *needed) == []


@pytest.mark.parametrize(
    ("method", "overrides", "named"),
    [
        ("grpo", ["token_weight_min=0.6"], ["policy_loss.token_weight_min=0.6 with loss_mode=vanilla"]),
        ("grpo", ["linear=false", "target_gain=1.0"], ["loss.linear=False with loss", "loss.target_gain=1.0 with"]),
        ("steer_exp", ["target_entropy=0.3"], ["policy_loss.target_entropy=0.3 with token_weight_map=exponential"]),
        ("steer_exp", ["target_controller=pi"], ["policy_loss.target_controller=pi with token_weight_map=exponential"]),
        ("steer_linear", ["entropy_band=0.1"], ["policy_loss.entropy_band=0.1 with token_weight_map=linear"]),
        (
            "influence_target",
            ["entropy_control_mode=asymmetric"],
            ["policy_loss.entropy_control_mode=asymmetric with token_weight_map=target"],
        ),
        ("influence_target", ["entropy_band=0.1"], ["policy_loss.entropy_band=0.1 with token_weight_map=target"]),
        (
            "steer_exp",
            ["token_weight_quantile=0.9", "token_weight_ema_decay=0.5"],
            ["token_weight_quantile=0.9 with token_weight_map=exponential, token_weight_normalizer=micro_batch",
             "token_weight_ema_decay=0.5 with token_weight_normalizer=micro_batch"],
        ),
        (
            "steer_exp",
            ["influence_way=head", "influence_refresh=2"],
            ["influence_way=head with entropy_change_estimator=released", "influence_refresh=2 with entropy_change_es"],
        ),
        ("opefo", ["clip_v_mu=3", "opefo_lambda=0.1"], ["policy_loss.clip_v_mu=3 with loss_mode=opefo"]),
        ("entropic", ["target_entropy=0.3", "target_gain=0.1"], ["loss.target_gain=0.1 with loss_mode=entropic"]),
        ("pi_exact", ["target_gain=0.1"], ["policy_loss.target_gain=0.1 with target_controller=pi"]),
        ("steer_linear", ["token_weight_map=exponential"], ["loss.linear=True with token_weight_map=exponential"]),
        ("influence_target", ["target_kp=2"], ["policy_loss.target_kp=2 with target_controller=solve"]),
        ("steer_exp", ["clip_cov_ratio=0.1"], ["policy_loss.clip_cov_ratio=0.1 with loss_mode=entropy_control"]),
        ("steer_exp", ["dro_beta=0.3"], ["policy_loss.dro_beta=0.3 with loss_mode=entropy_control"]),
        ("clip_cov", ["ppo_kl_coef=2"], ["policy_loss.ppo_kl_coef=2 with loss_mode=clip_cov"]),
        ("steer_exp", ["base_loss=kl_cov", "ppo_kl_coef=2"], []),
        ("grpo", ["target_entropy=0.3"], ["policy_loss.target_entropy=0.3 with loss_mode=vanilla"]),
    ],
)  # fmt: skip
def test_options_of_the_loss_that_are_not_read_are_named(told, method, overrides, named):
    found = told(method, *(f"{LOSS}.{one}" for one in overrides))
    assert len(found) == len(named)
    assert all(one in line for one, line in zip(named, found, strict=True)), found


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("steer_threshold", ["token_weight_quantile=0.9", "linear=false"]),
        ("steer_exp", ["token_weight_map=threshold"]),
        ("steer_winsorised", ["token_weight_quantile=0.9"]),
        ("steer_ema", ["token_weight_ema_decay=0.5"]),
        ("adaptive_entropy", ["target_entropy=0.3"]),
        ("entropic", ["target_kp=2", "target_ki=0.1"]),
        ("pi_exact", ["target_kp=2", "target_ki=0.1", "token_weight_min=0.5"]),
        ("influence_exp", ["influence_way=head", "influence_refresh=2"]),
        ("influence_band", ["entropy_band=0.01"]),
    ],
)
def test_options_that_are_read_are_not_named(told, method, overrides):
    assert told(method, *(f"{LOSS}.{one}" for one in overrides)) == []


def test_options_of_another_advantage_estimator_are_named(told):
    overrides = ["algorithm.clip_b_mu=3", "algorithm.unlikeliness_beta=0.5"]
    assert told("clip_b", *overrides) == ["without effect: algorithm.unlikeliness_beta=0.5 with adv_estimator=clip_b"]
    assert len(told("steer_exp", *overrides)) == 2
    assert told("grpo_s", "algorithm.entropy_reward_share=0.2") == []


def test_options_of_an_audit_that_never_comes_are_named(told):
    audit = "trainer.entropy_audit"
    assert told("grpo", f"{audit}.one_token=9") == [f"without effect: {audit}.one_token=9 with freq=0"]
    assert told("grpo", f"{audit}.freq=2", f"{audit}.tokens=9") == []
    assert told("grpo", f"{audit}.freq=0") == []


def test_coefficients_of_kl_terms_that_are_off_are_named(told):
    actor, reward = "actor_rollout_ref.actor", "algorithm"
    off = [f"{actor}.kl_loss_coef=0.1", f"{reward}.kl_ctrl.kl_coef=0.2"]
    assert told("grpo", *off) == [
        "without effect: actor.kl_loss_coef=0.1 with actor.use_kl_loss=false",
        "without effect: algorithm.kl_ctrl.kl_coef=0.2 with algorithm.use_kl_in_reward=false",
    ]
    assert told("grpo", *off, f"{actor}.use_kl_loss=true", f"{reward}.use_kl_in_reward=true") == []


def test_the_sampling_of_training_is_named_in_an_evaluation(told):
    rollout = "actor_rollout_ref.rollout"
    overrides = [f"{rollout}.temperature=0.6", f"{rollout}.top_k=20", f"{rollout}.top_p=0.7"]
    why = "with trainer.val_only=true, which reads rollout.val_kwargs"
    expected = [  # top_p is that of the validation too
        f"without effect: rollout.temperature=0.6 {why}.temperature",
        f"without effect: rollout.top_k=20 {why}.top_k",
    ]
    assert told("eval", *overrides, f"{rollout}.val_kwargs.top_p=0.7") == expected
    assert told("eval", f"{rollout}.val_kwargs.top_p=0.7") == told("grpo", *overrides) == []


def test_steps_after_the_last_one_are_named(monkeypatch):
    lines = []
    monkeypatch.setattr(unread.logger, "warning", lambda text, *values: lines.append(text % values))
    warmup = "actor_rollout_ref.actor.optim.lr_warmup_steps"
    config = resolved("grpo", "hardware=cpu", "trainer.entropy_audit.freq=9", f"{warmup}=10")
    unread.warn_of_late_steps(config, 9)
    assert lines == [f"{warmup}=10: the run has 9 steps"]
    unread.warn_of_late_steps(config, 8)
    assert lines[1:] == ["trainer.entropy_audit.freq=9: the run has 8 steps", f"{warmup}=10: the run has 8 steps"]
    config.trainer.val_only = True
    unread.warn_of_late_steps(config, 1)
    unread.warn_of_late_steps(resolved("grpo", "hardware=cpu"), 1)
    assert len(lines) == 3


def test_bounds_that_verls_trainers_do_not_read_are_named(told):
    batches, steps = "algorithm.filter_groups.max_num_gen_batches", "actor_rollout_ref.actor.optim.total_training_steps"
    lines = told("grpo", f"{batches}=10", f"{steps}=100")
    assert [line.partition(" with ")[0] for line in lines] == [
        f"without effect: {batches}=10", "without effect: actor.optim.total_training_steps=100"
    ]  # fmt: skip
    assert told("grpo", f"{batches}=-1", f"{steps}=0") == []
