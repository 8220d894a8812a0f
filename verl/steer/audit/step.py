# SPDX-License-Identifier: Apache-2.0
"""The entropy audit of a training step: the batch's entropies after all of its updates, against the old policy's."""

from __future__ import annotations

import math
from typing import Any

import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.steer.audit.scores import covariance_estimate, score_estimates, signed_estimates
from verl.workers.utils.padding import response_from_nested

#: What the log-prob pass of an audited step leaves in the batch beside upstream's fields.
SUMS = ("sum_pi_squared", "sum_pi_squared_log_pi")

#: At the old policy, at a ratio of 1, no loss clips.
NO_CLIP = (math.inf, math.inf, math.inf)

FIELDS = ("advantages", "old_log_probs", "entropy", "response_mask", *SUMS)


def audit_step(batch: KVBatchMeta, actor_worker_group: Any, temperature: float) -> dict[str, float]:
    """Measure the updated policy's entropies, and hold the estimates at the old policy against their change.

    Args:
        batch: the step's batch after the update; the old policy's `SUMS` came with its log-probs.
        actor_worker_group: verl's workers.
        temperature: that of the old log-probs.

    Returns:
        Scores as `score_estimates` names them, below `entropy_audit/step/`.
    """

    def fetch(*fields: str) -> Any:
        return tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(fields))

    old = fetch(*FIELDS)
    flags = {"calculate_entropy": True, "compute_loss": False, "temperature": temperature}
    actor_worker_group.compute_log_prob(
        KVBatchMeta(partition_id=batch.partition_id, keys=batch.keys, tags=batch.tags, extra_info=flags)
    )
    # The workers write what they compute over the old policy's.
    new_entropy = response_from_nested(fetch("entropy")["entropy"], old["response_mask"])
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=old.select("entropy"))
    for name in SUMS:
        old[name] = response_from_nested(old[name], old["response_mask"])
    valid = old["response_mask"].values().bool()
    tokens = {name: values.values()[valid].float() for name, values in old.items() if name != "response_mask"}
    advantages, log_prob, entropy = tokens["advantages"], tokens["old_log_probs"], tokens["entropy"]
    sums = {name: tokens[name] for name in SUMS}
    estimates = signed_estimates(advantages, entropy, entropy, log_prob, log_prob, clip=NO_CLIP, **sums)
    estimates["covariance"] = covariance_estimate(log_prob, advantages, log_prob.mean(), advantages.mean())
    scores = score_estimates(estimates, new_entropy.values()[valid].float() - entropy)
    return {f"entropy_audit/step/{name}": score for name, score in scores.items()}
