# SPDX-License-Identifier: Apache-2.0
"""Checks in processes of their own, whose output goes to a log file and whose rows come back in files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from verl.steer.preflight.rows import Row

#: File of the tokens that vLLM sampled: `prompt`, `response`, and the response's `log_probs` in nats.
TOKENS = "tokens.json"


def write_row(folder: Path, group: str, rank: int, row: Row) -> None:
    """Append a process's row to its file."""
    with (folder / f"{group}_rank_{rank}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(folder: Path, group: str, names: tuple[str, ...], ranks: int, ending: str) -> Iterator[Row]:
    """One row for each name: rank 0's, unless a rank's check failed or is missing.

    Args:
        folder: with the rows' files and the log.
        group: name of the processes.
        names: of the checks.
        ranks: number of processes.
        ending: how the processes ended, for the ranks whose rows are missing.
    """
    files = [folder / f"{group}_rank_{rank}.jsonl" for rank in range(ranks)]
    lines = [file.read_text().splitlines() if file.exists() else [] for file in files]
    found = [{row.name: row for row in (Row(*json.loads(line)) for line in of_rank)} for of_rank in lines]
    for name in names:
        missing = Row(name, False, f"{ending}: see {folder / group}.log")
        rows = [of_rank.get(name, missing) for of_rank in found]
        # A check that failed explains better than one that another rank then waited for in vain.
        failed = [(rank, row) for rank, row in enumerate(rows) if not row.passed]
        failed.sort(key=lambda ranked: ranked[1] is missing)
        yield rows[0] if not failed else Row(name, False, f"rank {failed[0][0]}: {failed[0][1].detail}")


def run_group(
    folder: Path, group: str, names: tuple[str, ...], ranks: int, command: list[str], seconds: float, **environment: str
) -> list[Row]:
    """Run a command for so many seconds at most, end all that it started, and read the rows that it wrote."""
    for file in folder.glob(f"{group}_rank_*.jsonl"):
        file.unlink()
    start = time.monotonic()
    with (folder / f"{group}.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment}, start_new_session=True
        )
        try:
            process.wait(max(seconds, 0))
            ending = f"ended with status {process.returncode}"
        except subprocess.TimeoutExpired:
            ending = f"not finished after {time.monotonic() - start:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return list(read_rows(folder, group, names, ranks, ending))
