#!/usr/bin/env bash
# Trains a run unless it is finished. A stopped run resumes from its last checkpoint, or starts again if it has none; a
# run with other settings is refused. Further arguments are Hydra overrides.
#   bash run/train_once.sh FOLDER CONFIG [overrides]
# FOLDER gets settings (the overrides), config.yaml (the resolved configuration), train.log and metrics.jsonl. Variables
# as in launch.sh.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

run=${1:?train_once.sh: expected a folder for the run}
config=${2:?train_once.sh: expected the name of a configuration, such as steer_exp}
shift 2
overrides=("$@" trainer.experiment_name="$(basename "$run")" trainer.default_local_dir="$run" trainer.resume_mode=auto)
title=$(basename "$(dirname "$run")")/$(basename "$run")
if [ -f "$run/settings" ] && [ "$(cat "$run/settings")" != "$config ${overrides[*]}" ]; then
  echo "train_once.sh: $run was trained with other settings ($run/settings): delete it or choose another folder" >&2
  exit 1
fi
if [ -f "$run/finished" ]; then
  echo "$title: trained already; delete $run to train it again"
  exit 0
fi
mkdir -p "$run"
echo "$config ${overrides[*]}" >"$run/settings"
# A run without a checkpoint starts again, and so do its metrics.
[ -f "$run/latest_checkpointed_iteration.txt" ] || rm -rf "$run"/metrics*.jsonl "$run/audit"
bash "$root/run/launch.sh" "$config" "${overrides[@]}" --cfg job --resolve >"$run/config.yaml"
"${PYTHON:-${STEER_VENV:-$root/.venv}/bin/python}" "$root/scripts/watch.py" \
  --title "$title" --log "$run/train.log" --metrics "$run" -- bash "$root/run/launch.sh" "$config" "${overrides[@]}"
touch "$run/finished"
