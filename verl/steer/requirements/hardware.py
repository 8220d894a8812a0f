# SPDX-License-Identifier: Apache-2.0
"""The checks of hardware, engine, attention and micro-batches."""

from __future__ import annotations

import logging
import math
import os
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from verl.plugin.platform import get_platform
from verl.steer.requirements.allowed import refuse_others
from verl.steer.requirements.loss import FSDP_STRATEGIES
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.torch_dtypes import BFLOAT_LIST, HALF_LIST

logger = logging.getLogger(__name__)

#: verl's default attention, and torch's for rollouts without padding.
FLASH_ATTENTION, PACKED_ATTENTION = "flash_attention_2", "packed_sdpa"

#: verl's engines, values of `model_engine` -> keys below `actor` of the ranks that share a rollout.
MODEL_ENGINES = {
    "dp": ("ulysses_sequence_parallel_size",),
    "megatron": tuple(f"megatron.{kind}_parallel_size" for kind in ("tensor_model", "pipeline_model", "context")),
    "veomni": ("veomni.ulysses_parallel_size",),
    "torchtitan": tuple(f"torchtitan.{kind}_parallel_size" for kind in ("tensor", "pipeline", "context")),
}


def check_platform(config: DictConfig) -> None:
    """Check that the configuration is for this machine's hardware, and the environment's number of threads.

    Raises:
        ValueError: if not.
    """
    platform = get_platform().device_name
    if (platform == "cpu") != (config.trainer.device == "cpu"):
        remedy = "hardware=cpu" if platform == "cpu" else "VERL_PLATFORM=cpu in the environment, or another hardware"
        raise ValueError(
            f"trainer.device={config.trainer.device}: verl's platform here is {platform}; expected {remedy}"
        )
    threads = os.environ.get("ROLLOUT_OMP_NUM_THREADS")
    if threads and not (threads.isdecimal() and int(threads)):
        raise ValueError(f"ROLLOUT_OMP_NUM_THREADS={threads}: expected a number of threads, at least 1")


def check_cpu(config: DictConfig) -> None:
    """Check that a run without an accelerator asks for nothing that it cannot do; verl would find out in a worker.

    Raises:
        ValueError: if it does.
    """
    if config.trainer.device != "cpu":
        return
    root = config.actor_rollout_ref
    needs: list[tuple[str, Any, tuple[Any, ...]]] = [
        (f"rollout.{key}", root.rollout[key], (False,)) for key in ("free_cache_engine", "enable_sleep_mode")
    ]
    needs.append(("rollout.tensor_model_parallel_size", root.rollout.tensor_model_parallel_size, (1,)))
    if root.actor.strategy in FSDP_STRATEGIES and not config.trainer.val_only:
        needs.append(("actor.strategy", root.actor.strategy, ("fsdp2",)))
    refuse_others(needs, "trainer.device=cpu")


def check_model_engine(config: DictConfig) -> None:
    """Check that `actor.strategy` is of the chosen engine, and no option of the FSDP engine is set for another.

    verl has two keys for the FSDP engine's ranks that share a rollout, of which the engine takes the one that is set:
    the other checks find it in `actor.ulysses_sequence_parallel_size`.

    Raises:
        ValueError: if not; `hardware=cpu` and `hardware=gpu1` set options of the FSDP engine.
    """
    engine, actor = config.model_engine, config.actor_rollout_ref.actor
    others = MODEL_ENGINES.keys() - {"dp"}
    if actor.strategy in others - {engine} or engine in others and actor.strategy != engine:
        expected = engine if engine in others else " or ".join(FSDP_STRATEGIES)
        raise ValueError(f"actor.strategy={actor.strategy}: expected {expected} with model_engine={engine}")
    if engine == "dp" and (size := OmegaConf.select(actor, "fsdp_config.ulysses_sequence_parallel_size") or 1) > 1:
        if actor.ulysses_sequence_parallel_size not in (1, size):
            raise ValueError(
                f"actor.ulysses_sequence_parallel_size={actor.ulysses_sequence_parallel_size}: expected {size}, "
                "actor.fsdp_config.ulysses_sequence_parallel_size, or one of the two"
            )
        actor.ulysses_sequence_parallel_size = size
    kept = OmegaConf.select(actor, "fsdp_config.model_dtype")
    if engine == "dp" and not config.trainer.val_only and str(kept) in HALF_LIST + BFLOAT_LIST:
        if not config.actor_rollout_ref.model.lora_rank:
            logger.warning(
                "actor.fsdp_config.model_dtype=%s: the weights have 16 bits, which round most updates of a small "
                "learning rate away; with fp32, mixed_precision.param_dtype=bf16 is for the passes alone",
                kept,
            )
    for section in ("actor", "ref"):
        ignored = config.actor_rollout_ref[section].get("fsdp_config")
        if engine in others and ignored:
            raise ValueError(
                f"{section}.fsdp_config: expected none with model_engine={engine}, which ignores its keys "
                f"{', '.join(ignored)}; the override ~actor_rollout_ref.{section}.fsdp_config removes them"
            )


