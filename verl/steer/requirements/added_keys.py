# SPDX-License-Identifier: Apache-2.0
"""The check of keys that a run adds to the configuration: after a plus Hydra takes any name, misspelt ones too."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from os.path import commonprefix

from hydra import compose
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from verl.steer.options import leaves
from verl.steer.requirements.ignored import OLD_SECTIONS

#: How alike a new name and a known one are where the new one is taken for a slip, from 0 to 1 (difflib's ratio).
ALIKE = 0.8

#: Sections whose names are the user's or another library's.
FREE = {"engine_kwargs", "ray_init", "reward_kwargs", "sampler_kwargs", "teacher_models"}

#: Beginning of the names of sections with another library's keys.
OVERRIDE = "override_"

#: Names that mean something in any section: a user's own code may read them anywhere.
COMMON = {"enable", "mode", "n", "name", "path", "seed", "temperature"}

#: Sections from which verl makes the dataclasses that they name, which refuse unknown keys in a worker.
MADE = ("actor_rollout_ref", "critic", "distillation")


#: Keys of older versions of verl, and their places today.
MOVED = {
    "ray_init": "ray_kwargs.ray_init",
    "algorithm.rollout_is": "algorithm.rollout_correction.rollout_is",
    "algorithm.rollout_is_threshold": "algorithm.rollout_correction.rollout_is_threshold",
    "actor_rollout_ref.actor.tis_imp_ratio_cap": "algorithm.rollout_correction.rollout_is_threshold",
    "actor_rollout_ref.actor.kl_coef": "actor_rollout_ref.actor.kl_loss_coef",
    "algorithm.kl_coef": "algorithm.kl_ctrl.kl_coef",
}


def check_added_keys() -> None:
    """Check the keys that this program's overrides add, such as `+trainer.savefreq=5`, which would have no effect.

    Where verl makes a dataclass of a section, any new key is refused; elsewhere only one whose name is nearly that of
    a known one or that of a key at another place, since a user's own code may read others.

    Raises:
        ValueError: if a key is unknown, or has moved.
    """
    hydra = HydraConfig.get()
    adding = [one for one in overriding(hydra) if one.is_add() or one.is_force_add()]
    keys = [key for one in adding for key, _ in leaves(one.value(), one.key_or_group)]
    for key in keys:
        if place := next((new for old, new in MOVED.items() if f"{key}.".startswith(f"{old}.")), None):
            raise ValueError(f"{key}: expected {place} in its place")
    if keys:
        declared = declared_configuration(hydra)
        own_data = any(one.key_or_group == "data.custom_cls.path" for one in overriding(hydra))
        for key in keys:
            _check_key(declared, key, own_sections=("data.",) if own_data else ())


def overriding(hydra: HydraConf) -> list[Override]:
    """This program's overrides that set keys, without those that choose a group's file."""
    overrides = OverridesParser.create().parse_overrides(list(hydra.overrides.task))
    return [one for one in overrides if one.key_or_group not in hydra.runtime.choices and not one.is_delete()]


def declared_configuration(hydra: HydraConf) -> DictConfig:
    """The configuration of the chosen files alone, without the keys that the program sets."""
    choosing = OverridesParser.create().parse_overrides(list(hydra.overrides.task))
    groups = [str(one.input_line) for one in choosing if one.key_or_group in hydra.runtime.choices]
    places = [one for one in hydra.overrides.hydra if one.startswith("hydra.searchpath=")]
    return compose(hydra.job.config_name, places + groups)


def _check_key(declared: DictConfig, key: str, own_sections: tuple[str, ...]) -> None:
    """Check the first part of a key that the configuration does not have, such as `lora_rnk` of `model.lora_rnk`.

    Args:
        declared: the configuration of the chosen files.
        key: the whole key.
        own_sections: those that the user's own code reads, which may have the names of others.
    """
    section, place = declared, ""
    for name in key.split("."):
        below = OmegaConf.select(section, name)
        if not isinstance(below, DictConfig):
            break
        if _is_free(name):
            return
        section, place = below, f"{place}{name}."
    else:
        return
    dataclass = [field.name for field in fields(get_class(section._target_))] if "_target_" in section else []
    known = [other for other in dict.fromkeys([*map(str, section), *dataclass]) if other != "_target_"]
    known += [] if place else ["seed"]  # which other keys read
    if name in section or name in known:
        return
    rest = key.removeprefix(f"{place}{name}")
    if not (place and name in COMMON or place in own_sections) and (elsewhere := _places(declared, place, name, rest)):
        raise ValueError(f"{key}: unknown; expected {' or '.join(elsewhere)}")
    close = get_close_matches(name, known, cutoff=ALIKE)
    if close or dataclass and place.startswith(MADE):
        raise ValueError(f"{place}{name}: unknown; expected one of {', '.join(close or known)}")


def _is_free(name: str) -> bool:
    """Whether a section's keys are the user's or another library's."""
    return name in FREE or name.startswith(OVERRIDE)


def _places(declared: DictConfig, place: str, name: str, rest: str) -> list[str]:
    """The keys that end with a name and the rest of a key, such as `.n` after `rollout`, or the sections of this name.

    At most four, those nearest to the place first, then the shortest.
    """
    every = [f".{key}." for key, _ in leaves(OmegaConf.to_container(declared)) if not key.startswith(OLD_SECTIONS)]
    found = {key for key in every if key.endswith(f".{name}{rest}.")}
    found = found or {key.partition(f".{name}.")[0] + f".{name}." for key in every if f".{name}." in key}
    near = place.split(".")
    ranked = []
    for key in (key.strip(".") for key in found):
        shared = len(commonprefix([key.split("."), near]))
        ranked.append((-shared, key.count("."), key))
    return [key for _, _, key in sorted(ranked)[:4]]
