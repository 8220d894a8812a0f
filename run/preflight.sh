#!/usr/bin/env bash
# Checks this machine for a run, within five minutes and before any training: driver, GPUs, attention, collectives,
# vLLM, kernels, log-probs, a checkpoint, data, disk and memory. Ends with a table and one line, and exits with 1 unless
# the line says ready.
#   bash run/preflight.sh [--cpu] [Hydra overrides, those of the run]
#   MODEL_PATH=models/Qwen2.5-Math-7B bash run/preflight.sh method=steer_exp hardware=gpu8
#   --cpu       the laptop task with hardware=cpu; the task is made where TASK_DIR is not set
#   OUTPUT_DIR  logs go to preflight/ below it (outputs in the repository)
#   PREFLIGHT_SECONDS  time for all checks (290)
# MODEL_PATH, DATA_DIR and PYTHON as in launch.sh.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/run/help.sh"
source "$root/run/quoted.sh"
source "$root/run/environment.sh"
"$PYTHON" -m verl_steer --check

overrides=()
if [ "${1:-}" = --cpu ]; then
  shift
  overrides=(task=arithmetic hardware=cpu)
  source "$root/run/laptop_task.sh"
fi
exec "$PYTHON" -m verl.steer.preflight.main hydra.run.dir="$(quoted "$OUTPUT_DIR/preflight")" ${overrides[@]+"${overrides[@]}"} "$@"
