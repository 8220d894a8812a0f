# SPDX-License-Identifier: Apache-2.0
"""The check of the kinds of values: Python takes a text such as `flase` for true."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from verl.steer.options import leaves
from verl.steer.requirements.added_keys import declared_configuration, overriding

#: A number with a text as another form of it: two bounds.
BOUNDS = "algorithm.rollout_correction.rollout_is_threshold"


def check_kinds() -> None:
    """Check that this program's overrides give no text to a key that is declared with a boolean or a number.

    Raises:
        ValueError: if one does.
    """
    values = [
        (key, value) for one in overriding(HydraConfig.get()) for key, value in leaves(one.value(), one.key_or_group)
    ]
    texts = {key: value for key, value in values if isinstance(value, str) and not value.startswith("${")}
    if not texts:
        return
    declared = dict(leaves(OmegaConf.to_container(declared_configuration(HydraConfig.get()))))
    for key, text in texts.items():
        if isinstance(declared.get(key), bool):
            raise ValueError(f"{key}={text}: expected true or false")
        if isinstance(declared.get(key), int | float) and key != BOUNDS:
            raise ValueError(f"{key}={text}: expected a number")
