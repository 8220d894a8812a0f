# SPDX-License-Identifier: Apache-2.0
"""Configurations for the tests, composed once each."""

import re
from copy import deepcopy
from functools import cache
from pathlib import Path
from unittest import mock

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.override_parser.overrides_parser import OverridesParser
from verl.steer import main  # noqa: F401 - puts verl's configurations on Hydra's path
from verl.steer.requirements import check_and_complete
from verl.utils.config import omega_conf_to_dataclass

import verl_steer

ACTOR, ROLLOUT, MODEL = (f"actor_rollout_ref.{name}" for name in ("actor", "rollout", "model"))
POLICY_LOSS = f"{ACTOR}.policy_loss"
MANAGER = "actor_rollout_ref.rollout.agent.agent_loop_manager_class"


#: Configuration file -> its parsed content, since most of the time of a composition is spent on parsing YAML.
PARSED = {}
read_file = ConfigRepository.load_config


def read_file_once(repository, config_path):
    key = (*(source.path for source in repository.sources), config_path)
    if key not in PARSED:
        PARSED[key] = read_file(repository, config_path)
    return deepcopy(PARSED[key])


METHODS = sorted(path.stem for path in (verl_steer.OVERLAY / "trainer/config/method").glob("*.yaml"))


@cache
def composed(name, *groups):
    """A configuration, or the common one with a method of this name, as run/launch.sh takes it."""
    name, groups = ("steer", (f"method={name}", *groups)) if name in METHODS else (name, groups)
    with (
        initialize_config_dir(str(verl_steer.OVERLAY / "trainer/config"), version_base=None),
        mock.patch.object(ConfigRepository, "load_config", read_file_once),
    ):
        return compose(name, list(groups))


def resolved(name, *overrides):
    """A new configuration: composed once for each choice of groups, then Hydra's own step that overrides values."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    groups = [override for override in parsed if override.key_or_group in ("hardware", "task", "model_engine")]
    config = deepcopy(composed(name, *(override.input_line for override in groups)))
    ConfigLoaderImpl._apply_overrides_to_config([override for override in parsed if override not in groups], config)
    return config


def validated(name, *overrides):
    """A configuration on the CPU after this fork's checks, and its policy loss."""
    config = resolved(name, "hardware=cpu", *overrides)
    check_and_complete(config)
    return config, omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss)


LAUNCHERS = {path.stem: path for path in (Path(__file__).parents[1] / "run").glob("run_*.sh")}


def configuration_of(launcher):
    """The configuration that a launcher names."""
    return re.search(r'launch.sh" (\w+) "\$@"', LAUNCHERS[launcher].read_text())[1]


INFLUENCE = {"loss_mode": "entropy_control", "entropy_change_estimator": "influence"}


TARGET = INFLUENCE | {"token_weight_map": "target"}


ROW = {
    "prompt": [{"role": "user", "content": "1+1="}], "data_source": "arithmetic", "reward_model": {"ground_truth": "2"},
}  # fmt: skip
