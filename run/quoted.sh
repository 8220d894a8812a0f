# Sourced by launchers: `quoted PATH` prints a path in quotes for Hydra, since it may have characters of its grammar.
quoted() { echo "'${1//\'/\\\'}'"; }
