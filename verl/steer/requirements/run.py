# SPDX-License-Identifier: Apache-2.0
"""The checks with which a run begins, before Ray starts, but for those of its data and its model."""

from __future__ import annotations

from omegaconf import DictConfig
from verl.steer.requirements import check_and_complete
from verl.steer.requirements.added_keys import check_added_keys
from verl.steer.requirements.kinds import check_kinds
from verl.steer.requirements.loggers import check_loggers
from verl.steer.requirements.model import check_critic_model
from verl.steer.requirements.verl_values import check_by_verl
from verl.utils.device import auto_set_device


def check_run(config: DictConfig) -> None:
    """Check this program's command line, its configuration and its loggers, and complete the configuration.

    Args:
        config: the resolved configuration, changed in place.

    Raises:
        ValueError: if a check fails.
    """
    check_added_keys()
    check_kinds()
    check_and_complete(config)
    check_loggers(config)
    check_critic_model(config)
    if config.trainer.use_v1:
        auto_set_device(config)
        check_by_verl(config)
