# SPDX-License-Identifier: Apache-2.0
"""What the step of a checkpoint logs, in the checkpoint: `global_step_N/step_record.json`.

verl saves a step's checkpoint before the step's validation and logs the step after it. A run that is killed in between
goes on with the next step, so it needs the record to log the step all the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEP_RECORD = "step_record.json"


@dataclass
class StepRecord:
    """The metrics of a step, without its validation's.

    Args:
        file: in the step's checkpoint.
        metrics: by name.
        logged: whether the loggers have them.
    """

    file: Path
    metrics: dict[str, float]
    logged: bool = False

    @classmethod
    def read(cls, checkpoint: Path) -> StepRecord | None:
        """The record of a checkpoint's folder; None where there is none, as in plain verl's checkpoints."""
        file = checkpoint / STEP_RECORD
        return cls(file, **json.loads(file.read_text())) if file.is_file() else None

    def write(self) -> None:
        """Replace the file; a kill leaves the old one or this."""
        new = self.file.with_name(f".{STEP_RECORD}.new")
        new.write_text(json.dumps({"metrics": self.metrics, "logged": self.logged}, default=_number) + "\n")
        new.replace(self.file)


def _number(value: Any) -> float:
    """A scalar of NumPy or PyTorch, which `json` doesn't know."""
    return value.item()
