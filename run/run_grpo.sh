#!/usr/bin/env bash
# GRPO without STEER, everything else as in run_exp.sh. Further arguments are Hydra overrides.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" grpo "$@"
