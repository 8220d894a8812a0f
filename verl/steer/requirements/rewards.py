# SPDX-License-Identifier: Apache-2.0
"""The checks of the reward function, its code rewards and its reward model."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, open_dict
from verl.steer.data_files import column_values
from verl.steer.grading import sandbox
from verl.steer.grading.code import CodeOptions, is_code
from verl.steer.options import from_config

#: The reward function of this fork.
GRADING = "pkg://verl.steer.grading.score"
LEARNED = "pkg://verl.steer.grading.learned"


def check_reward_function(config: DictConfig) -> None:
    """Check that the file of the reward function is there.

    Raises:
        ValueError: if it is not.
    """
    path = config.reward.custom_reward_function.path
    file = str(path or "").removeprefix("file://")
    if file and not file.startswith("pkg://") and not Path(file).is_file():
        raise ValueError(f"reward.custom_reward_function.path={path}: expected a file, or pkg:// and a module")


def check_code_rewards(config: DictConfig) -> None:
    """Check the options of code rewards and, if rows of this run need it, their sandbox.

    With verl's `reward.sandbox_fusion.url` that service runs the programs: the reward function gets the section.

    Raises:
        ValueError: if an option is out of range, or the sandbox doesn't start.
    """
    function, service = config.reward.custom_reward_function, config.reward.sandbox_fusion
    if function.path != GRADING:
        return
    options = from_config(CodeOptions, (function.get("reward_kwargs") or {}).get("code"), sandbox.SECTION)
    if service.url:
        with open_dict(config):
            function.reward_kwargs = {
                **(function.get("reward_kwargs") or {}),
                "sandbox_fusion_url": service.url,
                "memory_limit_mb": service.memory_limit_mb,
                "max_concurrent": max(1, service.max_concurrent // config.reward.num_workers),
            }
    elif options.sandbox == "bwrap" and any(map(is_code, _data_sources(config))):
        sandbox.check()


def check_reward_model(config: DictConfig) -> None:
    """Check that the reward model of `verl.steer.grading.learned` is there.

    Raises:
        ValueError: if its folder is not named or holds no model.
    """
    function = config.reward.custom_reward_function
    if function.path == LEARNED:
        folder = (function.get("reward_kwargs") or {}).get("model_path")
        if not folder or not Path(folder, "config.json").is_file():
            raise ValueError(
                f"reward.custom_reward_function.reward_kwargs.model_path={folder}: expected the folder of a reward "
                "model, such as scripts/make_reward_model.py makes"
            )


def _data_sources(config: DictConfig) -> set[str]:
    """The data sources of the run's files, as far as these are at hand."""
    keys = ("val_files",) if config.trainer.val_only else ("val_files", "train_files")
    return {source for key in keys for _, source in column_values(config, key, "data_source")}
