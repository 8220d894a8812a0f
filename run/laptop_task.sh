# Sourced by launchers that know `root` and PYTHON: makes the task of arithmetic where TASK_DIR names none.
if [ -z "${TASK_DIR:-}" ]; then
  export TASK_DIR=$root/outputs/laptop_task
  "$PYTHON" "$root/scripts/make_laptop_task.py" --out "$TASK_DIR"
fi
