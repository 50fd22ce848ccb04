#!/usr/bin/env bash
# Run the fast tests: ./run_tests.sh [options of pytest]; all slow ones with: ./run_tests.sh -m slow
set -euo pipefail
CDPATH= cd -- "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
. ./environment.sh
find_python lab,dev papermill pytest ruff xdist
"$python" -m ruff check .
"$python" -m ruff format --check .
exec "$python" -m pytest -n auto --dist loadfile "$@"
