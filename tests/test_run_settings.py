# SPDX-License-Identifier: Apache-2.0
"""A run goes on by itself from a checkpoint of its own settings only."""

from inspect import signature

import pytest
import torch
from configurations import resolved
from omegaconf import OmegaConf
from verl.steer.checkpoint_ledger import LEDGER, TRACKER, UNFINISHED
from verl.steer.requirements import check_and_complete, checkpoints
from verl.steer.requirements.checkpoints import check_checkpoints
from verl.steer.run_settings import KEYS, SETTINGS, check_settings, save_settings, settings_of

LOSS = "actor_rollout_ref.actor.policy_loss"


@pytest.fixture
def run(tmp_path):
    """The overrides of a run whose last checkpoint is of step 5."""
    overrides = ["hardware=cpu", "task=arithmetic", f"trainer.default_local_dir={tmp_path}"]
    checkpoint = tmp_path / "global_step_5"
    checkpoint.mkdir()
    (tmp_path / TRACKER).write_text("5")
    save_settings(resolved("steer_exp", *overrides), checkpoint)
    return overrides


def test_the_same_run_goes_on_also_for_longer_on_other_hardware_and_elsewhere(run):
    check_settings(resolved("steer_exp", *run))
    others = (
        "trainer.total_training_steps=99", "trainer.test_freq=1", "trainer.n_gpus_per_node=2",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2", "actor_rollout_ref.rollout.max_num_seqs=8",
        "actor_rollout_ref.model.path=elsewhere", "data.train_files=elsewhere.parquet",
    )  # fmt: skip
    check_settings(resolved("steer_exp", *run, *others))
    kept = settings_of(resolved("steer_exp", *run))
    assert all(settings_of(resolved("steer_exp", f"hardware={name}", *run[1:])) == kept for name in ("gpu1", "gpu8"))


def test_a_checkpoint_without_the_optimizer_is_told_of(run, monkeypatch):
    told, contents = [], "actor_rollout_ref.actor.checkpoint.save_contents"
    monkeypatch.setattr(checkpoints.logger, "warning", lambda text, *values: told.append(text % values))
    check_checkpoints(resolved("steer_exp", *run, f"{contents}=[model,optimizer,extra]"))
    assert not told
    check_checkpoints(resolved("steer_exp", *run, f"{contents}=[model,extra]"))
    assert len(told) == 2 and all("without optimizer a resumed run begins with new moments" in one for one in told)


@pytest.mark.parametrize("mode", ["auto", "resume_path"])
def test_a_checkpoint_has_a_part_for_each_rank(run, tmp_path, mode):
    """verl loads those of as many ranks as the run has."""
    (tmp_path / "global_step_5/actor").mkdir()
    for rank in range(2):
        (tmp_path / f"global_step_5/actor/model_world_size_2_rank_{rank}.pt").touch()
    resumed = [f"trainer.resume_mode={mode}"]
    if mode == "resume_path":
        resumed.append(f"trainer.resume_from_path={tmp_path}/global_step_5")
    check_checkpoints(resolved("steer_exp", *run, *resumed, "trainer.n_gpus_per_node=2"))
    with pytest.raises(ValueError, match="^trainer.n_gpus_per_node=1, trainer.nnodes=1: expected 2 ranks in all"):
        check_checkpoints(resolved("steer_exp", *run, *resumed))
    named = f"trainer.resume_from_path={tmp_path}/global_step_5"
    check_checkpoints(resolved("steer_exp", *run, "trainer.resume_mode=disable", named))


