#!/usr/bin/env bash
# Writes run/constraints.txt: the versions of all packages of the CPU environment, for each Python that it supports.
#   bash run/lock.sh      # needs run/setup.sh first, and the package index
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/run/help.sh"
cd "$root"
uv=${STEER_VENV:-$PWD/.venv}/bin/uv

# setup.sh installs torch by itself, and leaves its companions out.
excluded=$(printf '%s; sys_platform == "never"\n' torch torchvision torchaudio torchcodec)
for python in 3.10 3.11 3.12; do
  "$uv" pip compile --quiet --python-version "$python" --python-platform x86_64-manylinux_2_28 --extra cpu --extra dev \
    --override <(echo "$excluded") --no-annotate --no-header --no-emit-index-url pyproject.toml |
    sed "s/\$/ $python/"
done |
  # A version that all three share needs no marker.
  awk '{ count[$1]++; marker[$1] = marker[$1] (marker[$1] ? " or " : "") "python_version == \"" $2 "\"" }
    END { for (pin in count) print pin (count[pin] == 3 ? "" : " ; " marker[pin]) }' |
  sort >run/.constraints.txt
mv run/.constraints.txt run/constraints.txt # the old one stays where a version cannot be found
wc -l run/constraints.txt
