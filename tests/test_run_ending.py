# SPDX-License-Identifier: Apache-2.0
"""What a run says at its end: of a process that was killed, and of a full disk."""

import errno
import os
import subprocess
import sys

import pytest
import torch
from verl.steer.run_ending import PROBE, naming_a_full_disk


def write(file, size):
    with open(file, "wb") as stream:
        stream.write(bytes(size))


def test_full_disk_is_named(small_disk):
    """PyTorch's writer doesn't say why a write failed."""
    folder = small_disk(2 * PROBE)
    with pytest.raises(OSError) as caught, naming_a_full_disk(folder):
        torch.save(torch.zeros(PROBE), folder / "model.pt")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(folder)
    assert not isinstance(caught.value.__cause__, OSError) and "No space left" in str(caught.value)
    assert os.listdir(folder) == ["model.pt"]


def test_other_errors_pass(small_disk):
    folder = small_disk(4 * PROBE)
    with pytest.raises(ZeroDivisionError), naming_a_full_disk(folder):
        write(folder / "model.pt", 2 * PROBE)
        raise ZeroDivisionError
    with naming_a_full_disk(folder):
        write(folder / "model.pt", 2 * PROBE)


# A runner that waits for ever, and an actor beside it of which it waits for nothing.
PROGRAM = """
import os, signal, sys, time
import ray
from verl.steer.run_ending import ActorsDied, WatchedRunner, dead_actors, reason_of

@ray.remote
class Storage:
    def pid(self):
        return os.getpid()

@ray.remote
class Runner:
    def run(self, how):
        self.storage = Storage.options(name="storage_0").remote()
        pid = ray.get(self.storage.pid.remote())
        asked = Storage.remote()
        ray.get(asked.pid.remote())
        ray.kill(asked)
        if how == "killed":
            os.kill(pid, signal.SIGKILL)
            time.sleep(1000)
        elif how == "noticed":
            os.kill(pid, signal.SIGKILL)
            ray.get(self.storage.pid.remote())
        elif how == "trainer":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "full":
            raise OSError(28, "No space left on device", "/checkpoints")
        elif how == "told":
            raise KeyError("best_metric_key")
        elif how == "bug":
            raise ZeroDivisionError
        print("storage", pid)

if __name__ == "__main__":
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _system_config={"worker_niceness": 0})
    import verl.steer.run_ending as run_ending
    run_ending.LOOK_EVERY = run_ending.GRACE = 1.0
    for how in sys.argv[1:]:
        seen = len(dead_actors())
        runner = WatchedRunner(Runner).options(name=how).remote()
        try:
            ray.get(runner.run.remote(how))
            print(how, "ended", len(dead_actors()) - seen)
        except (ray.exceptions.RayError, ActorsDied) as error:
            print(how, type(error).__name__, reason_of(error, explained_by=(KeyError,)))
"""


@pytest.mark.e2e
def test_last_line(tmp_path):
    """Ray's own actors; those that were asked to end don't count."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def said(*ways):
        result = subprocess.run(
            [sys.executable, program, *ways], capture_output=True, text=True, timeout=1200, stdin=subprocess.DEVNULL
        )
        assert result.returncode == 0, result.stderr
        return dict(line.split(" ", 1) for line in result.stdout.splitlines() if line.split()[0] in ways)

    lines = said("well", "bug", "full", "told", "killed")
    assert lines["well"] == "ended 0"
    assert lines["bug"] == "RayTaskError(ZeroDivisionError) None"
    assert "[Errno 28] No space left on device: '/checkpoints': make room" in lines["full"]
    assert lines["told"].endswith(" 'best_metric_key'")
    assert lines["killed"].startswith("ActorsDied Storage `storage_0` (pid ") and lines["killed"].endswith(" died")
    assert "Storage `storage_0` (pid " in said("noticed")["noticed"]
    assert said("trainer")["trainer"].startswith("ActorDiedError Runner `trainer` (pid ")
