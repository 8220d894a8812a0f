# SPDX-License-Identifier: Apache-2.0
"""The trainer of this fork, `trainer.v1.trainer_mode=steer`: verl's synchronous trainer with the following additions.

Keys below `trainer`, beside verl's:

    save_after                  no checkpoint before this step, or before the last one if that is earlier
    save_best_only              save only where the validation's metric is the best so far
    delete_old_best_checkpoint  delete the previous best checkpoint once the new one is complete
    best_metric_key             the metric; null: the only val-core/.../acc/mean@N
    rollout_timeout             seconds without a finished rollout after which a run ends; null: never
    skip_old_log_prob           take the old log-probs from the forward pass of a step's only update
    entropy_audit               compare estimated entropy changes with the true ones every so many steps
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transfer_queue as tq
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict
from torch.utils.data import DataLoader
from transfer_queue import KVBatchMeta
from verl.experimental.agent_loop import AgentLoopManager
from verl.steer.audit.scores import AuditOptions, AuditRequest
from verl.steer.audit.step import audit_step
from verl.steer.checkpoint_ledger import CheckpointLedger, metric_name, step_of
from verl.steer.gc_heap import freeze_gc_heap
from verl.steer.methods.adaptive_entropy import AdaptiveEntropyCoefficient
from verl.steer.methods.advantages import ESTIMATORS, bind_estimator, estimator_fields
from verl.steer.methods.aepo import AEPOOptions
from verl.steer.methods.entropic import EntroPICCoefficient
from verl.steer.methods.siren import EntropyAnchor
from verl.steer.methods.step_state import StepState
from verl.steer.options import at_step, from_config
from verl.steer.report.metrics_files import next_evaluation_file, next_file
from verl.steer.rollout.checks import ROLLOUT_TIMEOUT, TEMPERATURE, is_batched
from verl.steer.rollout.lost_rollouts import LOST_IN_TRAINING, lost_rollouts, means_over_stored_samples, stored_samples
from verl.steer.rollout.wait import RolloutWait
from verl.steer.run_ending import naming_a_full_disk
from verl.steer.run_settings import save_settings
from verl.steer.step_record import RecordsSteps
from verl.steer.validation_metrics import problems_of, sampling_metrics
from verl.steer.worker import SteerWorkers
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.trainer.ppo.core_algos import weighs_mini_batches
from verl.trainer.ppo.utils import create_rl_dataset
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.dataset.rl_dataset import collate_fn
from verl.utils.transferqueue_utils import kv_batch_meta2batch_meta

logger = logging.getLogger(__name__)

#: Seconds between two polls for a step's rollouts. verl's 2 s are half of a small model's step on a CPU; on GPUs each
#: poll lists thousands of rollouts.
POLL_INTERVAL, GPU_POLL_INTERVAL = 0.05, 0.5

#: Columns of tensors that only the critic and the trainer read, not an update of the actor.
UNREAD_BY_UPDATES = frozenset({"dummy_tensor", "log_probs", "returns", "rm_scores", "rollout_log_probs", "values"})

#: Columns of tensors that a pass for log-probs doesn't read either.
UNREAD_BY_FORWARD_PASSES = UNREAD_BY_UPDATES | {
    "advantages",
    "entropy",
    "old_log_probs",
    "prompts",
    "responses",
}

#: Classes of the losses' states; a run has at most one of them.
STEP_STATES: tuple[type[StepState], ...] = (AdaptiveEntropyCoefficient, EntroPICCoefficient, EntropyAnchor)


def metrics_of_files(by_file: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Join the metrics of several validation files.

    Args:
        by_file: each file's metrics by its name.

    Returns:
        Metric -> value. A metric of several files gets the file's name: `val-core/SOURCE/acc/mean@1` of the file F
        becomes `val-core/F/SOURCE/acc/mean@1`.
    """
    files = Counter(name for metrics in by_file.values() for name in metrics)
    together = {}
    for file, metrics in by_file.items():
        for name, value in metrics.items():
            section, _, rest = name.partition("/")
            together[name if files[name] == 1 else f"{section}/{file}/{rest}"] = value
    return together


