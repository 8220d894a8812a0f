#!/usr/bin/env bash
# Trains a run unless it is finished. A stopped run resumes from its last checkpoint, or starts again if it has none; a
# finished or stopped run of other settings is refused. Further arguments are Hydra overrides.
#   bash run/train_once.sh FOLDER CONFIG [overrides]
# FOLDER gets settings (the configuration's name, the overrides, and the variables that name model and data),
# config.yaml (the resolved configuration), train.log and metrics.jsonl. Variables as in launch.sh.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/run/help.sh"
source "$root/run/quoted.sh"
source "$root/run/check_idle.sh"

if [ $# -lt 2 ]; then
  echo "train_once.sh: expected a folder for the run and the name of a configuration, such as steer_exp" >&2
  exit 1
fi
run=$1 config=$2
shift 2
name=$(basename "$run")
overrides=("$@" trainer.experiment_name="$(quoted "$name")" trainer.default_local_dir="$(quoted "$run")"
  trainer.resume_mode=auto)
title=$(basename "$(dirname "$run")")/$name
settings=$(printf '%s\n' "$config" "${overrides[@]}"; env | grep -E '^(MODEL_PATH|TASK_DIR|DATA_DIR)=' | sort || true)
begun=
if [ -f "$run/finished" ] || [ -f "$run/latest_checkpointed_iteration.txt" ]; then begun=yes; fi
if [ "$begun" ] && [ "$(cat "$run/settings")" != "$settings" ]; then
  echo "train_once.sh: $run was trained with other settings ($run/settings): delete it or choose another folder" >&2
  exit 1
fi
if [ -f "$run/finished" ]; then
  echo "$title: trained already; delete $run to train it again"
  exit 0
fi
source "$root/run/environment.sh"
check_idle "$run"
mkdir -p "$run"
echo "$settings" >"$run/settings"
# A run without a checkpoint starts again, and so do its metrics.
[ "$begun" ] || rm -rf "$run"/metrics*.jsonl "$run/audit"
bash "$root/run/launch.sh" "$config" "${overrides[@]}" --cfg job --resolve >"$run/config.yaml"
"$PYTHON" "$root/scripts/watch.py" \
  --title "$title" --log "$run/train.log" --metrics "$run" -- bash "$root/run/launch.sh" "$config" "${overrides[@]}"
ls "$run"/metrics*.jsonl >/dev/null 2>&1 ||
  { echo "train_once.sh: $run: no metrics*.jsonl; expected a run with \`file\` among trainer.logger" >&2; exit 1; }
touch "$run/finished"
