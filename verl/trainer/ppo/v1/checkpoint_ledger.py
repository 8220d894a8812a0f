# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints of a run are whole, and which is the best: `checkpoint_ledger.json` beside the checkpoints.

A checkpoint counts once the ledger names it, and the ledger is replaced in one step after the checkpoint has been
written. So a run that is killed at any moment goes on from the last whole checkpoint, and with the best value so far.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

LEDGER = "checkpoint_ledger.json"
#: Upstream's file of the same purpose, which `resume_mode=auto` reads.
TRACKER = "latest_checkpointed_iteration.txt"


class UnknownMetric(ValueError):
    """`trainer.best_metric_key` is not among the validation's metrics."""


@dataclass
class CheckpointLedger:
    """The ledger of one run.

    Args:
        folder: where `global_step_N` folders are, `trainer.default_local_dir`.
        latest_step: the last whole checkpoint.
        best_step: the best checkpoint, which is whole too.
        best_value: the metric there; the largest so far.
    """

    folder: Path
    latest_step: int | None = None
    best_step: int | None = None
    best_value: float | None = None

    @classmethod
    def open(cls, folder: Path) -> CheckpointLedger:
        """Read the folder's ledger, and clear away what a killed run left half written or half deleted."""
        file = folder / LEDGER
        ledger = cls(folder, **json.loads(file.read_text())) if file.is_file() else cls(folder)
        for path in folder.glob(".deleted_global_step_*"):
            shutil.rmtree(path)
        if file.is_file():
            for path in folder.glob("global_step_*"):
                if int(path.name.removeprefix("global_step_")) > (ledger.latest_step or -1):
                    ledger.delete(path)
            ledger._write_tracker()
        return ledger

    def saved(self, step: int) -> None:
        """Checkpoint `global_step_{step}` is whole."""
        self.latest_step = step
        self._write()

    def is_best(self, value: float) -> bool:
        """Whether a value of the metric is greater than every one so far."""
        return self.best_value is None or value > self.best_value

    def saved_best(self, step: int, value: float, delete_old: bool) -> None:
        """Checkpoint `global_step_{step}`, which is whole, is the best; with `delete_old` the one before it goes."""
        old, self.best_step, self.best_value = self.best_step, step, value
        self._write()
        if delete_old and old not in (None, step, self.latest_step):
            self.delete(self.folder / f"global_step_{old}")

    def keep_latest(self, count: int) -> None:
        """Delete all but the latest `count` checkpoints and the best one."""
        steps = sorted(int(path.name.removeprefix("global_step_")) for path in self.folder.glob("global_step_*"))
        for step in steps[:-count]:
            if step != self.best_step:
                self.delete(self.folder / f"global_step_{step}")

    def delete(self, path: Path) -> None:
        """Delete a checkpoint's folder so that a kill leaves no half one under its name."""
        if path.exists():
            hidden = path.with_name(f".deleted_{path.name}")
            path.rename(hidden)
            shutil.rmtree(hidden)

    def _write(self) -> None:
        entries = asdict(self)
        del entries["folder"]
        _replace(self.folder / LEDGER, json.dumps(entries) + "\n")
        self._write_tracker()

    def _write_tracker(self) -> None:
        if self.latest_step is not None:
            _replace(self.folder / TRACKER, str(self.latest_step))


def metric_of(metrics: Mapping[str, float], key: str | None) -> float:
    """The validation metric that decides which checkpoint is best.

    Args:
        metrics: what a validation logged.
        key: its name, or None for the only `val-core/.../acc/mean@N`.

    Raises:
        UnknownMetric: if there is no such metric, or no single one; the message names those that exist.
    """
    candidates = [name for name in metrics if name.startswith("val-core/") and "/acc/mean@" in name]
    if key is None and len(candidates) == 1:
        return float(metrics[candidates[0]])
    if key is None or key not in metrics:
        named = ", ".join(candidates or metrics)
        raise UnknownMetric(f"trainer.best_metric_key={key}: expected one of the validation's metrics: {named}")
    return float(metrics[key])


def _replace(file: Path, text: str) -> None:
    """Write a file so that a kill leaves either the old text or the new."""
    new = file.with_name(f".{file.name}.new")
    with new.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(file)
