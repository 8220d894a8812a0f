# SPDX-License-Identifier: Apache-2.0
"""Settings that decide what a run learns, kept in each checkpoint: a run with other ones resumes by `resume_path` only.

Not among them are what a run may change when it goes on: its length, its paths, its hardware and what it logs.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from verl.steer.checkpoint_ledger import CheckpointLedger, replace_file
from verl.steer.options import leaves

#: File in a checkpoint's folder.
SETTINGS = "settings.yaml"

ACTOR = (
    *("clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "policy_loss", "loss_agg_mode"),
    *("entropy_coeff", "use_kl_loss", "kl_loss_coef", "kl_loss_type"),
    *("loss_scale_factor", "tau_pos", "tau_neg"),
    *("ppo_epochs", "ppo_mini_batch_size", "shuffle", "data_loader_seed"),
)
OPTIMIZER = (
    *("optimizer", "lr", "betas", "weight_decay", "clip_grad"),
    *("lr_scheduler_type", "lr_warmup_steps", "lr_warmup_steps_ratio", "min_lr_ratio", "num_cycles"),
    *("override_optimizer_config.amsgrad", "override_optimizer_config.eps"),  # others are of the hardware
)
#: Keys of the configuration; of a section all below it.
KEYS = (
    "algorithm",
    *(f"actor_rollout_ref.actor.{name}" for name in ACTOR),
    *(f"actor_rollout_ref.actor.optim.{name}" for name in OPTIMIZER),
    *(f"actor_rollout_ref.model.{name}" for name in ("lora", "lora_rank", "lora_alpha", "target_modules")),
    *(f"actor_rollout_ref.rollout.{name}" for name in ("n", "temperature", "top_p", "top_k", "seed")),
    *(f"data.{name}" for name in ("train_batch_size", "max_prompt_length", "max_response_length", "seed", "shuffle")),
    *("data.train_max_samples", "trainer.critic_warmup"),
    # Not `custom_reward_function.reward_kwargs`, which may have paths.
    *("reward.custom_reward_function.name", "reward.reward_manager.name", "reward.reward_kwargs"),
)


def settings_of(config: DictConfig, keys: Iterable[str] = KEYS) -> dict[str, Any]:
    """Each of the keys, or of a section's each key below it, with its value; None where the configuration lacks it."""
    return {name: value for key in keys for name, value in leaves(OmegaConf.select(config, key), key)}


def save_settings(config: DictConfig, checkpoint: Path) -> None:
    """Write the settings into a checkpoint's folder."""
    replace_file(checkpoint / SETTINGS, OmegaConf.to_yaml(OmegaConf.create(settings_of(config))))


def check_settings(config: DictConfig) -> None:
    """Check that a run that goes on by itself has the settings of the checkpoint from which it would go on.

    Raises:
        ValueError: if it has others.
    """
    checkpoint = CheckpointLedger.checkpoint_to_resume(Path(config.trainer.default_local_dir))
    if config.trainer.resume_mode != "auto" or checkpoint is None or not (checkpoint / SETTINGS).is_file():
        return
    saved: Any = OmegaConf.to_container(OmegaConf.load(checkpoint / SETTINGS))
    # An earlier version may have saved fewer keys.
    now = settings_of(config, [key for key in KEYS if any(name == key or name.startswith(f"{key}.") for name in saved)])
    changed = [
        f"{key.removeprefix('actor_rollout_ref.')}={saved.get(key)} (now {now.get(key)})"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    ]
    if changed:
        raise ValueError(
            f"trainer.resume_mode=auto: {checkpoint} is of a run with {', '.join(changed)}: expected the same "
            "settings, another trainer.experiment_name or OUTPUT_DIR for a new run, or trainer.resume_mode=resume_path "
            "with trainer.resume_from_path to go on with others"
        )
