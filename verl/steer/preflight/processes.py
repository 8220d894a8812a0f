# SPDX-License-Identifier: Apache-2.0
"""Checks in processes of their own: their output goes to a log file, their rows come back in a file for each rank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
from verl.steer.preflight.rows import Row

#: File of what vLLM sampled: the tokens of `prompt` and of each of `responses`, and their `log_probs` in nats.
TOKENS = "tokens.json"

#: Folder of the checkpoint that the ranks write, beside those of the run.
CHECKPOINT = "preflight_checkpoint"


def write_row(folder: Path, group: str, rank: int, row: Row) -> None:
    """Append a row to the file of a rank."""
    with (folder / f"{group}_{rank}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_row(files: list[Path], name: str, ending: str) -> Row:
    """A check's row of the first rank where it failed, else of the first where it did not end, else of rank 0."""
    ranked = []
    for rank, file in enumerate(files):
        rows = [Row(*json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
        row = next((row for row in rows if row.name == name), Row(name, False, ending))
        ranked.append((row.passed, row.detail == ending, rank, row.detail))
    passed, _, rank, detail = min(ranked)
    return Row(name, passed, detail if passed else f"rank {rank}: {detail}")


def _end(pid: int) -> None:
    """End a process, its group, and all that they started: torchrun's workers have sessions of their own."""
    with suppress(psutil.NoSuchProcess):
        started = psutil.Process(pid).children(recursive=True)
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def run_group(
    folder: Path, group: str, names: tuple[str, ...], ranks: int, command: list[str], seconds: float, **variables: str
) -> list[Row]:
    """The rows that a command's processes wrote; after so many seconds it is ended, with all that it started."""
    files = [folder / f"{group}_{rank}.jsonl" for rank in range(ranks)]
    for file in files:
        file.unlink(missing_ok=True)
    log, environment = folder / f"{group}.log", {**os.environ, **variables}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            ending = f"ended with status {process.wait(max(seconds, 1))}"
        except subprocess.TimeoutExpired:
            ending = f"not done after {seconds:.0f} s"
        finally:
            _end(process.pid)
    return [read_row(files, name, f"{ending}: see {log}") for name in names]
