# SPDX-License-Identifier: Apache-2.0
"""Best and latest checkpoints: what stays on disk, also after a kill at any moment."""

import json

import pytest
from verl.trainer.ppo.v1 import checkpoint_ledger
from verl.trainer.ppo.v1.checkpoint_ledger import LEDGER, TRACKER, CheckpointLedger, UnknownMetric, metric_of
from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path


def checkpoint(folder, step):
    path = folder / f"global_step_{step}"
    path.mkdir()
    (path / "model.pt").write_text(str(step))
    return path


def steps(folder):
    return sorted(int(path.name.removeprefix("global_step_")) for path in folder.glob("global_step_*"))


def test_best_replaces_best(tmp_path):
    ledger = CheckpointLedger.open(tmp_path)
    for step, value, best in [(1, 0.2, True), (2, 0.1, False), (3, 0.2, False), (4, 0.5, True)]:
        assert ledger.is_best(value) is best
        if best:
            checkpoint(tmp_path, step)
            ledger.saved(step)
            ledger.saved_best(step, value, delete_old=True)
    assert steps(tmp_path) == [4]
    again = CheckpointLedger.open(tmp_path)
    assert (again.latest_step, again.best_step, again.best_value) == (4, 4, 0.5)
    assert not again.is_best(0.4)
    assert find_latest_ckpt_path(str(tmp_path)) == str(tmp_path / "global_step_4")


def test_old_best_stays_without_deletion_and_while_it_is_the_latest(tmp_path):
    ledger = CheckpointLedger.open(tmp_path)
    for step in (1, 2):
        checkpoint(tmp_path, step)
        ledger.saved(step)
        ledger.saved_best(step, step / 10, delete_old=False)
    assert steps(tmp_path) == [1, 2]


def test_keep_latest_spares_the_best(tmp_path):
    ledger = CheckpointLedger.open(tmp_path)
    for step in (1, 2, 10, 11):
        checkpoint(tmp_path, step)
        ledger.saved(step)
        if step == 2:
            ledger.saved_best(step, 0.9, delete_old=True)
    ledger.keep_latest(1)
    assert steps(tmp_path) == [2, 11]


def test_half_written_checkpoint_is_cleared(tmp_path):
    """Killed while it wrote step 3: the ledger still names step 2."""
    ledger = CheckpointLedger.open(tmp_path)
    checkpoint(tmp_path, 2)
    ledger.saved(2)
    checkpoint(tmp_path, 3)
    (tmp_path / TRACKER).write_text("")
    assert CheckpointLedger.open(tmp_path).latest_step == 2
    assert steps(tmp_path) == [2] and find_latest_ckpt_path(str(tmp_path)) == str(tmp_path / "global_step_2")


def test_half_deleted_checkpoint_is_cleared(tmp_path):
    ledger = CheckpointLedger.open(tmp_path)
    checkpoint(tmp_path, 2)
    ledger.saved(2)
    checkpoint(tmp_path, 1).rename(tmp_path / ".deleted_global_step_1")
    CheckpointLedger.open(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LEDGER, "global_step_2", TRACKER]


@pytest.mark.parametrize("killed_at", ["replace", "rename", "rmtree"])
def test_killed_between_any_two_moves(tmp_path, monkeypatch, killed_at):
    """Every file operation may be the last; what remains opens, and names whole checkpoints."""

    class Killed(BaseException):
        pass

    def kill(*_, **__):
        raise Killed

    ledger = CheckpointLedger.open(tmp_path)
    checkpoint(tmp_path, 1)
    ledger.saved(1)
    ledger.saved_best(1, 0.1, delete_old=True)
    checkpoint(tmp_path, 2)
    owner = checkpoint_ledger.shutil if killed_at == "rmtree" else checkpoint_ledger.Path
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, killed_at, kill)
        ledger.saved(2)
        ledger.saved_best(2, 0.2, delete_old=True)
    again = CheckpointLedger.open(tmp_path)
    assert again.latest_step in steps(tmp_path) and again.best_step in steps(tmp_path)
    json.loads((tmp_path / LEDGER).read_text())
    assert find_latest_ckpt_path(str(tmp_path)) == str(tmp_path / f"global_step_{again.latest_step}")


def test_folder_of_plain_verl_is_left_alone(tmp_path):
    """Checkpoints without a ledger are upstream's to judge."""
    checkpoint(tmp_path, 5)
    (tmp_path / TRACKER).write_text("5")
    CheckpointLedger.open(tmp_path)
    assert steps(tmp_path) == [5] and (tmp_path / TRACKER).read_text() == "5"


def test_metric_of():
    metrics = {
        "val-core/aime/acc/mean@32": 0.25,
        "val-core/aime/acc/best@32/mean": 0.5,
        "val-aux/aime/reward/mean@1": -1,
    }
    assert metric_of(metrics, None) == 0.25
    assert metric_of(metrics, "val-aux/aime/reward/mean@1") == -1
    with pytest.raises(UnknownMetric, match="trainer.best_metric_key=acc: expected one .*: val-core/aime/acc/mean@32$"):
        metric_of(metrics, "acc")
    with pytest.raises(UnknownMetric, match="best_metric_key=None"):
        metric_of(metrics | {"val-core/amc/acc/mean@32": 0.5}, None)
