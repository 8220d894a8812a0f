#!/usr/bin/env bash
# GRPO without STEER, everything else as in run_exp.sh. Further arguments are Hydra overrides:
#   MODEL_PATH=Qwen/Qwen2.5-Math-7B bash run/run_grpo.sh +seed=1
# launch.sh lists the environment variables.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" grpo "$@"
