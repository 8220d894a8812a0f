# SPDX-License-Identifier: Apache-2.0
"""Best and latest checkpoints: what stays on disk, also after a kill at any moment."""

import json
import logging
import math
import os
from unittest.mock import Mock

import pytest
from verl.steer import checkpoint_ledger
from verl.steer.checkpoint_ledger import (
    LEDGER,
    TRACKER,
    UNFINISHED,
    CheckpointLedger,
    UnknownMetric,
    metric_name,
    step_of,
)
from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path


def checkpoint(folder, step):
    """A whole checkpoint, as upstream's own trainer would leave it but for the tracker."""
    path = folder / f"global_step_{step}"
    path.mkdir()
    (path / "model.pt").write_text(str(step))
    return path


def save(ledger, step):
    ledger.begin(step)
    (ledger.folder / f"global_step_{step}" / "model.pt").write_text(str(step))
    ledger.saved(step)


def steps(folder):
    return sorted(step for path in folder.iterdir() if (step := step_of(path)) is not None)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_best_replaces_best(tmp_path):
    ledger = CheckpointLedger.open(tmp_path)
    ledger.measure_by("acc")
    for step, value, best in [(1, 0.2, True), (2, 0.1, False), (3, 0.2, False), (4, 0.5, True)]:
        assert ledger.is_best(value) is best
        if best:
            save(ledger, step)
            ledger.saved_best(step, value, delete_old=True)
    assert steps(tmp_path) == [4]
    again = CheckpointLedger.open(tmp_path)
    assert (again.latest_step, again.best_step, again.best_value, again.best_key) == (4, 4, 0.5, "acc")
    assert not again.is_best(0.4)
    assert find_latest_ckpt_path(str(tmp_path)) == str(tmp_path / "global_step_4")


