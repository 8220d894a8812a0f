# SPDX-License-Identifier: Apache-2.0
"""The check of keys that a run adds to the configuration: after a plus Hydra takes any name, misspelt ones too."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

#: How alike a new name and a known one are where the new one is taken for a slip, from 0 to 1 (difflib's ratio).
ALIKE = 0.8

#: Section that is passed to a library whole, with names alike that mean different things.
PASSED_ON = "ray_kwargs"

#: Sections from which verl makes the dataclasses that they name, which refuse unknown keys in a worker.
MADE = ("actor_rollout_ref", "critic", "distillation")


def check_added_keys() -> None:
    """Check the keys that this program's overrides add, such as `+trainer.savefreq=5`, which would have no effect.

    Where verl makes a dataclass of a section, any new key is refused; elsewhere only one whose name is nearly that of
    a known one, since a user's own code may read others.

    Raises:
        ValueError: if a key is unknown.
    """
    hydra = HydraConfig.get()
    parsed = OverridesParser.create().parse_overrides(list(hydra.overrides.task))
    adding = [one for one in parsed if one.is_add() or one.is_force_add()]
    if not adding:
        return
    declared = compose(hydra.job.config_name, [str(one.input_line) for one in parsed if one not in adding])
    for override in adding:
        if override.key_or_group.partition(".")[0] != PASSED_ON:
            _check_key(declared, override.key_or_group)


def _check_key(declared: DictConfig, key: str) -> None:
    """Check the first part of a key that the configuration does not have, such as `lora_rnk` of `model.lora_rnk`."""
    section, place = declared, ""
    for name in key.split("."):
        below = OmegaConf.select(section, name)
        if not isinstance(below, DictConfig):
            break
        section, place = below, f"{place}{name}."
    else:
        return
    known = [str(other) for other in section if other != "_target_"]
    of_dataclass = "_target_" in section and place.startswith(MADE)
    if of_dataclass:
        known += [field.name for field in fields(get_class(section._target_)) if field.name not in known]
    close = get_close_matches(name, known, cutoff=ALIKE)
    if name not in known and (of_dataclass or close):
        raise ValueError(f"{place}{name}: unknown; expected one of {', '.join(close or known)}")
