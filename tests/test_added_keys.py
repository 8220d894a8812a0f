# SPDX-License-Identifier: Apache-2.0
"""Misspelt keys that Hydra adds after a plus are refused, others of a user's own are not."""

import runpy
import sys

import pytest
from configurations import read_file_once
from hydra import compose, initialize_config_dir
from hydra._internal.config_repository import ConfigRepository
from hydra.core.hydra_config import HydraConfig
from verl.steer.requirements.added_keys import check_added_keys
from verl.steer.requirements.kinds import check_kinds

import verl_steer

LOSS = "actor_rollout_ref.actor.policy_loss"


@pytest.fixture
def checked(monkeypatch, tmp_path):
    """Checks a run's overrides; `critics/mine.yaml` is a user's own, with keys like those of verl."""
    (tmp_path / "critics").mkdir()
    (tmp_path / "critics/mine.yaml").write_text("# @package _global_\nmine: {key: 1}\ntrainer: {savefreq: 2}\n")
    search_path = f"hydra.searchpath=[{tmp_path}]"
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    monkeypatch.setattr(ConfigRepository, "load_config", read_file_once)
    with initialize_config_dir(str(verl_steer.OVERLAY / "trainer/config"), version_base=None):

        def check(*overrides):
            words = ["method=steer_exp", *overrides, search_path]
            HydraConfig.instance().set_config(compose("steer", words, return_hydra_config=True))
            check_added_keys()
            check_kinds()

        yield check


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+trainer.savefreq=5", "trainer.savefreq: unknown; expected one of save_freq"),
        ("++trainer.savefreq=5", "trainer.savefreq: unknown; expected one of save_freq"),
        ("+data.train_batchsize=64", "data.train_batchsize: unknown; expected one of train_batch_size"),
        ("+algorithm.gama=0.9", "algorithm.gama: unknown; expected one of gamma"),
        ("+trainer.entropy_audit.frq=1", "trainer.entropy_audit.frq: unknown; expected one of freq"),
        ("+trainr.save_freq=5", "trainr: unknown; expected one of trainer"),
        ("+actor_rollout_ref.rollout.temprature=1", "actor_rollout_ref.rollout.temprature: unknown; expected one of "),
        ("++trainer={savefreq: 5}", "trainer.savefreq: unknown; expected one of save_freq"),
        ("+ray_kwargs.ray_intt.num_gpus=1", "ray_kwargs.ray_intt: unknown; expected one of ray_init"),
        (
            "++actor_rollout_ref.rollout.val_kwargs={nn: 2}",
            "actor_rollout_ref.rollout.val_kwargs.nn: unknown; expected ",
        ),
        # Texts for a boolean and a number.
        (
            "actor_rollout_ref.actor.use_kl_loss=flase",
            "actor_rollout_ref.actor.use_kl_loss='flase': expected true or false",
        ),
        ("trainer.val_only='true'", "trainer.val_only='true': expected true or false, without quotes"),
        ("actor_rollout_ref.rollout.top_k=abc", "actor_rollout_ref.rollout.top_k='abc': expected a number"),
        (
            "actor_rollout_ref.actor.optim.lr='1e-5'",
            "actor_rollout_ref.actor.optim.lr='1e-5': expected a number, without quotes",
        ),
        # Lists for booleans, and other values for sections.
        ("trainer.val_only=[false]", "trainer.val_only=[False]: expected true or false"),
        (
            "actor_rollout_ref.actor.policy_loss=entropy_control",
            "actor_rollout_ref.actor.policy_loss='entropy_control': expected a section of keys below it",
        ),
        ("actor_rollout_ref.rollout.agent=null", "actor_rollout_ref.rollout.agent=null: expected a section of k"),
        ("trainer=null", "trainer=null: expected a section of keys below it"),
        ("reward.sandbox_fusion=null", "reward.sandbox_fusion=null: expected a section of keys below it"),
        # Of older versions of verl.
        ("+ray_init.num_cpus=8", "ray_init.num_cpus: expected ray_kwargs.ray_init in its place"),
        (
            "+algorithm.rollout_is=token",
            "algorithm.rollout_is: expected algorithm.rollout_correction.rollout_is in its",
        ),
        # Of another place.
        ("+rollout.n=16", "rollout.n: unknown; expected actor_rollout_ref.rollout.n"),
        ("+actor.use_kl_loss=true", "actor.use_kl_loss: unknown; expected actor_rollout_ref.actor.use_kl_loss"),
        (
            "+policy_loss.token_weight_min=0.7",
            f"policy_loss.token_weight_min: unknown; expected {LOSS}.token_weight_min",
        ),
        ("+lr=1e-5", "lr: unknown; expected critic.optim.lr or actor_rollout_ref.actor.optim.lr"),
        (
            "+actor_rollout_ref.lr=1e-5",
            "actor_rollout_ref.lr: unknown; expected actor_rollout_ref.actor.optim.lr or cri",
        ),
        ("+n=16", "n: unknown; expected actor_rollout_ref.rollout.n or "),
        ("+reward.max_concurrent=4", "reward.max_concurrent: unknown; expected reward.sandbox_fusion.max_concurrent"),
        (
            "+algorithm.loss_agg_mode=token-mean",
            "algorithm.loss_agg_mode: unknown; expected critic.loss_agg_mode or act",
        ),
        ("+trainer.train_batch_size=128", "trainer.train_batch_size: unknown; expected data.train_batch_size"),
        ("+val_kwargs.n=8", "val_kwargs.n: unknown; expected actor_rollout_ref.rollout.val_kwargs.n"),
        ("+rollout.nn=16", "rollout.nn: unknown; expected actor_rollout_ref.rollout or "),
        ("+data.tokenizer_path=a", "data.tokenizer_path: unknown; expected "),
        # Declared nowhere, and read.
        ("+sed=3", "sed: unknown; expected one of seed"),
        # Like none of the names, and refused by a worker.
        ("+actor_rollout_ref.rollout.xyz=1", "actor_rollout_ref.rollout.xyz: unknown; expected one of name, mode, "),
        (f"+{LOSS}.token_weight_mn=0.7", f"{LOSS}.token_weight_mn: unknown; expected one of token_weight_min, "),
    ],
)
def test_an_unknown_key_is_named(checked, override, message):
    with pytest.raises(ValueError) as error:
        checked(override)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "override",
    [
        f"+{LOSS}.token_weight_min=0.7",  # declared, as null
        "++trainer.save_freq=5",
        f"++{LOSS}._target_=verl.steer.config.PolicyLossConfig",
        "+actor_rollout_ref.model.hf_config=null",  # the dataclass has it, verl's file does not
        "+seed=3",
        "+critics=mine",
        "+reward.reward_model.rollout.standalone_gpu_memory_utilization=0.5",  # as hf_config above
        "+distillation.teacher_models.teacher_model1.key=a",
        "++actor_rollout_ref.model.override_config={attn_implementation: eager}",
        "+trainer.wandb_proxy=http://proxy",
        "+trainer.mine.savefreq=5",
        "+algorithm.mine=1",
        "++actor_rollout_ref.rollout.val_kwargs={n: 2}",
        "+ray_kwargs.ray_init.num_gpus=1",
        "+mine.rollout.n=1",
        "+data.name=mine",
        "+trainer.seed=3",
        "+actor_rollout_ref.model.override_config.dtype=a",
        "+actor_rollout_ref.rollout.engine_kwargs.vllm.max_num_seqs=12",
        "+actor_rollout_ref.actor.optim.override_optimizer_config.lr=1",
        "+reward.custom_reward_function.reward_kwargs.strict=true",
        "+reward.custom_reward_function.reward_kwargs={strict: true}",
        "+actor_rollout_ref.rollout.engine_kwargs.vllm.swap_space=1",
        "trainer.save_freq=5",
        "model_engine=dp",
    ],
)
def test_other_keys_are_taken(checked, override):
    checked(override)


@pytest.mark.parametrize(
    "overrides",
    [
        ["+seed=42", "seed=7"],
        ["+trainer.mine=1", "~trainer.mine"],
        ["data.custom_cls.path=mine.py", "+data.tokenizer_path=a"],
        ["+critics=mine", "mine.key=2", "++trainer.savefreq=3", "+mine.other=4"],
        ["hardware=cpu", "+actor_rollout_ref.model.override_config._attn_implementation=eager"],
    ],
)
def test_overrides_may_change_what_others_add(checked, overrides):
    checked(*overrides)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_entry_point_ends_in_one_line(monkeypatch, tmp_path):
    words = ["--config-name", "steer", "method=grpo", "hardware=cpu", "+trainer.savefreq=5"]
    monkeypatch.setattr(sys, "argv", ["main", *words])
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path))
    with pytest.raises(SystemExit) as end:
        runpy.run_module("verl.steer.main", run_name="__main__", alter_sys=True)
    assert end.value.code == "steer-verl: trainer.savefreq: unknown; expected one of save_freq"
