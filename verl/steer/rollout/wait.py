# SPDX-License-Identifier: Apache-2.0
"""A wait for rollouts that ends: with the rollouts, with the error of who makes them, or after a time without any."""

from __future__ import annotations

import time
from collections.abc import Callable

from ray.exceptions import RayTaskError
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

#: Default of `trainer.rollout_timeout`, in seconds: more than a share of long responses takes.
ROLLOUT_TIMEOUT = 3600.0


class RolloutsFailed(RuntimeError):
    """A run can't go on, as its rollouts do not come."""


def told(error: BaseException) -> str:
    """An error in one line with its type, a remote one without the remote traceback."""
    if isinstance(error, RolloutsFailed):
        return str(error)
    cause = error.cause if isinstance(error, RayTaskError) else error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"


class RolloutWait:
    """Looks at every poll of a replay buffer whether the wait is still of use.

    Args:
        replay_buffer: upstream's, or a custom sampler that keeps upstream's polling.
        timeout: seconds without a rollout or a prompt done, after which the wait ends; None waits for ever.
        failure: what befell those who make the rollouts, if anything did.
        clock: seconds.
    """

    def __init__(
        self,
        replay_buffer: ReplayBuffer,
        timeout: float | None,
        failure: Callable[[], BaseException | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.replay_buffer, self.timeout, self.failure, self.clock = replay_buffer, timeout, failure, clock
        self.poll = replay_buffer._wait_for_next_poll
        self.progress: tuple[object, ...] = ()
        self.since = clock()
        replay_buffer._wait_for_next_poll = self.wait_for_next_poll

    def wait_for_next_poll(self, partition_id: str, last_debug_time: float) -> float:
        """Upstream's, which every wait of the replay buffer calls between two looks at the TransferQueue.

        Raises:
            RolloutsFailed: if rollouts failed, or none was done for too long; it names what was waited for.
        """
        failure = self.failure()
        if failure is not None:
            raise RolloutsFailed(f"waiting for {self._awaited(partition_id)}: {told(failure)}") from failure
        steps, stored = self._steps(partition_id), len(self.replay_buffer.partitions[partition_id])
        progress = (partition_id, steps, stored, len(self._done(partition_id)))
        if progress != self.progress:
            self.progress, self.since = progress, self.clock()
        elif self.timeout is not None and self.clock() - self.since > self.timeout:
            raise RolloutsFailed(
                f"trainer.rollout_timeout={self.timeout:g}: waiting for {self._awaited(partition_id)}: no rollout was "
                f"done for {self.timeout:g} s; expected a longer time if responses take that long"
            )
        return self.poll(partition_id, last_debug_time)

    def _awaited(self, partition_id: str) -> str:
        prompts = len(self.replay_buffer.prompt_global_steps[partition_id])
        return (
            f"the rollouts of step {self._steps(partition_id)}, partition {partition_id}: "
            f"{len(self._done(partition_id))} of {prompts} prompts done"
        )

    def _done(self, partition_id: str) -> set[str]:
        return self.replay_buffer.finished_keys[partition_id] | self.replay_buffer.failure_keys[partition_id]

    def _steps(self, partition_id: str) -> str:
        return ", ".join(map(str, sorted(set(self.replay_buffer.prompt_global_steps[partition_id].values()))))
