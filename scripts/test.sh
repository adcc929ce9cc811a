#!/usr/bin/env bash
# From a fresh machine to the test suite: everything that needs neither a GPU nor a network beyond the package index.
#   bash scripts/test.sh [PYTEST_ARGUMENT ...]      without arguments: all but the slow fault tests
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh "${VENV:-.venv}" test
bin=${VENV:-.venv}/bin
if [ $# -eq 0 ]; then
  "$bin/ruff" check .
  "$bin/ruff" format --check .
  # Two at a time; a file's tests stay together, for they share what is expensive to make.
  set -- -m "not faults and not slow" -n 2 --dist loadfile
fi
exec "$bin/python" -m pytest "$@"
