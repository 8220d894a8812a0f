# SPDX-License-Identifier: Apache-2.0
"""Names of a run's metrics files, and of the accuracies in them.

verl's `file` logger empties the file that it opens, so each start of a run gets a file of its own:

metrics.jsonl                   the first start
metrics_from_40_start_2.jsonl   the second start, from the checkpoint of step 40 (step 0: from the beginning)
metrics_from_40.jsonl           from a release that did not count the starts; these are sorted by step
evaluation_of_40_start_1.jsonl  a start that only evaluates the checkpoint of step 40; no part of the run's metrics
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_NAME = re.compile(r"metrics(?:_from_(\d+))?(?:_start_(\d+))?$")


def start_of(file: Path) -> tuple[int, int | None]:
    """Number of the start that wrote a file, and step of the checkpoint it resumed from; None if the name has none."""
    name = _NAME.match(file.stem)
    number, step = (name[2], name[1]) if name else (None, None)
    return int(number or 1), int(step) if step else None


def in_order(folder: Path) -> list[Path]:
    """A run's metrics files in the order of its starts, by name: a copy of a run has other modification times."""
    return sorted(folder.glob("metrics*.jsonl"), key=lambda file: (*[part or 0 for part in start_of(file)], file.name))


def next_file(folder: Path, step: int) -> Path:
    """The metrics file for a start from the checkpoint of `step`, 0 without a checkpoint."""
    files = in_order(folder)
    return folder / (f"metrics_from_{step}_start_{start_of(files[-1])[0] + 1}.jsonl" if files else "metrics.jsonl")


def next_evaluation_file(folder: Path, step: int) -> Path:
    """The metrics file for a start that only evaluates the checkpoint of `step`, 0 without a checkpoint."""
    earlier = [*folder.glob(f"evaluation_of_{step}_start_*.jsonl")]
    return folder / f"evaluation_of_{step}_start_{len(earlier) + 1}.jsonl"


def accuracy_metrics(names: Iterable[str]) -> list[str]:
    """The names of mean validation accuracies among metrics: `val-core/SOURCE/acc/mean@N`."""
    return [name for name in names if re.fullmatch(r"val-core/.*/acc/mean@\d+", name)]