def check_attention(config: DictConfig) -> None:
    """Choose torch's attention where flash-attn, which verl takes by default, is not installed.

    Raises:
        ValueError: if the configuration or its critic needs flash-attn, or its ranks cannot share sequences.
    """
    model, actor = config.actor_rollout_ref.model, config.actor_rollout_ref.actor
    named = model.override_config.get("attn_implementation")
    ranks = actor.ulysses_sequence_parallel_size if actor.strategy in FSDP_STRATEGIES else 1
    if named == PACKED_ATTENTION and actor.strategy in FSDP_STRATEGIES:
        refuse_others(
            [("model.use_remove_padding", model.use_remove_padding, (True,))],
            f"model.override_config.attn_implementation={PACKED_ATTENTION}",
        )
    if find_spec("flash_attn"):
        if ranks > 1 and not str(named or FLASH_ATTENTION).startswith("flash"):
            raise ValueError(
                f"model.override_config.attn_implementation={named}: expected {FLASH_ATTENTION} with "
                f"actor.ulysses_sequence_parallel_size={ranks}: with another each rank attends to its own tokens alone"
            )
        return
    if need_critic(config) and config.critic.strategy in FSDP_STRATEGIES:
        raise ValueError(
            f"algorithm.adv_estimator={config.algorithm.adv_estimator}: expected one without a critic where flash-attn "
            "is not installed: verl gives critics no other attention"
        )
    if actor.strategy not in FSDP_STRATEGIES:
        return
    if named == FLASH_ATTENTION or ranks > 1:
        key, value, expected = (
            "model.override_config.attn_implementation",
            named,
            f"{PACKED_ATTENTION}, torch's attention,",
        )
        if ranks > 1:
            key, value, expected = "actor.ulysses_sequence_parallel_size", ranks, "1"
        raise ValueError(f"{key}={value}: expected {expected} where flash-attn is not installed")
    if named is None:
        chosen = PACKED_ATTENTION if model.use_remove_padding else "sdpa"
        logger.warning(
            "flash-attn is not installed: attn_implementation=%s, torch's attention, takes its place", chosen
        )
        with open_dict(model):
            model.override_config["attn_implementation"] = chosen


def check_micro_batches(config: DictConfig) -> None:
    """Check the micro-batches of updates and log-probs, of which a wrong size would stop a worker.

    Raises:
        ValueError: if a size doesn't divide a rank's rollouts, the ranks a mini-batch, or the engine's parallel sizes
            the number of devices; or if a micro-batch by tokens has no room for the longest rollout.
    """
    actor, rollout, trainer = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.trainer
    if trainer.val_only:
        return
    devices = trainer.nnodes * trainer.n_gpus_per_node
    keys = MODEL_ENGINES.get(config.model_engine, ())
    shared = math.prod(OmegaConf.select(actor, key) for key in keys)
    if shared < 1 or devices % shared:
        named = ", ".join(f"actor.{key}={OmegaConf.select(actor, key)}" for key in keys)
        raise ValueError(f"{named}: expected sizes whose product divides the {devices} devices")
    ranks = devices // shared
    if actor.ppo_mini_batch_size * rollout.n % ranks:
        raise ValueError(
            f"actor.ppo_mini_batch_size={actor.ppo_mini_batch_size}: expected a number whose product with "
            f"rollout.n={rollout.n} the {ranks} ranks divide"
        )
    size = OmegaConf.select(actor, "fsdp_config.fsdp_size", default=-1)
    if actor.strategy in FSDP_STRATEGIES and (size is None or 0 <= size < ranks and (size == 0 or ranks % size)):
        raise ValueError(f"actor.fsdp_config.fsdp_size={size}: expected -1 or a divisor of the {ranks} ranks")
    longest = config.data.max_prompt_length + config.data.max_response_length
    sizes = [
        ("actor.ppo_max_token_len", actor.use_dynamic_bsz, actor.ppo_max_token_len_per_gpu),
        ("rollout.log_prob_max_token_len", rollout.log_prob_use_dynamic_bsz, rollout.log_prob_max_token_len_per_gpu),
    ]
    if need_reference_policy(config):
        ref = config.actor_rollout_ref.ref
        sizes.append(("ref.log_prob_max_token_len", ref.log_prob_use_dynamic_bsz, ref.log_prob_max_token_len_per_gpu))
    for key, dynamic, most in sizes:
        if dynamic and (most or 0) * shared < longest:  # verl stops at the first rollout that is longer
            expected = math.ceil(longest / shared)
            raise ValueError(f"{key}_per_gpu={most}: expected at least {expected}, for rollouts of {longest} tokens")
    if actor.use_dynamic_bsz != rollout.log_prob_use_dynamic_bsz:
        raise ValueError(
            f"rollout.log_prob_use_dynamic_bsz={rollout.log_prob_use_dynamic_bsz}: expected "
            f"actor.use_dynamic_bsz={actor.use_dynamic_bsz}"
        )
    if not rollout.log_prob_use_dynamic_bsz:
        size, prompts = rollout.log_prob_micro_batch_size_per_gpu, config.data.train_batch_size
        _check_divisor("rollout.log_prob", size, "data.train_batch_size", prompts, rollout.n, ranks)
    if not actor.use_dynamic_bsz:
        size, prompts = actor.ppo_micro_batch_size_per_gpu, actor.ppo_mini_batch_size
        _check_divisor("actor.ppo", size, "actor.ppo_mini_batch_size", prompts, rollout.n, ranks)


def _check_divisor(name: str, size: int | None, key: str, prompts: int, n: int, ranks: int) -> None:
    """Check that a rank has whole micro-batches of the prompts' n rollouts each."""
    if size is None:
        return
    rollouts = prompts * n // ranks
    if size < 1 or rollouts % size:
        raise ValueError(
            f"{name}_micro_batch_size_per_gpu={size}: expected a divisor of the {rollouts} rollouts of a rank "
            f"({key}={prompts} * rollout.n={n} / {ranks} ranks)"
        )
