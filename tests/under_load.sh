#!/usr/bin/env bash
# Shows that the tests don't depend on how busy the machine is: runs them several times beside processes that never
# rest, and ends with a line a run. Arguments go to run/test.sh, such as `-m "not e2e and not slow"`.
#   BUSY  busy processes (4)
#   RUNS  runs (3)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

busy=()
trap 'kill "${busy[@]}" 2>/dev/null || true' EXIT
for _ in $(seq "${BUSY:-4}"); do
  while :; do :; done &
  busy+=($!)
done
results=() failed=0
for run in $(seq "${RUNS:-3}"); do
  code=0
  bash "$root/run/test.sh" "$@" || code=$?
  if [ "$code" = 0 ]; then results+=("run $run: passed"); else results+=("run $run: failed ($code)") failed=1; fi
done
printf 'under_load.sh: %s\n' "${results[@]}"
exit "$failed"
