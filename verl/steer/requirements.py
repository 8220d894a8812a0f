# SPDX-License-Identifier: Apache-2.0
"""The checks of a run's configuration before Ray starts, and the keys that its loss needs switched on."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import verl.steer.methods  # noqa: F401 - registers the losses and estimators
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.plugin.platform import get_platform
from verl.steer.audit.scores import AuditOptions
from verl.steer.checkpoint_ledger import UNFINISHED
from verl.steer.config import ADVANTAGE_OPTIONS
from verl.steer.grading import sandbox
from verl.steer.grading.code import CodeOptions, is_code
from verl.steer.methods.registry import (
    POLICY_LOSSES,
    SCORES,
    base_loss_of,
    clips_as_ppo,
    estimator_fields,
    fields_needed,
)
from verl.steer.options import from_config
from verl.steer.ray_cpus import check_cpus
from verl.steer.rollout.checks import BATCHED_MANAGER, check_rollouts, is_batched
from verl.trainer.distillation import is_distillation_enabled
from verl.trainer.ppo.core_algos import INFLUENCE, get_policy_loss_fn, weighs_mini_batches
from verl.trainer.ppo.utils import need_critic
from verl.utils.config import omega_conf_to_dataclass

logger = logging.getLogger(__name__)

#: verl's default attention.
FLASH_ATTENTION = "flash_attention_2"

#: Engines that return the current policy's entropies from the update's forward pass.
ENTROPY_STRATEGIES = ("fsdp", "fsdp2", "megatron", "veomni", "torchtitan", "automodel")

#: Strategies of this fork's own engine, which has sums over the vocabulary and the range of a whole mini-batch.
FSDP_STRATEGIES = ("fsdp", "fsdp2")

#: verl's engines, values of `model_engine` -> keys below `actor` of the ranks that share a rollout.
MODEL_ENGINES = {
    "dp": ("ulysses_sequence_parallel_size",),
    "megatron": tuple(f"megatron.{kind}_parallel_size" for kind in ("tensor_model", "pipeline_model", "context")),
    "veomni": ("veomni.ulysses_parallel_size",),
    "torchtitan": tuple(f"torchtitan.{kind}_parallel_size" for kind in ("tensor", "pipeline", "context")),
}

#: Losses that read `actor.clip_ratio_c` but do not clip as PPO does, and the value that it must exceed.
CLIP_RATIO_C_ABOVE = {"archer": 1, "bapo": 1, "ce_gppo": 1, "dynamic_clip": 1, "dppo_tv": 0, "dppo_kl": 0}

#: Keys below `trainer` that only this fork's trainer reads, with the values that switch them off.
TRAINER_KEYS = {
    "save_after": 0,
    "save_best_only": False,
    "delete_old_best_checkpoint": False,
    "best_metric_key": None,
    "skip_old_log_prob": False,
}

#: The reward function of this fork.
GRADING = "pkg://verl.steer.grading.score"
LEARNED = "pkg://verl.steer.grading.learned"

#: Averages by which the trainer's `actor/entropy` is a mean over tokens.
MEANS = ("token-mean", "seq-mean-token-mean")


def check_and_complete(config: DictConfig) -> None:
    """Check a run's configuration, and switch on the keys that its policy loss needs.

    Args:
        config: the resolved configuration. `actor.calculate_entropy`, `actor.calculate_sum_pi_squared`,
            `actor.fsdp_config.one_pass_reductions` and, without flash-attn, the attention are set.

    Raises:
        ValueError: if a value is out of range, or the loss or the advantage estimator needs something that this run
            does not compute.
    """
    _check_platform(config)
    check_cpus(config)
    _check_model_engine(config)
    _check_attention(config)
    _check_log_prob_micro_batches(config)
    check_rollouts(config)
    try:
        policy_loss = omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss)
    except InstantiationException as error:
        raise ValueError(str(error.__cause__)) from error
    for options in ADVANTAGE_OPTIONS:
        from_config(options, config.algorithm)
    _check_clip(config, policy_loss)
    needed = _inputs_needed(config, policy_loss)
    _check_engine(config, policy_loss, needed)
    _check_entropy_control(config, policy_loss)
    _check_trainer(config, policy_loss, needed)
    _check_skipped_old_log_prob(config, policy_loss)
    _switch_on(config, needed)
    _check_entropy_audit(config, policy_loss)
    _check_checkpoints(config)
    _check_evaluation(config)
    _check_code_rewards(config)
    _check_reward_model(config)


def _check_platform(config: DictConfig) -> None:
    platform = get_platform().device_name
    if (platform == "cpu") != (config.trainer.device == "cpu"):
        remedy = "hardware=cpu" if platform == "cpu" else "VERL_PLATFORM=cpu in the environment, or another hardware"
        raise ValueError(
            f"trainer.device={config.trainer.device}: verl's platform here is {platform}; expected {remedy}"
        )
    threads = os.environ.get("ROLLOUT_OMP_NUM_THREADS")
    if threads and not (threads.isdecimal() and int(threads)):
        raise ValueError(f"ROLLOUT_OMP_NUM_THREADS={threads}: expected a number of threads, at least 1")


def _check_attention(config: DictConfig) -> None:
    """Choose torch's attention where flash-attn, which verl takes by default, is not installed.

    Raises:
        ValueError: if the configuration needs flash-attn.
    """
    model, actor = config.actor_rollout_ref.model, config.actor_rollout_ref.actor
    if actor.strategy not in FSDP_STRATEGIES or find_spec("flash_attn"):
        return
    named, ranks = model.override_config.get("attn_implementation"), actor.ulysses_sequence_parallel_size
    if named == FLASH_ATTENTION or ranks > 1:
        key, value, expected = "model.override_config.attn_implementation", named, "packed_sdpa, torch's attention,"
        if ranks > 1:
            key, value, expected = "actor.ulysses_sequence_parallel_size", ranks, "1"
        raise ValueError(f"{key}={value}: expected {expected} where flash-attn is not installed")
    if named is None:
        chosen = "packed_sdpa" if model.use_remove_padding else "sdpa"
        logger.warning(
            "flash-attn is not installed: attn_implementation=%s, torch's attention, takes its place", chosen
        )
        with open_dict(model):
            model.override_config["attn_implementation"] = chosen


def _check_model_engine(config: DictConfig) -> None:
    """Check that `actor.strategy` is of the chosen engine, and no option of the FSDP engine is set for another.

    Raises:
        ValueError: if not; `hardware=cpu` and `hardware=gpu1` set options of the FSDP engine.
    """
    engine, actor = config.model_engine, config.actor_rollout_ref.actor
    others = MODEL_ENGINES.keys() - {"dp"}
    if actor.strategy in others - {engine} or engine in others and actor.strategy != engine:
        expected = engine if engine in others else " or ".join(FSDP_STRATEGIES)
        raise ValueError(f"actor.strategy={actor.strategy}: expected {expected} with model_engine={engine}")
    for section in ("actor", "ref"):
        ignored = config.actor_rollout_ref[section].get("fsdp_config")
        if engine in others and ignored:
            raise ValueError(
                f"{section}.fsdp_config: expected none with model_engine={engine}, which ignores its keys "
                f"{', '.join(ignored)}; the override ~actor_rollout_ref.{section}.fsdp_config removes them"
            )


def _check_log_prob_micro_batches(config: DictConfig) -> None:
    """verl checks the micro-batches of the update only; wrong ones of the log-probs would stop a worker later."""
    rollout, trainer = config.actor_rollout_ref.rollout, config.trainer
    size = rollout.log_prob_micro_batch_size_per_gpu
    if trainer.val_only or rollout.log_prob_use_dynamic_bsz or size is None:
        return
    shared = MODEL_ENGINES.get(config.model_engine, ())
    ranks = trainer.nnodes * trainer.n_gpus_per_node
    ranks //= math.prod(OmegaConf.select(config.actor_rollout_ref.actor, key) for key in shared)
    rollouts = config.data.train_batch_size * rollout.n // ranks
    if rollouts % size:
        raise ValueError(
            f"rollout.log_prob_micro_batch_size_per_gpu={size}: expected a divisor of the {rollouts} rollouts of a "
            f"rank (data.train_batch_size={config.data.train_batch_size} * rollout.n={rollout.n} / {ranks} ranks)"
        )


def has_old_entropy(config: DictConfig) -> bool:
    """Whether the trainer computes the old policy's entropies and keeps them in the batch."""
    rollout_correction = config.algorithm.get("rollout_correction") or {}
    skips = rollout_correction.get("bypass_mode", False) or config.trainer.get("skip_old_log_prob", False)
    return config.trainer.use_v1 and not skips


