# SPDX-License-Identifier: Apache-2.0
"""The entry point, `python -m verl.steer.main`: verl's, with this fork's configurations, checks and task runner."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import hydra
import ray
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from verl.steer.requirements.files import check_data
from verl.steer.requirements.model import check_model
from verl.steer.requirements.run import check_run
from verl.steer.run_ending import ActorsDied, WatchedRunner, reason_of
from verl.steer.run_lock import lock_folder
from verl.steer.task_runner import SteerTaskRunner
from verl.trainer import main_ppo

import verl_steer


class VerlConfigs(SearchPathPlugin):
    """Adds verl's configurations to Hydra's search path, after this fork's, which `main` names."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("verl", "pkg://verl.trainer.config")


Plugins.instance().register(VerlConfigs)


#: Keys below `trainer` that name folders.
FOLDERS = ("default_local_dir", "resume_from_path", "rollout_data_dir", "validation_data_dir")

#: Hydra's flags whose value is a word of its own.
VALUED = frozenset("--config-dir -cd --config-path -cp --config-name -cn --package -p --cfg -c".split())


def overrides_first(words: Sequence[str]) -> list[str]:
    """The command line with its overrides before its flags: Hydra refuses `--cfg job hardware=cpu`."""
    parts: tuple[list[str], list[str]] = [], []
    for before, word in zip(["", *words], words, strict=False):
        is_flag = before in VALUED or word.startswith("-") or not ("=" in word or word.startswith("~"))
        parts[is_flag].append(word)
    return parts[0] + parts[1]


@hydra.main(config_path="../trainer/config", config_name="steer", version_base=None)
def main(config: DictConfig) -> None:
    """Train or evaluate by a Hydra configuration, such as `--config-name steer method=steer_exp`."""
    verl_steer.check()
    try:
        check_run(config)
        # The workers of a Ray that runs already may have another working folder.
        for key in FOLDERS:
            if config.trainer.get(key):
                config.trainer[key] = os.path.abspath(config.trainer[key])
        for key in ("train_files", "val_files"):
            check_data(config, key)
        check_model(config)
        lock = nullcontext() if config.trainer.val_only else lock_folder(Path(config.trainer.default_local_dir))
    except ValueError as error:
        sys.exit(f"steer-verl: {error}")
    with lock:
        _run(config)


def _run(config: DictConfig) -> None:
    if not config.trainer.use_v1:
        main_ppo.main.__wrapped__(config)
        return
    # Here, because the workers of a Ray that runs already lack this process's variables, such as OUTPUT_DIR.
    OmegaConf.resolve(config)
    try:
        main_ppo.run_ppo(config, task_runner_class=WatchedRunner(SteerTaskRunner))
    except (ray.exceptions.RayError, ActorsDied) as error:
        # Their modules import the trainers, which this process does not need before.
        from verl.steer.checkpoint_ledger import UnknownMetric
        from verl.steer.checkpoints import NoSteps
        from verl.steer.rollout.wait import RolloutsFailed

        reason = reason_of(error, explained_by=(UnknownMetric, NoSteps, RolloutsFailed))
        if reason is None:
            raise
        # Ray passes on the workers' output until it has ended; end it first, so that the line below is the last one.
        ray.shutdown()
        sys.exit(f"steer-verl: {reason}")


if __name__ == "__main__":
    # verl warns at each of its checks that estimators other than `gae` have no critic.
    warnings.filterwarnings("ignore", message="Disabled critic as")
    sys.argv[1:] = overrides_first(sys.argv[1:])
    main()
