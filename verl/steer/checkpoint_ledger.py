# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints of a run are whole, and which is the best: `checkpoint_ledger.json` beside the checkpoints.

A checkpoint is saved in this order: a mark inside its folder, upstream's files with the tracker last, the mark's
removal, the ledger. So a run that is killed at any moment goes on from the last whole checkpoint, and with the best
value so far. Only folders with the mark, and what the ledger itself was deleting, are ever cleared away.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path

from verl.steer.requirements import UNFINISHED

logger = logging.getLogger(__name__)

LEDGER = "checkpoint_ledger.json"
#: Upstream's file of the same purpose, which `resume_mode=auto` reads.
TRACKER = "latest_checkpointed_iteration.txt"


@dataclass
class CheckpointLedger:
    """The ledger of one run.

    Args:
        folder: where `global_step_N` folders are, `trainer.default_local_dir`.
        saved_steps: the whole checkpoints that the run saved and didn't delete, ascending, which is saving order.
        best_step: the best checkpoint, one of them.
        best_value: the metric there; the largest so far.
        best_key: that metric's name.
    """

    folder: Path
    saved_steps: list[int] = field(default_factory=list)
    best_step: int | None = None
    best_value: float | None = None
    best_key: str | None = None

    @classmethod
    def open(cls, folder: Path) -> CheckpointLedger:
        """Read the folder's ledger, after clearing away what a killed run left unfinished or half deleted.

        The tracker is upstream's word for the last checkpoint: the whole folder that it names is the latest, also
        where upstream's own trainer saved it.
        """
        _clear(folder)
        whole = _checkpoints(folder)
        ledger = cls._read(folder)
        ledger.saved_steps = [step for step in ledger.saved_steps if step in whole]
        if ledger.best_step is not None and ledger.best_step not in whole:
            logger.warning("%s, the best checkpoint, is gone: the best starts anew", ledger._path(ledger.best_step))
            ledger._forget_best()
        tracked = _tracked(folder)
        if tracked in whole:
            ledger.go_on_from(tracked)
        if ledger.saved_steps or (folder / TRACKER).exists():
            ledger._write()
        return ledger

    @property
    def latest_step(self) -> int | None:
        """The last whole checkpoint."""
        return self.saved_steps[-1] if self.saved_steps else None

    def unknown(self) -> list[str]:
        """What is named like a checkpoint and isn't one that the ledger records."""
        recorded = {self._path(step) for step in self.saved_steps}
        return sorted(path.name for path in self.folder.glob("global_step_*") if path not in recorded)

    def go_on_from(self, step: int) -> None:
        """Checkpoint `step` is the latest; later ones are of another branch of the run: forgotten, not deleted."""
        self.saved_steps = [*(saved for saved in self.saved_steps if saved < step), step]
        if self.best_step is not None and self.best_step > step:
            self._forget_best()

    def begin(self, step: int) -> None:
        """Mark `global_step_{step}` as unfinished, before anything is written there.

        A folder of another branch that has this name is kept aside until `saved`, and comes back after a kill.
        """
        if CheckpointLedger._read(self.folder) != self:
            self._write()
        path = self._path(step)
        marked = _hidden(path)
        marked.mkdir()
        _write_through(marked / UNFINISHED, "")
        if path.exists():
            path.rename(self._aside(step))
        marked.rename(path)

    def saved(self, step: int) -> None:
        """Checkpoint `global_step_{step}` is whole."""
        # Upstream's tracker isn't flushed: after a power cut an old one would take the run back.
        _replace(self.folder / TRACKER, str(step))
        (self._path(step) / UNFINISHED).unlink(missing_ok=True)
        self.go_on_from(step)
        self._write()
        _delete(self._aside(step))

    def measure_by(self, key: str) -> None:
        """Name the metric that decides; a best value of another metric is forgotten, with a warning."""
        if self.best_key not in (None, key):
            logger.warning(
                "the best value so far, %s at step %s, is of %s: with %s the best starts anew",
                self.best_value, self.best_step, self.best_key, key,
            )  # fmt: skip
            self._forget_best()
        self.best_key = key

    def is_best(self, value: float) -> bool:
        """Whether a value of the metric is finite and greater than every one so far."""
        return math.isfinite(value) and (self.best_value is None or value > self.best_value)

    def saved_best(self, step: int, value: float, delete_old: bool) -> None:
        """Checkpoint `global_step_{step}`, which is whole, is the best; with `delete_old` the one before it goes."""
        old, self.best_step, self.best_value = self.best_step, step, value
        self._write()
        if delete_old and old in self.saved_steps[:-1] and old != step:
            self._drop(old)

    def keep_latest(self, number: int) -> None:
        """Delete, of the checkpoints that the ledger records, all but the latest `number` and the best one."""
        for step in self.saved_steps[:-number]:
            if step != self.best_step:
                self._drop(step)

    def _drop(self, step: int) -> None:
        _delete(self._path(step))
        self.saved_steps.remove(step)
        self._write()

    def _forget_best(self) -> None:
        self.best_step = self.best_value = self.best_key = None

    def _path(self, step: int) -> Path:
        return self.folder / f"global_step_{step}"

    def _aside(self, step: int) -> Path:
        return self.folder / f".replaced_global_step_{step}"

    @classmethod
    def _read(cls, folder: Path) -> CheckpointLedger:
        file = folder / LEDGER
        entries = json.loads(file.read_text()) if file.is_file() else {}
        latest = entries.pop("latest_step", None)
        ledger = cls(folder, **entries)
        if "saved_steps" not in entries and latest is not None:
            # A ledger that records the latest and the best only.
            ledger.saved_steps = sorted({latest, latest if ledger.best_step is None else ledger.best_step})
            ledger.go_on_from(latest)
        if ledger.best_value is not None and not math.isfinite(ledger.best_value):
            ledger._forget_best()
        return ledger

    def _write(self) -> None:
        entries = {"latest_step": self.latest_step, **asdict(self)}
        del entries["folder"]
        tracker = self.folder / TRACKER
        right = self.saved_steps and _tracked(self.folder) == self.latest_step
        if not right:
            # Between the two writes the tracker mustn't name a checkpoint of another branch.
            tracker.unlink(missing_ok=True)
        _replace(self.folder / LEDGER, json.dumps(entries) + "\n")
        if self.saved_steps and not right:
            _replace(tracker, str(self.latest_step))