def _inputs_needed(config: DictConfig, policy_loss: Any) -> set[str]:
    """Fields of `LossInputs` that the loss needs; without the old policy's entropies the current policy's."""
    if policy_loss.loss_mode not in POLICY_LOSSES:
        get_policy_loss_fn(policy_loss.loss_mode)  # raises if the name is unknown
    needed = fields_needed(policy_loss)
    return needed if has_old_entropy(config) or "entropys" not in needed else needed | {"current_entropys"}


def _check_skipped_old_log_prob(config: DictConfig, policy_loss: Any) -> None:
    """Check `trainer.skip_old_log_prob`: the update computes the old log-probs, and nothing reads them before it.

    Raises:
        ValueError: if a step has several updates, or something else reads the old log-probs.
    """
    skips = config.trainer.get("skip_old_log_prob", False)
    if not isinstance(skips, bool):
        raise ValueError(f"trainer.skip_old_log_prob={skips}: expected true or false")
    if not skips:
        return
    algorithm, actor, rollout = config.algorithm, config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    corrections = algorithm.get("rollout_correction") or {}
    estimator = algorithm.adv_estimator
    reads = {"old_log_probs", "entropy"} & set(estimator_fields(algorithm)) or "optimal_token_baseline" in estimator
    _refuse_others(
        [
            ("actor.ppo_mini_batch_size", actor.ppo_mini_batch_size, (config.data.train_batch_size,)),
            ("actor.ppo_epochs", actor.ppo_epochs, (1,)),
            ("actor.strategy", actor.strategy, ENTROPY_STRATEGIES),
            ("rollout.calculate_log_probs", rollout.calculate_log_probs, (False,)),
            ("algorithm.rollout_correction.bypass_mode", corrections.get("bypass_mode", False), (False,)),
            ("algorithm.use_kl_in_reward", algorithm.use_kl_in_reward, (False,)),
            ("algorithm.adv_estimator", estimator, ("another",) if reads else (estimator,)),
            ("distillation.enabled", is_distillation_enabled(config.get("distillation")), (False,)),
        ],
        "trainer.skip_old_log_prob=true",
    )
    if weighs_mini_batches(policy_loss):
        raise ValueError(
            f"policy_loss.token_weight_map={policy_loss.token_weight_map}, entropy_change_estimator="
            f"{policy_loss.entropy_change_estimator}: expected trainer.skip_old_log_prob=false with weights of the "
            "whole mini-batch, which are computed before its update"
        )


