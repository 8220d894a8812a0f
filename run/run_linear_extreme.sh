#!/usr/bin/env bash
# run_linear.sh almost without clipping: ratios from 0.01 to 6. Further arguments are Hydra overrides:
#   MODEL_PATH=Qwen/Qwen2.5-Math-7B bash run/run_linear_extreme.sh +seed=1
# launch.sh lists the environment variables.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" steer_linear_extreme "$@"
