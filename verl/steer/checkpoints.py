# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of this fork's trainer: complete ones alone count, the best by a validation's metric is kept.

Keys below `trainer`, beside verl's:

    save_after                  no checkpoint before this step, or before the last one if that is earlier
    save_best_only              save only where the validation's metric is the best so far
    delete_old_best_checkpoint  delete the previous best checkpoint once the new one is complete
    best_metric_key             the metric; null: the only val-core/.../acc/mean@N
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

from omegaconf import OmegaConf, open_dict
from verl.steer.checkpoint_ledger import CheckpointLedger, metric_name, step_of
from verl.steer.methods.step_state import StepState
from verl.steer.requirements.unread import warn_of_late_steps
from verl.steer.rollout.lost_rollouts import lost_share
from verl.steer.run_settings import save_settings
from verl.steer.step_record import RecordsSteps
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback

logger = logging.getLogger(__name__)

#: Share of a validation's samples that may be lost where its metric is compared with the best: the samples that are
#: left may be the easy ones.
MOST_LOST = 0.01


class NoSteps(ValueError):
    """An epoch has no whole batch."""


class SavesCheckpoints(RecordsSteps):
    """Mix-in for a trainer: whole checkpoints with the loss's state, the best one, and safe resuming."""

    #: `trainer.default_local_dir`, resolved.
    folder: Path
    step_state: StepState | None
    total_training_steps: int
    parameter_sync_step: int
    checkpoint_callback: CheckpointCallback

    def _init_dataloader(self) -> None:
        """Set the last step and the first step that may be saved as well.

        verl neither saves nor validates at a last step that results from `trainer.total_epochs`.

        Raises:
            NoSteps: if there are too few rows for a batch.
        """
        super()._init_dataloader()
        options = self.config.trainer
        if not self.steps_per_epoch and not options.val_only:
            raise NoSteps(
                f"data.train_batch_size={self.config.data.train_batch_size}: expected at most "
                f"{len(self.train_dataset)}, the rows that the training data have; with data.filter_overlong_prompts "
                f"none is left whose prompt has more than {self.config.data.max_prompt_length} tokens"
            )
        asked, self.total_training_steps = (
            self.total_training_steps,
            min(self.total_training_steps, self.steps_per_epoch * options.total_epochs),
        )
        # verl has given the learning rates' schedules the steps that were asked for.
        for section in ("actor_rollout_ref.actor.optim", "critic.optim"):
            if optimizer := OmegaConf.select(self.config, section):
                with open_dict(optimizer):
                    optimizer.total_training_steps = self.total_training_steps * self.parameter_sync_step
        if self.total_training_steps < asked and not options.val_only:
            logger.warning(
                "trainer.total_epochs=%d: the run ends after %d of trainer.total_training_steps=%d",
                options.total_epochs, self.total_training_steps, asked,
            )  # fmt: skip
        warn_of_late_steps(self.config, self.total_training_steps)
        self.save_after = min(options.save_after, self.total_training_steps)
        saves = options.save_freq > 0 or options.save_best_only or options.best_metric_key is not None
        if saves and not options.val_only and self.save_after < options.save_after:
            logger.warning(
                "trainer.save_after=%d: the run has %d steps; its last may be saved",
                options.save_after, self.total_training_steps,
            )  # fmt: skip

    def _load_checkpoint(self) -> None:
        options = self.config.trainer
        # An evaluation changes nothing in the folder: a run may be training there.
        self.ledger = CheckpointLedger(self.folder) if options.val_only else self._open_ledger()
        super()._load_checkpoint()
        if not self.global_steps:
            return
        automatic = options.resume_mode == "auto"
        resumed = self.folder / f"global_step_{self.global_steps}" if automatic else Path(options.resume_from_path)
        if self.step_state:
            self.step_state.load(resumed)
        self.read_step_record(resumed, goes_on=automatic and not options.val_only)

    def _open_ledger(self) -> CheckpointLedger:
        """The folder's ledger if the run resumes from one of its checkpoints, else an empty one."""
        options = self.config.trainer
        ledger = CheckpointLedger.open(self.folder)
        if options.resume_mode != "auto":
            resumed = Path(str(options.resume_from_path)).resolve()
            step = step_of(resumed) if resumed.parent == self.folder else None
            if options.resume_mode == "resume_path" and step is not None:
                ledger.go_on_from(step)
            else:
                ledger = CheckpointLedger(self.folder)
        if unknown := ledger.unknown():
            logger.warning("%s: left alone, not in this run's ledger: %s", self.folder, ", ".join(unknown))
        return ledger

    def _save_checkpoint(self) -> None:
        """Save, unless it is too early or only the best is saved; verl calls this every `trainer.save_freq` steps."""
        options = self.config.trainer
        if options.save_best_only or self.global_steps < self.save_after:
            return
        self._save_whole_checkpoint()
        self._keep_latest()

    def _keep_latest(self) -> None:
        """Delete checkpoints beyond `trainer.max_actor_ckpt_to_keep`, where it is set; never the best one."""
        number = self.config.trainer.max_actor_ckpt_to_keep or 0
        if number > 0:
            self.ledger.keep_latest(number)

    def _save_whole_checkpoint(self) -> None:
        options, callback = self.config.trainer, self.checkpoint_callback
        events: list[dict] = []
        # verl's workers would delete the best checkpoint as one of the oldest; the ledger deletes instead.
        kept = {key: options[key] for key in ("max_actor_ckpt_to_keep", "max_critic_ckpt_to_keep")}
        options.update(dict.fromkeys(kept))
        # A user's callback may take long and copy the folder: call it once the checkpoint is complete.
        self.checkpoint_callback = SimpleNamespace(on_save=lambda **event: events.append(event))  # type: ignore
        self.ledger.begin(self.global_steps)
        super()._save_checkpoint()
        saved = self.folder / f"global_step_{self.global_steps}"
        if self.step_state:
            self.step_state.save(saved)
        self.write_step_record(saved)
        save_settings(self.config, saved)
        self.ledger.saved(self.global_steps)
        options.update(kept)
        self.checkpoint_callback = callback
        for event in events:
            callback.on_save(**event)

    def _validate(self) -> dict[str, float]:
        """Validate, and save the checkpoint if it is the best; also the last one if there is no other."""
        options = self.config.trainer
        metrics = super()._validate()
        if options.val_only or (not options.save_best_only and options.best_metric_key is None):
            return metrics
        # Look the key up at every validation, so that a wrong one ends the run at the first.
        name = metric_name(metrics, options.best_metric_key)
        value = float(metrics[name])
        self.ledger.measure_by(name)
        lost = lost_share(metrics, name)
        compared = lost <= MOST_LOST
        if not compared:
            logger.warning("%s=%s: never the best, as %.0f %% of its samples were lost", name, value, 100 * lost)
        if self.global_steps >= max(1, self.save_after) and compared and self.ledger.is_best(value):
            if self.ledger.latest_step != self.global_steps:
                self._save_whole_checkpoint()
            self.ledger.saved_best(self.global_steps, value, delete_old=options.delete_old_best_checkpoint)
            self._keep_latest()
        elif self.global_steps >= max(1, self.total_training_steps) and self.ledger.latest_step is None:
            logger.warning("%s=%s: no checkpoint yet, so the last step %d is saved", name, value, self.global_steps)
            self._save_whole_checkpoint()
        if self.ledger.best_value is not None:
            metrics["training/best_metric"] = self.ledger.best_value
        return metrics
