# SPDX-License-Identifier: Apache-2.0
"""The structure of the fork: imports without circles, and no replacement of verl's attributes by an import."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import verl_steer

# vLLM's own processes import the first, a subprocess without verl runs the second as a program.
NOT_IMPORTED = ("verl.steer.cpu.vllm_worker_extension", "verl.steer.grading.symbolic_server")


def source_of(module: str) -> Path:
    path = verl_steer.OVERLAY.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports_of(module: str, modules: set[str]) -> set[str]:
    """The fork's modules that one imports anywhere but for type checking."""
    tree = ast.parse(source_of(module).read_text())
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            # import_module("verl.steer.x")
            names |= {str(node.args[0].value)}
    return (names & modules) - {module}


def test_imports_form_no_circle():
    modules = set(verl_steer.overlay_modules())
    graph = {module: imports_of(module, modules) for module in modules}
    # A package's __init__ may import its own modules.
    packages = {module for module in modules if source_of(module).name == "__init__.py"}
    graph = {
        module: {name for name in imported if not (name in packages and module.startswith(f"{name}."))}
        for module, imported in graph.items()
    }
    assert "verl.trainer.ppo.core_algos" in graph["verl.steer.loss"]
    list(TopologicalSorter(graph).static_order())


def test_steer_needs_no_other_module_of_the_fork():
    assert imports_of("verl.trainer.ppo.core_algos", set(verl_steer.overlay_modules())) == set()


def test_importing_the_fork_replaces_nothing(command):
    """Each replaced attribute of verl is verl's own after all of the fork's modules have been imported."""
    script = (
        "import importlib, sys, verl, verl_steer\n"
        "names = [name for name in verl_steer.REPLACED if name.startswith('verl.') and 'REGISTRY' not in name]\n"
        "def found():\n"
        "    parts = [name.rpartition('.') for name in names]\n"
        "    return [getattr(importlib.import_module(module), name) for module, _, name in parts]\n"
        "before = found()\n"
        "for module in verl_steer.overlay_modules():\n"
        f"    if module not in {NOT_IMPORTED!r}:\n"
        "        importlib.import_module(module)\n"
        "assert len(names) >= 5 and all(a is b for a, b in zip(before, found()))\n"
        "print('unchanged')\n"
    )
    result = command(sys.executable, "-c", script, cwd="/")
    assert result.stdout.strip().endswith("unchanged"), result.stderr
