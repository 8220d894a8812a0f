# Sourced by launchers of several runs, which would find a misspelt name or a flag in a later run.
#   check_methods "NAME ..." [Hydra overrides]
check_methods() {
  local name word launcher
  launcher=$(basename "$0")
  for name in $1; do
    if [ ! -f "$root/verl/trainer/config/method/$name.yaml" ]; then
      echo "$launcher: METHODS names $name: expected names of files in verl/trainer/config/method" >&2
      exit 1
    fi
  done
  shift
  for word in "$@"; do
    case $word in -*) echo "$launcher: $word: expected Hydra overrides, without flags" >&2; exit 1 ;; esac
  done
}
