#!/usr/bin/env bash
# STEER with the linear map, on 8 GPUs by default. Further arguments are Hydra overrides:
#   MODEL_PATH=Qwen/Qwen2.5-Math-7B bash run/run_linear.sh actor_rollout_ref.actor.policy_loss.token_weight_min=0.7
# launch.sh lists the environment variables.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" steer_linear "$@"
