# Sourced by launchers that know `root`: exports DATA_DIR, OUTPUT_DIR and PYTHON, and ends a launcher whose interpreter
# lacks this package or whose output folder cannot be written.
export DATA_DIR=${DATA_DIR:-$root/data} OUTPUT_DIR=${OUTPUT_DIR:-$root/outputs}
if [ -z "${PYTHON:-}" ]; then
  PYTHON=${STEER_VENV:-$root/.venv}/bin/python
  [ -x "$PYTHON" ] || PYTHON=python3
fi
export PYTHON
launcher=$(basename "${BASH_SOURCE[1]}")
mkdir -p "$OUTPUT_DIR" 2>/dev/null && [ -w "$OUTPUT_DIR" ] ||
  { echo "$launcher: OUTPUT_DIR=$OUTPUT_DIR: expected a folder to write to" >&2; exit 1; }
"$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("verl_steer") is None)' ||
  { echo "$launcher: $PYTHON has no verl_steer: run \`bash run/setup.sh\` or set PYTHON" >&2; exit 1; }
