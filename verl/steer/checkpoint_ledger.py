# SPDX-License-Identifier: Apache-2.0
"""The whole checkpoints of a run and the best of them, recorded in `checkpoint_ledger.json` beside their folders.

A checkpoint is saved in this order: a mark in its folder, upstream's files with the tracker last, removal of the mark,
the ledger. A run that is killed at any moment therefore resumes from its last whole checkpoint with its best value so
far. A start deletes only folders that have the mark and folders whose deletion was interrupted.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from verl.steer.report.metrics_files import accuracy_metrics

logger = logging.getLogger(__name__)

LEDGER = "checkpoint_ledger.json"
#: File inside a checkpoint's folder while the checkpoint is being written.
UNFINISHED = ".unfinished"
#: Upstream's file with the step of the last checkpoint, from which `resume_mode=auto` resumes.
TRACKER = "latest_checkpointed_iteration.txt"


@dataclass
class CheckpointLedger:
    """The ledger of one run.

    Args:
        folder: `trainer.default_local_dir`, with the checkpoints `global_step_N`.
        saved_steps: the whole checkpoints of the run, ascending; deleted ones are removed.
        best_step: the step of the best checkpoint.
        best_value: the largest value of the metric so far.
        best_key: the name of the metric.
        superseded_step: the step of a former best checkpoint that is to be deleted.
    """

    folder: Path
    saved_steps: list[int] = field(default_factory=list)
    best_step: int | None = None
    best_value: float | None = None
    best_key: str | None = None
    superseded_step: int | None = None

    @classmethod
    def open(cls, folder: Path) -> CheckpointLedger:
        """Read the ledger of a folder, after deleting unfinished checkpoints and finishing interrupted deletions.

        The tracker decides which whole checkpoint is the latest, since upstream's own trainer may have saved it.
        """
        _clear(folder)
        ledger, whole, tracked = cls._read(folder), _checkpoints(folder), _tracked(folder)
        ledger.saved_steps = [step for step in ledger.saved_steps if step in whole]
        if ledger.best_step is not None and ledger.best_step not in whole:
            logger.warning("%s, the best checkpoint, is gone: the best starts anew", ledger._path(ledger.best_step))
            ledger._forget_best()
        if tracked in whole:
            ledger.go_on_from(tracked)
        if ledger.saved_steps or (folder / TRACKER).exists():
            ledger._write()
        ledger._delete_superseded()
        return ledger

    @classmethod
    def checkpoint_to_resume(cls, folder: Path) -> Path | None:
        """The checkpoint that a start goes on from: the tracked one, else the last recorded one that is whole."""
        whole = {step: path for step, path in _checkpoints(folder).items() if not (path / UNFINISHED).exists()}
        tracked = _tracked(folder)
        recorded = max(whole.keys() & cls._read(folder).saved_steps, default=None)
        step = tracked if tracked in whole else recorded
        return None if step is None else whole[step]

    @property
    def latest_step(self) -> int | None:
        """The step of the last whole checkpoint."""
        return self.saved_steps[-1] if self.saved_steps else None

    def unknown(self) -> list[str]:
        """Names `global_step_*` in the folder that the ledger does not record."""
        return sorted(path.name for path in self.folder.glob("global_step_*") if step_of(path) not in self.saved_steps)

    def go_on_from(self, step: int) -> None:
        """Make checkpoint `step` the latest; later ones belong to another branch and are forgotten, not deleted."""
        self.saved_steps = [*(saved for saved in self.saved_steps if saved < step), step]
        if self.best_step is not None and self.best_step > step:
            self._forget_best()

    def begin(self, step: int) -> None:
        """Create `global_step_{step}` with the mark in it.

        A folder of this name, left by another branch, is renamed until `saved`; after a kill, `open` restores it.
        """
        if self._read(self.folder) != self:
            self._write()
        path = self._path(step)
        new = _deleted_name(path)
        new.mkdir()
        replace_file(new / UNFINISHED, "")
        if path.exists():
            path.rename(path.with_name(f".replaced_{path.name}"))
        new.rename(path)

    def saved(self, step: int) -> None:
        """Record that checkpoint `step` is whole. A power cut may still shorten its files: upstream flushes none."""
        path = self._path(step)
        # Upstream doesn't flush the tracker: after a power cut an old one would move the run back.
        replace_file(self.folder / TRACKER, str(step))
        (path / UNFINISHED).unlink(missing_ok=True)
        self.go_on_from(step)
        self._write()
        _delete(path.with_name(f".replaced_{path.name}"))

    def measure_by(self, key: str) -> None:
        """Set the metric of the best checkpoint; the best value of another metric is forgotten, with a warning."""
        if self.best_key not in (None, key):
            best = f"{self.best_value} at step {self.best_step}, is of {self.best_key}"
            logger.warning("the best value so far, %s: with %s the best starts anew", best, key)
            self._forget_best()
        self.best_key = key

    def is_best(self, value: float) -> bool:
        """Whether a value of the metric is finite and greater than all before."""
        return math.isfinite(value) and (self.best_value is None or value > self.best_value)

    def saved_best(self, step: int, value: float, delete_old: bool) -> None:
        """Make the whole checkpoint `step` the best; `delete_old` deletes the previous best if it isn't the latest."""
        old, self.best_step, self.best_value = self.best_step, step, value
        if delete_old and old in self.saved_steps[:-1]:
            self.superseded_step = old
        self._write()
        self._delete_superseded()

    def keep_latest(self, number: int) -> None:
        """Delete all recorded checkpoints but the latest `number` and the best one."""
        self._delete_steps(self.saved_steps[:-number])

    def _delete_superseded(self) -> None:
        step, self.superseded_step = self.superseded_step, None
        if step in self.saved_steps[:-1]:
            self._delete_steps([step])

    def _delete_steps(self, steps: list[int]) -> None:
        """Delete recorded checkpoints, never the best one."""
        for step in steps:
            if step != self.best_step:
                _delete(self._path(step))
                self.saved_steps.remove(step)
                self._write()

    def _forget_best(self) -> None:
        self.best_step = self.best_value = self.best_key = None

    def _path(self, step: int) -> Path:
        return self.folder / f"global_step_{step}"

    @classmethod
    def _read(cls, folder: Path) -> CheckpointLedger:
        file = folder / LEDGER
        entries = json.loads(file.read_text()) if file.is_file() else {}
        # The first version of the ledger recorded the latest and the best checkpoint only.
        first = {entries.pop("latest_step", None), entries.get("best_step")} - {None}
        ledger = cls(folder, **{"saved_steps": sorted(first), **entries})
        if not math.isfinite(ledger.best_value or 0.0):
            ledger._forget_best()
        return ledger

    def _write(self) -> None:
        tracker, latest = self.folder / TRACKER, self.latest_step
        # The tracker comes first: after a kill between the two writes, `open` corrects the ledger by the tracker.
        if latest is None:
            tracker.unlink(missing_ok=True)
        elif _tracked(self.folder) != latest:
            replace_file(tracker, str(latest))
        entries = {"latest_step": latest, **vars(self)}
        del entries["folder"]
        replace_file(self.folder / LEDGER, json.dumps(entries) + "\n")


