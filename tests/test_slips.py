# SPDX-License-Identifier: Apache-2.0
"""Slips in verl's own keys that would end a worker, or a run's meaning, end in one line before Ray starts."""

import re

import pytest
from configurations import ACTOR, resolved
from verl.steer.ray_resources import quote_variables
from verl.steer.requirements import check_and_complete, hardware
from verl.steer.requirements.hardware import check_model_engine
from verl.steer.requirements.model import check_model

ROLLOUT, MODEL = "actor_rollout_ref.rollout", "actor_rollout_ref.model"
CORRECTION, GROUPS = "algorithm.rollout_correction", "algorithm.filter_groups"
PENALTY = ["reward.reward_manager.name=dapo", "+reward.reward_kwargs.max_resp_len=48"]
LENGTH = "+reward.reward_kwargs.overlong_buffer_cfg.len"
PENALTY += [f"+reward.reward_kwargs.overlong_buffer_cfg.{one}" for one in ("enable=true", "penalty_factor=1.0")]
FUNCTION = "+reward.custom_reward_function.reward_kwargs"
OPTIMIZER = f"{ACTOR}.optim"
SEPARATE = ["trainer.v1.trainer_mode=separate_async", f"{ROLLOUT}.agent.agent_loop_manager_class=null"]
SEPARATE += ["data.train_batch_size=4", f"{ACTOR}.ppo_mini_batch_size=1", f"{ACTOR}.ppo_micro_batch_size_per_gpu=8"]
SEPARATE += [f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=8"]

BY_TOKENS = [f"{ACTOR}.use_dynamic_bsz=true", f"{ROLLOUT}.log_prob_use_dynamic_bsz=true"]
TWO_RANKS = ["trainer.n_gpus_per_node=2", f"{ACTOR}.ppo_micro_batch_size_per_gpu=16"]
TWO_RANKS += [f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=64"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # Models of rewards, which this fork's functions do not read
        (
            ["reward.reward_model.enable=true"],
            "reward.reward_model.enable=true: expected reward.custom_reward_function",
        ),
        (
            ["reward.reward_model.enable=true", "reward.custom_reward_function.path=null"],
            "reward.reward_model.model_path=None: expected the folder of a model, or a name on",
        ),
        # The penalty for long responses
        (
            [*PENALTY, f"{LENGTH}=49"],
            "reward.reward_kwargs.overlong_buffer_cfg.len=49: expected at most max_resp_len=48",
        ),
        (
            [*PENALTY, f"{LENGTH}=8", "data.max_response_length=40"],
            "reward.reward_kwargs.max_resp_len=48: expected at most data.max_response_length=40",
        ),
        (
            ["+reward.overlong_buffer_cfg.enable=true"],
            "reward.overlong_buffer_cfg.enable=True: expected false, and reward.reward_kwargs.overlong_buffer_cfg.enab",
        ),
        # Corrections that verl's trainers skip
        (
            [f"{CORRECTION}.bypass_mode=true", f"{CORRECTION}.rollout_is=token"],
            "algorithm.rollout_correction.rollout_is=token: expected None with algorithm.rollout_correction.bypass_mod",
        ),
        (
            [
                f"{CORRECTION}.bypass_mode=true",
                f"{CORRECTION}.rollout_rs=token_k1",
                f"{CORRECTION}.rollout_rs_threshold=1",
            ],
            "algorithm.rollout_correction.rollout_rs=token_k1: expected None with",
        ),
        (
            [f"{CORRECTION}.bypass_mode=true", f"{CORRECTION}.loss_type=reinforce"],
            "algorithm.rollout_correction.loss_type=reinforce: expected None or ppo_clip with",
        ),
        (
            [f"{ACTOR}.policy_loss.loss_mode=bypass_mode"],
            "policy_loss.loss_mode=bypass_mode: expected another with tra",
        ),
        # Names
        ([f"{ROLLOUT}.name=vlm"], "rollout.name=vlm: expected one of vllm, "),
        (
            [f"{ROLLOUT}.name=sglang", f"{ROLLOUT}.agent.agent_loop_manager_class=null"],
            "rollout.name=sglang: expected an engine that is installed",
        ),
        (["trainer.v1.sampler.max_off_policy_strategy=dropp"], "trainer.v1.sampler.max_off_policy_strategy=dropp: exp"),
        # The optimizer's own arguments
        (
            [f"+{OPTIMIZER}.override_optimizer_config.epsilon=1e-5"],
            "actor.optim.optimizer=AdamW, actor.optim.override_optimizer_config={'fused': True, 'epsilon': 1e-05}: ",
        ),
        (
            [f"{OPTIMIZER}.optimizer=Adafactor"],
            "actor.optim.optimizer=Adafactor, actor.optim.override_optimizer_config",
        ),
        # Numbers
        ([f"{OPTIMIZER}.lr_warmup_steps=0.1"], "actor.optim.lr_warmup_steps=0.1: expected an integer of at least -1"),
        ([f"{OPTIMIZER}.lr_warmup_steps=null"], "actor.optim.lr_warmup_steps=None: expected an integer of at least -1"),
        (["+seed=-1"], "rollout.seed=-1: expected an integer of at least 0 and at most"),
        ([f"{ROLLOUT}.seed=null"], "rollout.seed=None: expected an integer of at least 0"),
        (["+seed=20250101120000"], "rollout.seed=20250101120000: expected an integer of at least 0 and at most"),
        ([f"{ROLLOUT}.val_kwargs.top_k=0.5"], "rollout.val_kwargs.top_k=0.5: expected an integer of at least -1"),
        (
            [f"{ROLLOUT}.max_num_seqs=16384"],
            "rollout.max_num_batched_tokens=8192: expected at least rollout.max_num_seqs=16384",
        ),
        (["data.val_max_samples=null"], "data.val_max_samples=None: expected an integer"),
        (["data.dataloader_num_workers=-1"], "data.dataloader_num_workers=-1: expected an integer of at least 0"),
        (["algorithm.kl_ctrl.target_kl=0"], "algorithm.kl_ctrl.target_kl=0: expected a finite number above 0"),
        (
            ["trainer.v1.sampler.max_off_policy_threshold=0"],
            "trainer.v1.sampler.max_off_policy_threshold=0: expected an",
        ),
        (
            [*BY_TOKENS, f"{ACTOR}.use_kl_loss=true", "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=79"],
            "ref.log_prob_max_token_len_per_gpu=79: expected at least 80, for rollouts of 80 tokens",
        ),
        (["trainer.default_local_dir=null"], "trainer.default_local_dir=None: expected a folder"),
        # Groups
        (
            [f"{GROUPS}.enable=true", f"{ROLLOUT}.n=1", "algorithm.adv_estimator=reinforce_plus_plus"],
            "rollout.n=1: expected at least 2 with algorithm.filter_groups.enable=true",
        ),
        (
            [f"{GROUPS}.max_inflight_gen_batches=0"],
            "algorithm.filter_groups.max_inflight_gen_batches=0: expected an in",
        ),
        # Keys that nobody reads
        (["algorithm.use_pf_ppo=true"], "algorithm.use_pf_ppo=True: expected null or false"),
        ([f"{MODEL}.tiled_mlp.enabled=true"], "model.tiled_mlp.enabled=True: expected false"),
        ([f"{ACTOR}.use_prefix_grouper=true"], "actor.use_prefix_grouper=True: expected false"),
        (
            [f"{OPTIMIZER}.warmup_style=linear"],
            "actor.optim.warmup_style=linear: expected one of None, constant, cosine",
        ),
        (
            [f"+{OPTIMIZER}.override_optimizer_config.foreach=true"],
            "actor.optim.optimizer=AdamW, actor.optim.override_optimizer_config={'fused': True, 'foreach': True}: ",
        ),
        (["data.reward_fn_key=source"], "data.reward_fn_key=source: expected data_source"),
        (["data.tokenizer=/x"], "data.tokenizer=/x: expected null, and actor_rollout_ref.model.tokenizer_path in its"),
        ([f"{ROLLOUT}.do_sample=false"], "rollout.do_sample=False: expected true"),
        (["data.custom_cls.name=Mine"], "data.custom_cls.name=Mine: expected data.custom_cls.path with it"),
        (
            [f"{ACTOR}.use_remove_padding=false"],
            "actor.use_remove_padding=False: expected model.use_remove_padding=False in its place, which is read",
        ),
        (
            [f"{ACTOR}.use_torch_compile=false", f"{ACTOR}.fsdp_config.use_torch_compile=true"],
            "actor.use_torch_compile=False: expected actor.fsdp_config.use_torch_compile=False in its place",
        ),
        # What a machine without an accelerator cannot do
        (
            [f"{MODEL}.use_remove_padding=false"],
            "model.use_remove_padding=False: expected true with model.override_con",
        ),
        ([f"{ACTOR}.strategy=fsdp"], "actor.strategy=fsdp: expected fsdp2 with trainer.device=cpu"),
        (
            [f"{ROLLOUT}.free_cache_engine=true"],
            "rollout.free_cache_engine=True: expected false with trainer.device=cpu",
        ),
        (
            [f"{ROLLOUT}.enable_sleep_mode=true"],
            "rollout.enable_sleep_mode=True: expected false with trainer.device=cp",
        ),
        (
            [*TWO_RANKS, f"{ROLLOUT}.tensor_model_parallel_size=2"],
            "rollout.tensor_model_parallel_size=2: expected 1 with trainer.device=cpu",
        ),
        # Options of this fork's reward function
        (
            [f"{FUNCTION}.rule=evall"],
            "reward.custom_reward_function.reward_kwargs.rule='evall': expected one of auto, ",
        ),
        ([f"{FUNCTION}.timeout=2s"], "reward.custom_reward_function.reward_kwargs.timeout='2s': expected a finite num"),
        (
            [f"{FUNCTION}.rules=eval"],
            "reward.custom_reward_function.reward_kwargs.rules: unknown; expected one of rule, ",
        ),
        # Servers of their own
        (
            [*SEPARATE, "data.train_batch_size=16"],
            "data.train_batch_size=16: expected 4, trainer.v1.separate_async.parameter_sync_step=4 times actor.ppo_m",
        ),
        (
            SEPARATE,
            "rollout.nnodes=0: expected at least 1 with trainer.v1.trainer_mode=separate_async",
        ),
        (
            [*SEPARATE, f"{ROLLOUT}.nnodes=1"],
            "rollout.checkpoint_engine.backend=naive: expected another, such as nccl, with trainer.v1.trainer_mode=sep",
        ),
        # Ray's texts
        (
            ["ray_kwargs.ray_init.runtime_env.env_vars=5"],
            "ray_kwargs.ray_init.runtime_env.env_vars=5: expected a section of variables",
        ),
        (
            ["+ray_kwargs.ray_init.runtime_env.env_vars.MINE=true"],
            "ray_kwargs.ray_init.runtime_env.env_vars.MINE=True: expected a text, such as",
        ),
    ],
)
def test_a_slip_ends_in_one_line(laptop_files, overrides, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        check_and_complete(resolved("grpo", "hardware=cpu", "task=arithmetic", *overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        [*PENALTY, f"{LENGTH}=48"],
        [*PENALTY, f"{LENGTH}=8", "reward.reward_kwargs.max_resp_len=40"],
        [f"{ACTOR}.fsdp_config.use_torch_compile=true", f"{ACTOR}.use_torch_compile=true"],
        [f"{ACTOR}.use_torch_compile=true"],  # verl's default
        [f"{ROLLOUT}.max_num_batched_tokens=null"],
        [f"{ROLLOUT}.max_num_batched_tokens=100", f"{ROLLOUT}.enable_chunked_prefill=false"],
        [f"{GROUPS}.max_num_gen_batches=10"],
        [f"{GROUPS}.enable=true", f"{ROLLOUT}.n=1", "trainer.val_only=true"],
        ["trainer.use_v1=false", *SEPARATE[:2], "trainer.save_after=0"],
        [f"{CORRECTION}.bypass_mode=true", f"{CORRECTION}.loss_type=ppo_clip"],
        [f"{OPTIMIZER}.lr_warmup_steps=10"],
        [f"{OPTIMIZER}.optimizer=RMSprop", f"{OPTIMIZER}.override_optimizer_config=null"],
        [f"{FUNCTION}.rule=eval", f"{FUNCTION}.timeout=1"],
        [
            "reward.reward_model.enable=true",
            "reward.reward_model.model_path=/m",
            "reward.custom_reward_function.path=null",
        ],
    ],
)
def test_what_looks_like_a_slip_and_is_none(laptop_files, overrides):
    check_and_complete(resolved("grpo", "hardware=cpu", "task=arithmetic", *overrides))


def test_a_penalty_that_says_nothing_of_its_log_has_none(laptop_files):
    config = resolved("grpo", "hardware=cpu", "task=arithmetic", *PENALTY, f"{LENGTH}=8")
    check_and_complete(config)
    assert config.reward.reward_kwargs.overlong_buffer_cfg.log is False


def test_numbers_among_rays_variables_become_texts():
    variables = "+ray_kwargs.ray_init.runtime_env.env_vars"
    config = resolved("grpo", "hardware=cpu", f"{variables}.MINE=1", f"{variables}.HALF=0.5", f"{variables}.NAME=a")
    quote_variables(config)
    found = config.ray_kwargs.ray_init.runtime_env.env_vars
    assert (found.MINE, found.HALF, found.NAME, found.TORCHDYNAMO_DISABLE) == ("1", "0.5", "a", "1")


def test_a_chat_template_is_no_files_name(laptop_files):
    key = f"{MODEL}.custom_chat_template"
    config = resolved("grpo", "hardware=cpu", "task=arithmetic")
    config.actor_rollout_ref.model.custom_chat_template = "{{ messages[0].content }}"
    check_model(config)
    config.actor_rollout_ref.model.custom_chat_template = "/my/template.jinja"
    with pytest.raises(ValueError, match=f"^{key}=/my/template.jinja: expected a template itself"):
        check_model(config)


def test_weights_of_16_bits_are_warned_of(monkeypatch):
    told = []
    monkeypatch.setattr(hardware.logger, "warning", lambda text, *values: told.append(text % values))
    half = f"{ACTOR}.fsdp_config.model_dtype=bf16"
    check_model_engine(resolved("grpo", half))
    assert [one.partition(":")[0] for one in told] == ["actor.fsdp_config.model_dtype=bf16"]
    check_model_engine(resolved("grpo"))
    check_model_engine(resolved("grpo", half, f"{MODEL}.lora_rank=8"))
    check_model_engine(resolved("eval", half))
    assert len(told) == 1
