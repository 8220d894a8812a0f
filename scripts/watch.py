# SPDX-License-Identifier: Apache-2.0
"""Runs a training command, shows a progress bar and one line per step, and writes the output to a log file.

    python scripts/watch.py --log run.log --metrics run/ --title GRPO -- bash run/run_grpo.sh ...

The figures come from the files of verl's `file` logger (`metrics*.jsonl` in the folder --metrics). Ctrl-C ends the
command and all its processes. The exit code is the command's. The log of an earlier start is kept beside the new one,
as `run_1.log`, `run_2.log` and so on.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

#: Heading, metric and format of the figures in a step's line, if the run logs the metric.
COLUMNS = (
    ("reward", "critic/score/mean", "{:+.3f}"),
    ("entropy", "actor/entropy", "{:.3f}"),
    ("weight", "actor/token_weights_mean", "{:.3f}"),
    ("clipped", "actor/pg_clipfrac", "{:.1%}"),
    ("length", "response_length/mean", "{:.1f}"),
    ("seconds", "timing_s/step", "{:.1f}"),
)
GRACE = 20.0  # seconds between SIGINT, SIGTERM and SIGKILL
States = dict[Path, tuple[int, int]]  # metrics file -> `state`

# Loaded by its path: the import of verl takes seconds, and with it all of torch's memory.
_REPORT = Path(__file__).resolve().parents[1] / "verl/steer/report"
accuracy_metrics = runpy.run_path(str(_REPORT / "metrics_files.py"))["accuracy_metrics"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, required=True, help="file for the command's output")
    parser.add_argument("--metrics", type=Path, required=True, help="folder where metrics*.jsonl appear")
    parser.add_argument("--title", default="training", help="name shown beside the progress bar")
    parser.add_argument("command", nargs="+", help="after --: the command")
    args = parser.parse_args()
    if not shutil.which(args.command[0]):
        parser.error(f"{args.command[0]}: no such command")
    console = Console(markup=False, emoji=False)  # titles are names of folders
    args.log.parent.mkdir(parents=True, exist_ok=True)
    if args.log.is_file() and args.log.stat().st_size:
        args.log.rename(free_name(args.log))
    before = {file: state(file) for file in args.metrics.glob("metrics*.jsonl")}
    received: list[int] = []
    # A closed terminal and a cancelled job end the command as Ctrl-C does. A handler that raised an exception while the
    # command starts would leave it running. `nohup` ignores SIGHUP.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: received.append(number))
    with args.log.open("wb") as log:
        process = subprocess.Popen(
            args.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        show(console, args, process, before, received)
    except BaseException:
        end(process)  # in a session of its own, it would go on
        raise
    if received:
        console.print(f"{args.title}: ending all its processes ...")
        end(process)
        return 130
    if process.returncode:
        console.print(
            f"{args.title} failed with exit code {process.returncode}; the end of {args.log}:", style="bold red"
        )
        console.print("\n".join(error_lines(args.log)), highlight=False, soft_wrap=True)
    return process.returncode


def show(
    console: Console,
    args: argparse.Namespace,
    process: subprocess.Popen[bytes],
    before: States,
    received: list[int],
) -> None:
    """Show the metrics until the command has ended or a signal has been received."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"{args.title}: starting Ray and vLLM (log: {args.log})", total=None)
        reader = new_records(args.metrics, before)
        steps: int | None = None
        while not received:
            ended = process.poll() is not None
            for record in iter(lambda: next(reader), None):
                steps = steps or total_steps(args.log)
                line = step_line(args.title, record["step"], steps, record["data"])
                if line:
                    console.print(line, highlight=False, soft_wrap=True)
                progress.update(task, completed=record["step"], total=steps, description=args.title)
            if ended:
                return
            time.sleep(0.2)


def state(file: Path) -> tuple[int, int]:
    """Size and modification time of a file. Compared for equality only, since a file server has its own clock."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def new_records(folder: Path, before: States) -> Iterator[dict[str, Any] | None]:
    """Records of the metrics files that differ from their state in `before`; None after the last one so far."""
    offsets: dict[Path, int] = {}
    while True:
        for file in sorted(folder.glob("metrics*.jsonl")):
            try:
                stream = None if state(file) == before.get(file) else file.open("rb")
            except OSError:  # deleted since, or a file server's fault; no reason to end the training
                continue
            if stream is None:
                continue
            with stream:
                stream.seek(offsets.get(file, 0))
                for line in stream:
                    if not line.endswith(b"\n"):
                        break
                    offsets[file] = offsets.get(file, 0) + len(line)
                    try:
                        record = json.loads(line)
                    except ValueError:  # a line of a full disk; no reason to end the training
                        continue
                    yield record
        yield None


def free_name(log: Path) -> Path:
    """A name for an earlier log: `run_1.log` for `run.log`, or the next number that no file has."""
    names = (log.with_stem(f"{log.stem}_{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def total_steps(log: Path) -> int | None:
    """The run's number of training steps, which verl logs before the first one."""
    found = re.search(r"Total training steps: (\d+)", log.read_text(errors="replace"))
    return int(found[1]) if found else None


def step_line(title: str, step: int, steps: int | None, data: dict[str, Any]) -> str:
    """A step's line: its figures, and the mean accuracies of its validation. NaN, which verl logs as null, as "nan"."""
    numbers = {key: math.nan if value is None else value for key, value in data.items()}
    parts = [f"{name} {form.format(numbers[key])}" for name, key, form in COLUMNS if key in numbers]
    parts += [f"accuracy {numbers[key]:.3f}" for key in accuracy_metrics(numbers)]
    return f"{title:<12} step {step:>3}/{steps or '?'}  " + "  ".join(parts) if parts else ""


def error_lines(log: Path, context: int = 12) -> list[str]:
    """The last error in the log and the lines before it; the last lines of a log without an error."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [i for i, line in enumerate(lines) if "Error" in line or line.startswith(("steer-verl:", "launch.sh:"))]
    last = errors[-1] + 1 if errors else len(lines)
    return lines[max(0, last - context) : last]


def end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the command's session, terminate it if the command goes on, and kill the remaining processes."""
    with contextlib.suppress(ProcessLookupError):
        for number in (signal.SIGINT, signal.SIGTERM):
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
                break
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
