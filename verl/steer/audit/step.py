# SPDX-License-Identifier: Apache-2.0
"""The entropy audit of a training step: the batch's entropies after all of its updates, against the old policy's."""

from __future__ import annotations

import math
from typing import Any

import torch
import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.steer.audit.scores import covariance_estimate, score_estimates, signed_estimates
from verl.trainer.ppo.core_algos import ClipRatios, LossInputs
from verl.workers.utils.padding import response_from_nested

#: Fields that the log-prob pass of an audited step adds to verl's.
SUMS = ("sum_pi_squared", "sum_pi_squared_log_pi")

#: At the old policy, at a ratio of 1, no loss clips.
NO_CLIP = ClipRatios(math.inf, math.inf, math.inf)

FIELDS = ("advantages", "old_log_probs", "entropy", "response_mask", *SUMS)


def audit_step(batch: KVBatchMeta, actor_worker_group: Any, temperature: float) -> dict[str, float]:
    """Measure the updated policy's entropies, and score the old policy's estimates by their change.

    Args:
        batch: the step's batch after the update, with the old policy's `SUMS`; its flag `micro_batch_size_per_gpu`, if
            it has one, is that of the pass for the new entropies.
        actor_worker_group: verl's workers.
        temperature: that of the old log-probs.

    Returns:
        Scores as `score_estimates` names them, below `entropy_audit/step/`.
    """

    def fetch(*fields: str) -> Any:
        return tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(fields))

    old = fetch(*FIELDS)
    flags = {"calculate_entropy": True, "compute_loss": False, "temperature": temperature}
    if size := batch.extra_info.get("micro_batch_size_per_gpu"):
        flags["micro_batch_size_per_gpu"] = size
    actor_worker_group.compute_log_prob(
        KVBatchMeta(partition_id=batch.partition_id, keys=batch.keys, tags=batch.tags, extra_info=flags)
    )
    # The workers overwrite the old policy's entropies.
    new_entropy = response_from_nested(fetch("entropy")["entropy"], old["response_mask"])
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=old.select("entropy"))
    for name in SUMS:
        old[name] = response_from_nested(old[name], old["response_mask"])
    valid = old["response_mask"].values().bool()
    tokens = {name: values.values()[valid].float() for name, values in old.items() if name != "response_mask"}
    advantages, log_prob, entropy = tokens["advantages"], tokens["old_log_probs"], tokens["entropy"]
    sums = {name: tokens[name] for name in SUMS}
    inputs = LossInputs(log_prob, log_prob, advantages, torch.ones_like(entropy), entropy, entropy, **sums)
    estimates = signed_estimates(inputs, NO_CLIP)
    estimates["covariance"] = covariance_estimate(log_prob, advantages, log_prob.mean(), advantages.mean())
    scores = score_estimates(estimates, new_entropy.values()[valid].float() - entropy)
    return {f"entropy_audit/step/{name}": score for name, score in scores.items()}