def step_of(path: Path) -> int | None:
    """N of a checkpoint's folder `global_step_N`; None of any other name."""
    match = re.fullmatch(r"global_step_(0|[1-9]\d*)", path.name)
    return int(match[1]) if match else None


def metric_name(metrics: Mapping[str, float], key: str | None) -> str:
    """Which validation metric decides about the best checkpoint.

    Args:
        metrics: what a validation logged.
        key: its name, or None for the only `val-core/.../acc/mean@N`.

    Raises:
        UnknownMetric: if there is no such metric, or no single one; the message names those that exist.
    """
    candidates = [name for name in metrics if name.startswith("val-core/") and "/acc/mean@" in name]
    if key is None and len(candidates) == 1:
        return candidates[0]
    if key is None or key not in metrics:
        named = ", ".join(candidates or metrics)
        raise UnknownMetric(f"trainer.best_metric_key={key}: expected one of the validation's metrics: {named}")
    return key


class UnknownMetric(ValueError):
    """`trainer.best_metric_key` is not among the validation's metrics."""


def _checkpoints(folder: Path) -> dict[int, Path]:
    """Step -> folder; stray names such as `global_step_10_merged` are none."""
    steps = {step_of(path): path for path in folder.glob("global_step_*") if path.is_dir()}
    return {step: path for step, path in steps.items() if step is not None}


def _tracked(folder: Path) -> int | None:
    """The step in upstream's tracker; None where it is missing, or empty because of a kill."""
    tracker = folder / TRACKER
    text = tracker.read_text().strip() if tracker.is_file() else ""
    return int(text) if text.isdecimal() else None


def _clear(folder: Path) -> None:
    """Clear away what a kill left unfinished or half deleted, and put back what an unfinished folder had replaced."""
    tracked = _tracked(folder)
    if tracked is not None and (folder / f"global_step_{tracked}" / UNFINISHED).exists():
        # First of all: what comes back under this name below is of another branch.
        (folder / TRACKER).unlink()
    for path in folder.glob(".deleted_global_step_*"):
        _remove(path)
    for path in _checkpoints(folder).values():
        if (path / UNFINISHED).exists():
            _delete(path)
    for aside in folder.glob(".replaced_global_step_*"):
        path = folder / aside.name.removeprefix(".replaced_")
        if path.exists():
            _delete(aside)
        else:
            aside.rename(path)


def _hidden(path: Path) -> Path:
    """A free name beside `path` that `_clear` clears away."""
    names = (path.with_name(f".deleted_{path.name.removeprefix('.replaced_')}_{number}") for number in count())
    return next(name for name in names if not name.exists())


def _delete(path: Path) -> None:
    """Delete a folder so that a kill leaves no half one under its name."""
    if path.exists():
        _remove(path.rename(_hidden(path)))


def _remove(hidden: Path) -> None:
    shutil.rmtree(hidden, ignore_errors=True)
    if hidden.exists():
        logger.warning("%s could not be deleted", hidden)


def _write_through(file: Path, text: str) -> None:
    """Write a file to the disk itself."""
    with file.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _replace(file: Path, text: str) -> None:
    """Write a file so that a kill leaves either the old text or the new."""
    new = file.with_name(f".{file.name}.new")
    _write_through(new, text)
    new.replace(file)
