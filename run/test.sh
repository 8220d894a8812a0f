#!/usr/bin/env bash
# Makes the environment and passes the tests: lint, types, unit tests and a few real runs. One process makes the real
# runs, a second passes the other tests meanwhile. Further arguments go to pytest; with `-n 0` a single process runs the
# tests, and `-s` shows their output:
#   bash run/test.sh -m "not e2e" -k weights
#   STEER_REAL_DATA  folder with the released parquet files, for the tests that measure against them
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/run/help.sh"
cd "$root"
bash run/setup.sh
bin=${STEER_VENV:-$PWD/.venv}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
exec "$bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