def _switch_on(config: DictConfig, needed: set[str]) -> None:
    actor = config.actor_rollout_ref.actor
    with open_dict(actor):
        # Without the pass for the old log-probs the trainer's `actor/entropy` is the update's.
        wanted = "current_entropys" in needed or config.trainer.get("skip_old_log_prob", False)
        actor.calculate_entropy = actor.calculate_entropy or wanted
        if "sum_pi_squared" in needed:
            actor.calculate_sum_pi_squared = actor.fsdp_config.one_pass_reductions = True
        if "nucleus_entropys" in needed:
            actor.fsdp_config.one_pass_reductions = True


def _reader_of_sums(policy_loss: Any) -> str:
    """The option that needs the sums over the vocabulary."""
    steer = policy_loss.loss_mode == "entropy_control"
    return "entropy_change_estimator=exact" if steer else f"loss_mode={policy_loss.loss_mode}"


def _check_engine(config: DictConfig, policy_loss: Any, needed: set[str]) -> None:
    strategy = config.actor_rollout_ref.actor.strategy
    for field, strategies, reason in (
        (
            "current_entropys",
            ENTROPY_STRATEGIES,
            f"loss_mode={policy_loss.loss_mode} needs the current policy's entropies, which others do not return",
        ),
        ("sum_pi_squared", FSDP_STRATEGIES, f"{_reader_of_sums(policy_loss)} needs sums over the vocabulary"),
        ("nucleus_entropys", FSDP_STRATEGIES, f"loss_mode={policy_loss.loss_mode} needs a nucleus"),
        ("change_range", FSDP_STRATEGIES, f"token_weight_normalizer={policy_loss.token_weight_normalizer}"),
        ("token_weights", FSDP_STRATEGIES, f"token_weight_map={policy_loss.token_weight_map}"),
    ):
        if field in needed and strategy not in strategies:
            raise ValueError(f"actor.strategy={strategy}: expected one of {', '.join(strategies)}: {reason}")
    if {"sum_pi_squared", "nucleus_entropys"} & needed and config.actor_rollout_ref.model.use_fused_kernels:
        raise ValueError(
            f"model.use_fused_kernels=true: expected false with {_reader_of_sums(policy_loss)}, which reads logits"
        )


