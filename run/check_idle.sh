# Sourced by launchers that know `root` and PYTHON: `check_idle FOLDER` ends a launcher if a training runs in the folder,
# whose metrics a new start would delete.
check_idle() {
  [ -e "$1/.lock" ] || return 0
  local status=0
  # A network file system gives this lock only to who may write.
  "$PYTHON" -c 'import fcntl, sys
try:
    fcntl.flock(open(sys.argv[1], "a"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(75)
except OSError:
    pass  # a file system without locks' "$1/.lock" || status=$?
  [ $status != 75 ] ||
    { echo "$(basename "$0"): $1: a training runs in it; wait for its end or choose another folder" >&2; exit 1; }
}
