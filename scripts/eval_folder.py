# SPDX-License-Identifier: Apache-2.0
"""Makes the folder of an evaluation's results, one for each model and set of options, with `settings.json`.

    MODEL_PATH=Qwen/Qwen2.5-Math-7B python scripts/eval_folder.py outputs/eval data/aime24.parquet -- [overrides]

The folder's name is the model's and a digest of `settings.json`, which holds everything that determines responses and
grades: the resolved configuration `eval`, in which each local file or folder, such as the model, has its real path and
each file's size and modification time; a digest of the grading code; and the versions of some packages. Only equal
settings share responses. A hub id stands for whatever the hub has under it.

Prints the folder and, for each benchmark, a link in it to the benchmark's file. The link's name ends in a digest of the
file's content. verl names the responses after the link, so a changed benchmark gets new responses.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from importlib.metadata import distribution, packages_distributions, version
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

OVERLAY = Path(__file__).resolve().parents[1] / "verl"
#: Packages whose version decides responses and grades; vLLM's CPU build is a distribution of another name.
PACKAGES = ("math_verify", "sympy", "transformers", "vllm")
#: Keys that run/eval.sh sets, and verl's training data, which an evaluation doesn't read.
RESERVED = ("data.val_files", "data.train_files", "trainer.default_local_dir", "trainer.validation_data_dir")


class UpstreamConfigs(SearchPathPlugin):
    """verl's own configurations, without an import of verl, which takes seconds."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("verl", f"file://{distribution('verl').locate_file('verl/trainer/config')}")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:10]


def files_of(path: Path) -> dict[str, list[int]]:
    """Name -> size in bytes and modification time in ns, of a file or of the files in a folder.

    A digest of a model's weights would take too long for every call.
    """
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.name[0] != "."}


def with_files(value: Any, key: str = "") -> Any:
    """The configuration with real path and files in place of each path of an existing file or folder to read."""
    if isinstance(value, dict):
        return {name: with_files(one, name) for name, one in value.items()}
    if isinstance(value, str) and value and key.endswith("path") and key != "save_path":
        path = Path(value).expanduser().resolve()
        if path.exists():
            return {"path": str(path), "files": files_of(path)}
    return value


def settings_of(overrides: list[str]) -> dict[str, Any]:
    """The settings that determine an evaluation's responses and grades, with these Hydra overrides."""
    with initialize_config_dir(str(OVERLAY / "trainer/config"), version_base=None):
        config = compose("eval", overrides)
    for key in RESERVED:
        OmegaConf.update(config, key, None)
    names = packages_distributions()
    graders = sorted(file for part in ("grading", "tasks") for file in (OVERLAY / "steer" / part).glob("*.py"))
    return {
        "config": with_files(OmegaConf.to_container(config, resolve=True)),
        "grading": digest(b"".join(file.read_bytes() for file in graders)),
        "versions": {package: version(names[package][0]) for package in PACKAGES},
    }


def name_of(model: str) -> str:
    """`steer_exp-global_step_9` for a checkpoint and the folders in it, else the last part of the path or hub id.

    With a dash for characters that have a meaning in Hydra's overrides, such as "=".
    """
    checkpoint = re.search(r"([^/]+)/(global_step_\d+)(/|$)", model)
    name = f"{checkpoint[1]}-{checkpoint[2]}" if checkpoint else Path(model).name
    return re.sub(r"[^\w.-]", "-", name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of all evaluations")
    parser.add_argument(
        "benchmarks",
        type=Path,
        nargs="+",
        help="parquet files, then -- and the overrides of the evaluation, if there are any",
    )
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, overrides = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    for override in overrides:
        if (key := override.lstrip("+~").partition("=")[0]) in RESERVED:
            sys.exit(f"eval.sh: {override}: {key} can't be set here; expected --only, DATA_DIR or OUTPUT_DIR instead")
    for file in args.benchmarks:
        if not file.is_file():
            sys.exit(f"eval.sh: {file}: no such file; expected a benchmark's parquet file")
    Plugins.instance().register(UpstreamConfigs)
    try:
        settings = settings_of(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"eval.sh: {error}")
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    model = settings["config"]["actor_rollout_ref"]["model"]["path"]
    name = name_of(model["path"] if isinstance(model, dict) else model)
    folder = args.out.resolve() / f"{name}-{digest(text.encode())}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(text)
    print(folder)
    for file in args.benchmarks:
        link = folder / f"{file.stem}-{digest(file.read_bytes())}.parquet"
        link.unlink(missing_ok=True)
        link.symlink_to(file.resolve())
        print(link)


if __name__ == "__main__":
    main()
