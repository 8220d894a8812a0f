# SPDX-License-Identifier: Apache-2.0
"""Names of a run's metrics files. verl's `file` logger empties the file it is given, so each start gets one of its own:

metrics.jsonl                   the first start
metrics_from_40_start_2.jsonl   the second, from the checkpoint of step 40; from step 0 it begins again
metrics_from_40.jsonl           of a release that didn't count the starts: taken to be in the order of their steps
"""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"metrics(?:_from_(\d+))?(?:_start_(\d+))?$")


def start_of(file: Path) -> tuple[int, int | None]:
    """The number of the start that wrote a file, and the step of the checkpoint it went on from, None if unnamed."""
    name = _NAME.match(file.stem)
    number, step = (name[2], name[1]) if name else (None, None)
    return int(number or 1), int(step) if step else None


def in_order(folder: Path) -> list[Path]:
    """A run's metrics files, the first start's first. Times don't count: a copy has others."""

    def order(file: Path) -> tuple[int, int, str]:
        number, step = start_of(file)
        return number, step or 0, file.name

    return sorted(folder.glob("metrics*.jsonl"), key=order)


def next_file(folder: Path, step: int) -> Path:
    """The file for a start from the checkpoint of `step`, 0 without one."""
    files = in_order(folder)
    return folder / (f"metrics_from_{step}_start_{start_of(files[-1])[0] + 1}.jsonl" if files else "metrics.jsonl")
