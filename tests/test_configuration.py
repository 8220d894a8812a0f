# SPDX-License-Identifier: Apache-2.0
"""Configurations and launchers: what they resolve to, and that a bad value gives one clear line."""

import math
import re
import runpy
import sys
from dataclasses import fields
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from configurations import (
    ACTOR,
    INFLUENCE,
    LAUNCHERS,
    MANAGER,
    METHODS,
    MODEL,
    POLICY_LOSS,
    ROLLOUT,
    ROW,
    TARGET,
    configuration_of,
    resolved,
    validated,
)
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from ray.exceptions import RayTaskError
from verl.steer import main as entry_point
from verl.steer import requirements, run_ending
from verl.steer.audit.scores import AuditOptions
from verl.steer.checkpoint_ledger import UnknownMetric
from verl.steer.config import ADVANTAGE_OPTIONS, PolicyLossConfig
from verl.steer.methods.registry import POLICY_LOSSES
from verl.steer.options import from_config
from verl.steer.requirements import check_and_complete, hardware, loggers
from verl.steer.requirements import run as run_checks
from verl.steer.requirements.verl_values import WITHOUT_INPUTS_IN_V1, check_verl_values
from verl.steer.rollout.checks import check_servers
from verl.steer.run_lock import lock_folder
from verl.trainer.ppo.core_algos import (
    ADV_ESTIMATOR_REGISTRY,
    BASE_LOSSES,
    ENTROPY_CHANGE_ESTIMATORS,
    TOKEN_WEIGHT_NORMALIZERS,
    get_adv_estimator_fn,
    get_policy_loss_fn,
)
from verl.utils.dataset.rl_dataset import RLHFDataset

import verl_steer


def test_overrides_applied_to_a_composition_give_what_hydra_composes():
    overrides = [
        "hardware=cpu",
        f"+{POLICY_LOSS}.token_weight_min=0.7",
        "data.seed=3",
        "++trainer.new=[1]",
        "~data.seed",
    ]
    with initialize_config_dir(str(verl_steer.OVERLAY / "trainer/config"), version_base=None):
        expected = compose("steer", ["method=steer_exp", *overrides])
    assert resolved("steer_exp", *overrides) == expected


def test_launchers_differ_in_their_configuration_only():
    """So that one of them, started for real, stands for all."""
    lines = {name: re.sub("^#.*\n", "", path.read_text(), flags=re.MULTILINE) for name, path in LAUNCHERS.items()}
    assert len(lines) == 6 and len({configuration_of(name) for name in lines}) == 6
    assert len({text.replace(f'" {configuration_of(name)} "', '" CONFIG "') for name, text in lines.items()}) == 1


def test_workers_on_a_laptop_have_the_priority_of_its_other_programs():
    """Ray's own niceness of 15 would leave them a tenth of a core where four programs keep two cores busy."""
    assert resolved("grpo", "hardware=cpu").ray_kwargs.ray_init._system_config.worker_niceness == 0


@pytest.mark.parametrize("name", METHODS)
def test_every_configuration_composes_and_passes_the_checks(name):
    """Each names itself, and its loss and its advantage estimator are registered."""
    config, policy_loss = validated(name)
    assert config.trainer.experiment_name == name
    assert policy_loss.loss_mode in POLICY_LOSSES or get_policy_loss_fn(policy_loss.loss_mode)
    assert config.algorithm.adv_estimator == "grpo" or get_adv_estimator_fn(config.algorithm.adv_estimator)


def test_methods_differ_from_grpo_in_nothing_but_their_own_keys():
    """So that a comparison compares methods: only the loss, the advantage, the clip and the entropy or KL terms.

    GRPO-S is defined with a mean over responses.
    """
    own = ("actor_rollout_ref.actor.policy_loss.", "algorithm.adv_estimator", "trainer.experiment_name")
    own += tuple(
        f"actor_rollout_ref.actor.{key}"
        for key in ("clip_ratio_low", "clip_ratio_high", "entropy_coeff", "use_kl_loss", "kl_loss_coef", "kl_loss_type")
    )

    def flat(node, path=""):
        if OmegaConf.is_dict(node):
            return {k: v for key in node for k, v in flat(node._get_node(key), f"{path}.{key}".lstrip(".")).items()}
        return {path: OmegaConf.to_container(node) if OmegaConf.is_list(node) else node._value()}

    grpo = flat(resolved("grpo", "hardware=cpu"))
    for name in METHODS:
        other = flat(resolved(name, "hardware=cpu"))
        averaged = "actor_rollout_ref.actor.loss_agg_mode" if name == "grpo_s" else None
        different = [key for key in other if other[key] != grpo.get(key) and key != averaged]
        assert other.keys() == grpo.keys() and all(key.startswith(own) for key in different), (name, different)


def test_the_map_follows_linear_unless_it_is_named():
    assert PolicyLossConfig().token_weight_map == "linear"
    assert PolicyLossConfig(linear=False).token_weight_map == "exponential"
    threshold = PolicyLossConfig(linear=True, token_weight_map="threshold")
    assert (threshold.token_weight_map, threshold.token_weight_max) == ("threshold", 1.0)
    assert PolicyLossConfig(linear=False, token_weight_map="linear").token_weight_max == 1.2


def test_the_quantile_follows_the_normalizer_unless_it_is_given():
    quantiles = {
        name: PolicyLossConfig(token_weight_normalizer=name).token_weight_quantile for name in TOKEN_WEIGHT_NORMALIZERS
    }
    assert quantiles == dict.fromkeys(TOKEN_WEIGHT_NORMALIZERS, 0.8) | {"winsorised": 0.95}
    given = PolicyLossConfig(token_weight_normalizer="winsorised", token_weight_quantile=0.8)
    assert given.token_weight_quantile == 0.8


@pytest.mark.parametrize("plus", ["", "+"])
@pytest.mark.parametrize(
    "key, value",
    [
        (f"{POLICY_LOSS}.token_weight_min", 0.7),
        (f"{POLICY_LOSS}.token_weight_map", "threshold"),
        ("algorithm.positive_weight", 0.3),
    ],
)
def test_new_keys_are_taken_with_and_without_plus(plus, key, value):
    assert OmegaConf.select(resolved("grpo", f"{plus}{key}={value}"), key) == value


def test_every_new_field_is_declared_for_hydra():
    """Null in steer.yaml, where the dataclasses then put their defaults."""
    config = resolved("grpo")
    declared = OmegaConf.select(config, POLICY_LOSS)
    new = {field.name for field in fields(PolicyLossConfig) if "option" in field.metadata}
    assert len(new) > 15 and {name for name in new if declared.get(name, "missing") is None} == new
    for options in ADVANTAGE_OPTIONS:
        assert all(config.algorithm.get(field.name, "missing") is None for field in fields(options))


def test_the_exact_estimator_asks_for_the_sums_over_the_vocabulary():
    config, _ = validated("steer_exact", "actor_rollout_ref.actor.fsdp_config.one_pass_reductions=false")
    actor = config.actor_rollout_ref.actor
    assert actor.calculate_entropy and actor.calculate_sum_pi_squared and actor.fsdp_config.one_pass_reductions
    for name in ("steer_exp", "steer_global", "grpo", "dynamic_clip"):
        actor = validated(name)[0].actor_rollout_ref.actor
        assert not actor.calculate_entropy and not actor.calculate_sum_pi_squared


def test_the_adaptive_bonus_asks_for_the_current_entropies():
    assert validated("adaptive_entropy")[0].actor_rollout_ref.actor.calculate_entropy


LAPTOP_TASKS = ["arithmetic", "countdown"]


@pytest.fixture
def any_machine(monkeypatch):
    """One with the hardware and the CPUs of any configuration."""
    for check in ("check_platform", "check_gpus", "check_cpus"):
        monkeypatch.setattr(requirements, check, lambda config: None)


