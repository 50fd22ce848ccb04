#!/usr/bin/env bash
# Train what is missing and render every table and figure: ./run_all.sh [quick|small|short|paper] [options]
#   ./run_all.sh                    the quick profile: a few minutes on two cores, no network
#   ./run_all.sh paper --no-train   the report of the records that are there
# Options are those of `python -m silalib report`: --seeds, --device, --workers, --budget, --no-train ...
set -euo pipefail
CDPATH= cd -- "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
. ./environment.sh
find_python lab pandas papermill
profile=()
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    profile=(--profile "$1")
    shift
fi
exec "$python" -m silalib report ${profile[@]+"${profile[@]}"} "$@"
