# SPDX-License-Identifier: Apache-2.0
"""Downloads a model from the Hugging Face hub into a folder; called again, it goes on where it was interrupted.

python scripts/download_model.py Qwen/Qwen2.5-Math-7B --out models/Qwen2.5-Math-7B
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

#: What vLLM and FSDP read: weights in other formats double the download.
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, such as Qwen/Qwen2.5-Math-7B")
    parser.add_argument("--out", type=Path, help="folder (models/NAME in the working directory)")
    parser.add_argument("--revision", help="branch, tag or commit (main)")
    args = parser.parse_args()
    out = args.out or Path("models") / args.model.rpartition("/")[2]
    try:
        snapshot_download(args.model, revision=args.revision, local_dir=out, allow_patterns=PATTERNS)
    except GatedRepoError:
        sys.exit(f"download_model: {args.model}: access must be granted on its page; then `hf auth login`")
    except HFValidationError:
        sys.exit(f"download_model: {args.model}: no hub id; expected OWNER/NAME")
    except RevisionNotFoundError:
        sys.exit(f"download_model: --revision {args.revision}: expected a branch, tag or commit of {args.model}")
    except RepositoryNotFoundError:
        sys.exit(f"download_model: {args.model}: no such model on the hub, or private; expected OWNER/NAME")
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        sys.exit(f"download_model: {args.model}: the hub did not answer ({reason}); call again to go on")
    if not any(out.glob("*.safetensors")):
        sys.exit(f"download_model: {args.model}: no *.safetensors on the hub; expected weights in that format")
    index = out / "model.safetensors.index.json"
    weights = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    # Where the hub does not answer, what is there already counts as the download.
    if missing := [name for name in sorted(weights) if not (out / name).is_file()]:
        sys.exit(f"download_model: {args.model}: {', '.join(missing)} missing in {out}; call again to go on")
    print(f"{args.model} is in {out}: MODEL_PATH={out}")


if __name__ == "__main__":
    main()