@pytest.mark.parametrize(
    "hardware, device, number", [("cpu", "cpu", 1), ("gpu1", "cuda", 1), ("gpu8", "cuda", 8), ("gpu8_long", "cuda", 8)]
)
@pytest.mark.parametrize("task", ["dapo_math", *LAPTOP_TASKS])
def test_every_hardware_goes_with_every_task(any_machine, hardware, device, number, task):
    config = resolved("steer_exp", f"hardware={hardware}", f"task={task}")
    if hardware == "gpu8" and task in LAPTOP_TASKS:
        # Of its few rollouts one of eight ranks has less than its micro-batches.
        with pytest.raises(ValueError, match="^rollout.log_prob_micro_batch_size_per_gpu=128: expected a divisor of"):
            check_and_complete(config)
        smaller = {"rollout.log_prob_micro_batch_size_per_gpu": 2, "actor.ppo_micro_batch_size_per_gpu": 2}
        for key, size in smaller.items():
            OmegaConf.update(config, f"actor_rollout_ref.{key}", size)
    OmegaConf.resolve(config)
    check_and_complete(config)
    assert (config.trainer.device, config.trainer.n_gpus_per_node) == (device, number)
    # On the CPU the rank takes the one device that Ray is told of.
    assert config.ray_kwargs.ray_init.get("num_gpus") == (1 if hardware == "cpu" else None)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"token_weight_min": -1.0}, "policy_loss.token_weight_min=-1.0: expected a finite number of at least 0"),
        ({"token_weight_min": 0.0}, "policy_loss.token_weight_min=0.0: expected a finite number above 0"),
        ({"token_weight_min": 1.5}, "policy_loss.token_weight_min=1.5: expected at most token_weight_max=1.2"),
        ({"linear": False, "token_weight_max": 1.1}, "policy_loss.token_weight_max=1.1: expected at most 1 in the exp"),
        (
            {"token_weight_map": "threshold", "token_weight_max": 1.1},
            "policy_loss.token_weight_max=1.1: expected at most 1 in the threshold map",
        ),
        (
            {"token_weight_map": "exponential", "token_weight_max": 1.1},
            "policy_loss.token_weight_max=1.1: expected at most 1 in the exponential map",
        ),
        (
            {"entropy_control_mode": "asymmetric", "token_weight_normalizer": "winsorised"},
            "policy_loss.token_weight_normalizer='winsorised': expected another with entropy_control_mode=asymmetric",
        ),
        (
            {"entropy_control_mode": "signed"},
            "policy_loss.entropy_control_mode='signed': expected one of symmetric, asymmetric",
        ),
        (
            {"token_weight_map": "cubic"},
            "policy_loss.token_weight_map='cubic': expected one of linear, exponential, thr",
        ),
        (
            {"token_weight_quantile": 1.5},
            "policy_loss.token_weight_quantile=1.5: expected a number of at least 0 and at",
        ),
        (
            {"token_weight_normalizer": "all"},
            "policy_loss.token_weight_normalizer='all': expected one of micro_batch, rank, w",
        ),
        (
            {"token_weight_ema_decay": -1},
            "policy_loss.token_weight_ema_decay=-1: expected a number of at least 0 and at",
        ),
        (
            {"token_weight_normalizer": "global", "entropy_change_estimator": "exact"},
            "policy_loss.token_weight_normalizer='global': expected one of micro_batch, rank, winsorised with entropy",
        ),
        (
            {"token_weight_map": "threshold", "token_weight_normalizer": "rank"},
            "policy_loss.token_weight_normalizer='rank': expected another in the threshold map",
        ),
        (
            {"linear": False, "entropy_control_mode": "asymmetric", "token_weight_normalizer": "rank"},
            "policy_loss.token_weight_normalizer='rank': expected another, or linear=true, with entropy_control",
        ),
        (
            {"token_weight_map": "threshold", "token_weight_normalizer": "winsorised"},
            "policy_loss.token_weight_normalizer='winsorised': expected another in the threshold map",
        ),
        (
            {"token_weight_map": "threshold", "token_weight_quantile": 1.0},
            "policy_loss.token_weight_quantile=1.0: expected a number of at least 0 and below 1 in the threshold map",
        ),
        (INFLUENCE | {"base_loss": "gspo"}, "policy_loss.base_loss='gspo': expected vanilla with entropy_change_estim"),
        (
            INFLUENCE | {"token_weight_normalizer": "rank"},
            "policy_loss.token_weight_normalizer='rank': expected micro_batch (the default) with entropy_change_est",
        ),
        (TARGET | {"token_weight_min": 1.1}, "policy_loss.token_weight_min=1.1: expected bounds on both sides of 1"),
        (TARGET | {"token_weight_max": 0.9}, "policy_loss.token_weight_max=0.9: expected bounds on both sides of 1"),
        (TARGET | {"target_entropy": {2: 0.3}}, "policy_loss.target_entropy={2: 0.3}: expected training steps from 1"),
        (
            TARGET | {"target_entropy": {1: 0.3, 1.5: 0.2}},
            "policy_loss.target_entropy={1: 0.3, 1.5: 0.2}: expected train",
        ),
        (
            TARGET | {"target_entropy": {0: 0.3, 1: 0.2}},
            "policy_loss.target_entropy={0: 0.3, 1: 0.2}: expected training",
        ),
        (TARGET | {"target_entropy": {1: -1}}, "policy_loss.target_entropy.1=-1: expected a finite number above 0"),
        (TARGET | {"target_gain": 2}, "policy_loss.target_gain=2: expected a number above 0 and at most 1"),
        (TARGET | {"target_controller": "pid"}, "policy_loss.target_controller='pid': expected one of solve, pi"),
        (
            TARGET | {"entropy_change_estimator": "exact"},
            "policy_loss.entropy_change_estimator='exact': expected influence with token_weight_map=target and",
        ),
        (INFLUENCE | {"token_weight_map": "band"}, "policy_loss.entropy_band=None: expected a number of nats"),
        ({"influence_refresh": 0}, "policy_loss.influence_refresh=0: expected an integer of at least 1"),
        (
            {"base_loss": "bypass_mode"},
            "policy_loss.base_loss='bypass_mode': expected one of vanilla, gspo, cispo, sapo, geo_mean, gpg",
        ),
        ({"advantage_entropy_alpha": -1}, "advantage_entropy_alpha=-1: expected a finite number of at least 0"),
        ({"advantage_entropy_kappa": 1.0}, "policy_loss.advantage_entropy_kappa=1.0: expected a finite number above 1"),
        ({"dynamic_clip_low": 0.0}, "policy_loss.dynamic_clip_low=0.0: expected a finite number above 0"),
        ({"dynamic_clip_high": "wide"}, "policy_loss.dynamic_clip_high='wide': expected a finite number above 0"),
        ({"high_entropy_share": 0}, "policy_loss.high_entropy_share=0: expected a number above 0 and at most 1"),
        (
            {"quadrant": "all"},
            "policy_loss.quadrant='all': expected one of positive_likely, positive_unlikely, negative",
        ),
        ({"quadrant_weight": -0.5}, "policy_loss.quadrant_weight=-0.5: expected a finite number of at least 0"),
        ({"quadrant_probability": 2}, "policy_loss.quadrant_probability=2: expected a number above 0 and at most 1"),
        ({"target_entropy": True}, "policy_loss.target_entropy=True: expected a finite number above 0"),
        ({"entropy_coeff_step": 0}, "policy_loss.entropy_coeff_step=0: expected a finite number above 0"),
        ({"entropy_coeff_max": 0}, "policy_loss.entropy_coeff_max=0: expected a finite number above 0"),
        ({"clip_cov_ratio": 0.0}, "policy_loss.clip_cov_ratio=0.0: expected a number above 0 and at most 1"),
        ({"kl_cov_ratio": -1}, "policy_loss.kl_cov_ratio=-1: expected a number above 0 and at most 1"),
        ({"kl_cov_ratio": 2.0}, "policy_loss.kl_cov_ratio=2.0: expected a number above 0 and at most 1"),
        ({"clip_cov_lb": 5.0}, "policy_loss.clip_cov_lb=5.0: expected a number below clip_cov_ub=5.0"),
        ({"loss_mode": "dro"}, "policy_loss.dro_beta=None: expected a finite number above 0 with the loss dro"),
        (
            {"loss_mode": "entropy_control", "base_loss": "dro", "dro_beta": 0},
            "policy_loss.dro_beta=0: expected a finite number above 0 with the loss dro",
        ),
        ({"linear": "yes"}, "policy_loss.linear='yes': expected one of true, false"),
        ({"entropy_change_estimator": "best"}, "entropy_change_estimator='best': expected one of released"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PolicyLossConfig(**options)


NUMBERS = [field.name for field in fields(PolicyLossConfig) if "float" in str(field.type)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, True, "0.5", [0.5]], ids=str)
@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_is_a_finite_number(name, bad):
    if (name, bad) in (("clip_cov_lb", -math.inf), ("clip_cov_ub", math.inf)):
        assert getattr(PolicyLossConfig(**{name: bad}), name) == bad  # bounds, of which there may be none
    else:
        with pytest.raises(ValueError, match=rf"^policy_loss.{name}={re.escape(repr(bad))}: expected a .*number"):
            PolicyLossConfig(**{name: bad})


def test_upstreams_numbers_may_be_null():
    """Where upstream takes its own default."""
    names = ["clip_cov_ratio", "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio", "ppo_kl_coef", "dro_beta"]
    options = PolicyLossConfig(**dict.fromkeys(names))
    assert all(getattr(options, name) is None for name in names) and set(names) < set(NUMBERS)


@pytest.mark.parametrize("estimator", ENTROPY_CHANGE_ESTIMATORS)
@pytest.mark.parametrize("base_loss", BASE_LOSSES)
def test_an_estimator_that_reads_ppos_clip_goes_with_ppos_loss_only(base_loss, estimator):
    options = {"base_loss": base_loss, "entropy_change_estimator": estimator}
    if base_loss == "vanilla" or estimator in ("released", "squared"):
        PolicyLossConfig(**options)
    else:
        message = f"policy_loss.base_loss='{base_loss}': expected vanilla with entropy_change_estimator={estimator}"
        with pytest.raises(ValueError, match=re.escape(message)):
            PolicyLossConfig(**options)


def test_bad_value_ends_a_launcher_in_one_line(command, root, tmp_path):
    """From the command line to the message, without Ray."""
    overrides = ("hardware=cpu", f"+{POLICY_LOSS}.token_weight_min=-1")
    result = command("bash", root / "run/run_exp.sh", *overrides, cwd="/", OUTPUT_DIR=str(tmp_path))
    assert result.returncode == 1 and "Ray" not in result.stdout
    assert result.stderr.strip().splitlines()[-1].startswith("steer-verl: policy_loss.token_weight_min=-1: expected")
    assert "Traceback" not in result.stderr


