# SPDX-License-Identifier: Apache-2.0
"""The trainer of this fork, `trainer.v1.trainer_mode=steer`: verl's synchronous trainer with the following additions.

Keys below `trainer`, beside verl's:

    rollout_timeout    seconds without a finished rollout after which a run ends; null: never
    skip_old_log_prob  take the old log-probs from the forward pass of a step's only update
    entropy_audit      compare estimated entropy changes with the true ones every so many steps

and those of `verl.steer.checkpoints`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transfer_queue as tq
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.experimental.agent_loop import AgentLoopManager
from verl.steer.audit.scores import AuditOptions, AuditRequest
from verl.steer.audit.step import audit_step
from verl.steer.checkpoints import SavesCheckpoints
from verl.steer.gc_heap import freeze_gc_heap
from verl.steer.methods.adaptive_entropy import AdaptiveEntropyCoefficient
from verl.steer.methods.advantages import ESTIMATORS, bind_estimator, estimator_fields
from verl.steer.methods.aepo import Tempering
from verl.steer.methods.entropic import EntroPICCoefficient
from verl.steer.methods.siren import EntropyAnchor
from verl.steer.methods.step_state import StepState
from verl.steer.options import at_step, from_config
from verl.steer.report.metrics_files import next_evaluation_file, next_file
from verl.steer.rollout.checks import ROLLOUT_TIMEOUT, is_batched
from verl.steer.rollout.lost_rollouts import LOST_IN_TRAINING, lost_rollouts
from verl.steer.rollout.wait import RolloutWait
from verl.steer.run_ending import naming_a_full_disk
from verl.steer.validation import Validates
from verl.steer.worker import SteerWorkers
from verl.trainer.ppo.core_algos import weighs_mini_batches
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.transferqueue_utils import kv_batch_meta2batch_meta

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
class SteerTrainer(SteerWorkers, SavesCheckpoints, Validates, PPOTrainerSync):
    """verl's synchronous trainer, with best checkpoints, safe resuming and whole batches of rollouts."""

    tempering: Tempering | None = None
    #: The policy's mean entropy at the last step, in nats.
    last_entropy: float | None = None

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
        self.tempering = Tempering(config) if config.algorithm.adv_estimator == "aepo" else None
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

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        """Record the number of rollouts of each prompt, then submit them."""
        uids, usual = list(batch["uid"]), self.config.actor_rollout_ref.rollout.n
        counts = list(batch["__rollout_n__"]) if "__rollout_n__" in batch else [usual] * len(uids)
        self.rollouts_asked |= dict(zip(uids, map(int, counts), strict=True))
        if self.tempering:
            self.tempering.temper(batch, self.last_entropy, step_prompts=len(self.rollouts_asked))
        return super()._submit_batch_to_rollout(batch)

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, *args: Any, **kwargs: Any) -> KVBatchMeta:
        """Count the missing rollouts of a batch before verl fills it up."""
        failed = self.replay_buffer.failure_keys[batch.partition_id]
        metrics[LOST_IN_TRAINING] = lost_rollouts(self.rollouts_asked, failed, batch.keys)
        self.rollouts_asked.clear()
        return super()._balance_batch(batch, metrics, *args, **kwargs)

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.step_record:
            self.last_entropy = self.step_record.metrics.get("actor/entropy")

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
            if self.tempering:
                bound["tempered"] = self.tempering.end_step({key.partition("_")[0] for key in batch.keys}, metrics)
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
