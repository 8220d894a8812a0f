# Sourced by launchers: where the first argument asks for help, prints the comment at the launcher's head and ends it.
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[1]}"
  exit
fi
