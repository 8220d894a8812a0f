#!/usr/bin/env bash
# Step times of this fork and of TRL's GRPOTrainer on the same work, one after the other on this machine's CPU. Makes
# what is missing: this repository's environment, one of its own for TRL, and the models. Arguments are peer_trl.py's:
#   bash benchmarks/peer_trl.sh
#   bash benchmarks/peer_trl.sh --side trl --workloads laptop-128 --steps 6
#   PEER_DIR  folder of TRL's environment, models, logs and results (outputs/peer_trl in the repository)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${PEER_DIR:-$root/outputs/peer_trl}

bash "$root/run/setup.sh"
python=${STEER_VENV:-$root/.venv}/bin/python
uv=$(dirname "$python")/uv

# The same torch and transformers on both sides; datasets and accelerate as TRL asks for.
version() { "$python" -c 'import sys; from importlib.metadata import version; print(version(sys.argv[1]))' "$1"; }
torch=$(version torch)
packages=(trl==1.16.0 "transformers==$(version transformers)" pandas pyarrow)
venv=$folder/venv
if [ "$(cat "$venv/stamp" 2>/dev/null)" != "$torch ${packages[*]}" ]; then
  echo "peer_trl.sh: making $venv: torch $torch, ${packages[*]}" >&2
  mkdir -p "$folder"
  "$python" -m venv --clear "$venv"
  # As in run/setup.sh: a CPU build of torch from where pip or uv knows of one.
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==${torch%+cpu}+cpu" 2>/dev/null ||
    "$uv" pip install --quiet --python "$venv/bin/python" --torch-backend cpu "torch==${torch%+cpu}"
  "$uv" pip install --quiet --python "$venv/bin/python" "${packages[@]}"
  echo "$torch ${packages[*]}" >"$venv/stamp"
fi

exec "$python" "$root/benchmarks/peer_trl.py" --out "$folder" --trl-python "$venv/bin/python" "$@"