@pytest.mark.parametrize(
    "method, override, told",
    [
        ("steer_exp", f"{LOSS}.token_weight_min=0.6", "actor.policy_loss.token_weight_min=None (now 0.6)"),
        ("steer_exp", f"+{LOSS}.target_entropy={{1:0.3,9:0.2}}", "actor.policy_loss.target_entropy.9=None (now 0.2)"),
        ("steer_exp", "actor_rollout_ref.actor.optim.lr=5e-5", "actor.optim.lr=0.0002 (now 5e-05)"),
        ("steer_exp", "actor_rollout_ref.actor.optim.betas=[0.9,0.95]", "actor.optim.betas=[0.9, 0.999] (now"),
        ("steer_exp", "+reward.reward_kwargs.max_resp_len=9", "reward.reward_kwargs.max_resp_len=None (now 9)"),
        ("steer_exp", "+seed=7", "actor.data_loader_seed=42 (now 7)"),
        ("steer_exp", "actor_rollout_ref.rollout.n=16", "rollout.n=8 (now 16)"),
        ("steer_exp", "data.train_batch_size=32", "data.train_batch_size=16 (now 32)"),
        ("steer_exp", "actor_rollout_ref.actor.clip_ratio_high=0.3", "actor.clip_ratio_high=0.28 (now 0.3)"),
        ("steer_exp", "actor_rollout_ref.model.lora_rank=8", "model.lora_rank=0 (now 8)"),
        ("steer_exp", "trainer.critic_warmup=1", "trainer.critic_warmup=0 (now 1)"),
        (
            "steer_exp",
            "+actor_rollout_ref.actor.optim.override_optimizer_config.amsgrad=true",
            "actor.optim.override_optimizer_config.amsgrad=None (now True)",
        ),
        ("steer_exp", "data.train_max_samples=64", "data.train_max_samples=-1 (now 64)"),
        (
            "steer_exp",
            "reward.custom_reward_function.name=f",
            "reward_function.name=compute_score (now f)",
        ),
        ("grpo", "trainer.test_freq=1", "actor.policy_loss.loss_mode=entropy_control (now vanilla)"),
        ("nsr", "trainer.test_freq=1", "algorithm.adv_estimator=grpo (now nsr)"),
    ],
)
def test_a_run_of_other_settings_is_refused_unless_it_is_told_to_go_on(run, tmp_path, method, override, told):
    with pytest.raises(ValueError, match="trainer.resume_mode=auto: ") as refused:
        check_and_complete(resolved(method, *run, override))
    assert told in str(refused.value) and str(tmp_path / "global_step_5") in str(refused.value)
    told_to = ("trainer.resume_mode=resume_path", f"trainer.resume_from_path={tmp_path}/global_step_5")
    check_settings(resolved(method, *run, override, *told_to))
    check_settings(resolved(method, *run, override, "trainer.resume_mode=disable"))


def test_a_key_that_an_earlier_version_did_not_save_is_not_compared(run, tmp_path):
    file = tmp_path / "global_step_5" / SETTINGS
    saved = OmegaConf.to_container(OmegaConf.load(file))
    del saved["data.train_max_samples"]
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(saved)))
    check_settings(resolved("steer_exp", *run, "data.train_max_samples=64"))
    with pytest.raises(ValueError, match="is of a run with data.train_batch_size=16 "):
        check_settings(resolved("steer_exp", *run, "data.train_max_samples=64", "data.train_batch_size=32"))


def test_checkpoints_that_the_run_would_not_resume_or_that_have_no_settings_do_not_count(run, tmp_path):
    other = resolved("grpo", *run)
    checkpoint = tmp_path / "global_step_5"
    (checkpoint / UNFINISHED).touch()
    check_settings(other)
    (tmp_path / "global_step_3").mkdir()
    save_settings(resolved("steer_exp", *run), tmp_path / "global_step_3")
    (tmp_path / LEDGER).write_text('{"saved_steps": [3, 5]}')
    with pytest.raises(ValueError, match="global_step_3 is of a run with "):  # from which it would go on
        check_settings(other)
    (tmp_path / LEDGER).unlink()
    (checkpoint / UNFINISHED).unlink()
    (tmp_path / TRACKER).write_text("4")
    check_settings(other)
    (tmp_path / TRACKER).write_text("5")
    (checkpoint / SETTINGS).unlink()
    check_settings(other)


def test_every_key_is_one_of_the_configuration():
    """Or an argument of the optimizer or of a reward manager, which verl does not declare."""
    config, arguments = resolved("grpo"), signature(torch.optim.AdamW).parameters
    for section, _, name in (key.rpartition(".") for key in KEYS if key != "reward.reward_kwargs"):
        place = OmegaConf.select(config, section) if section else config
        assert name in (arguments if section.endswith("override_optimizer_config") else place), name
