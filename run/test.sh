#!/usr/bin/env bash
# Makes the environment and passes the tests: lint, types, unit tests, then a few real runs. Further arguments go to
# pytest, such as `-m "not e2e"` or `-k weights`.
#   STEER_REAL_DATA  folder with the released parquet files, for the tests that measure against them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash run/setup.sh
bin=${STEER_VENV:-$PWD/.venv}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
exec "$bin/python" -m pytest "$@"
