#!/usr/bin/env bash
# Trains several methods from the same start over several seeds, one run after another, and ends with a table: means
# and 95 % intervals over the seeds. Finished runs are not repeated; a stopped run resumes from its last checkpoint, or
# starts again if it has none. Further arguments are Hydra overrides for all runs:
#   bash run/compare.sh trainer.total_training_steps=60
#   METHODS="grpo_symmetric steer_exact" SEEDS="1 2" TASK=dapo_math HARDWARE=gpu8 bash run/compare.sh
#   METHODS     configurations to train (GRPO, clip-higher, Clip-Cov, KL-Cov and STEER with either map);
#               docs/interventions.md lists all
#   SEEDS       seeds of the data order and the rollouts ("42 43 44")
#   TASK        task of verl/trainer/config/task (arithmetic)
#   HARDWARE    preset of verl/trainer/config/hardware (cpu)
#   OUTPUT_DIR  where results go (outputs/compare in the repository): seed42/grpo_symmetric and so on, each with
#               config.yaml, the resolved configuration, train.log and metrics.jsonl
#   TASK_DIR    for TASK=arithmetic: what scripts/make_laptop_task.py made (made in outputs/laptop_task)
#   PYTHON      interpreter (that of the environment made by setup.sh)
# MODEL_PATH and DATA_DIR as in launch.sh.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/run/help.sh"
source "$root/run/check_methods.sh"

methods=${METHODS:-grpo_symmetric clip_higher clip_cov kl_cov steer_exp steer_linear}
check_methods "$methods"
task=${TASK:-arithmetic} hardware=${HARDWARE:-cpu}
export OUTPUT_DIR=${OUTPUT_DIR:-$root/outputs/compare}
if [ -z "${PYTHON:-}" ]; then
  bash "$root/run/setup.sh" "$([ "$hardware" = cpu ] && echo cpu || echo gpu)"
  export PYTHON=${STEER_VENV:-$root/.venv}/bin/python
fi
if [ "$task" = arithmetic ]; then source "$root/run/laptop_task.sh"; fi

runs=()
for seed in ${SEEDS:-42 43 44}; do
  for method in $methods; do
    run=$OUTPUT_DIR/seed$seed/$method
    runs+=("$run")
    bash "$root/run/train_once.sh" "$run" "$method" task="$task" hardware="$hardware" "trainer.logger=[console,file]" \
      +seed="$seed" "$@"
  done
done
"$PYTHON" "$root/scripts/compare_runs.py" "${runs[@]}" --out "$OUTPUT_DIR/comparison.png"
echo "logs, configurations and metrics: $OUTPUT_DIR"
