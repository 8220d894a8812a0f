# SPDX-License-Identifier: Apache-2.0
"""What docs/interventions.md names is there: configurations, keys, and their defaults as it gives them."""

import re

import pytest
import yaml
from configurations import METHODS, POLICY_LOSS, validated
from omegaconf import OmegaConf
from verl.steer.config import ADVANTAGE_OPTIONS
from verl.steer.options import from_config
from verl.steer.token_metrics import QUADRANTS
from verl.trainer.ppo.core_algos import (
    BASE_LOSSES,
    ENTROPY_CHANGE_ESTIMATORS,
    ENTROPY_CONTROL_MODES,
    TOKEN_WEIGHT_MAPS,
    TOKEN_WEIGHT_NORMALIZERS,
)


def rows(root):
    """(configuration, key, value) for each key of each row of the tables."""
    for line in (root / "docs/interventions.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = [name for cell in cells for name in re.findall(r"^`(\w+)`$", cell)]
        if line.startswith("|") and len(cells) in (4, 5) and "---" not in line:
            for key, value in re.findall(r"`([\w.]+)=([^`]+)`", cells[-2]):
                yield (names or ["steer_exp"])[0], key, value


def test_the_keys_have_the_values_that_the_page_gives(root):
    found = list(rows(root))
    assert len(found) > 30
    for name, key, value in found:
        config, policy_loss = validated(name)
        if key.startswith("actor."):
            actual = OmegaConf.select(config, f"actor_rollout_ref.{key}")
        elif key.startswith("algorithm."):
            options = {k: v for cls in ADVANTAGE_OPTIONS for k, v in vars(from_config(cls, config.algorithm)).items()}
            actual = options[key.removeprefix("algorithm.")]
        else:
            assert OmegaConf.select(config, POLICY_LOSS).get(key, "missing") != "missing", key
            actual = getattr(policy_loss, key)
        assert actual == yaml.safe_load(value), f"{name}: {key} is {actual}, the page says {value}"


def test_every_method_is_on_the_page_and_every_name_is_a_configuration(root):
    page = (root / "docs/interventions.md").read_text()
    named = {cell for line in page.splitlines() for cell in re.findall(r"\| `(\w+)` \|", line)}
    extremes = {"steer_exp_extreme", "steer_linear_extreme"}
    assert named == set(METHODS) - {"grpo"} - extremes and "`grpo`" in page


@pytest.mark.parametrize(
    "choices",
    [
        BASE_LOSSES,
        ENTROPY_CHANGE_ESTIMATORS,
        ENTROPY_CONTROL_MODES,
        TOKEN_WEIGHT_MAPS,
        TOKEN_WEIGHT_NORMALIZERS,
        QUADRANTS,
    ],
)
def test_every_choice_is_named(root, choices):
    page = (root / "docs/interventions.md").read_text()
    assert [name for name in choices if not re.search(rf"\b{name}\b", page)] == []
