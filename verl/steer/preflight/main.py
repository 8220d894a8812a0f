# SPDX-License-Identifier: Apache-2.0
"""All checks of a configuration on this machine: `python -m verl.steer.preflight.main [Hydra overrides]`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf
from verl.steer import main as entry_point  # noqa: F401 - puts verl's configurations on Hydra's path
from verl.steer.preflight import dataset, disk, machine, memory
from verl.steer.preflight.processes import run_group
from verl.steer.preflight.ranks import CHECKS
from verl.steer.preflight.rows import Row, report, run_check
from verl.steer.requirements import check_and_complete
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config

#: Seconds for all checks; vLLM leaves the last ones to the ranks.
SECONDS, LEFT_TO_RANKS = 290.0, 120.0


def check_configuration(config: DictConfig) -> str:
    """The checks with which a run begins."""
    check_and_complete(config)
    validate_config(config, need_reference_policy(config), need_critic(config))
    return f"loss_mode={config.actor_rollout_ref.actor.policy_loss.loss_mode}, {config.actor_rollout_ref.model.path}"


def checks_here(config: DictConfig) -> list[Row]:
    """The checks of this process, which leave the GPUs alone."""
    checks: dict[str, Callable[[DictConfig], str]] = {
        "configuration": check_configuration,
        "driver": machine.check_driver,
        "GPUs": machine.check_gpus,
        "memory in use": machine.check_free_memory,
        "training data": lambda config: dataset.check_files(config, "train_files"),
        "validation data": lambda config: dataset.check_files(config, "val_files"),
        "disk": disk.check_disk,
        "memory needed": memory.check_memory,
    }
    return [run_check(name, check, config) for name, check in checks.items()]


def checks_in_processes(config: DictConfig, folder: Path, end: float) -> list[Row]:
    """vLLM, then the ranks, which compare their log-probs with vLLM's."""
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    variables = OmegaConf.select(config, "ray_kwargs.ray_init.runtime_env.env_vars") or {}
    environment = {str(key): str(value) for key, value in variables.items()}
    python, ranks = [sys.executable, "-m"], config.trainer.n_gpus_per_node
    torchrun = [*python, "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    generate, of_rank = (f"verl.steer.preflight.{name}" for name in ("generate", "ranks"))
    seconds = end - time.monotonic() - LEFT_TO_RANKS
    rows = run_group(folder, "vllm", ("vLLM",), 1, [*python, generate, str(folder)], seconds, **environment)
    seconds = end - time.monotonic()
    return rows + run_group(folder, "ranks", CHECKS, ranks, [*torchrun, of_rank, str(folder)], seconds, **environment)


@hydra.main(config_path="../../trainer/config", config_name="steer", version_base=None)
def main(config: DictConfig) -> None:
    """Check, print the table and the line, and exit with 1 if anything failed."""
    end = time.monotonic() + float(os.environ.get("PREFLIGHT_SECONDS", SECONDS))
    folder = Path(os.environ.get("OUTPUT_DIR", "outputs"), "preflight").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"preflight: logs in {folder}; vLLM and the training ranks take a minute or more", flush=True)
    sys.exit(report(checks_here(config) + checks_in_processes(config, folder, end)))


if __name__ == "__main__":
    main()
