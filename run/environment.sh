# Sourced by launchers that know `root`: exports DATA_DIR, OUTPUT_DIR, PYTHON and OMP_WAIT_POLICY, and ends a launcher
# whose interpreter lacks this package or whose output folder cannot be written.
export DATA_DIR=${DATA_DIR:-$root/data} OUTPUT_DIR=${OUTPUT_DIR:-$root/outputs}
if [ -z "${PYTHON:-}" ]; then
  PYTHON=${STEER_VENV:-$root/.venv}/bin/python
  [ -x "$PYTHON" ] || PYTHON=python3
fi
export PYTHON
# Threads that wait by spinning would take the cores from other processes.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
launcher=$(basename "${BASH_SOURCE[1]}")
mkdir -p "$OUTPUT_DIR" 2>/dev/null && [ -w "$OUTPUT_DIR" ] ||
  { echo "$launcher: OUTPUT_DIR=$OUTPUT_DIR: expected a folder to write to" >&2; exit 1; }
# Not the module, which is also found where this runs in the repository's root.
"$PYTHON" -c 'import sys; from importlib.metadata import entry_points as found
sys.exit(not any(one.name == "steer" for one in found(group="verl.plugins")))' 2>/dev/null ||
  { echo "$launcher: $PYTHON has no verl_steer: run \`bash run/setup.sh\` or set PYTHON" >&2; exit 1; }
