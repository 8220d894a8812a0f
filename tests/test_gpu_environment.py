# SPDX-License-Identifier: Apache-2.0
"""The environment for GPUs on a machine without one: it installs, imports, resolves, and passes the unit tests.

It takes 11 GB of disk and a download of some minutes. STEER_GPU_ENV names a folder to make it in and to keep.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from configurations import METHODS

import verl_steer

pytestmark = pytest.mark.slow

VERSIONS = {"torch": "2.11", "vllm": "0.24", "transformers": "5.9", "verl": "0.9.1"}

IMPORTS = """
import importlib, verl, verl_steer
verl_steer.check()
for module in verl_steer.overlay_modules():
    importlib.import_module(module)
    print("imported", module)
"""

#: verl's platform is CUDA in this environment, whether the machine has a GPU or not.
RESOLVES = """
import sys
sys.path.insert(0, "tests")
from configurations import METHODS, resolved
from verl.steer.requirements import check_and_complete
from verl.utils.config import validate_config
for hardware in ("gpu1", "gpu8"):
    for method in METHODS:
        ray = ("ray_kwargs.ray_init.num_cpus=30", "+ray_kwargs.ray_init.num_gpus=8")
        config = resolved(method, f"hardware={hardware}", *ray)
        check_and_complete(config)
        validate_config(config, use_reference_policy=False, use_critic=False)
        print("resolved", hardware, method)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory, root):
    """The environment's interpreter. There is no limit of time: the download may take long."""
    folder = os.environ.get("STEER_GPU_ENV") or str(tmp_path_factory.mktemp("gpu") / "venv")
    environment = {**os.environ, "STEER_VENV": folder, "PYTHON": sys.executable}
    result = subprocess.run(["bash", root / "run/setup.sh", "gpu"], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return Path(folder) / "bin/python"


def test_versions_are_verls_own_pins(python, command):
    script = f"from importlib.metadata import version; print(*(version(name) for name in {tuple(VERSIONS)}))"
    found = dict(zip(VERSIONS, command(python, "-c", script).stdout.split(), strict=True))
    assert all(found[name].startswith(expected) for name, expected in VERSIONS.items()), found


def test_every_module_of_the_fork_imports(python, command):
    result = command(python, "-c", IMPORTS, cwd="/", PYTHONPATH="")
    # vLLM's messages go to the standard output, too.
    imported = re.findall("^imported (.*)$", result.stdout, re.M)
    assert imported == list(verl_steer.overlay_modules()), result.stderr


def test_every_configuration_resolves_on_the_platform_of_gpus(python, command):
    result = command(python, "-c", RESOLVES)
    assert result.returncode == 0 and result.stdout.count("resolved ") == 2 * len(METHODS), result.stderr


def test_the_unit_tests_pass(python, root):
    """Those that need no device, on the CPU platform, as `bash run/test.sh -m "not e2e and not slow"` runs them."""
    result = subprocess.run(
        [python, "-m", "pytest", "-q", "-n", "0", "-W", "ignore", "-m", "not e2e and not slow"],
        cwd=root, env={**os.environ, "VERL_PLATFORM": "cpu", "PYTHON": str(python)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-5000:]
