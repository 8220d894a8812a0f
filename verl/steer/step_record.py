# SPDX-License-Identifier: Apache-2.0
"""What the step of a checkpoint logs, in the checkpoint: `global_step_N/step_record.json`.

verl saves a step's checkpoint before the step's validation, and logs the step and dumps its rollouts after it. A run
that is killed in between goes on with the next step. So a checkpoint takes its step's metrics along, and the run that
goes on logs them; the rollouts are dumped before the checkpoint is whole.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfer_queue import KVBatchMeta
from verl.experimental.agent_loop import AgentLoopManager
from verl.trainer.ppo.v1.replay_buffer import DAPO_FILTERED_REWARD_COUNTS_KEY

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


class RecordsSteps:
    """Stands before a trainer among a class's bases: each step of a run is logged, and its rollouts are dumped."""

    step_record: StepRecord | None = None
    #: What `step` made last: its batch, metrics and times.
    last_step: tuple[KVBatchMeta, dict[str, Any], dict[str, float]] | None = None
    dumped_step: int | None = None

    def fit(self, agent_loop_manager: AgentLoopManager) -> None:
        """The trainer's, which first does what is left to do of the step that it goes on from."""
        options = self.config.trainer
        if self._unlogged() and options.test_freq > 0:
            last = self.global_steps >= self.total_training_steps
            options.val_before_train |= last or self.global_steps % options.test_freq == 0
        super().fit(agent_loop_manager)  # type: ignore[misc]
        self._mark_logged()

    def on_train_begin(self) -> None:
        super().on_train_begin()  # type: ignore[misc]
        if record := self._unlogged():
            self.logger.log(data=record.metrics, step=self.global_steps - 1)

    def on_step_begin(self) -> None:
        super().on_step_begin()  # type: ignore[misc]
        self._mark_logged()

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> KVBatchMeta:
        batch = super().step(metrics, timing_raw)  # type: ignore[misc]
        self.last_step = batch, metrics, timing_raw
        return batch

    def read_step_record(self, checkpoint: Path) -> None:
        """The run goes on from a checkpoint."""
        self.step_record = StepRecord.read(checkpoint)

    def write_step_record(self, checkpoint: Path) -> None:
        """Into a checkpoint what the present step has to log, and its rollouts on disk.

        Nothing where there is no step yet: a resumed run's first validation may find the best value.
        """
        if self.last_step is None:
            return
        batch, metrics, timing = self.last_step
        # The time of a step is not known before its checkpoint is saved.
        metrics, timing = dict(metrics), {"step": sum(timing.values()), **timing}
        metrics.pop(DAPO_FILTERED_REWARD_COUNTS_KEY, None)
        # Upstream computes the metrics once more when it logs them, and these counts add up.
        counts = copy.deepcopy(self._rollout_moe_lb_metrics_accumulator)  # type: ignore[has-type]
        self._compute_metrics(
            batch, metrics, timing, self.global_steps, epoch=(self.global_steps - 1) // self.steps_per_epoch
        )
        self._rollout_moe_lb_metrics_accumulator = counts
        self.step_record = StepRecord(checkpoint / STEP_RECORD, metrics)
        self.step_record.write()
        if folder := self.config.trainer.get("rollout_data_dir"):
            self._log_rollout_data(batch, timing, folder)
            for dump in self._dump_futures:
                dump.result()

    def _log_rollout_data(self, batch: KVBatchMeta, timing_raw: dict[str, float], rollout_data_dir: str) -> None:
        """Upstream's, once a step."""
        if self.dumped_step != self.global_steps:
            super()._log_rollout_data(batch, timing_raw, rollout_data_dir)  # type: ignore[misc]
            self.dumped_step = self.global_steps

    def _unlogged(self) -> StepRecord | None:
        return None if self.step_record is None or self.step_record.logged else self.step_record

    def _mark_logged(self) -> None:
        if record := self._unlogged():
            record.logged = True
            record.write()


def _number(value: Any) -> float:
    """A scalar of NumPy or PyTorch, which `json` doesn't know."""
    return value.item()
