#!/usr/bin/env bash
# run_linear.sh almost without clipping: ratios from 0.01 to 6. Further arguments are Hydra overrides.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" steer_linear_extreme "$@"
