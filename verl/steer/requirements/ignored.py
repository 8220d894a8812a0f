# SPDX-License-Identifier: Apache-2.0
"""The checks of keys that verl 0.9.1 reads nowhere, or not in this combination: the run would not be as asked for."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf
from verl.steer.options import leaves
from verl.steer.requirements.allowed import refuse_others
from verl.trainer.ppo.utils import need_critic

#: Sections of older versions of verl, which now reads `reward` only.
OLD_SECTIONS = ("custom_reward_function", "reward_model", "sandbox_fusion")

#: The section of the penalty for long responses.
PENALTY = "reward.reward_kwargs.overlong_buffer_cfg"

#: The places today of some of their keys.
NEW_PLACES = {
    "reward_model.reward_manager": "reward.reward_manager.name",
    "custom_reward_function.path": "reward.custom_reward_function.path",
    "custom_reward_function.name": "reward.custom_reward_function.name",
}

#: Keys that neither verl's trainers of `trainer.use_v1` nor the FSDP engine read -> their default, and what to set in
#: their place.
UNREAD = {
    "algorithm.use_pf_ppo": (False, "null or false: verl's older trainers alone read it"),
    "actor_rollout_ref.actor.use_prefix_grouper": (False, "false"),
    "actor_rollout_ref.model.tiled_mlp.enabled": (False, "false"),
    "actor_rollout_ref.rollout.do_sample": (True, "true: rollouts for training are sampled"),
    "data.reward_fn_key": ("data_source", "data_source"),
    "data.tokenizer": (None, "null, and actor_rollout_ref.model.tokenizer_path in its place"),
}

#: Keys below `actor` -> those that the FSDP engine reads in their place, and a default that says nothing.
READ_ELSEWHERE = {
    "use_remove_padding": ("model.use_remove_padding", None),
    "use_fused_kernels": ("model.use_fused_kernels", None),
    "use_torch_compile": ("actor.fsdp_config.use_torch_compile", True),
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
    if config.model_engine == "dp" and trainer.use_v1 and not trainer.val_only:
        _check_unread(config)
    _check_rollout_correction(config)


def _check_unread(config: DictConfig) -> None:
    for key, (usual, expected) in UNREAD.items():
        value = OmegaConf.select(config, key, default=usual)
        if value not in (usual, None):
            raise ValueError(f"{key.removeprefix('actor_rollout_ref.')}={value}: expected {expected}")
    root, actor = config.actor_rollout_ref, config.actor_rollout_ref.actor
    for key, (place, default) in READ_ELSEWHERE.items():
        if actor.get(key) not in (None, default, OmegaConf.select(root, place)):
            raise ValueError(f"actor.{key}={actor[key]}: expected {place}={actor[key]} in its place, which is read")
    if OmegaConf.select(actor, "fsdp_config.offload_policy") and actor.strategy != "fsdp2":
        raise ValueError(
            f"actor.fsdp_config.offload_policy=True: expected actor.strategy=fsdp2 with it, which is {actor.strategy}"
        )
    if OmegaConf.select(config, "data.custom_cls.name") and not config.data.custom_cls.path:
        raise ValueError(f"data.custom_cls.name={config.data.custom_cls.name}: expected data.custom_cls.path with it")


def _check_leaves(config: DictConfig) -> None:
    for key, value in leaves(OmegaConf.to_container(config)):
        section = key.partition(".")[0]
        if section in OLD_SECTIONS and value is not None:
            place = NEW_PLACES.get(key, "a key below `reward`")
            raise ValueError(f"{key}={value}: expected null, and {place} in its place")
        if "overlong_buffer" in key and not key.startswith(f"{PENALTY}.") and value is True:
            raise ValueError(f"{key}=True: expected false, and {PENALTY}.enable=true in its place")
        if section != "ray_kwargs" and str(value).lower() in TEXTS and not key.endswith("_name"):
            raise ValueError(f"{key}={value}: expected true or false: {value!r} is a text, which counts as true")


def _check_rollout_correction(config: DictConfig) -> None:
    """verl corrects only rollouts whose log-probs vLLM returns, and skips the others without a word.

    With `bypass_mode` its trainers of `trainer.use_v1` correct nothing, and leave the loss to `policy_loss`.
    """
    section = config.algorithm.get("rollout_correction") or {}
    mode = config.actor_rollout_ref.actor.policy_loss.loss_mode
    if config.trainer.use_v1 and mode == "bypass_mode":
        raise ValueError("policy_loss.loss_mode=bypass_mode: expected another with trainer.use_v1=true")
    if config.trainer.use_v1 and section.get("bypass_mode"):
        refuse_others(
            [
                ("algorithm.rollout_correction.rollout_is", section.get("rollout_is"), (None,)),
                ("algorithm.rollout_correction.rollout_rs", section.get("rollout_rs"), (None,)),
                ("algorithm.rollout_correction.loss_type", section.get("loss_type"), (None, "ppo_clip")),
            ],
            "algorithm.rollout_correction.bypass_mode=true and trainer.use_v1=true",
        )
    asked = [key for key in ("rollout_is", "rollout_rs", "bypass_mode") if section.get(key)]
    if asked and not config.actor_rollout_ref.rollout.calculate_log_probs:
        raise ValueError(
            f"algorithm.rollout_correction.{asked[0]}={section[asked[0]]}: expected rollout.calculate_log_probs=true "
            "with it"
        )
