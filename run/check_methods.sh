# Sourced by launchers of several runs, which would find a misspelt name when its turn comes.
#   check_methods "NAME ..."
check_methods() {
  local name
  for name in $1; do
    if [ ! -f "$root/verl/trainer/config/method/$name.yaml" ]; then
      echo "$(basename "$0"): METHODS names $name: expected names of files in verl/trainer/config/method" >&2
      exit 1
    fi
  done
}