HEAD = ("entropy_change_estimator=influence", "token_weight_map=target", "influence_way=head")


@pytest.mark.parametrize(
    "overrides, message",
    [
        ([f"{POLICY_LOSS}.loss_mode=nothing"], "policy_loss.loss_mode=nothing: expected one of entropy_control, "),
        ([f"{POLICY_LOSS}.loss_mode=opef"], "policy_loss.loss_mode=opef: expected one of opefo"),
        ([f"{ACTOR}.loss_agg_mode=mean"], "actor.loss_agg_mode=mean: expected one of token-mean, token-sum, "),
        (
            [
                f"{POLICY_LOSS}.loss_mode=adaptive_entropy",
                f"{POLICY_LOSS}.target_entropy=0.2",
                f"{ACTOR}.entropy_coeff=0.01",
            ],
            "actor.entropy_coeff=0.01: expected 0 with policy_loss.loss_mode=adaptive_entropy, which has",
        ),
        ([f"{ROLLOUT}.response_length=20"], "rollout.response_length=20: expected data.max_response_length="),
        ([f"{ROLLOUT}.prompt_length=20"], "rollout.prompt_length=20: expected data.max_prompt_length="),
        ([f"{MODEL}.lora_alpha=0"], "model.lora_alpha=0: expected a finite number above 0"),
        (["reward.reward_manager.source=file"], "reward.reward_manager.source=file: expected register or importlib"),
        (["reward.reward_manager.name=dap"], "reward.reward_manager.name=dap: expected one of dapo, "),
        (
            ["+reward.reward_kwargs.overlong_buffer_cfg.enable=true"],
            "reward.reward_manager.name=naive: expected dapo with reward.reward_kwargs.overlong_buffer_cfg.enable=true",
        ),
        (
            ["algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=seq_reward"],
            "algorithm.filter_groups.metric=seq_reward: expected one of reward, score, acc with reward.custom_reward",
        ),
        ([f"{ACTOR}.fsdp_config.model_dtype=bf17"], "actor.fsdp_config.model_dtype=bf17: expected one of 16, fp16, "),
        (
            [f"{ACTOR}.fsdp_config.mixed_precision.reduce_dtype=half"],
            "actor.fsdp_config.mixed_precision.reduce_dtype=half: expected one of 16, fp16, ",
        ),
        (
            [f"{ACTOR}.fsdp_config.dtype=float16"],
            "actor.fsdp_config.dtype=float16: expected actor.fsdp_config.mixed_precision in its place",
        ),
        (
            ["actor_rollout_ref.ref.fsdp_config.dtype=float16"],
            "ref.fsdp_config.dtype=float16: expected ref.fsdp_config.mixed_precision in its place",
        ),
        (
            ["actor_rollout_ref.ref.fsdp_config.model_dtype=bf17"],
            "ref.fsdp_config.model_dtype=bf17: expected one of 16, fp16, ",
        ),
        (
            [f"{ACTOR}.optim.optimizer_impl=torch.optimm"],
            "actor.optim.optimizer_impl=torch.optimm: expected a module that is installed",
        ),
        (
            ["+reward.reward_kwargs.overlong_buffer_cfg.enable=true", "reward.reward_manager.name=dapo"],
            "reward.reward_kwargs.max_resp_len=None: expected a finite number above 0",
        ),
        (
            [f"{ACTOR}.optim.optimizer_impl=bitsandbites.optim"],
            "actor.optim.optimizer_impl=bitsandbites.optim: expected a module that is installed",
        ),
        ([f"{ROLLOUT}.agent.num_workers=0"], "rollout.agent.num_workers=0: expected an integer of at least 1"),
        ([f"{ROLLOUT}.dtype=float33"], "rollout.dtype=float33: expected one of auto, half, "),
        ([f"{ROLLOUT}.top_k=1.5"], "rollout.top_k=1.5: expected an integer of at least -1"),
        ([f"{ROLLOUT}.max_num_seqs=0"], "rollout.max_num_seqs=0: expected an integer of at least 1"),
        (
            [f"{ACTOR}.checkpoint.save_contents=hf_model"],
            "actor.checkpoint.save_contents=hf_model: expected a list of model, optimizer, extra, hf_model",
        ),
        (
            ["task=arithmetic", "data.train_batch_size=8"],
            "rollout.log_prob_micro_batch_size_per_gpu=128: expected a divisor of the 64 rollouts of a rank",
        ),
        (
            ["task=arithmetic", "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=0"],
            "rollout.log_prob_micro_batch_size_per_gpu=0: expected an integer of at least 1",
        ),
        (
            ["task=arithmetic", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=24"],
            "actor.ppo_micro_batch_size_per_gpu=24: expected a divisor of the 32 rollouts of a rank (actor.ppo_mini_",
        ),
        (
            ["task=arithmetic", "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2"],
            "actor.ulysses_sequence_parallel_size=2: expected 1 where flash-attn is not installed",
        ),
        (
            [f"{ACTOR}.use_dynamic_bsz=true", f"{ACTOR}.ppo_max_token_len_per_gpu=4095"],
            "actor.ppo_max_token_len_per_gpu=4095: expected at least 4096, for rollouts of 4096 tokens",
        ),
        (
            [f"{ROLLOUT}.log_prob_use_dynamic_bsz=true", f"{ROLLOUT}.log_prob_max_token_len_per_gpu=4095"],
            "rollout.log_prob_max_token_len_per_gpu=4095: expected at least 4096, for rollouts of 4096 tokens",
        ),
        (
            [f"{MODEL}.lora.rank=8"],
            "model.lora.rank=8: expected model.lora_rank above 0 with it, which FSDP reads",
        ),
        (
            [f"{MODEL}.lora_adapter_path=/no/adapter"],
            "model.lora_adapter_path=/no/adapter: expected model.lora_rank above 0 with it",
        ),
        (
            [f"{MODEL}.lora_adapter_path=/no/adapter", f"{MODEL}.lora_rank=8"],
            "model.lora_adapter_path=/no/adapter: expected a folder with adapter_config.json",
        ),
        *(
            (
                ["data.filter_overlong_prompts=false", f"data.truncation={end}"],
                f"data.truncation={end}: expected left with data.filter_overlong_prompts=false: verl cuts",
            )
            for end in ("error", "right")
        ),
        (
            [f"{ACTOR}.ppo_mini_batch_size=5", f"{ACTOR}.use_dynamic_bsz=true", "trainer.n_gpus_per_node=3"],
            "actor.ppo_mini_batch_size=5: expected a number whose product with rollout.n=8 the 3 ranks divide",
        ),
        (
            ["actor_rollout_ref.rollout.name=sglang"],
            "rollout.name=sglang: expected vllm with rollout.agent.agent_loop_manager_class=verl.steer.rollout.batched",
        ),
        (
            [f"{POLICY_LOSS}.{option}" for option in HEAD] + ["actor_rollout_ref.model.lora_rank=8"],
            "model.lora_rank=8: expected 0 with policy_loss.influence_way=head",
        ),
        (
            [f"{POLICY_LOSS}.{option}" for option in HEAD] + [f"{ACTOR}.fsdp_config.offload_policy=true"],
            "actor.fsdp_config.offload_policy=True: expected false with policy_loss.influence_way=head",
        ),
        (
            ["algorithm.adv_estimator=aepo", "++algorithm.rollout_correction.bypass_mode=true"],
            "algorithm.adv_estimator=aepo: expected another in bypass mode",
        ),
        (
            ["algorithm.adv_estimator=aepo", f"{ACTOR}.loss_agg_mode=seq-mean-token-sum"],
            "actor.loss_agg_mode=seq-mean-token-sum: expected one of token-mean, seq-mean-token-mean with algorithm",
        ),
        (["hardware=gpu8"], "trainer.device=cuda: verl's platform here is cpu; expected hardware=cpu"),
        (
            ["++algorithm.rollout_correction.bypass_mode=true", "actor_rollout_ref.actor.strategy=mine"],
            "actor.strategy=mine: expected one of fsdp, fsdp2",
        ),
        (["algorithm.positive_weight=2"], "algorithm.positive_weight=2: expected a number of at least 0 and at most 1"),
        (
            [f"{POLICY_LOSS}.entropy_change_estimator=exact", "actor_rollout_ref.actor.strategy=automodel"],
            "actor.strategy=automodel: expected one of fsdp, fsdp2: entropy_change_estimator=exact needs",
        ),
        (
            [f"{POLICY_LOSS}.entropy_change_estimator=exact", "actor_rollout_ref.model.use_fused_kernels=true"],
            "model.use_fused_kernels=true: expected false with entropy_change_estimator=exact",
        ),
        (
            [f"{POLICY_LOSS}.token_weight_normalizer=ema", "actor_rollout_ref.actor.strategy=automodel"],
            "actor.strategy=automodel: expected one of fsdp, fsdp2: token_weight_normalizer=ema",
        ),
        (
            [f"{POLICY_LOSS}.token_weight_normalizer=ema", "++algorithm.rollout_correction.bypass_mode=true"],
            "policy_loss.token_weight_normalizer=ema: expected micro_batch where the trainer computes no entropies",
        ),
        (
            ["algorithm.adv_estimator=gtpo", "++algorithm.rollout_correction.bypass_mode=true"],
            "algorithm.adv_estimator=gtpo: expected another where the trainer computes no entropies",
        ),
        (
            [f"{POLICY_LOSS}.loss_mode=adaptive_entropy", "++algorithm.rollout_correction.bypass_mode=true"],
            "policy_loss.loss_mode=adaptive_entropy: expected another where the trainer computes no entropies",
        ),
        (
            [f"{POLICY_LOSS}.loss_mode=adaptive_entropy", "actor_rollout_ref.actor.loss_agg_mode=token-sum"],
            "actor.loss_agg_mode=token-sum: expected one of token-mean, seq-mean-token-mean with policy_loss",
        ),
        (
            ["algorithm.adv_estimator=unlikeliness", "trainer.v1.trainer_mode=sync"],
            "trainer.v1.trainer_mode=sync: expected steer with algorithm.adv_estimator=unlikeliness",
        ),
        (
            ["algorithm.adv_estimator=psr", "algorithm.use_kl_in_reward=true", "trainer.v1.trainer_mode=sync"],
            "trainer.v1.trainer_mode=sync: expected steer with algorithm.adv_estimator=psr, algorithm.use_kl_in_reward",
        ),
        (
            [f"{POLICY_LOSS}.entropy_change_estimator=exact", "trainer.v1.trainer_mode=sync", f"{MANAGER}=null"],
            "trainer.v1.trainer_mode=sync: expected steer with policy_loss.entropy_change_estimator=exact",
        ),
        (
            [f"{POLICY_LOSS}.loss_mode=siren", "trainer.v1.trainer_mode=sync", f"{MANAGER}=null"],
            "trainer.v1.trainer_mode=sync: expected steer with policy_loss.loss_mode=siren",
        ),
        (
            [f"{POLICY_LOSS}.loss_mode=adaptive_entropy", "trainer.v1.trainer_mode=sync", f"{MANAGER}=null"],
            "trainer.v1.trainer_mode=sync: expected steer with policy_loss.loss_mode=adaptive_entropy",
        ),
        (
            [f"{POLICY_LOSS}.loss_mode=vanilla", "distillation.enabled=true"],
            "distillation.enabled=True: the batched manager",
        ),
        (
            [f"{POLICY_LOSS}.entropy_change_estimator=exact", "trainer.use_v1=false", f"{MANAGER}=null"],
            "trainer.use_v1=False: expected true with policy_loss.entropy_change_estimator=exact",
        ),
        (
            ["trainer.v1.trainer_mode=sync"],
            "trainer.v1.trainer_mode=sync: expected steer with rollout.agent.agent_loop_manager_class="
            "verl.steer.rollout.batched_manager.BatchedAgentLoopManager (null: verl's manager)",
        ),
        (
            ["trainer.use_v1=false"],
            "trainer.use_v1=False: expected true with rollout.agent.agent_loop_manager_class=verl.",
        ),
        ([f"{POLICY_LOSS}.token_weight_min=true"], "policy_loss.token_weight_min=True: expected a finite number"),
        ([f"{POLICY_LOSS}.token_weight_max=inf"], "policy_loss.token_weight_max=inf: expected a finite number"),
        ([f"{POLICY_LOSS}.token_weight_max=much"], "policy_loss.token_weight_max='much': expected a finite number"),
        (
            ["trainer.use_v1=false", f"{MANAGER}=null"],
            "trainer.use_v1=False: expected true with policy_loss.loss_mode=entropy_control",
        ),
        (
            ["distillation.enabled=true", f"{MANAGER}=null"],
            "distillation.enabled=true: expected false with policy_loss",
        ),
        ([f"{ACTOR}.clip_ratio_c=1"], "actor.clip_ratio_c=1: expected a number above 1 with the loss vanilla"),
        ([f"{ACTOR}.clip_ratio_c=null"], "actor.clip_ratio_c=None: expected a number above 1 with the loss vanilla"),
        ([f"{ACTOR}.clip_ratio_c=nan"], "actor.clip_ratio_c=nan: expected a number above 1 with the loss vanilla"),
        (
            [f"{ACTOR}.clip_ratio_c=0.5", f"{POLICY_LOSS}.loss_mode=dynamic_clip"],
            "actor.clip_ratio_c=0.5: expected a number above 1 with the loss dynamic_clip",
        ),
        *(
            (
                [f"{ACTOR}.clip_ratio_c=1", f"{POLICY_LOSS}.loss_mode={loss}"],
                f"actor.clip_ratio_c=1: expected a number above 1 with the loss {loss}",
            )
            for loss in ("archer", "bapo", "ce_gppo", "entropic", "opefo")
        ),
        (
            [f"{ACTOR}.clip_ratio_c=0", f"{POLICY_LOSS}.base_loss=dppo_tv"],
            "actor.clip_ratio_c=0: expected a number above 0 with the loss dppo_tv",
        ),
        ([f"{ACTOR}.clip_ratio_low=-0.1"], "actor.clip_ratio_low=-0.1: expected a number of at least 0"),
        ([f"{ACTOR}.clip_ratio_low=nan"], "actor.clip_ratio_low=nan: expected a number of at least 0"),
        ([f"{ACTOR}.clip_ratio_high=-1"], "actor.clip_ratio_high=-1: expected a number of at least 0"),
        ([f"{ACTOR}.clip_ratio_high=true"], "actor.clip_ratio_high=True: expected a number of at least 0"),
        (
            ["task=countdown_learned", "reward.custom_reward_function.reward_kwargs.model_path=/nowhere"],
            "reward.custom_reward_function.reward_kwargs.model_path=/nowhere: expected the folder of a reward model",
        ),
        (
            [f"{ACTOR}.clip_ratio_high=null", f"{ACTOR}.clip_ratio=wide"],
            "actor.clip_ratio=wide: expected a number of at least 0",
        ),
        ([f"{ACTOR}.entropy_coeff=nan"], "actor.entropy_coeff=nan: expected a finite number"),
        ([f"{ACTOR}.entropy_coeff=null"], "actor.entropy_coeff=None: expected a finite number"),
        ([f"{ACTOR}.kl_loss_coef=strong"], "actor.kl_loss_coef='strong': expected a finite number"),
        ([f"{ACTOR}.loss_scale_factor=0"], "actor.loss_scale_factor=0: expected a finite number above 0"),
        ([f"{ACTOR}.optim.lr=-1e-6"], "actor.optim.lr=-1e-06: expected a finite number of at least 0"),
        ([f"{ACTOR}.ppo_epochs=0"], "actor.ppo_epochs=0: expected an integer of at least 1"),
        ([f"{ACTOR}.ppo_mini_batch_size=0"], "actor.ppo_mini_batch_size=0: expected an integer of at least 1"),
        (["actor_rollout_ref.rollout.n=0"], "rollout.n=0: expected an integer of at least 1"),
        (["data.train_batch_size=0"], "data.train_batch_size=0: expected an integer of at least 1"),
        (["algorithm.adv_estimator=clipb"], "algorithm.adv_estimator=clipb: expected one of gae, "),
        ([f"{ACTOR}.use_kl_loss=true", f"{ACTOR}.kl_loss_type=k4"], "actor.kl_loss_type=k4: expected one of kl, k1, "),
        (
            ["algorithm.use_kl_in_reward=true", "algorithm.kl_penalty=full"],
            "algorithm.kl_penalty=full: expected one of kl, k1, ",
        ),
        (
            ["algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl.type=constant"],
            "algorithm.kl_ctrl.type=constant: expected one of fixed, adaptive",
        ),
        (
            [f"+{POLICY_LOSS}.token_weight_mim=0.5"],
            "policy_loss.token_weight_mim: unknown; expected one of token_weight_min, ",
        ),
        (["trainer.entropy_audit=5"], "trainer.entropy_audit=5: expected a section of keys below it"),
    ],
)
def test_runs_that_cannot_work_are_refused(monkeypatch, overrides, message):
    """Where flash-attn is not installed."""
    monkeypatch.setattr(hardware, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_and_complete(resolved("steer_exp", "hardware=cpu", *overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.v1.trainer_mode=sync", f"{MANAGER}=null"],
        ["trainer.use_v1=false", f"{MANAGER}=null", f"{POLICY_LOSS}.loss_mode=gspo"],
        ["algorithm.adv_estimator=psr", "trainer.v1.trainer_mode=sync", f"{MANAGER}=null"],
        ["algorithm.adv_estimator=psr", "algorithm.use_kl_in_reward=true"],
        # What a loss doesn't read may be anything, and a bound may be infinite or fall back to clip_ratio.
        [f"{ACTOR}.clip_ratio_c=null", f"{POLICY_LOSS}.base_loss=gspo", f"{ACTOR}.kl_loss_type=k4"],
        [f"{ACTOR}.clip_ratio_c=0.5", f"{POLICY_LOSS}.loss_mode=cispo"],
        [f"{ACTOR}.clip_ratio_c=1", f"{POLICY_LOSS}.base_loss=dppo_kl"],
        [f"{ACTOR}.clip_ratio_c=inf", f"{ACTOR}.clip_ratio_high=inf", f"{ACTOR}.clip_ratio_low=null"],
        [f"{POLICY_LOSS}.entropy_control_mode=asymmetric", f"{POLICY_LOSS}.token_weight_max=1.5"],
        [f"{MODEL}.lora_adapter_path=hdfs://cluster/adapter", f"{MODEL}.lora_rank=8"],  # verl fetches it
    ],
)
def test_runs_that_can_work_are_not_refused(overrides):
    check_and_complete(resolved("steer_exp", "hardware=cpu", "trainer.save_after=0", *overrides))


@pytest.mark.parametrize("plus", ["", "+"])
def test_the_entropy_audit_is_off_unless_it_is_asked_for(plus):
    config, _ = validated("steer_exp")
    assert from_config(AuditOptions, config.trainer.entropy_audit) == AuditOptions(freq=0)
    config, _ = validated("steer_exp", f"{plus}trainer.entropy_audit.freq=5", f"{plus}trainer.entropy_audit.tokens=100")
    assert from_config(AuditOptions, config.trainer.entropy_audit) == AuditOptions(freq=5, tokens=100)


@pytest.mark.parametrize(
    "override, message",
    [
        ("trainer.entropy_audit.freq=-1", "trainer.entropy_audit.freq=-1: expected an integer of at least 0"),
        ("trainer.entropy_audit.freq=often", "trainer.entropy_audit.freq='often': expected an integer of at least 0"),
        ("+trainer.entropy_audit.every=2", "trainer.entropy_audit.every: unknown; expected one of freq, tokens"),
        (
            f"trainer.v1.trainer_mode=sync {MANAGER}=null",
            "trainer.v1.trainer_mode=sync: expected steer with trainer.entropy_audit",
        ),
        (f"trainer.use_v1=false {MANAGER}=null", "trainer.use_v1=False: expected true with trainer.entropy_audit"),
        (
            "actor_rollout_ref.actor.strategy=automodel",
            "actor.strategy=automodel: expected fsdp or fsdp2 with trainer.",
        ),
        (
            "actor_rollout_ref.actor.fsdp_config.one_pass_reductions=false",
            "actor.fsdp_config.one_pass_reductions=False: expected true with trainer.entropy_audit.freq=2",
        ),
        (
            "actor_rollout_ref.model.use_fused_kernels=true",
            "model.use_fused_kernels=True: expected false with trainer.entropy_audit.freq=2",
        ),
        (
            "++algorithm.rollout_correction.bypass_mode=true",
            "algorithm.rollout_correction.bypass_mode=True: expected false with trainer.entropy_audit.freq=2",
        ),
    ],
)
def test_an_audit_that_cannot_be_made_is_refused(override, message):
    overrides = override.split() if "freq" in override else ["trainer.entropy_audit.freq=2", *override.split()]
    with pytest.raises(ValueError, match=re.escape(message)):
        check_and_complete(resolved("grpo", "hardware=cpu", *overrides))
    if "entropy_audit" not in override:
        check_and_complete(resolved("grpo", "hardware=cpu", "trainer.save_after=0", *override.split()))


@pytest.mark.parametrize(
    "overrides, message",
    [
        *(
            (
                ["trainer.save_best_only=true", f"trainer.test_freq={never}"],
                f"trainer.test_freq={never}: expected at least 1 with trainer.save_best_only=true",
            )
            for never in (-1, 0)
        ),
        (
            ["trainer.v1.trainer_mode=sync", f"{MANAGER}=null"],
            "trainer.save_after=80: expected 0 with trainer.v1.trainer_mode=sync and",
        ),
        (
            ["trainer.use_v1=false", f"{MANAGER}=null"],
            "trainer.save_after=80: expected 0 with trainer.v1.trainer_mode=steer and trainer.",
        ),
        (
            ["task=arithmetic", "trainer.v1.trainer_mode=sync", f"{MANAGER}=null", "trainer.save_best_only=true"],
            "trainer.save_best_only=true: expected false with trainer.v1.trainer_mode=sync and trainer.use_v1=true",
        ),
        (
            [
                "task=arithmetic",
                "trainer.v1.trainer_mode=sync",
                f"{MANAGER}=null",
                "trainer.delete_old_best_checkpoint=true",
            ],
            "trainer.delete_old_best_checkpoint=true: expected false with trainer.v1.trainer_mode=sync",
        ),
        (
            ["task=arithmetic", "trainer.v1.trainer_mode=sync", f"{MANAGER}=null", "trainer.rollout_timeout=5"],
            "trainer.rollout_timeout=5: expected 3600.0 with trainer.v1.trainer_mode=sync",
        ),
        (
            ["task=arithmetic", "trainer.delete_old_best_checkpoint=true"],
            "trainer.delete_old_best_checkpoint=true: expected false without trainer.save_best_only=true or a",
        ),
        (
            ["task=arithmetic", "trainer.v1.trainer_mode=sync", f"{MANAGER}=null", "trainer.best_metric_key=acc"],
            "trainer.best_metric_key=acc: expected null with trainer.v1.trainer_mode=sync",
        ),
        (
            ["+trainer.remove_previous_ckpt_in_save=true"],
            "trainer.remove_previous_ckpt_in_save=true: expected trainer.max_actor_ckpt_to_keep=1 instead",
        ),
        (["actor_rollout_ref.actor.checkpoint.async_save=true"], "actor.checkpoint.async_save=true: expected false"),
    ],
)
def test_checkpoints_that_would_not_come_are_refused(overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_and_complete(resolved("grpo", "hardware=cpu", *overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.save_best_only=true"],
        ["trainer.max_actor_ckpt_to_keep=2"],
        ["task=arithmetic", "trainer.v1.trainer_mode=sync", f"{MANAGER}=null"],
        ["trainer.val_only=true", "trainer.test_freq=-1", "trainer.save_best_only=true"],
    ],
)
def test_checkpoints_that_come_are_taken(overrides):
    check_and_complete(resolved("grpo", "hardware=cpu", *overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["save_best_only=true"],
            "best_metric_key=null: expected a metric, such as val-core/a/b/acc/mean@2: ",
        ),
        (
            ["best_metric_key=val-core/c/acc/mean@2"],
            "best_metric_key=val-core/c/acc/mean@2: expected a metric",
        ),
        (
            ["best_metric_key=val-core/a/acc/mean@2"],
            "best_metric_key=val-core/a/acc/mean@2: expected a metric",
        ),
        (
            ["best_metric_key=val-core/a/b/acc/mean@2", "test_freq=-1"],
            "test_freq=-1: expected at least 1 with",
        ),
        (["best_metric_key=val-core/a/b/acc/mean@2"], None),
        (["best_metric_key=val-aux/x/acc/pass@2", "save_best_only=true"], None),
        (["best_metric_key=others"], None),
        ([], None),
    ],
)
def test_the_metric_of_best_checkpoints_is_of_a_validated_source(laptop_files, overrides, message):
    for name, source in (("one", "a/b"), ("two", "x")):
        rows = {column: [value] for column, value in (ROW | {"data_source": source}).items()}
        pq.write_table(pa.table(rows), laptop_files / f"{name}.parquet")
    files = f"data.val_files=[{laptop_files}/one.parquet,{laptop_files}/two.parquet]"
    reward = "reward.custom_reward_function.path=" + __file__, "reward.custom_reward_function.name=reward_of_mine"
    config = resolved(
        "grpo", "hardware=cpu", "task=arithmetic", files, *reward, f"{ROLLOUT}.val_kwargs.n=2",
        *(f"trainer.{override}" for override in overrides),
    )  # fmt: skip
    if message is None:
        check_and_complete(config)
        return
    with pytest.raises(ValueError, match="^" + re.escape(f"trainer.{message}")):
        check_and_complete(config)


def test_a_critic_needs_flash_attention_and_keeps_as_many_checkpoints_as_the_actor(monkeypatch):
    gae = ("hardware=cpu", "algorithm.adv_estimator=gae", "trainer.max_actor_ckpt_to_keep=2")
    monkeypatch.setattr(hardware, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="^algorithm.adv_estimator=gae: expected one without a critic where flash-at"):
        check_and_complete(resolved("grpo", *gae))
    monkeypatch.setattr(hardware, "find_spec", lambda name: name == "flash_attn")
    with pytest.raises(ValueError, match="^trainer.max_critic_ckpt_to_keep=None: expected trainer.max_actor_ckpt"):
        check_and_complete(resolved("grpo", *gae))
    check_and_complete(resolved("grpo", *gae, "trainer.max_critic_ckpt_to_keep=2"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("save_best_only=never", "trainer.save_best_only='never': expected one of true, false"),
        ("delete_old_best_checkpoint=1", "trainer.delete_old_best_checkpoint=1: expected one of true, false"),
        ("save_after=-1", "trainer.save_after=-1: expected an integer of at least 0"),
        ("test_freq=often", "trainer.test_freq='often': expected an integer"),
        ("max_actor_ckpt_to_keep=1.5", "trainer.max_actor_ckpt_to_keep=1.5: expected an integer"),
        ("resume_mode=latest", "trainer.resume_mode=latest: expected one of auto, disable, resume_path"),
        ("resume_mode=resume_path", "trainer.resume_from_path=None: expected the folder global_step_N of a checkpoint"),
        ("val_only=true", "trainer.val_before_train=false: expected true with trainer.val_only=true, or verl trains"),
    ],
)
def test_wrong_keys_of_checkpoints_are_named(override, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        check_and_complete(
            resolved("grpo", "hardware=cpu", "task=arithmetic", "trainer.val_before_train=false", f"trainer.{override}")
        )


def test_the_path_of_a_checkpoint_may_end_with_a_slash(tmp_path):
    (tmp_path / "global_step_40").mkdir()
    resumed = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={tmp_path}/global_step_40/"]
    config = resolved("grpo", "hardware=cpu", *resumed, "trainer.save_after=null")
    check_and_complete(config)
    assert config.trainer.resume_from_path == f"{tmp_path}/global_step_40" and config.trainer.save_after == 0


def test_a_folder_without_a_step_in_its_name_is_no_checkpoint(tmp_path):
    resumed = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={tmp_path}"]
    with pytest.raises(ValueError, match=f"^{resumed[1]}: expected the folder global_step_N of a checkpoint"):
        check_and_complete(resolved("grpo", "hardware=cpu", *resumed))


def test_unfinished_checkpoints_are_refused(tmp_path):
    """Going on from one, and a trainer that knows no marks where one is."""
    unfinished = tmp_path / "global_step_3"
    unfinished.mkdir()
    (unfinished / ".unfinished").touch()
    folder = f"trainer.default_local_dir={tmp_path}"
    resume = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={unfinished}"]
    with pytest.raises(ValueError, match=f"{resume[1]}: expected a complete checkpoint"):
        check_and_complete(resolved("grpo", "hardware=cpu", *resume))
    with pytest.raises(ValueError, match=f"{folder}: global_step_3 is unfinished: delete it"):
        check_and_complete(
            resolved(
                "grpo", "hardware=cpu", "task=arithmetic", "trainer.v1.trainer_mode=sync", f"{MANAGER}=null", folder
            )
        )
    check_and_complete(resolved("grpo", "hardware=cpu", folder))


def test_evaluations_whose_results_would_collide_are_refused(tmp_path):
    def evaluation(*files):
        folder = f"trainer.validation_data_dir={tmp_path}"
        check_and_complete(resolved("eval", "hardware=cpu", f"data.val_files=[{','.join(files)}]", folder))

    (tmp_path / "empty").mkdir()
    (tmp_path / "killed.part").mkdir()
    (tmp_path / "killed.part/0.jsonl").touch()
    evaluation("/a/new.parquet", "/a/empty.parquet", "/a/killed.parquet")
    with pytest.raises(ValueError, match=r"data.val_files: /a/x.parquet, /b/x.parquet: expected one file named x"):
        evaluation("/a/x.parquet", "/b/x.parquet")
    (tmp_path / "done").mkdir()
    (tmp_path / "done/0.jsonl").touch()
    with pytest.raises(ValueError, match=f"trainer.validation_data_dir={tmp_path}: done in it holds results"):
        evaluation("/a/new.parquet", "/a/done.parquet")


def test_an_evaluation_of_some_rows_takes_the_first_ones(tmp_path):
    """verl's data set would draw others at each start."""
    pq.write_table(
        pa.table({name: [one] * 9 for name, one in ROW.items()} | {"n": list(range(9))}), tmp_path / "a.parquet"
    )
    config = resolved("eval", "hardware=cpu", "data.val_max_samples=4")
    found = RLHFDataset([str(tmp_path / "a.parquet")], None, config.data, max_samples=config.data.val_max_samples)
    assert found.dataframe["n"] == [0, 1, 2, 3]


def test_bypass_mode_asks_for_the_current_entropy():
    """There the trainer takes the rollout's log-probs and no old entropies exist."""
    for bypass in (True, False):
        config = resolved("steer_exp", "hardware=cpu", f"++algorithm.rollout_correction.bypass_mode={bypass}")
        check_and_complete(config)
        assert config.actor_rollout_ref.actor.calculate_entropy is bypass


@pytest.mark.parametrize("threads", ["0", "two", "1.5"])
def test_a_bad_number_of_threads_is_refused(monkeypatch, threads):
    monkeypatch.setenv("ROLLOUT_OMP_NUM_THREADS", threads)
    with pytest.raises(ValueError, match=f"^ROLLOUT_OMP_NUM_THREADS={threads}: expected a number of threads"):
        check_and_complete(resolved("grpo", "hardware=cpu"))


SKIPPED = (
    "hardware=cpu", "task=arithmetic", "trainer.skip_old_log_prob=true",
    "actor_rollout_ref.actor.ppo_mini_batch_size=16", "actor_rollout_ref.rollout.calculate_log_probs=false",
)  # fmt: skip


@pytest.mark.parametrize("method", ["grpo", "steer_exp", "steer_exact", "clip_cov", "siren", "psr"])
def test_skipped_old_log_probs_ask_for_the_current_entropy(method):
    config = resolved(method, *SKIPPED)
    check_and_complete(config)
    assert config.actor_rollout_ref.actor.calculate_entropy


@pytest.mark.parametrize(
    "method, override, message",
    [
        ("grpo", "actor_rollout_ref.actor.ppo_mini_batch_size=4", "actor.ppo_mini_batch_size=4: expected 16 with"),
        ("grpo", "actor_rollout_ref.actor.ppo_epochs=2", "actor.ppo_epochs=2: expected 1 with"),
        ("grpo", "actor_rollout_ref.actor.strategy=mine", "actor.strategy=mine: expected fsdp or fsdp2 or megatron"),
        (
            "grpo",
            "actor_rollout_ref.rollout.calculate_log_probs=true",
            "rollout.calculate_log_probs=True: expected false",
        ),
        ("grpo", "++algorithm.rollout_correction.bypass_mode=true", "algorithm.rollout_correction.bypass_mode=True"),
        ("grpo", "algorithm.use_kl_in_reward=true", "algorithm.use_kl_in_reward=True: expected false with"),
        (
            "grpo",
            "algorithm.adv_estimator=optimal_token_baseline",
            "algorithm.adv_estimator=optimal_token_baseline: exp",
        ),
        (
            "grpo",
            "trainer.entropy_audit.freq=2",
            "trainer.skip_old_log_prob=True: expected false with trainer.entropy_aud",
        ),
        ("grpo", "distillation.enabled=true", "distillation.enabled=True: expected false with trainer.skip"),
        (
            "grpo",
            "trainer.v1.trainer_mode=sync",
            "trainer.skip_old_log_prob=true: expected false with trainer.v1.trainer",
        ),
        ("grpo", "trainer.skip_old_log_prob=1", "trainer.skip_old_log_prob=1: expected true or false"),
        (
            "unlikeliness",
            "+seed=1",
            "algorithm.adv_estimator=unlikeliness: expected another with trainer.skip_old_log_prob",
        ),
        ("gtpo", "+seed=1", "algorithm.adv_estimator=gtpo: expected another where the trainer computes no entropies"),
        ("adaptive_entropy", "+seed=1", "policy_loss.loss_mode=adaptive_entropy: expected another where the trainer"),
        ("steer_global", "+seed=1", "policy_loss.token_weight_normalizer=global: expected micro_batch where"),
        ("influence_target", "+seed=1", "entropy_change_estimator=influence: expected trainer.skip_old_log_prob=false"),
    ],
)
def test_old_log_probs_that_something_reads_are_not_skipped(method, override, message):
    overrides = [*SKIPPED, override] + [f"{MANAGER}=null"] * ("sync" in override or "distillation" in override)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_and_complete(resolved(method, *overrides))


CORRECTION = "algorithm.rollout_correction"

CHECKPOINT = "actor_rollout_ref.actor.checkpoint"
DYNAMIC = [f"{ACTOR}.use_dynamic_bsz=true", f"{ROLLOUT}.log_prob_use_dynamic_bsz=true"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"{ACTOR}.optim.clip_grad=-1"], "actor.optim.clip_grad=-1: expected a finite number above 0"),
        ([f"{ACTOR}.optim.clip_grad=null"], "actor.optim.clip_grad=None: expected a finite number above 0"),
        ([f"{ACTOR}.optim.weight_decay=-1"], "actor.optim.weight_decay=-1: expected a finite number of at least 0"),
        ([f"{ACTOR}.optim.lr_warmup_steps_ratio=5"], "actor.optim.lr_warmup_steps_ratio=5: expected a number of at l"),
        ([f"{ACTOR}.optim.min_lr_ratio=5"], "actor.optim.min_lr_ratio=5: expected a number of at least 0 and at most"),
        (
            [f"{ACTOR}.optim.lr_scheduler_type=linear"],
            "actor.optim.lr_scheduler_type=linear: expected one of constant,",
        ),
        ([f"{ACTOR}.kl_loss_coef=-1"], "actor.kl_loss_coef=-1: expected a finite number of at least 0"),
        (["algorithm.kl_ctrl.kl_coef=-1"], "algorithm.kl_ctrl.kl_coef=-1: expected a finite number of at least 0"),
        ([f"{ROLLOUT}.temperature=-1"], "rollout.temperature=-1: expected a finite number above 0"),
        ([f"{ROLLOUT}.temperature=abc"], "rollout.temperature='abc': expected a finite number above 0"),
        ([f"{ROLLOUT}.top_p=0"], "rollout.top_p=0: expected a number above 0 and at most 1"),
        ([f"{ROLLOUT}.tensor_model_parallel_size=0"], "rollout.tensor_model_parallel_size=0: expected an integer of"),
        (
            [f"{ROLLOUT}.tensor_model_parallel_size=2"],
            "rollout.tensor_model_parallel_size=2, rollout.data_parallel_size=1, "
            "rollout.pipeline_model_parallel_size=1: expected sizes whose product divides the 1 devices",
        ),
        (["algorithm.adv_estimator=remax"], "algorithm.adv_estimator=remax: expected another with trainer.use_v1=true"),
        (["trainer.v1.trainer_mode=stear"], "trainer.v1.trainer_mode=stear: expected one of steer, sync, colocate_"),
        (["trainer.default_hdfs_dir=hdfs://x"], "trainer.default_hdfs_dir=hdfs://x: expected null: verl's FSDP engine"),
        (
            [f"{ACTOR}.use_dynamic_bsz=true", f"{ROLLOUT}.log_prob_use_dynamic_bsz=false"],
            "rollout.log_prob_use_dynamic_bsz=False: expected actor.use_dynamic_bsz=True",
        ),
        (
            ["trainer.n_gpus_per_node=4", f"{ACTOR}.fsdp_config.fsdp_size=3"],
            "actor.fsdp_config.fsdp_size=3: expected -1 or a divisor of the 4 ranks",
        ),
        (
            [f"{ROLLOUT}.pipeline_model_parallel_size=2"],
            "rollout.tensor_model_parallel_size=1, rollout.data_parallel_size=1, "
            "rollout.pipeline_model_parallel_size=2: expected sizes whose product divides the 1 devices",
        ),
        (
            [f"{ACTOR}.ppo_micro_batch_size_per_gpu=abc"],
            "actor.ppo_micro_batch_size_per_gpu='abc': expected an integer",
        ),
        (
            [f"{ACTOR}.ulysses_sequence_parallel_size=a"],
            "actor.ulysses_sequence_parallel_size='a': expected an int",
        ),
        ([f"{ROLLOUT}.max_model_len=abc"], "rollout.max_model_len='abc': expected an integer"),
        (["data.train_max_samples=null"], "data.train_max_samples=None: expected an integer"),
        (["trainer.critic_warmup=null"], "trainer.critic_warmup=None: expected an integer of at least 0"),
        ([f"{ROLLOUT}.pipeline_model_parallel_size=0"], "rollout.pipeline_model_parallel_size=0: expected an integer"),
        (
            ["reward.custom_reward_function.path=/no/mine.py"],
            "reward.custom_reward_function.path=/no/mine.py: expected a file, or pkg:// and a module",
        ),
        (
            ["reward.custom_reward_function.path=pkg://no_such.module"],
            "reward.custom_reward_function.path=pkg://no_such.module: expected a file, or pkg:// and a module",
        ),
        (
            ["reward.custom_reward_function.path=pkg://verl.steer.no_such"],
            "reward.custom_reward_function.path=pkg://verl.steer.no_such: expected a file, or pkg:// and a module",
        ),
        (
            ["reward.custom_reward_function.name=grade"],
            "reward.custom_reward_function.name=grade: expected a function of ",
        ),
        ([f"{ROLLOUT}.gpu_memory_utilization=60"], "rollout.gpu_memory_utilization=60: expected a number above 0 and"),
        (["trainer.total_training_steps=1.5"], "trainer.total_training_steps=1.5: expected an integer of at least 1"),
        (["actor_rollout_ref.model.lora_rank=abc"], "model.lora_rank='abc': expected an integer of at least 0"),
        (["+seed=abc"], "actor.data_loader_seed='abc': expected an integer"),
        (["data.seed=1.5"], "data.seed=1.5: expected an integer"),
        ([f"{ROLLOUT}.seed=x"], "rollout.seed='x': expected an integer"),
        ([f"{ROLLOUT}.val_kwargs.n=0"], "rollout.val_kwargs.n=0: expected an integer of at least 1"),
        ([f"{ROLLOUT}.val_kwargs.top_p=1.5"], "rollout.val_kwargs.top_p=1.5: expected a number above 0 and at most 1"),
        ([f"{ROLLOUT}.val_kwargs.temperature=-1"], "rollout.val_kwargs.temperature=-1: expected a finite number of at"),
        ([f"{ROLLOUT}.n=1"], "rollout.n=1: expected at least 2 with algorithm.adv_estimator=grpo"),
        (
            [f"{ROLLOUT}.n=1", "algorithm.adv_estimator=clip_b", *DYNAMIC],
            "rollout.n=1: expected at least 2 with algorithm.adv_estimator=clip_b",
        ),
        (["data.max_response_length=0"], "data.max_response_length=0: expected an integer of at least 1"),
        (["data.max_prompt_length=abc"], "data.max_prompt_length='abc': expected an integer of at least 1"),
        ([f"{ROLLOUT}.max_model_len=40"], "rollout.max_model_len=40: expected at least 80, data.max_prompt_length + "),
        (["reward.num_workers=0"], "reward.num_workers=0: expected an integer of at least 1"),
        (["trainer.nnodes=0"], "trainer.nnodes=0: expected an integer of at least 1"),
        (["trainer.n_gpus_per_node=null"], "trainer.n_gpus_per_node=None: expected an integer of at least 1"),
        (["trainer.total_epochs=-1"], "trainer.total_epochs=-1: expected an integer of at least 1"),
        (["trainer.total_training_steps=0"], "trainer.total_training_steps=0: expected an integer of at least 1"),
        ([f"{ACTOR}.optim.optimizer=AdamV"], "actor.optim.optimizer=AdamV: expected one of Adam"),
        ([f"{ACTOR}.optim.optimizer=null"], "actor.optim.optimizer=None: expected one of "),
        ([f"{ACTOR}.optim.optimizer=lr_scheduler"], "actor.optim.optimizer=lr_scheduler: expected one of "),
        ([f"{ACTOR}.optim.betas=null"], "actor.optim.betas=None: expected two numbers"),
        ([f"{ACTOR}.optim.betas=0.9"], "actor.optim.betas=0.9: expected two numbers"),
        ([f"{ACTOR}.optim.betas=[0.9]"], "actor.optim.betas=[0.9]: expected two numbers"),
        (
            [f"{ACTOR}.optim.betas=[0.9,1.0]"],
            "actor.optim.betas[1]=1.0: expected a number of at least 0 and below 1",
        ),
        (["trainer.logger=[console,bogus]"], "trainer.logger=bogus: expected one of wandb, mlflow, "),
        (["trainer.logger=bogus"], "trainer.logger=bogus: expected one of wandb, mlflow, "),
        (["trainer.logger=[]"], "trainer.logger=None: expected one of wandb, mlflow, "),
        ([f"{CORRECTION}.rollout_is=bogus"], f"{CORRECTION}.rollout_is=bogus: expected one of None, token, sequence"),
        (
            [f"{CORRECTION}.rollout_rs='token_k1,k9'"],
            f"{CORRECTION}.rollout_rs=k9: expected one of seq_max_k2, seq_max",
        ),
        ([f"{CORRECTION}.rollout_rs=token_k1"], f"{CORRECTION}: rollout_rs_threshold must be "),
        (
            [f"{CORRECTION}.rollout_is=token", f"{CORRECTION}.rollout_is_threshold=-1"],
            f"{CORRECTION}: rollout_is_thresh",
        ),
        (
            [f"{CORRECTION}.rollout_is=token", f"{CORRECTION}.rollout_is_threshold=null"],
            f"{CORRECTION}.rollout_is_threshold=None: expected a number with rollout_is",
        ),
    ],
)
def test_values_that_verl_takes_as_they_are_are_checked(overrides, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        check_and_complete(resolved("grpo", "hardware=cpu", "task=arithmetic", *overrides))


def test_a_server_has_whole_nodes_or_lies_in_one():
    def check(nodes, size):
        sizes = (f"trainer.nnodes={nodes}", "trainer.n_gpus_per_node=6", f"{ROLLOUT}.tensor_model_parallel_size={size}")
        check_servers(resolved("grpo", *sizes))

    for nodes, size in ((2, 3), (2, 6), (2, 12), (1, 1)):
        check(nodes, size)
    with pytest.raises(ValueError, match="^rollout.tensor_model_parallel_size=4, .* trainer.n_gpus_per_node=6 or"):
        check(2, 4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["custom_reward_function.path=/my.py"],
            "custom_reward_function.path=/my.py: expected null, and reward.custom_",
        ),
        (
            ["reward_model.reward_manager=dapo"],
            "reward_model.reward_manager=dapo: expected null, and reward.reward_manager.name in its place",
        ),
        (["sandbox_fusion.url=http://x"], "sandbox_fusion.url=http://x: expected null, and a key below `reward`"),
        (
            [f"{ACTOR}.use_kl_loss=no"],
            f"{ACTOR}.use_kl_loss=no: expected true or false: 'no' is a text, which counts as",
        ),
        (["trainer.val_only=Off"], "trainer.val_only=Off: expected true or false: 'Off' is a text"),
        ([f"{ACTOR}.grad_clip=0.5"], "actor.grad_clip=0.5: expected actor.optim.clip_grad in its place"),
        (
            [f"{ACTOR}.clip_ratio=0.1"],
            "actor.clip_ratio=0.1: expected clip_ratio_low and clip_ratio_high in its place, ",
        ),
        (
            ["trainer.resume_from_path=/x/global_step_5"],
            "trainer.resume_mode=auto: expected resume_path with trainer.resume_from_path=/x/global_step_5",
        ),
        (
            [f"{ROLLOUT}.val_kwargs.do_sample=false"],
            "rollout.val_kwargs.temperature=1.0: expected 0 with rollout.val_kwargs.do_sample=false",
        ),
        (
            ["trainer.critic_warmup=9"],
            "trainer.critic_warmup=9: expected 0 without a critic: the actor would not train",
        ),
        *(
            (
                [
                    f"{CORRECTION}.{key}={value}",
                    f"{CORRECTION}.rollout_rs_threshold=0.1",
                    f"{ROLLOUT}.calculate_log_probs=false",
                ],
                f"{CORRECTION}.{key}={value}: expected rollout.calculate_log_probs=true with it",
            )
            for key, value in (("rollout_is", "token"), ("rollout_rs", "seq_mean_k3"), ("bypass_mode", True))
        ),
        (
            [f"{CHECKPOINT}.save_contents=[hf]"],
            "actor.checkpoint.save_contents=['hf']: expected some of model, optimiz",
        ),
        ([f"{CHECKPOINT}.load_contents=[Model]"], "actor.checkpoint.load_contents=['Model']: expected some of model, "),
        (
            [f"{CHECKPOINT}.save_contents=[hf_model]"],
            "actor.checkpoint.save_contents=['hf_model']: expected model among them, or trainer.resume_mode=disable",
        ),
    ],
)
def test_what_verl_would_ignore_is_refused(overrides, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        check_and_complete(resolved("grpo", "hardware=cpu", "task=arithmetic", *overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        [f"{ACTOR}.clip_ratio=0.1", f"{ACTOR}.clip_ratio_low=null"],
        [f"{ROLLOUT}.val_kwargs.do_sample=false", f"{ROLLOUT}.val_kwargs.temperature=0"],
        [f"{ROLLOUT}.max_model_len=null"],
        [f"{ROLLOUT}.n=1", "algorithm.adv_estimator=reinforce_plus_plus", *DYNAMIC],
        [f"{ROLLOUT}.n=1", "algorithm.adv_estimator=psr", *DYNAMIC],
        [f"{ROLLOUT}.n=1", "trainer.val_only=true"],
        [
            f"{CORRECTION}.rollout_is=token",
            f"{CORRECTION}.rollout_rs='token_k1, seq_mean_k3'",
            f"{CORRECTION}.rollout_rs_threshold='0.5_2.0,0.1'",
        ],
        [f"{CHECKPOINT}.save_contents=[hf_model]", "trainer.resume_mode=disable"],
        ["+ray_kwargs.ray_init.runtime_env.env_vars.NCCL_IB_DISABLE=on", "trainer.experiment_name=no"],
        ["trainer.logger=console"],
        [f"{ACTOR}.optim.optimizer=SGD", f"{ACTOR}.optim.betas=[2.0]"],  # given to kinds of Adam only
        [f"{ACTOR}.optim.optimizer=SGD", f"{ACTOR}.optim.optimizer_impl=torch.optim.sgd"],
        [f"reward.custom_reward_function.path={__file__}", "reward.custom_reward_function.name=reward_of_mine"],
        ["reward.custom_reward_function.path=pkg://verl/steer/grading/score"],
        [f"reward.custom_reward_function.path={__file__}", "reward.custom_reward_function.name=reward_by_model"]
        + ["reward.reward_model.enable=true", "reward.reward_model.model_path=/m"],
    ],
)
def test_what_verl_reads_is_taken(overrides):
    check_and_complete(resolved("grpo", "hardware=cpu", "task=arithmetic", *overrides))


def reward_by_model(reward_router_address, **keywords):
    """A reward function that verl gives the address of a reward model."""


def reward_of_mine(**keywords):
    """A reward function of the test above."""


#: Estimators without a baseline from the prompt's other rollouts, and some that lack theirs with one rollout.
ALONE = {"gae", "gpg", "nsr", "psr", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "w_reinforce"}


def test_one_rollout_of_a_prompt_is_for_estimators_that_compare_none():
    config, refused = resolved("grpo", "hardware=cpu", "task=arithmetic", f"{ROLLOUT}.n=1"), set()
    names = ADV_ESTIMATOR_REGISTRY.keys() - WITHOUT_INPUTS_IN_V1
    for name in names:
        config.algorithm.adv_estimator = name
        try:
            check_verl_values(config)
        except ValueError as error:
            assert str(error) == f"rollout.n=1: expected at least 2 with algorithm.adv_estimator={name}"
            refused.add(name)
    assert refused == names - ALONE


def run_main(config):
    """The entry point with a configuration that Hydra has not composed from a command line."""
    with mock.patch.object(run_checks, "check_added_keys"), mock.patch.object(run_checks, "check_kinds"):
        entry_point.main.__wrapped__(config)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_overrides_come_before_flags():
    words = ["--config-name", "steer", "a.b=1", "--cfg", "job", "~c", "+d=[1,2]", "hardware=cpu", "--resolve"]
    expected = ["a.b=1", "~c", "+d=[1,2]", "hardware=cpu", "--config-name", "steer", "--cfg", "job", "--resolve"]
    assert entry_point.overrides_first(words) == expected
    words = ["--config-dir", "/d/lr=1", "a=1"]
    assert entry_point.overrides_first(words) == ["a=1", "--config-dir", "/d/lr=1"]


def test_cfg_prints_the_resolved_configuration(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["main", "--config-name", "steer", "--cfg", "job", "method=steer_exp"])
    runpy.run_module("verl.steer.main", run_name="__main__", alter_sys=True)
    assert "loss_mode: entropy_control" in capsys.readouterr().out


def test_an_error_of_the_run_that_explains_itself_ends_it_in_one_line(monkeypatch, tmp_path):
    def fail(config, task_runner_class):
        error = UnknownMetric("trainer.best_metric_key=x: expected y")
        raise RayTaskError("run", "a remote traceback", error).as_instanceof_cause()

    for name in ("check_run", "check_data", "check_model"):
        monkeypatch.setattr(entry_point, name, mock.Mock())
    monkeypatch.setattr(entry_point.main_ppo, "run_ppo", fail)
    monkeypatch.setattr(run_ending, "dead_actors", list)
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path))
    with pytest.raises(SystemExit) as end:
        run_main(resolved("grpo", "hardware=cpu", "task=arithmetic"))
    assert end.value.code == "steer-verl: trainer.best_metric_key=x: expected y"