def _check_entropy_control(config: DictConfig, policy_loss: Any) -> None:
    """Check that the engine can find the weights of a whole mini-batch if the loss reads them.

    Raises:
        ValueError: if it cannot.
    """
    if not weighs_mini_batches(policy_loss):
        return
    estimator = policy_loss.entropy_change_estimator
    reason = f"entropy_change_estimator={estimator}, token_weight_map={policy_loss.token_weight_map}"
    if estimator == INFLUENCE:
        _check_influence(config, reason)
    one_pass = config.actor_rollout_ref.actor.fsdp_config.get("one_pass_reductions")
    needs: list[tuple[str, Any, tuple[Any, ...]]] = [("model.use_fused_kernels", _fused(config), (False,))]
    if estimator == "exact" or policy_loss.influence_way == "head":
        needs.append(("actor.fsdp_config.one_pass_reductions", one_pass, (True,)))
    _refuse_others(needs, reason)


def _check_influence(config: DictConfig, reason: str) -> None:
    """Check that an update is AdamW's on the policy's loss alone, which the prediction by influence assumes.

    Raises:
        ValueError: if the update has parts that the prediction lacks.
    """
    actor = config.actor_rollout_ref.actor
    override = actor.optim.get("override_optimizer_config") or {}
    dtype = (actor.fsdp_config.get("mixed_precision") or {}).get("param_dtype", "bf16")
    _refuse_others(
        [
            ("actor.strategy", actor.strategy, ("fsdp2",)),
            ("actor.optim.optimizer", actor.optim.optimizer, ("AdamW",)),
            ("actor.optim.optimizer_impl", actor.optim.optimizer_impl, ("torch.optim",)),
            ("actor.optim.override_optimizer_config.amsgrad", override.get("amsgrad", False), (False,)),
            ("actor.fsdp_config.mixed_precision.param_dtype", dtype, ("fp32", "float32", "bf16", "bfloat16")),
            ("actor.entropy_coeff", actor.entropy_coeff, (0,)),
            ("actor.use_kl_loss", actor.use_kl_loss, (False,)),
        ],
        reason,
    )
    if actor.loss_agg_mode == "seq-mean-token-sum-norm" and actor.loss_scale_factor is None:
        raise ValueError(f"actor.loss_scale_factor=None: expected a number with loss_agg_mode={actor.loss_agg_mode}")


def _fused(config: DictConfig) -> bool:
    return config.actor_rollout_ref.model.use_fused_kernels


