#!/usr/bin/env bash
# Keep a run going: start it, and after a fault start it again from its newest checkpoint.
#   bash scripts/supervise.sh configs/accelerate/8xa100-zero1.yaml configs/gpt2-124m.yaml [--field value ...]
# It ends with 0 when the run is finished, 75 when it was stopped by a signal or by max_hours, 2 for a bad configuration, and 1
# after three restarts in a row without a newer checkpoint. SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and, but under nohup, SIGHUP (a
# closed terminal) are passed on, and the workers waited for: `accelerate launch` alone dies of a SIGUSR1, or of any signal with
# one process, before they have saved.
# Environment: PYTHON (python), SUPERVISE_PAUSE (5, seconds before a restart).
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;; esac
[ $# -ge 2 ] || { sed -n '3s/^# *//p' "$0" >&2; exit 2; }
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH} exec "${PYTHON:-python}" -P -m recipe.supervision "$@"