def test_the_launching_process_resolves_its_variables(laptop_files, monkeypatch, tmp_path):
    """Where Ray runs already, the trainer's process has other ones, and another working folder."""
    started = []
    monkeypatch.setattr(entry_point.main_ppo, "run_ppo", lambda config, task_runner_class: started.append(config))
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path.relative_to("/")))
    monkeypatch.chdir("/")
    run_main(resolved("steer_exp", "hardware=cpu", "task=arithmetic"))
    monkeypatch.undo()
    (config,) = started
    assert config.data.train_files == f"{laptop_files}/train.parquet"
    assert config.trainer.default_local_dir == f"{tmp_path}/steer_exp"


def test_a_second_training_in_a_folder_ends_in_one_line(laptop_files, monkeypatch, tmp_path):
    monkeypatch.setattr(entry_point.main_ppo, "run_ppo", mock.Mock(side_effect=AssertionError("Ray was started")))
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path))
    with lock_folder(tmp_path / "steer_exp"), pytest.raises(SystemExit, match=f"{tmp_path}/steer_exp: a training runs"):
        run_main(resolved("steer_exp", "hardware=cpu", "task=arithmetic"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"{ROLLOUT}.mode=sync", "Rollout mode 'sync' has been removed."),
        (f"{ACTOR}.ppo_mini_batch_size=32", "train_batch_size (16) must be >= actor.ppo_mini_batch_size (32)"),
    ],
)
def test_what_verl_refuses_ends_a_run_in_one_line(laptop_files, monkeypatch, override, message):
    monkeypatch.setattr(entry_point.main_ppo, "run_ppo", mock.Mock(side_effect=AssertionError("Ray was started")))
    with pytest.raises(SystemExit, match=f"^steer-verl: {re.escape(message)}[^\n]*$"):
        run_main(resolved("steer_exp", "hardware=cpu", "task=arithmetic", override))


def test_a_logger_that_is_not_installed_ends_a_run_in_one_line(laptop_files, monkeypatch):
    monkeypatch.setattr(entry_point.main_ppo, "run_ppo", mock.Mock(side_effect=AssertionError("Ray was started")))
    monkeypatch.setattr(loggers, "find_spec", lambda module: None)
    monkeypatch.setattr(loggers, "joins_running_ray", lambda config: False)
    with pytest.raises(SystemExit, match="^steer-verl: trainer.logger=tensorboard: expected the module tensorboard, "):
        run_main(resolved("steer_exp", "hardware=cpu", "task=arithmetic", "trainer.logger=[file,tensorboard]"))
