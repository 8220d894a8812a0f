#!/usr/bin/env bash
# Samples responses to the benchmarks, grades them and tells the results. What is done already is not done again.
#   MODEL_PATH=outputs/steer_exp/global_step_120 bash run/eval.sh --only aime24,math500 hardware=gpu8
#   MODEL_PATH  a Hugging Face folder, a hub id, or a checkpoint of ours (global_step_N), merged where it needs to be
#   DATA_DIR    folder of the parquet files (data in the repository); missing ones are made
#   OUTPUT_DIR  folder of the results (outputs in the repository); they go to eval/ below it, by model
#   --only A,B  these benchmarks, else all eight; a name is a file of DATA_DIR without .parquet
# Further arguments are Hydra overrides.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DATA_DIR=${DATA_DIR:-$root/data} OUTPUT_DIR=${OUTPUT_DIR:-$root/outputs}
if [ -z "${PYTHON:-}" ]; then
  PYTHON=${STEER_VENV:-$root/.venv}/bin/python
  [ -x "$PYTHON" ] || PYTHON=python3
fi
export PYTHON

benchmarks=aime24,aime25,amc23,math500,minerva_math,olympiadbench,gsm8k_test,omni
if [ "${1:-}" = --only ]; then
  benchmarks=${2:?eval.sh: --only: expected names such as aime24,math500}
  shift 2
fi
model=${MODEL_PATH:?eval.sh: MODEL_PATH: expected a Hugging Face folder, a hub id or a checkpoint (global_step_N)}

# a checkpoint of ours: its Hugging Face export, made from the shards where the run didn't save one
if [ -d "$model/actor" ]; then
  export_=$model/actor/huggingface
  if ! ls "$export_"/*.safetensors >/dev/null 2>&1; then
    "$PYTHON" -m verl.model_merger merge --backend fsdp --local_dir "$model/actor" --target_dir "$export_"
  fi
  name=$(basename "$(cd "$model/.." && pwd)")-$(basename "$model")
  model=$export_
else
  name=$(basename "$model")
fi
results=$OUTPUT_DIR/eval/$name

names=() files=()
IFS=, read -ra names <<<"$benchmarks"
for benchmark in "${names[@]}"; do
  file=$DATA_DIR/$benchmark.parquet
  [ -f "$file" ] || "$PYTHON" "$root/datasets/make_datasets.py" --only "$benchmark" --out "$DATA_DIR"
  [ -f "$results/$benchmark/0.jsonl" ] || files+=("$file")
done
if [ ${#files[@]} -gt 0 ]; then
  MODEL_PATH=$model bash "$root/run/launch.sh" eval "data.val_files=[$(IFS=, && echo "${files[*]}")]" \
    trainer.default_local_dir="$results" trainer.validation_data_dir="$results" "$@"
fi
"$PYTHON" "$root/scripts/summarize_eval.py" "$results" --only "${names[@]}"
