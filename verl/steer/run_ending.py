# SPDX-License-Identifier: Apache-2.0
"""End a run soon after one of its processes dies or a disk is full, with one line that names the process or folder.

A trainer notices a dead process only while it waits for a result of that process. It doesn't notice the death of a
storage unit of the TransferQueue, for example, and keeps waiting for the unit's message. Ray knows which actors have
died, so the process that launched the run asks Ray every few seconds.
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from ray._private.state import actors

#: Seconds between two checks for dead actors.
LOOK_EVERY = 5.0
#: Seconds after an actor's death for the trainer to end by itself, with its loggers closed.
GRACE = 20.0
#: Bytes of a test file. A full disk has less room than this; a failed write may leave a little.
PROBE = 1 << 20


class ActorsDied(RuntimeError):
    """Actors of the run died, and the trainer did not end by itself."""


def dead_actors() -> list[str]:
    """Descriptions of this job's actors whose processes were killed or crashed, in the order of their deaths."""
    job, dead = ray.get_runtime_context().get_job_id(), []
    for actor in sorted(actors(actor_state_name="DEAD").values(), key=lambda actor: actor["EndTime"]):
        if actor["JobID"] == job and _crashed(actor["DeathCause"]):
            class_name = actor["ActorClassName"].rpartition(".")[2]
            name = f" `{actor['Name']}`" if actor["Name"] else ""
            context = actor["DeathCause"].actor_died_error_context
            how = "died with its node" if context.reason == context.NODE_DIED else "died"
            dead.append(f"{class_name}{name} (pid {actor['Pid']} on node {actor['Address']['IPAddress']}) {how}")
    return dead


def _crashed(cause: Any) -> bool:
    """Whether an actor's process was killed or crashed, rather than ended by itself, by its owner or with its owner."""
    context = cause.actor_died_error_context
    return cause.HasField("oom_context") or context.reason in (context.WORKER_DIED, context.NODE_DIED)


@dataclass
class WatchedRunner:
    """Replaces a task runner's actor class in upstream's `run_ppo`: a dead actor ends the wait for `run(config)`."""

    runner_class: Any

    def options(self, **options: Any) -> WatchedRunner:
        return WatchedRunner(self.runner_class.options(**options))

    def remote(self) -> SimpleNamespace:
        """Start the actor; `run.remote(config)` of the returned object waits for the end of the run."""
        return SimpleNamespace(run=SimpleNamespace(remote=partial(_run, self.runner_class.remote())))


def _run(runner: Any, config: Any) -> ray.ObjectRef:
    """Call `runner.run(config)` and return the reference to its result once the call has ended.

    Raises:
        ActorsDied: if an actor has died and the run does not end within `GRACE` seconds.
    """
    result = runner.run.remote(config)
    while not ray.wait([result], timeout=LOOK_EVERY)[0]:
        if (dead := dead_actors()) and not ray.wait([result], timeout=GRACE)[0]:
            raise ActorsDied("; ".join(dead))
    return result


def reason_of(error: Exception, explained_by: tuple[type[Exception], ...]) -> str | None:
    """One line with the reason why a run ended, or None if the traceback is more useful.

    Args:
        error: raised while waiting for the task runner.
        explained_by: classes of errors whose message is the reason.
    """
    if isinstance(error, ActorsDied):
        return str(error)
    # A death comes first because most other errors follow from it. Ray may list it a moment after raising the error.
    looks = 10 if isinstance(error, ray.exceptions.RayActorError) else 1
    for look in range(looks):
        if dead := dead_actors():
            return "; ".join(dead)
        if look + 1 < looks:
            time.sleep(0.5)
    cause = getattr(error, "cause", None)
    if isinstance(cause, explained_by):
        return str(cause)
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{cause}: make room and call the same command again, which goes on from the last whole checkpoint"
    return None


@contextmanager
def naming_a_full_disk(folder: Path) -> Iterator[None]:
    """Replace an error by one that names the folder, if the folder's disk or quota is full.

    PyTorch's writer, for example, reports that a write failed but not why.

    Raises:
        OSError: in place of the original error; its file name is the folder.
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
