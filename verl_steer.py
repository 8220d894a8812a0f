# SPDX-License-Identifier: Apache-2.0
"""Grafts this fork's `verl/` onto the installed verl.

verl loads every entry point of the group `verl.plugins` when it is imported; this module is one. From then on
`verl.x.y` comes from `verl/x/y.py` of this fork where that file exists and from the installed verl elsewhere, in
the driver, in every Ray worker and in every vLLM subprocess alike.

An overlay file that changes an upstream module begins with `_upstream = verl_steer.upstream(globals())` and then
adds or replaces names. A file with no counterpart upstream is an ordinary module.

`python -m verl_steer` tells what is grafted; `python -m verl_steer --check` only whether it can be.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator, MutableMapping
from importlib.metadata import entry_points, version
from pathlib import Path
from types import ModuleType

VERL_VERSION = "0.9.1"

#: This plugin's name in the group `verl.plugins`.
PLUGIN = "steer"

#: Upstream modules that an overlay file stands in for, and why no registry of verl's could serve.
SHADOWED = {
    "verl.third_party.vllm": "every FSDP worker imports it, and with verl's all of vLLM for a class that nobody uses",
    "verl.trainer.main_ppo": "the entry: this fork's configurations on Hydra's search path, checks before Ray starts",
    "verl.trainer.ppo.core_algos": "STEER at the place where a reader looks for policy losses",
    "verl.trainer.ppo.v1.trainer_sync": "verl imports no other place where a trainer could register itself",
    "verl.utils.distributed": "torch refuses the process group that verl asks for when the device is the CPU itself",
    "verl.workers.config.actor": "PolicyLossConfig with STEER's fields: the configurations name the class by this path",
    "verl.workers.config.engine": "FSDPEngineConfig with one_pass_reductions, for the same reason",
    "verl.workers.engine.fsdp.transformer_impl": "where FSDP engines are registered; verl has none for a CPU",
    "verl.workers.utils.losses": "ppo_loss calls the policy loss, and STEER's needs the entropies too",
}


def overlay_root() -> Path:
    """The folder of this fork's `verl/`: `verl_overlay/` beside this file in a wheel, `verl/` in a checkout."""
    here = Path(__file__).resolve()
    packed = here.with_name("verl_overlay")
    return packed if packed.is_dir() else here.with_name("verl")


OVERLAY = overlay_root()


class Graft:
    """A finder for `sys.meta_path` that serves `verl.x.y` from `OVERLAY/x/y.py` where that file exists."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        package, *parts = name.split(".")
        if package != "verl" or not parts:
            return None
        place = OVERLAY.joinpath(*parts)
        if (package_file := place / "__init__.py").is_file():
            return importlib.util.spec_from_file_location(name, package_file, submodule_search_locations=[str(place)])
        file = place.with_suffix(".py")
        return importlib.util.spec_from_file_location(name, file) if file.is_file() else None


def upstream(namespace: MutableMapping[str, object]) -> ModuleType:
    """Execute the installed verl's module of the same name and re-export its names into an overlay file.

    Args:
        namespace: `globals()` of the overlay file.

    Returns:
        The upstream module, private to the caller: `sys.modules` holds the overlay file's.
    """
    # Not `__name__`: that is `__main__` under `python -m verl.trainer.main_ppo`.
    name = namespace["__spec__"].name  # type: ignore[attr-defined]
    spec = importlib.machinery.PathFinder.find_spec(name, sys.modules[name.rpartition(".")[0]].__path__)
    if spec is None or spec.loader is None:
        raise ImportError(f"{name}: the installed verl {version('verl')} has no such module; expected {VERL_VERSION}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    namespace.update({key: value for key, value in vars(module).items() if not key.startswith("__")})
    if hasattr(module, "__all__"):
        namespace["__all__"] = list(module.__all__)
    return module


def overlay_modules() -> Iterator[str]:
    """Names of all modules that the overlay holds, such as `verl.trainer.ppo.core_algos`."""
    for file in sorted(OVERLAY.rglob("*.py")):
        module = file.parent if file.name == "__init__.py" else file.with_suffix("")
        yield ".".join(("verl", *module.relative_to(OVERLAY).parts))


def check_installed() -> None:
    """Exit with one line on standard error unless the installed verl is the right one and will load this plugin.

    This reads the installed packages' metadata and imports nothing, so that a launcher can afford it.
    """
    if version("verl") != VERL_VERSION:
        sys.exit(f"steer-verl: verl is {version('verl')}, expected {VERL_VERSION}: pip install verl=={VERL_VERSION}")
    wanted = os.getenv("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    installed = any(plugin.name == PLUGIN for plugin in entry_points(group="verl.plugins"))
    if not installed or wanted != "auto" and PLUGIN not in wanted.split(","):
        sys.exit(
            "steer-verl: the fork is not grafted onto verl: run `pip install -e .` in its folder, and let "
            f"VERL_USE_EXTERNAL_PLUGINS be unset, `auto` or hold `{PLUGIN}`"
        )


def check() -> None:
    """`check_installed`, then import verl; exit with one line on standard error if the graft failed."""
    check_installed()
    importlib.import_module("verl")
    failure = sys.modules["verl_steer"].failure
    if failure is not None:
        sys.exit(f"steer-verl: the graft failed: {type(failure).__name__}: {failure}")


def main() -> None:
    """Print what is grafted, onto which verl, and on which platform."""
    if "--check" in sys.argv[1:]:
        check_installed()
        return
    check()
    from verl.plugin.platform import get_platform

    print(f"steer-verl {version('steer-verl')} on verl {version('verl')}, platform {get_platform().device_name}")
    print(f"grafted from {OVERLAY}")
    for name in overlay_modules():
        print(f"  {name}: {SHADOWED.get(name, 'new')}")


#: What went wrong while verl loaded this plugin; verl itself only logs it at debug level, `check` makes it loud.
failure: Exception | None = None

if __name__ == "__main__":
    main()
else:
    sys.meta_path.insert(0, Graft)  # type: ignore[arg-type]
    try:
        importlib.import_module("verl.steer.cpu.platform")
    except Exception as error:
        failure = error
