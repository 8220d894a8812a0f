#!/usr/bin/env bash
# From nothing to a picture, without a GPU: makes the environment, a tiny model and its arithmetic task, trains GRPO and
# STEER from the same start and seed, and compares them. Existing results are reused. Further arguments are Hydra
# overrides for both runs:
#   bash run/quickstart.sh trainer.total_training_steps=60 actor_rollout_ref.actor.policy_loss.token_weight_min=0.6
#   METHODS     configurations to train ("grpo steer_exp")
#   SEED        seed of the data order and the rollouts (42, verl's default)
#   OUTPUT_DIR  where results go (outputs/quickstart in the repository)
#   TASK_DIR    a task that scripts/make_laptop_task.py made (made in outputs/laptop_task)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/run/help.sh"
source "$root/run/check_methods.sh"
methods=${METHODS:-grpo steer_exp}
check_methods "$methods"
bash "$root/run/setup.sh"
export OUTPUT_DIR=${OUTPUT_DIR:-$root/outputs/quickstart} PYTHON=${STEER_VENV:-$root/.venv}/bin/python
source "$root/run/environment.sh"
source "$root/run/laptop_task.sh"
source "$root/run/check_idle.sh"

seed=${SEED:-42}
overrides=(
  task=arithmetic hardware=cpu trainer.resume_mode=disable
  +seed="$seed" "$@"
)
settings="${overrides[*]} ${MODEL_PATH:-$TASK_DIR/model} $TASK_DIR"
runs=()
for method in $methods; do
  run=$OUTPUT_DIR/$method
  runs+=("$run")
  finished="$run/finished-with"
  if [ "$(cat "$finished" 2>/dev/null)" = "$settings" ]; then
    echo "$method is trained already; delete $run to train it again"
    continue
  fi
  check_idle "$run"
  rm -rf "$finished" "$run"/metrics*.jsonl "$run/audit"
  "$PYTHON" "$root/scripts/watch.py" --title "$method" --log "$run/train.log" --metrics "$run" -- \
    bash "$root/run/launch.sh" "$method" "${overrides[@]}" trainer.experiment_name="$method"
  ls "$run"/metrics*.jsonl >/dev/null 2>&1 ||
    { echo "quickstart.sh: $run: no metrics*.jsonl; expected a run with \`file\` among trainer.logger" >&2; exit 1; }
  echo "$settings" >"$finished"
done
"$PYTHON" "$root/scripts/compare_runs.py" "${runs[@]}" --out "$OUTPUT_DIR/comparison.png"
echo "logs, configurations and metrics: $OUTPUT_DIR"