def _refuse_others(needs: list[tuple[str, Any, tuple[Any, ...]]], reason: str) -> None:
    """Check that each key has one of the values that an option allows.

    Args:
        needs: key, value and allowed values.
        reason: the option.

    Raises:
        ValueError: if a key has another value.
    """
    for key, value, allowed in needs:
        if value not in allowed:
            expected = " or ".join(str(one).lower() if isinstance(one, bool) else str(one) for one in allowed)
            raise ValueError(f"{key}={value}: expected {expected} with {reason}")


def _check_trainer(config: DictConfig, policy_loss: Any, needed: set[str]) -> None:
    actor, trainer = config.actor_rollout_ref.actor, config.trainer
    normalizer = f"policy_loss.token_weight_normalizer={policy_loss.token_weight_normalizer}"
    loss_mode = f"policy_loss.loss_mode={policy_loss.loss_mode}"
    adv_estimator = f"algorithm.adv_estimator={config.algorithm.adv_estimator}"
    has_coefficient, fields = "entropy_coeff" in needed, estimator_fields(config.algorithm)
    if policy_loss.loss_mode in POLICY_LOSSES and is_distillation_enabled(config.get("distillation")):
        raise ValueError(f"distillation.enabled=true: expected false with {loss_mode}")
    for needs, key, expected in (
        ("change_range" in needed, normalizer, "micro_batch"),
        (has_coefficient, loss_mode, "another"),
        ("entropy" in fields, adv_estimator, "another"),
    ):
        if needs and not has_old_entropy(config):
            raise ValueError(
                f"{key}: expected {expected} where the trainer computes no entropies of the old policy, as in bypass "
                "mode or with trainer.skip_old_log_prob=true"
            )
    if config.algorithm.adv_estimator == "aepo" and not is_batched(config):
        manager = config.actor_rollout_ref.rollout.agent.get("agent_loop_manager_class")
        raise ValueError(
            f"rollout.agent.agent_loop_manager_class={manager}: expected {BATCHED_MANAGER} with {adv_estimator}, whose "
            "prompts have temperatures of their own"
        )
    if has_coefficient and actor.loss_agg_mode not in MEANS:
        raise ValueError(
            f"actor.loss_agg_mode={actor.loss_agg_mode}: expected one of {', '.join(MEANS)} with {loss_mode}, which "
            "needs a mean entropy"
        )
    use_kl = ", algorithm.use_kl_in_reward=true" if SCORES in fields else ""
    needs_steer = (
        (has_coefficient, loss_mode),
        (bool(fields), adv_estimator + use_kl),
        ("sum_pi_squared" in needed, f"policy_loss.{_reader_of_sums(policy_loss)}"),
        ("nucleus_entropys" in needed, loss_mode),
        ("token_weights" in needed, f"policy_loss.token_weight_map={policy_loss.token_weight_map}"),
        (is_batched(config), f"rollout.agent.agent_loop_manager_class={BATCHED_MANAGER} (null: verl's manager)"),
    )
    for needs, key in (*needs_steer, (policy_loss.loss_mode in POLICY_LOSSES, loss_mode)):
        if needs and not trainer.use_v1:
            raise ValueError(f"trainer.use_v1={trainer.use_v1}: expected true with {key}")
    for needs, key in needs_steer:
        if needs and trainer.v1.trainer_mode != "steer":
            raise ValueError(f"trainer.v1.trainer_mode={trainer.v1.trainer_mode}: expected steer with {key}")


def _check_clip(config: DictConfig, policy_loss: Any) -> None:
    """Check `actor.clip_ratio*`: a worker would accept a bad value as a clip that never or always cuts, or crash.

    Raises:
        ValueError: if a value is not a number in the loss's range.
    """
    actor, loss = config.actor_rollout_ref.actor, base_loss_of(policy_loss)

    def check(name: str, allowed: Callable[[float], bool], expected: str) -> None:
        value = actor[name]
        number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
        if not number or not allowed(value):
            raise ValueError(f"actor.{name}={value}: expected a number {expected}")

    for name in ("clip_ratio_low", "clip_ratio_high"):
        check("clip_ratio" if actor[name] is None else name, lambda value: value >= 0, "of at least 0")
    if clips_as_ppo(policy_loss) or loss in CLIP_RATIO_C_ABOVE:
        bound = CLIP_RATIO_C_ABOVE.get(loss, 1)
        check("clip_ratio_c", lambda value: value > bound, f"above {bound} with the loss {loss}")


