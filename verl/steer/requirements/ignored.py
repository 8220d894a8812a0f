# SPDX-License-Identifier: Apache-2.0
"""The checks of keys that verl 0.9.1 reads nowhere, or not in this combination: the run would not be as asked for."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf
from verl.steer.options import leaves
from verl.trainer.ppo.utils import need_critic

#: Sections of older versions of verl, which now reads `reward` only.
OLD_SECTIONS = ("custom_reward_function", "reward_model", "sandbox_fusion")

#: The places today of some of their keys.
NEW_PLACES = {
    "reward_model.reward_manager": "reward.reward_manager.name",
    "custom_reward_function.path": "reward.custom_reward_function.path",
    "custom_reward_function.name": "reward.custom_reward_function.name",
}

#: YAML's former booleans. Hydra reads them as text, which Python takes for true.
TEXTS = ("yes", "no", "on", "off")


def check_ignored(config: DictConfig) -> None:
    """Check that verl reads what a run sets, and in the same sense.

    Raises:
        ValueError: if it does not.
    """
    _check_leaves(config)
    trainer, actor, rollout = config.trainer, config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    if trainer.resume_mode != "resume_path" and trainer.resume_from_path is not None:
        raise ValueError(
            f"trainer.resume_mode={trainer.resume_mode}: expected resume_path with trainer.resume_from_path="
            f"{trainer.resume_from_path}"
        )
    if actor.get("grad_clip", 1) != 1:
        raise ValueError(f"actor.grad_clip={actor.grad_clip}: expected actor.optim.clip_grad in its place")
    if actor.clip_ratio != 0.2 and None not in (actor.clip_ratio_low, actor.clip_ratio_high):
        raise ValueError(
            f"actor.clip_ratio={actor.clip_ratio}: expected clip_ratio_low and clip_ratio_high in its place, which are "
            f"{actor.clip_ratio_low} and {actor.clip_ratio_high}"
        )
    for section in ("actor", "ref") if config.model_engine == "dp" else ():
        name = OmegaConf.select(config, f"actor_rollout_ref.{section}.fsdp_config.dtype", default="bfloat16")
        if name != "bfloat16":
            raise ValueError(
                f"{section}.fsdp_config.dtype={name}: expected {section}.fsdp_config.mixed_precision in its place, "
                "with param_dtype, reduce_dtype and buffer_dtype"
            )
    if config.model_engine == "dp" and trainer.get("default_hdfs_dir") is not None:
        raise ValueError(
            f"trainer.default_hdfs_dir={trainer.default_hdfs_dir}: expected null: verl's FSDP engine copies no "
            "checkpoint there; a class that trainer.checkpoint_callback_class names can"
        )
    sampling = rollout.val_kwargs
    if not sampling.do_sample and sampling.temperature != 0:
        raise ValueError(
            f"rollout.val_kwargs.temperature={sampling.temperature}: expected 0 with rollout.val_kwargs.do_sample=false"
        )
    if trainer.critic_warmup > 1 and not trainer.val_only and not need_critic(config):
        raise ValueError(
            f"trainer.critic_warmup={trainer.critic_warmup}: expected 0 without a critic: the actor would not train in "
            "these steps"
        )
    _check_rollout_correction(config)


def _check_leaves(config: DictConfig) -> None:
    for key, value in leaves(OmegaConf.to_container(config)):
        section = key.partition(".")[0]
        if section in OLD_SECTIONS and value is not None:
            place = NEW_PLACES.get(key, "a key below `reward`")
            raise ValueError(f"{key}={value}: expected null, and {place} in its place")
        if section != "ray_kwargs" and str(value).lower() in TEXTS and not key.endswith("_name"):
            raise ValueError(f"{key}={value}: expected true or false: {value!r} is a text, which counts as true")


def _check_rollout_correction(config: DictConfig) -> None:
    """verl corrects only rollouts whose log-probs vLLM returns, and skips the others without a word."""
    section = config.algorithm.get("rollout_correction") or {}
    asked = [key for key in ("rollout_is", "rollout_rs", "bypass_mode") if section.get(key)]
    if asked and not config.actor_rollout_ref.rollout.calculate_log_probs:
        raise ValueError(
            f"algorithm.rollout_correction.{asked[0]}={section[asked[0]]}: expected rollout.calculate_log_probs=true "
            "with it"
        )
