# SPDX-License-Identifier: Apache-2.0
"""One training at a time in a folder."""

import errno
import fcntl
import subprocess
import sys
from types import SimpleNamespace

import pytest
from verl.steer import run_lock
from verl.steer.run_lock import LOCK, lock_folder

#: A program that locks its argument's folder, says so, and waits.
HOLDER = f"""
import fcntl, sys
file = open(sys.argv[1] + "/{LOCK}", "w")
fcntl.flock(file, fcntl.LOCK_EX)
print(1, flush=True)
sys.stdin.read()
"""


def test_a_second_training_in_the_folder_is_refused(tmp_path):
    folder = tmp_path / "run"
    with lock_folder(folder):
        expected = f"^trainer.default_local_dir={folder}: a training runs in it; expected another trainer.exp"
        with pytest.raises(ValueError, match=expected):
            lock_folder(folder)
        lock_folder(tmp_path / "other").close()
    lock_folder(folder).close()


def test_the_lock_ends_with_its_process_however_that_ends(tmp_path):
    holder = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"1\n"
        with pytest.raises(ValueError, match="a training runs in it"):
            lock_folder(tmp_path)
        process.kill()
        process.wait()
    lock_folder(tmp_path).close()


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch):
    """verl may keep its loggers' records from pytest."""
    lines = []
    logger = SimpleNamespace(warning=lambda text, *values: lines.append(text % values))
    monkeypatch.setattr(run_lock, "logger", logger)

    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock_folder(tmp_path).close()
    assert lines == [f"{tmp_path} cannot be locked (No locks available): start no other training in this folder"]
