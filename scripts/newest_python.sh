#!/usr/bin/env bash
# Prints the newest Python after 3.11 that runs here: on the PATH, of pyenv, or of uv. Prints nothing if there is none.
set -u
candidates=()
for minor in 14 13 12; do
  candidates+=("python3.$minor" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3."$minor".*/bin/python3)
  if command -v uv > /dev/null; then
    candidates+=("$(uv python find --no-python-downloads "3.$minor" 2> /dev/null)")
  fi
done
for python in "${candidates[@]}"; do
  if [ -n "$python" ] && "$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' > /dev/null 2>&1; then
    echo "$python"
    exit
  fi
done