def _check_entropy_audit(config: DictConfig, policy_loss: Any) -> None:
    """Check that an audited run has this fork's engine, whose statistics the audit reads, and this fork's trainer."""
    trainer, actor = config.trainer, config.actor_rollout_ref.actor
    options = from_config(AuditOptions, trainer.get("entropy_audit"), "trainer.entropy_audit")
    bypass = (config.algorithm.get("rollout_correction") or {}).get("bypass_mode", False)
    needs = [
        ("trainer.use_v1", trainer.use_v1, (True,)),
        ("trainer.v1.trainer_mode", trainer.v1.trainer_mode, ("steer",)),
        ("actor.strategy", actor.strategy, FSDP_STRATEGIES),
        ("actor.fsdp_config.one_pass_reductions", OmegaConf.select(actor, "fsdp_config.one_pass_reductions"), (True,)),
        ("model.use_fused_kernels", _fused(config), (False,)),
        ("algorithm.rollout_correction.bypass_mode", bypass, (False,)),
        ("trainer.skip_old_log_prob", trainer.get("skip_old_log_prob", False), (False,)),
    ]
    if not options.freq:
        return
    _refuse_others(needs, f"trainer.entropy_audit.freq={options.freq}")
    if options.influence or options.one_token:
        name = "influence" if options.influence else "one_token"
        reason = f"trainer.entropy_audit.{name}={getattr(options, name)}"
        _check_influence(config, reason)
        if base_loss_of(policy_loss) != "vanilla":
            raise ValueError(
                f"policy_loss.loss_mode={policy_loss.loss_mode}: expected vanilla or STEER's with {reason}"
            )
        if options.one_token and weighs_mini_batches(policy_loss):
            raise ValueError(
                f"trainer.entropy_audit.one_token={options.one_token}: expected 0 with a loss whose weights are "
                "those of the whole mini-batch"
            )


def _check_checkpoints(config: DictConfig) -> None:
    """Check that a run saves the checkpoints that its keys ask for, and resumes from a complete one.

    Raises:
        ValueError: if it would not.
    """
    trainer = config.trainer
    if trainer.resume_mode == "resume_path" and Path(str(trainer.resume_from_path), UNFINISHED).exists():
        raise ValueError(
            f"trainer.resume_from_path={trainer.resume_from_path}: expected a complete checkpoint; the run that "
            "wrote this one was killed meanwhile"
        )
    if trainer.val_only:
        return
    if trainer.use_v1 and trainer.v1.trainer_mode == "steer":
        _check_checkpoints_of_steer(config)
        return
    other = f"trainer.v1.trainer_mode={trainer.v1.trainer_mode} and trainer.use_v1={str(trainer.use_v1).lower()}"
    for key, off in TRAINER_KEYS.items():
        value = trainer.get(key, off)
        if value != off:
            raise ValueError(f"trainer.{key}={_yaml(value)}: expected {_yaml(off)} with {other}, which ignores it")
    marks = Path(trainer.default_local_dir).glob(f"global_step_*/{UNFINISHED}")
    unfinished = sorted(mark.parent.name for mark in marks)
    if unfinished:
        raise ValueError(
            f"trainer.default_local_dir={trainer.default_local_dir}: {', '.join(unfinished)} is unfinished: delete it, "
            f"because a run with {other} would resume from it"
        )