class UnknownMetric(ValueError):
    """`trainer.best_metric_key` is not among the validation's metrics."""


def metric_name(metrics: Mapping[str, float], key: str | None) -> str:
    """The validation metric that decides which checkpoint is the best.

    Args:
        metrics: the metrics of a validation.
        key: `trainer.best_metric_key`; None for the only `val-core/.../acc/mean@N`.

    Raises:
        UnknownMetric: if there is no such metric, or more than one for None.
    """
    candidates = accuracy_metrics(metrics)
    if key is None and len(candidates) == 1:
        return candidates[0]
    if key is None or key not in metrics:
        expected = ", ".join(candidates or metrics)
        raise UnknownMetric(f"trainer.best_metric_key={key}: expected one of the validation's metrics: {expected}")
    return key


def step_of(path: Path) -> int | None:
    """N of a checkpoint's folder `global_step_N`; None of any other name, such as `global_step_10_merged`."""
    match = re.fullmatch(r"global_step_(0|[1-9]\d*)", path.name)
    return int(match[1]) if match else None


def _checkpoints(folder: Path) -> dict[int, Path]:
    """Step -> folder."""
    folders = (path for path in folder.glob("global_step_*") if path.is_dir())
    return {step: path for path in folders if (step := step_of(path)) is not None}


def _tracked(folder: Path) -> int | None:
    """The step of the last checkpoint in upstream's tracker; None if it is missing, or if a kill left it empty."""
    tracker = folder / TRACKER
    text = tracker.read_text().strip() if tracker.is_file() else ""
    return int(text) if text.isdecimal() else None


def _clear(folder: Path) -> None:
    """Delete unfinished checkpoints, restore the folders that they replaced, and finish interrupted deletions."""
    for step, path in _checkpoints(folder).items():
        if (path / UNFINISHED).exists():
            if _tracked(folder) == step:
                # The folder that is restored under this name belongs to another branch.
                (folder / TRACKER).unlink()
            path.rename(_deleted_name(path))
    for replaced in folder.glob(".replaced_global_step_*"):
        path = folder / replaced.name.removeprefix(".replaced_")
        replaced.rename(_deleted_name(path) if path.exists() else path)
    _remove_deleted(folder)


def _delete(path: Path) -> None:
    """Delete a folder if it exists; a kill leaves all of it, or a part of it under a name that `_clear` deletes."""
    if path.exists():
        path.rename(_deleted_name(path))
        _remove_deleted(path.parent)


def _deleted_name(path: Path) -> Path:
    """A new name beside a checkpoint's folder, for `_remove_deleted`."""
    return path.with_name(f".deleted_{path.name.removeprefix('.replaced_')}_{uuid4().hex}")


def _remove_deleted(folder: Path) -> None:
    for path in folder.glob(".deleted_global_step_*"):
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():
            logger.warning("%s could not be deleted", path)


def replace_file(file: Path, text: str) -> None:
    """Write a file; a kill or a power cut leaves either the old text or the new."""
    new = file.with_name(f".{file.name}.new")
    with new.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(file)
