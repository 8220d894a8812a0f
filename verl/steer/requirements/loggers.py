# SPDX-License-Identifier: Apache-2.0
"""The check of `trainer.logger`, whose libraries verl loads only after models and vLLM have started."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec

from omegaconf import DictConfig, OmegaConf
from verl.steer.ray_resources import joins_running_ray

#: Modules of the loggers that need one.
MODULES = {
    "clearml": "clearml",
    "mlflow": "mlflow",
    "rl_insight": "rl_insight",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "vemlp_wandb": "volcengine_ml_platform",
    "wandb": "wandb",
}

#: Modes of W&B that need no login.
WITHOUT_LOGIN = ("offline", "disabled", "dryrun")


def check_loggers(config: DictConfig) -> None:
    """Check that the loggers' modules are installed, and that W&B knows who logs.

    Not checked where the run goes to a Ray that runs already, whose nodes may have other modules and logins.

    Raises:
        ValueError: if a module or the login is missing.
    """
    if joins_running_ray(config):
        return
    loggers = config.trainer.logger
    loggers = [loggers] if isinstance(loggers, str) else loggers
    for logger in loggers:
        module = MODULES.get(logger)
        if module and find_spec(module) is None:
            raise ValueError(f"trainer.logger={logger}: expected the module {module}, which is not installed")
    if "wandb" in loggers and not config.trainer.get("wandb_proxy"):
        _check_login(os.environ | (OmegaConf.select(config, "ray_kwargs.ray_init.runtime_env.env_vars") or {}))


def _check_login(variables: Mapping[str, str]) -> None:
    """A key in the run's variables is taken as it is: its server is asked when the run begins."""
    if variables.get("WANDB_API_KEY") or variables.get("WANDB_MODE") in WITHOUT_LOGIN:
        return
    import wandb

    try:
        # `wandb offline` and `wandb disabled` write the mode into a file.
        if wandb.setup().settings.mode in WITHOUT_LOGIN or wandb.login(prompt=False):
            return
    except wandb.errors.AuthenticationError as error:
        raise ValueError(f"trainer.logger=wandb: {error}") from error
    raise ValueError(
        "trainer.logger=wandb: expected a login: the variable WANDB_API_KEY or a `wandb login` before, else "
        "WANDB_MODE=offline, or trainer.logger=[console,file], which needs no account"
    )
