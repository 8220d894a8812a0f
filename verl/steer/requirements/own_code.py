# SPDX-License-Identifier: Apache-2.0
"""The checks of a user's own classes and functions, which verl looks up after Ray's start.

Their modules are read, not run; the packages that hold them are imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf
from verl.utils.import_utils import resolve_config_path

#: Keys with the full name of a class.
CLASSES = ("actor_rollout_ref.rollout.agent.agent_loop_manager_class", "trainer.checkpoint_callback_class")

#: Sections with the path of a module and the name of a class in it.
SECTIONS = ("data.custom_cls", "trainer.v1.sampler.custom_sampler")

#: Keys with the name of a module, or a list of them, that a worker imports.
MODULES = ("actor_rollout_ref.model.external_lib",)

#: Keys with the path of a file.
FILES = ("actor_rollout_ref.rollout.agent.agent_loop_config_path", "actor_rollout_ref.rollout.router_config_path")


def check_own_code(config: DictConfig) -> None:
    """Check that the modules, classes and files that a configuration names are there.

    Raises:
        ValueError: if not, or the package of a module, which is imported, fails.
    """
    for key in CLASSES:
        if name := OmegaConf.select(config, key):
            _check_class(key, str(name))
    for section in SECTIONS:
        module_with(config, f"{section}.path", f"{section}.name", "a class")
    for key in MODULES:
        names = OmegaConf.select(config, key) or []
        for name in map(str, names if isinstance(names, ListConfig) else [names] if names else []):
            if _module_file(f"{key}={name}", name) is None:
                raise ValueError(f"{key}={name}: expected the name of a module that is installed")
    for key in FILES:
        if path := OmegaConf.select(config, key):
            _check_file(key, str(path))


def module_with(config: DictConfig, path_key: str, name_key: str, kind: str) -> ast.Module | None:
    """Check that a module defines a name, and read the module.

    Args:
        config: the resolved configuration.
        path_key: the key of the module's path, that of a file or, after pkg://, of a module that is installed.
        name_key: the key of the name.
        kind: what the name stands for, such as "a class", for the message.

    Returns:
        The module's syntax tree; None where no path is set, and for a compiled module, whose names are not known.

    Raises:
        ValueError: if the module is not there or does not define the name.
    """
    path, name = OmegaConf.select(config, path_key), OmegaConf.select(config, name_key)
    if not path:
        return None
    named, module = f"{path_key}={path}", str(path).removeprefix("pkg://")
    if module == path:
        file: Path | None = Path(module.removeprefix("file://"))
    else:
        file = _module_file(named, module.replace("/", "."))
    if file is None or not file.is_file():
        raise ValueError(f"{named}: expected a file, or pkg:// and a module")
    return _parse(file, named, f"{name_key}={name}", name, kind)


def _check_class(key: str, full_name: str) -> None:
    module, _, name = full_name.rpartition(".")
    named = f"{key}={full_name}"
    file = _module_file(named, module) if module else None
    if file is None:
        raise ValueError(f"{named}: expected the full name of a class, such as package.module.Class")
    _parse(file, named, named, name, "a class")


def _parse(file: Path, named: str, with_name: str, name: str | None, kind: str) -> ast.Module | None:
    if file.suffix != ".py":  # compiled
        return None
    try:
        module = ast.parse(file.read_bytes(), str(file))
    except SyntaxError as error:
        raise ValueError(f"{named}: expected Python: {error}") from error
    if not set(_names(module)) & {name, "*", "__getattr__"}:
        raise ValueError(f"{with_name}: expected {kind} of {file}")
    return module


def _module_file(named: str, module: str) -> Path | None:
    """The file of a module; None for a module that is not installed.

    Raises:
        ValueError: if the module's package, which is imported, fails.
    """
    try:
        found = find_spec(module)
    except ModuleNotFoundError:  # of the package in which the module would be
        return None
    except Exception as error:  # the package's own
        raise ValueError(f"{named}: {type(error).__name__}: {error}") from error
    return Path(found.origin) if found and found.origin else None


def _names(module: ast.Module) -> Iterator[str]:
    """All names that a module or a part of it may define."""
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.alias):
            yield node.asname or node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _check_file(key: str, path: str) -> None:
    try:
        found = resolve_config_path(path)  # verl's: relative to the working folder or to verl
    except FileNotFoundError:
        found = path
    if not Path(found).is_file():
        raise ValueError(f"{key}={path}: expected a file")