def _yaml(value: Any) -> str:
    """A value as a YAML file writes it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _check_checkpoints_of_steer(config: DictConfig) -> None:
    trainer, checkpoint = config.trainer, config.actor_rollout_ref.actor.checkpoint
    if trainer.save_best_only and trainer.test_freq <= 0:
        raise ValueError(
            f"trainer.test_freq={trainer.test_freq}: expected at least 1 with trainer.save_best_only=true, which saves "
            "after validations only"
        )
    actor, critic = trainer.max_actor_ckpt_to_keep, trainer.max_critic_ckpt_to_keep
    if actor != critic and need_critic(config):
        raise ValueError(
            f"trainer.max_critic_ckpt_to_keep={critic}: expected trainer.max_actor_ckpt_to_keep={actor}: one "
            "folder holds a step's actor and critic"
        )
    if trainer.get("remove_previous_ckpt_in_save"):
        raise ValueError(
            "trainer.remove_previous_ckpt_in_save=true: expected trainer.max_actor_ckpt_to_keep=1 instead, which "
            "spares the best checkpoint"
        )
    if checkpoint.get("async_save"):
        raise ValueError(
            "actor.checkpoint.async_save=true: expected false: the trainer counts a checkpoint as complete "
            "once its save has returned"
        )


def _check_evaluation(config: DictConfig) -> None:
    """Check the names of the validation files, by which this fork's trainer keeps their results.

    Raises:
        ValueError: if two files have one name, or the folder has results of that name already.
    """
    trainer, files = config.trainer, config.data.val_files
    if not (trainer.val_only and trainer.use_v1 and trainer.v1.trainer_mode == "steer"):
        return
    by_name = defaultdict(list)
    for file in [files] if isinstance(files, str) else files:
        by_name[Path(file).stem].append(file)
    for name, same in by_name.items():
        if len(same) > 1:
            raise ValueError(f"data.val_files: {', '.join(same)}: expected one file named {name}, like its results")
        results = Path(trainer.validation_data_dir or "", name)
        empty = not results.exists() or results.is_dir() and not any(results.iterdir())
        if trainer.validation_data_dir and not empty:
            raise ValueError(
                f"trainer.validation_data_dir={trainer.validation_data_dir}: {name} in it holds results: expected "
                f"another folder, or none of {same[0]} among data.val_files"
            )


def _check_code_rewards(config: DictConfig) -> None:
    """Check the options of code rewards and, if rows of this run need it, their sandbox.

    With verl's `reward.sandbox_fusion.url` that service runs the programs: the reward function gets the section.

    Raises:
        ValueError: if an option is out of range, or the sandbox doesn't start.
    """
    function, service = config.reward.custom_reward_function, config.reward.sandbox_fusion
    if function.path != GRADING:
        return
    options = from_config(CodeOptions, (function.get("reward_kwargs") or {}).get("code"), sandbox.SECTION)
    if service.url:
        with open_dict(config):
            function.reward_kwargs = {
                **(function.get("reward_kwargs") or {}),
                "sandbox_fusion_url": service.url,
                "memory_limit_mb": service.memory_limit_mb,
                "max_concurrent": max(1, service.max_concurrent // config.reward.num_workers),
            }
    elif options.sandbox == "bwrap" and any(map(is_code, _data_sources(config))):
        sandbox.check()


def _check_reward_model(config: DictConfig) -> None:
    """Check that the reward model of `verl.steer.grading.learned` is there.

    Raises:
        ValueError: if its folder is not named or holds no model.
    """
    function = config.reward.custom_reward_function
    if function.path == LEARNED:
        folder = (function.get("reward_kwargs") or {}).get("model_path")
        if not folder or not Path(folder, "config.json").is_file():
            raise ValueError(
                f"reward.custom_reward_function.reward_kwargs.model_path={folder}: expected the folder of a reward "
                "model, such as scripts/make_reward_model.py makes"
            )


def _data_sources(config: DictConfig) -> set[str]:
    """The data sources of the run's parquet files, as far as these are at hand."""
    found: set[str] = set()
    for files in (config.data.val_files, *(() if config.trainer.val_only else (config.data.train_files,))):
        for file in [files] if isinstance(files, str) else files or ():
            if Path(file).is_file() and "data_source" in pq.read_schema(file).names:
                found.update(pq.read_table(file, columns=["data_source"])["data_source"].unique().to_pylist())
    return found
