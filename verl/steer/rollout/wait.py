# SPDX-License-Identifier: Apache-2.0
"""The trainer's wait for rollouts ends with an error if they fail, or if none is finished within `rollout_timeout`."""

from __future__ import annotations

import time
from collections.abc import Callable

from ray.exceptions import RayTaskError
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer


class RolloutsFailed(RuntimeError):
    """Rollouts can't be generated, so the run ends."""


def error_text(error: BaseException) -> str:
    """An error's type and message in one line; of an error in a Ray task, those of its cause."""
    if isinstance(error, RolloutsFailed):
        return str(error)
    cause = error.cause if isinstance(error, RayTaskError) else error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"


class RolloutWait:
    """Replaces the method by which one replay buffer waits between two polls of the TransferQueue.

    Args:
        replay_buffer: upstream's, or a custom sampler that calls `_wait_for_next_poll` as upstream's does.
        timeout: seconds without a finished rollout or prompt after which the wait ends; None: never.
        failure: returns the error that ended the generation, or None.
        clock: returns the present time, in seconds.

    Attributes:
        pause: called before each poll; returns when a poll may find something new.
    """

    def __init__(
        self,
        replay_buffer: ReplayBuffer,
        timeout: float | None,
        failure: Callable[[], BaseException | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.replay_buffer, self.timeout, self.failure, self.clock = replay_buffer, timeout, failure, clock
        self.progress: tuple[object, ...] = ()
        self.since = clock()
        self.pause: Callable[[], object] = lambda: None
        self.upstream_wait = replay_buffer._wait_for_next_poll
        # On the instance: a custom sampler may be of any class.
        replay_buffer._wait_for_next_poll = self.wait_for_next_poll  # type: ignore[method-assign]

    def wait_for_next_poll(self, partition_id: str, last_debug_time: float) -> float:
        """Upstream's wait, after a check whether rollouts still come.

        Raises:
            RolloutsFailed: if the generation failed or `timeout` is over; it names the step and the partition.
        """
        buffer = self.replay_buffer
        prompts = buffer.prompt_global_steps[partition_id]
        steps = ", ".join(map(str, sorted(set(prompts.values()))))
        done = len(buffer.finished_keys[partition_id] | buffer.failure_keys[partition_id])
        waiting = (
            f"waiting for the rollouts of step {steps}, partition {partition_id}: {done} of {len(prompts)} prompts done"
        )
        failure = self.failure()
        if failure is not None:
            raise RolloutsFailed(f"{waiting}: {error_text(failure)}") from failure
        # The prompts too: batches of a validation have the same step and partition.
        progress = (partition_id, frozenset(prompts.items()), done, len(buffer.partitions[partition_id]))
        if progress != self.progress:
            self.progress, self.since = progress, self.clock()
        elif self.timeout is not None and self.clock() - self.since > self.timeout:
            raise RolloutsFailed(
                f"trainer.rollout_timeout={self.timeout:g}: {waiting}: no rollout was done for {self.timeout:g} s; "
                "expected a longer time if responses take that long"
            )
        self.pause()
        return self.upstream_wait(partition_id, last_debug_time)
