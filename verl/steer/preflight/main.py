# SPDX-License-Identifier: Apache-2.0
"""All checks of a configuration on this machine: `python -m verl.steer.preflight.main [Hydra overrides]`."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf
from verl.steer import main as entry_point  # noqa: F401 - puts verl's configurations on Hydra's path
from verl.steer.preflight import dataset, disk, machine, memory, ranks
from verl.steer.preflight.processes import CHECKPOINT, TOKENS, run_group
from verl.steer.preflight.rows import Row, report, run_check
from verl.steer.requirements.model import check_model
from verl.steer.requirements.run import check_run

#: Seconds for all checks, and those that vLLM leaves to the ranks.
SECONDS, LEFT_TO_RANKS = 290, 120


def check_configuration(config: DictConfig) -> str:
    """The checks with which a run begins, but for those of its data."""
    check_run(config)
    check_model(config)
    return f"loss_mode={config.actor_rollout_ref.actor.policy_loss.loss_mode}, {config.actor_rollout_ref.model.path}"


#: Checks of this process, which leaves the GPUs alone; the first completes the configuration.
CHECKS: dict[str, Callable[[DictConfig], str]] = {
    "configuration": check_configuration,
    "GPUs": machine.check_gpus,
    "attention": machine.check_attention,
    "memory": memory.check_memory,
    "training data": partial(dataset.check_files, key="train_files"),
    "validation data": partial(dataset.check_files, key="val_files"),
    "disk": disk.check_disk,
}


def checks_in_processes(config: DictConfig, folder: Path, end: float) -> list[Row]:
    """vLLM, then the ranks, which compare their log-probs with vLLM's."""
    (folder / TOKENS).unlink(missing_ok=True)
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    variables = OmegaConf.select(config, "ray_kwargs.ray_init.runtime_env.env_vars") or {}
    count, python = config.trainer.n_gpus_per_node, [sys.executable, "-m"]
    generate = [*python, "verl.steer.preflight.generate", str(folder)]
    torchrun = [*python, "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    torchrun += ["-m", "verl.steer.preflight.ranks", str(folder)]
    seconds = max(end - LEFT_TO_RANKS - time.monotonic(), 0)
    # As a run does: verl's import counts the GPUs, and after that CUDA does not start in a forked process.
    spawn = {**variables, "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    rows = run_group(folder, "vllm", ("vLLM",), 1, generate, seconds, **spawn)
    rows += run_group(folder, "ranks", ranks.CHECKS, count, torchrun, end - time.monotonic(), **variables)
    shutil.rmtree(Path(config.trainer.default_local_dir, CHECKPOINT), ignore_errors=True)
    return rows


@hydra.main(config_path="../../trainer/config", config_name="steer", version_base=None)
def main(config: DictConfig) -> None:
    """Check, print the table and the line, and exit with 1 if a check failed."""
    # As Ctrl-C does, these leave none of the processes behind that the checks start. `nohup` ignores SIGHUP.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    end = time.monotonic() + float(os.environ.get("PREFLIGHT_SECONDS", SECONDS))
    folder = Path(os.environ.get("OUTPUT_DIR", "outputs"), "preflight").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"preflight: logs in {folder}", flush=True)
    rows = [run_check(name, check, config) for name, check in CHECKS.items()]
    sys.exit(report(rows + checks_in_processes(config, folder, end)))


if __name__ == "__main__":
    main()