def _check_single_outputs(keys: list[str], estimator: str) -> None:
    """Refuse rollouts of several outputs, whose keys end with their number: of these verl's GRPO reads the last alone.

    Raises:
        ValueError: if there is one.
    """
    if further := [key for key in keys if not key.endswith("_0")]:
        raise ValueError(
            f"algorithm.adv_estimator={estimator}: expected grpo or another of verl's where an agent loop gives "
            f"several outputs for a rollout ({further[0]}), each of which this one would take for a rollout"
        )


@register_trainer("steer")
class SteerTrainer(SteerWorkers, RecordsSteps, PPOTrainerSync):
    """verl's synchronous trainer, with best checkpoints, safe resuming and whole batches of rollouts."""

    total_training_steps: int
    checkpoint_callback: CheckpointCallback

    def __init__(self, config: DictConfig) -> None:
        # verl recognises synchronous trainers by the mode's name.
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"
        super().__init__(config)
        self.folder = Path(config.trainer.default_local_dir).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        policy_loss = omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss)
        states = (cls.from_options(policy_loss) for cls in STEP_STATES if cls.loss_mode == policy_loss.loss_mode)
        self.step_state: StepState | None = next(states, None)
        reads_target = weighs_mini_batches(policy_loss) and policy_loss.token_weight_map == "target"
        if self.step_state:
            reads_target = self.step_state.reads_target
        self.target_entropy = policy_loss.target_entropy if reads_target else None
        self.entropy_audit = from_config(AuditOptions, config.trainer.get("entropy_audit"), "trainer.entropy_audit")
        self.last_entropy: float | None = None
        self.tempered: dict[str, float] = {}
        self.val_prompts: list[str] = []
        self.batched = is_batched(config)

    def fit(self, agent_loop_manager: AgentLoopManager) -> None:
        """Train; loggers write into `trainer.default_local_dir` unless the environment names another folder."""
        metrics_file = (next_evaluation_file if self.config.trainer.val_only else next_file)(
            self.folder, self.global_steps
        )
        os.environ.setdefault("VERL_FILE_LOGGER_PATH", str(metrics_file))
        os.environ.setdefault("TENSORBOARD_DIR", str(self.folder / "tensorboard"))
        freeze_gc_heap()
        if self.batched:
            self.rollout_wait.failure = lambda: agent_loop_manager.failure  # type: ignore[attr-defined] # the batched one's
            self.rollout_wait.pause = agent_loop_manager.wait_for_batch  # type: ignore[attr-defined]
            self.replay_buffer.poll_interval = 0
        with naming_a_full_disk(self.folder):
            super().fit(agent_loop_manager)

    def _build_replay_buffer(self) -> ReplayBuffer:
        replay_buffer = super()._build_replay_buffer()
        on_cpu = self.config.trainer.device == "cpu"
        replay_buffer.poll_interval = POLL_INTERVAL if on_cpu else GPU_POLL_INTERVAL
        self.rollout_wait = RolloutWait(replay_buffer, self.config.trainer.get("rollout_timeout", ROLLOUT_TIMEOUT))
        self.rollouts_asked: dict[str, int] = {}
        return replay_buffer

    def _init_dataloader(self) -> None:
        """Set the last step and the first step that may be saved as well.

        verl neither saves nor validates at a last step that results from `trainer.total_epochs`.
        """
        super()._init_dataloader()
        options = self.config.trainer
        asked, self.total_training_steps = (
            self.total_training_steps,
            min(self.total_training_steps, self.steps_per_epoch * options.total_epochs),
        )
        if self.total_training_steps < asked and not options.val_only:
            logger.warning(
                "trainer.total_epochs=%d: the run ends after %d of trainer.total_training_steps=%d",
                options.total_epochs, self.total_training_steps, asked,
            )  # fmt: skip
        self.save_after = min(options.save_after, self.total_training_steps)
        saves = options.save_freq > 0 or options.save_best_only or options.best_metric_key is not None
        if saves and not options.val_only and self.save_after < options.save_after:
            logger.warning(
                "trainer.save_after=%d: the run has %d steps; its last may be saved",
                options.save_after, self.total_training_steps,
            )  # fmt: skip

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        """Record the number of rollouts of each prompt, then submit them."""
        uids, usual = list(batch["uid"]), self.config.actor_rollout_ref.rollout.n
        counts = list(batch["__rollout_n__"]) if "__rollout_n__" in batch else [usual] * len(uids)
        self.rollouts_asked |= dict(zip(uids, map(int, counts), strict=True))
        if self.config.algorithm.adv_estimator == "aepo":
            self._temper(batch, uids)
        return super()._submit_batch_to_rollout(batch)

    def _temper(self, batch: TensorDict, uids: list[str]) -> None:
        """Have the first prompts of a batch sampled at AEPO's temperature, as many as the step still lacks."""
        options = from_config(AEPOOptions, self.config.algorithm)
        wanted, temperature = options.tempered(
            self.last_entropy, self.config.data.train_batch_size, len(self.rollouts_asked)
        )
        count = wanted - len(self.tempered)
        others = [self.config.actor_rollout_ref.rollout.temperature] * (len(uids) - count)
        batch[TEMPERATURE] = torch.tensor([temperature] * count + others)
        self.tempered |= dict.fromkeys(uids[:count], temperature)

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, *args: Any, **kwargs: Any) -> KVBatchMeta:
        """Count the missing rollouts of a batch before verl fills it up."""
        failed = self.replay_buffer.failure_keys[batch.partition_id]
        metrics[LOST_IN_TRAINING] = lost_rollouts(self.rollouts_asked, failed, batch.keys)
        self.rollouts_asked.clear()
        return super()._balance_batch(batch, metrics, *args, **kwargs)

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
        if self.step_record:
            self.last_entropy = self.step_record.metrics.get("actor/entropy")

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

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Compute the sums over the vocabulary for an audit as well, and the entropy's change since the last step.

        With `trainer.skip_old_log_prob` compute nothing: in the only update of a step the policy is the old one.
        """
        if self._skips_old_log_prob(batch):
            return batch
        if self.entropy_audit.due(self.global_steps):
            batch.extra_info["calculate_sum_pi_squared"] = True
        self._leave_out(batch, UNREAD_BY_FORWARD_PASSES)
        with self._fitting_micro_batches(batch, self.config.actor_rollout_ref.rollout):
            batch = super()._compute_old_log_prob(batch, metrics)
        self._compare_entropy(metrics)
        return batch

    def _skips_old_log_prob(self, batch: KVBatchMeta) -> bool:
        """Whether the pass is left out; not if an agent loop's further rows of a rollout lead to a second update."""
        if not self.config.trainer.skip_old_log_prob:
            return False
        actor, rollout = self.config.actor_rollout_ref.actor, self.config.actor_rollout_ref.rollout
        return len(batch) <= actor.ppo_mini_batch_size * rollout.n

    def _compare_entropy(self, metrics: dict) -> None:
        entropy = metrics.get("actor/entropy")
        if entropy is not None and self.last_entropy is not None:
            metrics["actor/entropy_change_per_step"] = entropy - self.last_entropy
        self.last_entropy = entropy

    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Send the workers only the columns that they read."""
        self._leave_out(batch, UNREAD_BY_FORWARD_PASSES)
        # The reference of an adapter is the actor without it, whose passes have the rollout's sizes.
        with self._fitting_micro_batches(
            batch, self.config.actor_rollout_ref["rollout" if self.ref_in_actor else "ref"]
        ):
            return super()._compute_ref_log_prob(batch, metrics)

    @contextmanager
    def _fitting_micro_batches(self, batch: KVBatchMeta, options: DictConfig) -> Iterator[None]:
        """Reduce the micro-batch size of a pass for log-probs to a divisor of the batch's size.

        verl fills a batch that lacks rollouts up to whole mini-batches; the configured size may not divide the result.
        """
        size = options.log_prob_micro_batch_size_per_gpu
        if size and not options.log_prob_use_dynamic_bsz:
            rows = len(batch) // (max(self.actor_rollout_wg._dispatch_info["actor"]) + 1)
            if rows % size:
                batch.extra_info["micro_batch_size_per_gpu"] = math.gcd(size, rows)
        yield
        batch.extra_info.pop("micro_batch_size_per_gpu", None)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Bind the fields of the batch that an estimator of this fork reads, then compute the advantages."""
        name, fields = self.config.algorithm.adv_estimator, estimator_fields(self.config.algorithm)
        if name in ESTIMATORS:
            _check_single_outputs(batch.keys, name)
            bound: dict[str, Any] = {"progress": self.global_steps / self.total_training_steps}
            if fields:
                data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(fields))
                padded = data.to_padded_tensor()
                bound |= {field: padded[field] for field in fields}
            if name == "aepo":
                bound["tempered"], self.tempered = self.tempered, {}
                in_batch = bound["tempered"].keys() & {key.partition("_")[0] for key in batch.keys}
                metrics["training/tempered_prompts"] = len(in_batch)
                metrics["training/temperature"] = max(bound["tempered"].values(), default=0.0)
            bind_estimator(name, bound)
        batch = super()._compute_advantage(batch, metrics)
        if name in ESTIMATORS:
            bind_estimator(name, {})  # the fields are those of a whole step
        return batch

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Send the workers the flags of this fork's losses and metrics, update, and audit the entropy if it is due."""
        actor = self.config.actor_rollout_ref.actor
        self._leave_out(batch, UNREAD_BY_UPDATES)
        batch.extra_info["calculate_sum_pi_squared"] = actor.calculate_sum_pi_squared
        batch.extra_info["token_metrics"] = True
        if self._skips_old_log_prob(batch):
            batch.extra_info["skip_old_log_prob"] = True
        if self.target_entropy is not None:
            target = at_step(self.target_entropy, self.global_steps)
            batch.extra_info["target_entropy"] = metrics["actor/target_entropy"] = target
            if self.step_state:
                self.step_state.target = target
        if state := self.step_state:
            batch.extra_info |= state.flags
            if (value := state.step(metrics.get("actor/entropy", math.nan))) is not None:
                batch.extra_info[state.field] = metrics[f"actor/{state.field}"] = value
        audited = self.entropy_audit.due(self.global_steps)
        if audited:
            batch.extra_info["entropy_audit"] = self._audit_request(len(batch))
        batch = super()._update_actor(batch, metrics)
        if audited:
            self._audit_step(batch, metrics)
        self._after_update(metrics)
        return batch

    def _audit_step(self, batch: KVBatchMeta, metrics: dict) -> None:
        """Score the estimates by the whole step's change, and name the scores of its updates alike."""
        # verl prefixes the workers' metrics with `actor/`.
        for name in [name for name in metrics if name.startswith("actor/entropy_audit/")]:
            metrics[name.removeprefix("actor/")] = metrics.pop(name)
        temperature = self.config.actor_rollout_ref.rollout.temperature
        with self._fitting_micro_batches(batch, self.config.actor_rollout_ref.rollout):
            metrics |= audit_step(batch, self.actor_rollout_wg, temperature)

    def _after_update(self, metrics: dict) -> None:
        """Log the entropy that a left out pass would have logged, and pass the metrics to the loss's state."""
        if self.config.trainer.skip_old_log_prob and "actor/entropy" not in metrics:
            metrics["actor/entropy"] = metrics["actor/entropy_loss"]
            self._compare_entropy(metrics)
        if self.step_state:
            self.step_state.observe(metrics)

    def _leave_out(self, batch: KVBatchMeta, unread: frozenset[str]) -> None:
        """Have the workers fetch neither the `unread` columns nor columns of objects.

        verl sends them every column: tensors row by row, and the data set's columns, such as the prompt's text, as an
        object for each row. The batched manager writes no object that the workers read.
        """
        if self.batched:
            columns = kv_batch_meta2batch_meta(batch).field_schema
            batch.fields = [
                name for name, column in columns.items() if not column["is_non_tensor"] and name not in unread
            ]

    def _audit_request(self, rollouts: int) -> AuditRequest:
        actor = self.config.actor_rollout_ref.actor
        mini_batches = rollouts // (actor.ppo_mini_batch_size * self.config.actor_rollout_ref.rollout.n)
        return AuditRequest(
            step=self.global_steps,
            folder=str(self.folder / "audit"),
            tokens=self.entropy_audit.tokens,
            mini_batches=mini_batches * actor.ppo_epochs,
            influence=self.entropy_audit.influence,
            one_token=self.entropy_audit.one_token,
        )

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
        options = self.config.trainer
        if options.val_only:
            return self._validate_one_file_after_another()
        metrics = super()._validate()
        if not options.save_best_only and options.best_metric_key is None:
            return metrics
        # Look the key up at every validation, so that a wrong one ends the run at the first.
        name = metric_name(metrics, options.best_metric_key)
        value = float(metrics[name])
        self.ledger.measure_by(name)
        if self.global_steps >= max(1, self.save_after) and self.ledger.is_best(value):
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

    def _maybe_log_val_generations(self, inputs: list[str], outputs: list[str], scores: list[float]) -> None:
        """Keep the prompts of the stored samples. verl computes the samples' metrics after this call."""
        self.val_prompts = inputs
        super()._maybe_log_val_generations(inputs, outputs, scores)

    def _val_metrics_update(
        self,
        data_sources: list[str],
        sample_uids: list[str],
        reward_extra_infos_dict: dict[str, list[Any]],
        sample_turns: list[int],
        expected_acc_counts: dict[tuple[str, str], int] | None = None,
    ) -> dict[str, float]:
        """verl's metrics of a validation, but with missing samples left out of the means; verl counts them as wrong."""
        asked = expected_acc_counts or {}
        stored, counts = stored_samples(data_sources, sample_uids, asked)
        metrics = super()._val_metrics_update(
            data_sources, sample_uids, reward_extra_infos_dict, sample_turns, expected_acc_counts=stored
        )
        if stored != asked:
            metrics = means_over_stored_samples(metrics, data_sources, sample_uids, reward_extra_infos_dict, asked)
        # The text of a prompt with images doesn't tell them apart.
        prompts = sample_uids if self.processor else self.val_prompts
        problems = problems_of(data_sources, sample_uids, prompts, asked)
        return metrics | counts | sampling_metrics(data_sources, problems, reward_extra_infos_dict)

    def _validate_one_file_after_another(self) -> dict[str, float]:
        """Evaluate; each file's responses are on disk before the next file begins, so a killed run keeps them."""
        folder, data = self.config.trainer.validation_data_dir, self.config.data
        by_file = {}
        for file in self.val_dataset.data_files:
            name, samples = Path(file).stem, data.get("val_max_samples", -1)
            dataset = create_rl_dataset(
                [file], data, self.tokenizer, self.processor, is_train=False, max_samples=samples
            )
            batch_size = data.get("val_batch_size") or len(dataset)
            self.val_dataloader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate_fn)
            if folder:
                shutil.rmtree(f"{folder}/{name}.part", ignore_errors=True)  # left by a killed evaluation
                with open_dict(self.config):
                    self.config.trainer.validation_data_dir = f"{folder}/{name}.part"
            if self.batched:
                # A file's seeds do not depend on the files before it.
                self.agent_loop_manager.submitted.clear()  # type: ignore[attr-defined]
            by_file[name] = super()._validate()
            if folder:
                self._shutdown_dump_executor()
                self._init_dump_executor()
                os.replace(f"{folder}/{name}.part", f"{folder}/{name}")
        return metrics_of_files(by_file)
