#!/usr/bin/env bash
# Trains by a method of verl/trainer/config/method, or by a configuration of verl/trainer/config such as eval; the
# launchers beside it name one each.
#   bash run/launch.sh NAME [Hydra overrides and flags, such as hardware=cpu or --cfg job]
#   MODEL_PATH  Hugging Face folder or hub id (Qwen/Qwen2.5-Math-7B)
#   DATA_DIR    folder of the parquet files (data in the repository)
#   OUTPUT_DIR  folder of checkpoints, logs and figures (outputs in the repository)
#   TASK_DIR    folder of a laptop task (outputs/laptop_task or outputs/countdown_task, where the command is run)
#   PYTHON      interpreter (the repository's .venv, else python3)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/run/help.sh"

[ $# -gt 0 ] || { echo "launch.sh: expected the name of a method or configuration, such as steer_exp" >&2; exit 1; }
name=$1
shift
configs=$root/verl/trainer/config
# Others may be verl's, or lie in a folder that a flag or an override names.
if [[ ! -f $configs/method/$name.yaml && ! -f $configs/${name%.yaml}.yaml && $name != ppo_* ]] &&
  [[ " $*" != *" -c"* && " $*" != *" --config-"* && "$*" != *hydra.searchpath* ]]; then
  echo "launch.sh: $name: expected the name of a method or configuration, one of" \
    "$(basename -s .yaml "$configs"/method/*.yaml "$configs"/*.yaml | xargs)" >&2
  exit 1
fi
source "$root/run/environment.sh"
"$PYTHON" -m verl_steer --check
if [ -f "$configs/method/$name.yaml" ]; then
  exec "$PYTHON" -m verl.steer.main --config-name steer method="$name" "$@"
fi
exec "$PYTHON" -m verl.steer.main --config-name "$name" "$@"
