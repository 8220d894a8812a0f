# SPDX-License-Identifier: Apache-2.0
"""Upstream's training loop, killed between a step's checkpoint and its log; the run that goes on logs the step."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import verl.trainer.ppo.v1.trainer_base as trainer_base
from omegaconf import OmegaConf
from verl.steer.report.metrics_files import next_file
from verl.steer.report.run_metrics import read_run
from verl.steer.step_record import STEP_RECORD, RecordsSteps, StepRecord

STEPS = 4
ACCURACY = "val-core/a/acc/mean@1"


class Killed(BaseException):
    """Stands for SIGKILL."""


class Upstream(trainer_base.PPOTrainer):
    """Upstream's loop over steps whose metrics are known; it is killed before the n-th event."""

    def __init__(self, folder, events, **options):
        self.folder, self.events, self.total_training_steps, self.steps_per_epoch = folder, events, STEPS, STEPS
        trainer = {
            "project_name": "p", "experiment_name": "e", "logger": ["file"], "total_epochs": 1, "save_freq": 1,
            "test_freq": 2, "val_before_train": False, "rollout_data_dir": str(folder / "rollouts"),
            "v1": {"trainer_mode": "sync"}, **options,
        }  # fmt: skip
        self.config = OmegaConf.create({"trainer": trainer, "skip": {}, "global_profiler": {"steps": None}})
        self._rollout_moe_lb_metrics_accumulator = {"times": 0}
        self.trainer_mode, self.prev_step_profile = "sync", False
        self._init_dump_executor()

    def event(self, name):
        self.events.append(name)
        if len(self.events) == self.kill_before:
            raise Killed

    def step(self, metrics, timing_raw):
        self.event("step")
        metrics |= {"actor/entropy": np.float32(self.global_steps / 8)}
        timing_raw["gen"] = 1.0
        return SimpleNamespace(keys=[], partition_id="train")

    def _save_checkpoint(self):
        self.event("save")
        checkpoint = self.folder / f"global_step_{self.global_steps}"
        checkpoint.mkdir(exist_ok=True)
        self.write_step_record(checkpoint)
        self.event("whole")
        (self.folder / "latest").write_text(str(self.global_steps))
        self.event("saved")

    def _validate(self):
        self.event("validate")
        return {ACCURACY: self.global_steps / 10}

    def _compute_metrics(self, batch, metrics, timing_raw, global_steps, epoch):
        self._rollout_moe_lb_metrics_accumulator["times"] += 1
        metrics |= {"score": global_steps / 2, "training/epoch": epoch, "timing_s/step": timing_raw["step"]}

    def _log_rollout_data(self, batch, timing_raw, rollout_data_dir):
        self.event("dump")
        self._dump_executor.submit(time.sleep, 0.02)  # what a kill finds still to be written
        self._dump_generations([str(self.global_steps)], ["o"], ["g"], [0.0], {}, rollout_data_dir)

    def on_step_end(self):
        self.event("weights")

    def on_sample_end(self):
        pass

    def _start_profiling(self):
        pass

    _stop_profiling = _start_profiling


class Trainer(RecordsSteps, Upstream):
    """The loop with records."""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Starts the run, to be killed before its n-th event; returns the events and the trainer."""
    monkeypatch.setattr(trainer_base, "tq", SimpleNamespace(kv_clear=lambda **_: None))

    def start(kill_before=None, **options):
        events = []
        trainer = Trainer(tmp_path, events, **options)
        trainer.kill_before = kill_before
        latest = tmp_path / "latest"
        trainer.global_steps = int(latest.read_text()) if latest.exists() else 0
        if trainer.global_steps:
            trainer.read_step_record(tmp_path / f"global_step_{trainer.global_steps}", goes_on=True)
        monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(next_file(tmp_path, trainer.global_steps)))
        try:
            trainer.fit(None)
        except Killed:
            trainer._dump_executor.shutdown(cancel_futures=True)
        return events, trainer

    return start


def whole_series(folder):
    """What a run that was never killed leaves behind."""
    steps = range(1, STEPS + 1)
    found = read_run(folder)
    assert found.series("actor/entropy") == {step: step / 8 for step in steps}
    assert found.series("score") == {step: step / 2 for step in steps}
    assert {2: 0.2, 4: 0.4}.items() <= found.series(ACCURACY).items()
    dumps = {file.name: json.loads(file.read_text())["input"] for file in (folder / "rollouts").iterdir()}
    assert dumps == {f"{step}.jsonl": str(step) for step in steps}


def test_each_step_is_logged_and_dumped_once(run, tmp_path):
    events, trainer = run()
    whole_series(tmp_path)
    assert events.count("dump") == STEPS and events.count("validate") == 2
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    # Upstream's own call for each step counts, a record's doesn't.
    assert trainer._rollout_moe_lb_metrics_accumulator == {"times": STEPS}
    assert all(StepRecord.read(tmp_path / f"global_step_{step}").logged for step in range(1, STEPS + 1))


@pytest.mark.parametrize("val_before_train", [False, True])
@pytest.mark.parametrize("kill_before", range(1, 27))
def test_killed_before_any_event(run, tmp_path, kill_before, val_before_train):
    events, _ = run(kill_before, val_before_train=val_before_train)
    assert len(events) == kill_before, "the run has fewer events: lower the range"
    run(val_before_train=val_before_train)
    whole_series(tmp_path)


def test_killed_twice_before_the_log(run, tmp_path):
    """The second start is killed in its first step; the third finds in the second's file what that has logged."""
    events, _ = run()
    killed_in_validation = events.index("validate") + 1
    for file in tmp_path.rglob("*"):
        if file.is_file():
            file.unlink()
    for kill_before in (killed_in_validation, 2, None):
        run(kill_before)
    whole_series(tmp_path)


def test_a_run_from_another_folder_saves_its_checkpoints_record_before_its_first_step(run, tmp_path):
    """The validation that it begins with may find the best accuracy so far. It leaves the other run's record alone."""
    _, trainer = run()
    record = StepRecord.read(tmp_path / "global_step_2")
    record.logged = False
    record.write()
    trainer.last_step, saved = None, tmp_path / "saved"
    saved.mkdir()
    trainer.read_step_record(tmp_path / "global_step_2", goes_on=False)
    trainer.write_step_record(saved)
    trainer.on_step_begin()
    assert StepRecord.read(saved) == StepRecord(saved / STEP_RECORD, record.metrics, logged=True)
    assert StepRecord.read(tmp_path / "global_step_2") == record


def test_checkpoint_without_a_record(run, tmp_path):
    """As plain verl saves it."""
    run()
    (tmp_path / "global_step_4" / STEP_RECORD).unlink()
    _, trainer = run()
    assert trainer.step_record is None


def test_the_record_of_a_checkpoint_that_was_moved_is_not_written_again(tmp_path):
    """A user's callback may do so."""
    record = StepRecord(tmp_path / "moved" / STEP_RECORD, {})
    RecordsSteps._mark_logged(SimpleNamespace(_unlogged=lambda: record))
    assert record.logged and not (tmp_path / "moved").exists()
