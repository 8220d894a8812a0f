# SPDX-License-Identifier: Apache-2.0
"""The check of `trainer.logger`, whose libraries verl loads only after models and vLLM have started."""

from __future__ import annotations

import os
from importlib.util import find_spec

from omegaconf import DictConfig, OmegaConf

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

#: Values of WANDB_MODE that need no login.
WITHOUT_LOGIN = ("offline", "disabled", "dryrun")


def check_loggers(config: DictConfig) -> None:
    """Check that the loggers' modules are installed, and that W&B knows who logs.

    Not checked where the run goes to a Ray that runs already, whose nodes may have other modules and logins.

    Raises:
        ValueError: if a module or the login is missing.
    """
    if OmegaConf.select(config, "ray_kwargs.ray_init.address") or os.environ.get("RAY_ADDRESS"):
        return
    loggers = config.trainer.logger
    loggers = [loggers] if isinstance(loggers, str) else loggers
    for logger in loggers:
        module = MODULES.get(logger)
        if module and find_spec(module) is None:
            raise ValueError(f"trainer.logger={logger}: expected the module {module}, which is not installed")
    if "wandb" in loggers and not config.trainer.get("wandb_proxy"):
        _check_login()


def _check_login() -> None:
    """A key in the environment is taken as it is: its server is asked when the run begins."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in WITHOUT_LOGIN:
        return
    import wandb

    try:
        if wandb.login(prompt=False):
            return
    except wandb.errors.AuthenticationError as error:
        raise ValueError(f"trainer.logger=wandb: {error}") from error
    raise ValueError(
        "trainer.logger=wandb: expected a login: the variable WANDB_API_KEY or a `wandb login` before, else "
        "WANDB_MODE=offline, or trainer.logger=[console,file], which needs no account"
    )
