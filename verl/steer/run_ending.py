# SPDX-License-Identifier: Apache-2.0
"""How a run ends when one of its processes dies or a disk is full: soon, and with one line that says which.

A trainer learns of a dead process only where it waits for a result of that process. Of others, such as a storage unit
of the TransferQueue, it waits for messages that never come. Ray knows which actors have died, so the process that
launched the run asks it every few seconds.
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private.state import actors

#: Seconds between two looks at the run's actors.
LOOK_EVERY = 5.0
#: Seconds that the trainer has to end by itself, and to close its loggers, once an actor has died.
GRACE = 20.0
#: Bytes that must fit on a disk that isn't full: what a failed write leaves free is less.
PROBE = 1 << 20


@dataclass(frozen=True, order=True)
class DeadActor:
    """An actor whose process ended though nobody asked it to."""

    died_at: int
    class_name: str
    name: str
    pid: int
    node: str

    def __str__(self) -> str:
        named = f" `{self.name}`" if self.name else ""
        return f"{self.class_name}{named} (pid {self.pid} on node {self.node}) died"


class ActorsDied(RuntimeError):
    """Actors of the run died, and the trainer did not end by itself."""


def dead_actors() -> list[DeadActor]:
    """This job's actors whose processes were killed or crashed, the first to die first."""
    job = ray.get_runtime_context().get_job_id()
    return sorted(
        DeadActor(
            died_at=actor["EndTime"],
            class_name=actor["ActorClassName"].rpartition(".")[2],
            name=actor["Name"],
            pid=actor["Pid"],
            node=actor["Address"]["IPAddress"],
        )
        for actor in actors(actor_state_name="DEAD").values()
        if actor["JobID"] == job and _unasked(actor["DeathCause"])
    )


def _unasked(cause: Any) -> bool:
    """Whether an actor's process was killed or crashed, rather than ended by its owner, by itself or with its owner."""
    context = cause.actor_died_error_context
    return cause.HasField("oom_context") or context.reason in (context.WORKER_DIED, context.NODE_DIED)


class WatchedRunner:
    """Stands for a task runner's actor class where upstream starts one and waits for it.

    Args:
        runner_class: the actor class, with a method `run(config)`.
    """

    def __init__(self, runner_class: Any) -> None:
        self.runner_class = runner_class

    def options(self, **options: Any) -> WatchedRunner:
        return WatchedRunner(self.runner_class.options(**options))

    def remote(self) -> WatchedRunner:
        self.runner = self.runner_class.remote()
        return self

    @property
    def run(self) -> _WatchedCall:
        return _WatchedCall(self.runner)


@dataclass
class _WatchedCall:
    """`runner.run` with a `remote` that returns once the run has ended."""

    runner: Any

    def remote(self, config: Any) -> ray.ObjectRef:
        """Run to the end.

        Raises:
            ActorsDied: if an actor has died and the runner goes on regardless.
        """
        result = self.runner.run.remote(config)
        while not _ended(result, LOOK_EVERY):
            if dead_actors() and not _ended(result, GRACE):
                raise ActorsDied
        return result


def _ended(result: ray.ObjectRef, seconds: float) -> bool:
    return bool(ray.wait([result], timeout=seconds)[0])


def reason_of(error: Exception, told_by: tuple[type[Exception], ...]) -> str | None:
    """One line that says why a run ended with this error, or None where a traceback says it better.

    Args:
        error: what waiting for the task runner raised.
        told_by: errors whose message says all.
    """
    # What died comes first, since it is mostly why something else failed. The error may be there a moment before Ray's
    # table of actors has the death.
    for _ in range(10 if isinstance(error, ActorsDied | ray.exceptions.RayActorError) else 1):
        if died := dead_actors():
            return "; ".join(map(str, died))
        time.sleep(0.5)
    cause = getattr(error, "cause", None)
    if isinstance(cause, told_by):
        return str(cause)
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{cause}: make room and call the same command again, which goes on from the last whole checkpoint"
    return None


@contextmanager
def naming_a_full_disk(folder: Path) -> Iterator[None]:
    """Turn whatever a full disk has made fail into an OSError that names the folder.

    PyTorch's writer, among others, says that a write failed and not why.

    Args:
        folder: where the failing code writes.

    Raises:
        OSError: in place of the error at hand, if the folder's disk or quota is full.
    """
    try:
        yield
    except Exception as error:
        try:
            with tempfile.NamedTemporaryFile(dir=folder) as probe:
                probe.write(bytes(PROBE))
                probe.flush()
                os.fsync(probe.fileno())
        except OSError as full:
            raise OSError(full.errno, os.strerror(full.errno or 0), str(folder)) from error
        raise
