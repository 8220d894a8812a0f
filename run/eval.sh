#!/usr/bin/env bash
# Samples responses to the benchmarks, grades them and prints the results. Finished benchmarks are not repeated.
#   MODEL_PATH=outputs/steer_exp/global_step_120 bash run/eval.sh --only aime24,math500 hardware=gpu8
#   MODEL_PATH  a Hugging Face folder, a hub id, or a checkpoint of a run (global_step_N), merged if necessary
#   DATA_DIR    folder of the parquet files (data in the repository); missing ones are made
#   OUTPUT_DIR  folder of the results (outputs in the repository); they go to eval/ below it, to a folder for this model
#               under these options
#   --only A,B  these benchmarks, else the eight of mathematics; a name is a file of DATA_DIR without .parquet, among them
#               humaneval, mbpp and livecodebench, whose programs run in a sandbox (docs/code_rewards.md)
# Further arguments are Hydra overrides.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/run/help.sh"
source "$root/run/quoted.sh"

benchmarks=aime24,aime25,amc23,math500,minerva_math,olympiadbench,gsm8k_test,omni
if [ "${1:-}" = --only ]; then
  benchmarks=${2:-}
  [ "$benchmarks" ] || { echo "eval.sh: --only: expected names such as aime24,math500" >&2; exit 1; }
  shift 2
fi
for word in "$@"; do
  case $word in
    --only*) echo "eval.sh: $word: expected --only NAMES before the overrides" >&2; exit 1 ;;
    -*) echo "eval.sh: $word: expected Hydra overrides, without flags" >&2; exit 1 ;;
  esac
done
model=${MODEL_PATH:-}
if [ -z "$model" ]; then
  echo "eval.sh: MODEL_PATH: expected a Hugging Face folder, a hub id or a checkpoint (global_step_N)" >&2
  exit 1
fi
if compgen -G "$model/global_step_*" >/dev/null; then
  echo "eval.sh: MODEL_PATH=$model: a run's folder; expected one of its checkpoints:" "$model"/global_step_* >&2
  exit 1
fi
source "$root/run/environment.sh"

# Of a checkpoint take the Hugging Face export, or merge its shards. Merge again if the shards have changed since, or a
# kill interrupted the merge.
if [ -d "$model/actor" ]; then
  if [ -e "$model/.unfinished" ]; then
    echo "eval.sh: MODEL_PATH=$model: expected a whole checkpoint; this one was cut off while it was saved" >&2
    exit 1
  fi
  if ls "$model"/actor/huggingface/*.safetensors >/dev/null 2>&1; then
    model=$model/actor/huggingface
  else
    merged=$model/actor/merged
    shards=$(cd "$model/actor" && stat --format='%n %s %y' model_world_size_*.pt 2>/dev/null) ||
      { echo "eval.sh: MODEL_PATH=$model: expected model_world_size_*.pt or an export in its actor" >&2; exit 1; }
    if [ "$(cat "$merged/shards" 2>/dev/null)" != "$shards" ]; then
      rm -rf "$merged"
      "$PYTHON" -m verl.model_merger merge --backend fsdp --local_dir "$model/actor" --target_dir "$merged"
      echo "$shards" >"$merged/shards"
    fi
    model=$merged
  fi
fi
for file in "$model"/*.safetensors; do
  # The names of tensors come first in the file. verl exports the layers beside their adapters, or merges without them.
  if [ -d "$model/lora_adapter" ] || grep -aqF .base_layer. < <(head -c 1000000 "$file" 2>/dev/null); then
    echo "eval.sh: $model: expected a model without LoRA adapters: merge them, such as by peft's merge_and_unload" >&2
    exit 1
  fi
done
export MODEL_PATH=$model

names=() files=()
IFS=, read -ra names <<<"$benchmarks"
for benchmark in "${names[@]}"; do
  file=$DATA_DIR/$benchmark.parquet
  [ -f "$file" ] || "$PYTHON" "$root/datasets/make_datasets.py" --only "$benchmark" --out "$DATA_DIR" ||
    { echo "eval.sh: $file: expected this file, or the name of a benchmark that datasets/make_datasets.py makes" >&2; exit 1; }
  files+=("$file")
done

# The folder of this model under these options, and in it a link for each benchmark, named by the file's digest too.
places=$("$PYTHON" "$root/scripts/eval_folder.py" "$OUTPUT_DIR/eval" "${files[@]}" -- "$@")
{ read -r results && mapfile -t files; } <<<"$places"
echo "results: $results"
names=() missing=()
for file in "${files[@]}"; do
  names+=("$(basename "$file" .parquet)")
  [ -f "${file%.parquet}/0.jsonl" ] || missing+=("$(quoted "$file")")
done
if [ ${#missing[@]} -gt 0 ]; then
  bash "$root/run/launch.sh" eval "data.val_files=[$(IFS=, && echo "${missing[*]}")]" \
    trainer.default_local_dir="$(quoted "$results")" trainer.validation_data_dir="$(quoted "$results")" "$@"
fi
"$PYTHON" "$root/scripts/summarize_eval.py" "$results" --only "${names[@]}"
