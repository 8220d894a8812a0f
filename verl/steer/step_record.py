# SPDX-License-Identifier: Apache-2.0
"""The metrics of a checkpoint's step, kept in the checkpoint: `global_step_N/step_record.json`.

verl saves a step's checkpoint before it validates, logs the step and dumps its rollouts. A run that is killed between
the two resumes with the next step. So the checkpoint keeps its step's metrics, which the resumed run logs, and the
rollouts are dumped before the checkpoint is whole.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transfer_queue import KVBatchMeta
from verl.experimental.agent_loop import AgentLoopManager
from verl.steer.checkpoint_ledger import replace_file
from verl.trainer.ppo.v1.replay_buffer import DAPO_FILTERED_REWARD_COUNTS_KEY
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

STEP_RECORD = "step_record.json"


@dataclass
class StepRecord:
    """The metrics of a step without those of its validation, and whether the loggers have received them."""

    file: Path
    metrics: dict[str, float]
    logged: bool = False

    @classmethod
    def read(cls, checkpoint: Path) -> StepRecord | None:
        """The record in a checkpoint's folder; None for a checkpoint of plain verl, which has none."""
        file = checkpoint / STEP_RECORD
        return cls(file, **json.loads(file.read_text())) if file.is_file() else None

    def write(self) -> None:
        """Write the file; scalars of NumPy and PyTorch become numbers."""
        entries = {"metrics": self.metrics, "logged": self.logged}
        replace_file(self.file, json.dumps(entries, default=lambda scalar: scalar.item()) + "\n")


class RecordsSteps(PPOTrainer):
    """Mix-in for a trainer: each step with a whole checkpoint is logged and its rollouts are dumped, despite kills."""

    step_record: StepRecord | None = None
    #: Batch, metrics and seconds by timer of the last step.
    last_step: tuple[KVBatchMeta, dict[str, Any], dict[str, float]] | None = None
    dumped_step: int | None = None

    def fit(self, agent_loop_manager: AgentLoopManager) -> None:
        """Train; first validate the step that the run resumes from, if a kill prevented that."""
        options = self.config.trainer
        if self._unlogged() and options.test_freq > 0:
            last = self.global_steps >= self.total_training_steps
            options.val_before_train |= last or self.global_steps % options.test_freq == 0
        super().fit(agent_loop_manager)
        self._mark_logged()

    def on_train_begin(self) -> None:
        super().on_train_begin()
        if record := self._unlogged():
            self.logger.log(data=record.metrics, step=self.global_steps - 1)

    def on_step_begin(self) -> None:
        super().on_step_begin()
        self._mark_logged()

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> KVBatchMeta:
        batch = super().step(metrics, timing_raw)
        self.last_step = batch, metrics, timing_raw
        return batch

    def read_step_record(self, checkpoint: Path, goes_on: bool) -> None:
        """Read the record of the checkpoint that the run resumes from.

        It is not logged unless the run goes on with the one that saved the checkpoint.
        """
        self.step_record = StepRecord.read(checkpoint)
        if self.step_record and not goes_on:
            self.step_record.logged = True

    def write_step_record(self, checkpoint: Path) -> None:
        """Write the record of the current step into its checkpoint, and dump the step's rollouts.

        Before the first step, when the validation of a resumed run may save a best checkpoint, the record is the one of
        the checkpoint that the run resumes from.
        """
        if self.last_step is None:
            if self.step_record:
                replace(self.step_record, file=checkpoint / STEP_RECORD).write()
            return
        batch, metrics, timing = self.last_step
        # A table, which verl logs apart from the metrics.
        metrics = {name: value for name, value in metrics.items() if name != DAPO_FILTERED_REWARD_COUNTS_KEY}
        # The step's own time is not measured before its checkpoint is saved.
        timing = {"step": sum(timing.values()), **timing}
        # Upstream will compute the metrics again to log them, and this accumulator must count a step once.
        accumulator = copy.deepcopy(self._rollout_moe_lb_metrics_accumulator)  # type: ignore[has-type]
        epoch = (self.global_steps - 1) // self.steps_per_epoch
        self._compute_metrics(batch, metrics, timing, self.global_steps, epoch)
        self._rollout_moe_lb_metrics_accumulator = accumulator
        self.step_record = StepRecord(checkpoint / STEP_RECORD, metrics)
        self.step_record.write()
        if folder := self.config.trainer.get("rollout_data_dir"):
            self._log_rollout_data(batch, timing, folder)
            for dump in self._dump_futures:
                dump.result()

    def _log_rollout_data(self, batch: KVBatchMeta, timing_raw: dict[str, float], rollout_data_dir: str) -> None:
        """Dump the step's rollouts as upstream does, unless its checkpoint has done so."""
        if self.dumped_step != self.global_steps:
            super()._log_rollout_data(batch, timing_raw, rollout_data_dir)
            self.dumped_step = self.global_steps

    def _unlogged(self) -> StepRecord | None:
        return None if self.step_record is None or self.step_record.logged else self.step_record

    def _mark_logged(self) -> None:
        if record := self._unlogged():
            record.logged = True
            if record.file.parent.is_dir():  # a user's callback may have moved the checkpoint
                record.write()