def test_killed_before_the_old_best_was_deleted(tmp_path, monkeypatch):
    ledger = CheckpointLedger.open(tmp_path)
    for step in (1, 2):
        save(ledger, step)
    ledger.saved_best(1, 0.2, delete_old=True)
    with monkeypatch.context() as context:
        context.setattr(checkpoint_ledger, "_delete", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ledger.saved_best(2, 0.4, delete_old=True)
    assert steps(tmp_path) == [1, 2]
    again = CheckpointLedger.open(tmp_path)
    assert steps(tmp_path) == again.saved_steps == [2] and again.best_step == 2
    save(again, 3)
    assert CheckpointLedger.open(tmp_path).saved_steps == [2, 3]


def test_old_best_stays_without_deletion_and_while_it_is_the_latest(tmp_path):
    ledger = CheckpointLedger.open(tmp_path)
    for step in (1, 2):
        save(ledger, step)
        ledger.saved_best(step, step / 10, delete_old=False)
    assert steps(tmp_path) == [1, 2]
    ledger.saved_best(1, 0.3, delete_old=True)
    assert steps(tmp_path) == [1, 2]


def test_keep_latest_spares_the_best(tmp_path):
    ledger = CheckpointLedger.open(tmp_path)
    for step in (1, 2, 10, 11):
        save(ledger, step)
        if step == 2:
            ledger.saved_best(step, 0.9, delete_old=True)
    ledger.keep_latest(1)
    assert steps(tmp_path) == [2, 11]
    assert CheckpointLedger.open(tmp_path).saved_steps == [2, 11]


def test_keep_latest_deletes_what_the_ledger_records_only(tmp_path):
    """A run that went back to step 20: what it saves then is later than 30, which it doesn't touch."""
    ledger = CheckpointLedger.open(tmp_path)
    for step in (10, 20, 30):
        save(ledger, step)
        ledger.saved_best(step, step / 100, delete_old=False)
    ledger.go_on_from(20)
    assert (ledger.saved_steps, ledger.best_step) == ([10, 20], None)
    save(ledger, 25)
    ledger.keep_latest(1)
    assert steps(tmp_path) == [25, 30] and ledger.unknown() == ["global_step_30"]
    again = CheckpointLedger.open(tmp_path)
    assert steps(tmp_path) == [25, 30] and again.latest_step == 25
    assert find_latest_ckpt_path(str(tmp_path)) == str(tmp_path / "global_step_25")


def test_going_back_keeps_an_earlier_best(tmp_path):
    ledger = CheckpointLedger.open(tmp_path)
    for step in (10, 20, 30):
        save(ledger, step)
        if step == 10:
            ledger.saved_best(step, 0.5, delete_old=False)
    ledger.go_on_from(20)
    save(ledger, 25)
    ledger.keep_latest(1)
    assert steps(tmp_path) == [10, 25, 30] and (ledger.best_step, ledger.best_value) == (10, 0.5)


def test_killed_between_tracker_and_ledger(tmp_path, monkeypatch):
    """A run that went back to step 20 stays there if only one of the two files names that step."""
    ledger = CheckpointLedger.open(tmp_path)
    for step in (10, 20, 30):
        save(ledger, step)
    ledger.go_on_from(20)
    replace = checkpoint_ledger.Path.replace

    def killed_after(path, target):
        replace(path, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_ledger.Path, "replace", killed_after)
    with pytest.raises(KeyboardInterrupt):
        ledger.begin(25)
    monkeypatch.undo()
    assert CheckpointLedger.open(tmp_path).saved_steps == [10, 20] and steps(tmp_path) == [10, 20, 30]


def test_checkpoints_of_upstreams_own_trainer_are_taken_over(tmp_path):
    """20 and 30 were saved by `trainer_mode=sync`, which knows no ledger: the tracker's one is the latest."""
    save(CheckpointLedger.open(tmp_path), 10)
    checkpoint(tmp_path, 20)
    checkpoint(tmp_path, 30)
    (tmp_path / TRACKER).write_text("30")
    ledger = CheckpointLedger.open(tmp_path)
    assert steps(tmp_path) == [10, 20, 30]
    assert ledger.saved_steps == [10, 30] and ledger.unknown() == ["global_step_20"]


def test_whole_folders_that_nothing_names_are_left_alone(tmp_path):
    save(CheckpointLedger.open(tmp_path), 10)
    checkpoint(tmp_path, 20)
    ledger = CheckpointLedger.open(tmp_path)
    assert steps(tmp_path) == [10, 20] and ledger.latest_step == 10 and ledger.unknown() == ["global_step_20"]


def test_stray_names_stop_nothing(tmp_path):
    ledger = CheckpointLedger.open(tmp_path)
    save(ledger, 10)
    stray = ["global_step_10_merged", "global_step_", "global_step_x", "global_step_010"]
    for name in stray:
        (tmp_path / name).mkdir()
    (tmp_path / "global_step_7").write_text("a file")
    (tmp_path / ".deleted_global_step_10_0").mkdir()
    ledger = CheckpointLedger.open(tmp_path)
    assert ledger.unknown() == sorted([*stray, "global_step_7"])
    # one that couldn't be deleted is there when another of its name is to be
    hidden = tmp_path / ".deleted_global_step_10_0"
    hidden.mkdir()
    (hidden / "busy").write_text("")
    save(ledger, 20)
    ledger.keep_latest(1)
    assert ledger.saved_steps == [20] and not (tmp_path / "global_step_10").exists()
    assert CheckpointLedger.open(tmp_path).unknown() == sorted([*stray, "global_step_7"]) and not hidden.exists()


def test_what_cannot_be_deleted_is_named_and_stops_nothing(tmp_path, monkeypatch, caplog):
    (tmp_path / ".deleted_global_step_1").mkdir()
    monkeypatch.setattr(checkpoint_ledger.shutil, "rmtree", lambda path, ignore_errors: None)
    with caplog.at_level(logging.WARNING):
        CheckpointLedger.open(tmp_path)
    assert ".deleted_global_step_1 could not be deleted" in caplog.text


def test_unfinished_checkpoint_is_cleared(tmp_path):
    """Killed while it wrote step 3, at the tracker: the ledger still names step 2."""
    ledger = CheckpointLedger.open(tmp_path)
    save(ledger, 2)
    ledger.begin(3)
    for tracker in ("", "3"):
        (tmp_path / TRACKER).write_text(tracker)
        assert CheckpointLedger.open(tmp_path).latest_step == 2
        assert steps(tmp_path) == [2] and find_latest_ckpt_path(str(tmp_path)) == str(tmp_path / "global_step_2")


def test_killed_before_the_ledger_was_written(tmp_path):
    ledger = CheckpointLedger.open(tmp_path)
    save(ledger, 2)
    text = (tmp_path / LEDGER).read_text()
    save(ledger, 3)
    (tmp_path / LEDGER).write_text(text)
    assert CheckpointLedger.open(tmp_path).saved_steps == [2, 3]


def test_a_run_that_starts_anew_inherits_no_best_value(tmp_path):
    """Killed after its first checkpoint's mark was removed and before its first ledger was written."""
    earlier = CheckpointLedger.open(tmp_path)
    for step in (1, 2):
        save(earlier, step)
    earlier.saved_best(1, 0.9, delete_old=False)
    ledger = CheckpointLedger(tmp_path)
    ledger.begin(3)
    assert not (tmp_path / TRACKER).exists()
    (tmp_path / TRACKER).write_text("3")
    (tmp_path / "global_step_3" / UNFINISHED).unlink()
    again = CheckpointLedger.open(tmp_path)
    assert (again.saved_steps, again.best_step, again.best_value) == ([3], None, None) and steps(tmp_path) == [1, 2, 3]


def test_first_checkpoint_unfinished(tmp_path):
    CheckpointLedger.open(tmp_path).begin(1)
    (tmp_path / TRACKER).write_text("1")
    assert CheckpointLedger.open(tmp_path).latest_step is None
    assert steps(tmp_path) == [] and find_latest_ckpt_path(str(tmp_path)) is None and not (tmp_path / TRACKER).exists()


def test_half_deleted_checkpoint_is_cleared(tmp_path):
    ledger = CheckpointLedger.open(tmp_path)
    save(ledger, 2)
    checkpoint(tmp_path, 1).rename(tmp_path / ".deleted_global_step_1")
    CheckpointLedger.open(tmp_path)
    assert names(tmp_path) == [LEDGER, "global_step_2", TRACKER]


def test_a_checkpoint_over_one_of_another_branch_has_none_of_its_files(tmp_path):
    (checkpoint(tmp_path, 3) / "stale.pt").write_text("")
    ledger = CheckpointLedger.open(tmp_path)
    ledger.begin(3)
    assert names(tmp_path / "global_step_3") == [UNFINISHED]
    # killed: the old one comes back
    CheckpointLedger.open(tmp_path)
    assert names(tmp_path) == ["global_step_3"] and names(tmp_path / "global_step_3") == ["model.pt", "stale.pt"]
    save(ledger, 3)
    assert names(tmp_path) == [LEDGER, "global_step_3", TRACKER] and names(tmp_path / "global_step_3") == ["model.pt"]


def test_checkpoints_that_a_user_removed_are_forgotten(tmp_path, caplog):
    ledger = CheckpointLedger.open(tmp_path)
    for step in (1, 2, 3):
        save(ledger, step)
        if step == 2:
            ledger.saved_best(2, 0.9, delete_old=False)
    for step in (2, 3):
        (tmp_path / f"global_step_{step}" / "model.pt").unlink()
        (tmp_path / f"global_step_{step}").rmdir()
    with caplog.at_level(logging.WARNING):
        again = CheckpointLedger.open(tmp_path)
    assert (again.saved_steps, again.best_step, again.best_value) == ([1], None, None)
    assert "global_step_2, the best checkpoint, is gone" in caplog.text
    assert find_latest_ckpt_path(str(tmp_path)) == str(tmp_path / "global_step_1")


@pytest.mark.parametrize("best, saved", [((10, 0.5), [10, 20]), ((20, 0.5), [20]), ((None, None), [20])])
def test_ledger_of_latest_and_best_only(tmp_path, best, saved):
    """As this fork wrote it before it recorded every step."""
    for step in (5, 10, 20):
        checkpoint(tmp_path, step)
    (tmp_path / LEDGER).write_text(json.dumps({"latest_step": 20, "best_step": best[0], "best_value": best[1]}))
    (tmp_path / TRACKER).write_text("20")
    ledger = CheckpointLedger.open(tmp_path)
    assert ledger.saved_steps == saved and (ledger.best_step, ledger.best_value) == best
    ledger.measure_by("acc")
    assert (ledger.best_step, ledger.best_value) == best
    assert "global_step_5" in ledger.unknown() and steps(tmp_path) == [5, 10, 20]


def test_folder_of_plain_verl_is_left_alone(tmp_path):
    checkpoint(tmp_path, 5)
    (tmp_path / TRACKER).write_text("5")
    assert CheckpointLedger.open(tmp_path).saved_steps == [5]
    assert steps(tmp_path) == [5] and (tmp_path / TRACKER).read_text() == "5"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_is_never_the_best(tmp_path, value):
    ledger = CheckpointLedger.open(tmp_path)
    assert not ledger.is_best(value) and ledger.is_best(-1.0)
    checkpoint(tmp_path, 5)
    text = json.dumps({"latest_step": 5, "best_step": 5, "best_value": value})
    (tmp_path / LEDGER).write_text(text)
    ledger = CheckpointLedger.open(tmp_path)
    assert ledger.is_best(-1.0) and ledger.best_step is None


def test_another_metric_starts_the_best_anew(tmp_path, caplog):
    ledger = CheckpointLedger.open(tmp_path)
    ledger.measure_by("val-core/a/acc/mean@1")
    save(ledger, 1)
    ledger.saved_best(1, 0.9, delete_old=True)
    again = CheckpointLedger.open(tmp_path)
    with caplog.at_level(logging.WARNING):
        again.measure_by("val-core/a/acc/mean@1")
        assert not caplog.text and not again.is_best(0.5)
        again.measure_by("val-core/b/acc/mean@1")
    assert "0.9 at step 1, is of val-core/a/acc/mean@1: with val-core/b/acc/mean@1 the best starts anew" in caplog.text
    assert again.is_best(0.5)


@pytest.mark.parametrize("file", [LEDGER, TRACKER, UNFINISHED])
def test_files_are_on_the_disk_before_they_count(tmp_path, monkeypatch, file):
    """Without fsync the name can reach the disk before what is in the file."""
    ledger = CheckpointLedger.open(tmp_path)
    save(ledger, 1)
    events, fsync, replace = [], os.fsync, checkpoint_ledger.Path.replace

    def recorded_fsync(descriptor):
        fsync(descriptor)
        status = os.fstat(descriptor)
        events.append(("fsync", status.st_ino, status.st_size))

    def recorded_replace(path, target):
        status = path.stat()
        replace(path, target)
        events.append(("replace", target.name, status.st_ino, status.st_size))

    monkeypatch.setattr(checkpoint_ledger.os, "fsync", recorded_fsync)
    monkeypatch.setattr(checkpoint_ledger.Path, "replace", recorded_replace)
    ledger.begin(2)
    mark = (tmp_path / "global_step_2" / UNFINISHED).stat().st_ino
    ledger.saved(2)
    (index,) = [index for index, event in enumerate(events) if event[:2] == ("replace", file)]
    _, _, inode, size = events[index]
    assert inode == mark if file == UNFINISHED else size > 0
    assert events[index - 1] == ("fsync", inode, size)


def test_metric_name():
    metrics = {
        "val-core/aime/acc/mean@32": 0.25,
        "val-core/aime/acc/best@32/mean": 0.5,
        "val-aux/aime/reward/mean@1": -1,
    }
    assert metric_name(metrics, None) == "val-core/aime/acc/mean@32"
    assert metric_name(metrics, "val-aux/aime/reward/mean@1") == "val-aux/aime/reward/mean@1"
    with pytest.raises(UnknownMetric, match="trainer.best_metric_key=acc: expected one .*: val-core/aime/acc/mean@32$"):
        metric_name(metrics, "acc")
    with pytest.raises(UnknownMetric, match="best_metric_key=None"):
        metric_name(metrics | {"val-core/amc/acc/mean@32": 0.5}, None)
