# SPDX-License-Identifier: Apache-2.0
"""The check of the kinds of values: Python takes a text such as `flase`, and a list, for true."""

from __future__ import annotations

import re
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from verl.steer.options import leaves
from verl.steer.requirements.added_keys import declared_configuration, overriding

#: A number with a text as another form of it: two bounds.
BOUNDS = "algorithm.rollout_correction.rollout_is_threshold"

#: Texts that are booleans or numbers without the quotes.
UNQUOTED = re.compile(r"true|false|[-+]?[.\d]+(e[-+]?\d+)?", re.IGNORECASE)

#: Sections that verl or this fork reads in any case.
NEEDED = (
    *(f"actor_rollout_ref.actor.{name}" for name in ("policy_loss", "checkpoint", "optim")),
    *("actor_rollout_ref.model.override_config", "actor_rollout_ref.rollout.agent"),
    *("trainer", "trainer.v1", "ray_kwargs", "ray_kwargs.ray_init", "data.custom_cls", "global_profiler"),
    *(f"reward.{name}" for name in ("custom_reward_function", "reward_manager", "reward_model", "sandbox_fusion")),
    *("transfer_queue.backend", "transfer_queue.backend.SimpleStorage", "actor_rollout_ref.actor.fsdp_config"),
)


def check_kinds() -> None:
    """Check that this program's overrides give booleans, numbers and sections to keys that are declared with such.

    Raises:
        ValueError: if one does not.
    """
    hydra = HydraConfig.get()
    values = {key: value for one in overriding(hydra) for key, value in leaves(one.value(), one.key_or_group)}
    if not values:
        return
    configuration = declared_configuration(hydra)
    declared = dict(leaves(OmegaConf.to_container(configuration)))
    for key, value in values.items():
        if isinstance(value, str) and value.startswith("${"):
            continue
        if (value is not None or key in NEEDED) and OmegaConf.is_dict(OmegaConf.select(configuration, key)):
            raise ValueError(f"{key}={_shown(value)}: expected a section of keys below it")
        if not isinstance(value, str | list):
            continue
        quotes = ", without quotes" if UNQUOTED.fullmatch(str(value)) else ""
        if isinstance(declared.get(key), bool):
            raise ValueError(f"{key}={_shown(value)}: expected true or false{quotes}")
        if isinstance(declared.get(key), int | float) and key != BOUNDS:
            raise ValueError(f"{key}={_shown(value)}: expected a number{quotes}")


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)
