# SPDX-License-Identifier: Apache-2.0
"""What the tests share: the repository's root and commands that run in it."""

import atexit
import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import settings

#: Variables of a user's shell by which launchers and programs would do something else than the tests expect.
VARIABLES = (
    *("DATA_DIR", "HARDWARE", "METHOD", "METHODS", "MODEL_PATH", "OUTPUT_DIR", "PARTS", "SEED", "SEEDS", "TASK"),
    *("TASK_DIR", "ROLLOUT_OMP_NUM_THREADS", "STEER_VENV", "FORCE_COLOR"),
)
for name in VARIABLES:
    os.environ.pop(name, None)

# The tests' models are so small that a second thread would only wait, and two processes share the cores.
torch.set_num_threads(1)

# The same cases in every run, and no deadline: whether a test passes must not depend on how busy the machine is.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parents[1]

#: Set at the end of a session; a wrong argument ends pytest before there is one.
exit_status: int | None = None


@atexit.register
def leave() -> None:
    """Ends the process after all else that is registered, before Triton's module lists what it believes leaked.

    Its hundreds of lines would follow pytest's last one, and it has no switch for them.
    """
    if exit_status is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_status)


def pytest_sessionfinish(exitstatus: int) -> None:
    """What `leave` ends with."""
    global exit_status
    exit_status = exitstatus


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of several processes one begins with the real runs, which take the longest."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("e2e") is None)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every run, of tests that draw some without a generator."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def command():
    """Runs a command to its end and returns it with its output as text; the tests' interpreter is `PYTHON`."""

    def run(*words: object, cwd: object = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(word) for word in words],
            cwd=str(cwd),
            env={**os.environ, "PYTHON": sys.executable, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=1200,
        )

    return run


@pytest.fixture(scope="session")
def program():
    """Runs a program of `scripts/` as `command` does, but in this process, which has imported verl already."""

    def run(name: str, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        argv = [name, *map(str, words)]
        out, err, code = io.StringIO(), io.StringIO(), 0
        with (
            mock.patch.object(sys, "argv", argv),
            mock.patch.dict(os.environ, environment),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
        return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of so many bytes, and changes its size when called again."""
    folder = tmp_path / "small_disk"
    folder.mkdir()

    def mount(size: int) -> Path:
        how = f"{'remount,' if folder.is_mount() else ''}size={size}"
        result = subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", folder], capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"this machine mounts no file system: {result.stderr.strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="session")
def program_of_the_task():
    """The names of `scripts/make_laptop_task.py`."""
    return runpy.run_path(str(ROOT / "scripts/make_laptop_task.py"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, program_of_the_task):
    """A tiny Qwen2 model with random weights, and its tokenizer."""
    import torch

    task = program_of_the_task
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = task["make_tokenizer"]()
    model = task["make_model"](tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """A process group of this process alone."""
    import torch.distributed

    store = tmp_path_factory.mktemp("store") / "store"
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def laptop_files(tmp_path, monkeypatch):
    """A task's folder with 40 rows for training and a model's configuration."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from configurations import ROW

    for name, rows in (("train", 40), ("test", 8)):
        pq.write_table(
            pa.table({column: [value] * rows for column, value in ROW.items()}), tmp_path / f"{name}.parquet"
        )
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"max_position_embeddings": 96}')
    monkeypatch.setenv("TASK_DIR", str(tmp_path))
    return tmp_path
