# SPDX-License-Identifier: Apache-2.0
"""A logger whose module or login is missing is named before Ray starts."""

from types import SimpleNamespace

import pytest
import wandb
from configurations import resolved
from verl.steer.requirements import loggers
from verl.steer.requirements.loggers import MODULES, check_loggers
from verl.utils.tracking import Tracking


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch):
    """No Ray runs either; another test may have started one."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(wandb, "login", lambda prompt: False)
    monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=SimpleNamespace(mode="online")))
    monkeypatch.setattr(loggers, "joins_running_ray", lambda config: False)


def configuration(*overrides):
    return resolved("grpo", "hardware=cpu", *overrides)


def test_the_default_needs_a_login():
    with pytest.raises(ValueError, match="^trainer.logger=wandb: expected a login: .*WANDB_MODE=offline.*console,file"):
        check_loggers(configuration())


@pytest.mark.parametrize(
    ("name", "value"),
    [("WANDB_API_KEY", "key"), ("WANDB_MODE", "offline"), ("WANDB_MODE", "disabled")],
)
def test_a_variable_in_place_of_the_login(monkeypatch, name, value):
    """Of this process, or one that Ray gives the run's processes."""
    check_loggers(configuration(f"+ray_kwargs.ray_init.runtime_env.env_vars.{name}={value}"))
    monkeypatch.setenv(name, value)
    check_loggers(configuration())


def test_a_mode_that_wandb_keeps_in_a_file(monkeypatch):
    monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=SimpleNamespace(mode="offline")))
    check_loggers(configuration())


def test_a_running_ray_has_modules_and_logins_of_its_own(monkeypatch):
    monkeypatch.setattr(loggers, "joins_running_ray", lambda config: True)
    check_loggers(configuration("trainer.logger=[wandb,swanlab]"))


def test_a_saved_login(monkeypatch):
    monkeypatch.setattr(wandb, "login", lambda prompt: prompt is False)
    check_loggers(configuration())


def test_a_login_that_the_server_refuses(monkeypatch):
    def login(prompt):
        raise wandb.errors.AuthenticationError("the key has expired")

    monkeypatch.setattr(wandb, "login", login)
    with pytest.raises(ValueError, match="^trainer.logger=wandb: the key has expired$"):
        check_loggers(configuration())


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.logger=[console,file]"],
        ["trainer.logger=console"],
        ["+trainer.wandb_proxy=http://proxy"],  # wandb is given it when the run begins
    ],
)
def test_what_needs_no_login(overrides):
    check_loggers(configuration(*overrides))


@pytest.mark.parametrize("logger", sorted(MODULES))
def test_a_missing_module_is_named(monkeypatch, logger):
    monkeypatch.setattr(loggers, "find_spec", lambda module: None)
    with pytest.raises(ValueError, match=f"^trainer.logger={logger}: expected the module {MODULES[logger]}, which is"):
        check_loggers(configuration(f"trainer.logger={logger}"))
    with pytest.raises(ValueError, match=f"^trainer.logger={logger}: "):
        check_loggers(configuration(f"trainer.logger=[console,{logger}]"))


def test_all_loggers_of_verl_are_known():
    assert MODULES.keys() | {"console", "file"} == set(Tracking.supported_backend)
