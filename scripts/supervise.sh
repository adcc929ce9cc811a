#!/usr/bin/env bash
# Keep a run going: start it, and after a fault start it again from its newest checkpoint.
#   bash scripts/supervise.sh configs/accelerate/8xa100-zero1.yaml configs/gpt2-124m.yaml [--field value ...]
# It ends with 0 when the run is finished, 75 when it was stopped by a signal or by max_hours, 2 for a bad configuration, and 1
# after three restarts in a row without a newer checkpoint. SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 are passed on, and the workers
# waited for: `accelerate launch` alone dies of a SIGUSR1, or of any signal with one process, before they have saved.
set -uo pipefail
[ $# -ge 2 ] || { sed -n 2,3p "$0" >&2; exit 2; }
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
machine=$1
shift
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-120}  # seconds that the launcher leaves workers, from torch 2.13 on; else 30

# Before anything is started, so that a mistake is told once; the last line is the run folder.
export PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH}
folder=$("$python" -c '
import sys
from recipe.cli import report_problems
from recipe.config import ConfigError
from recipe.parsing import load_config
try:
    print(load_config(sys.argv[1:]).output_dir)
except ConfigError as error:
    report_problems(error)
    sys.exit(2)' "$@") || exit 2

newest() {  # the step of the newest checkpoint; -1 without one
  local step=-1 manifest name
  for manifest in "$folder"/checkpoints/step-*/MANIFEST.json; do
    [ -f "$manifest" ] || continue
    name=${manifest%/MANIFEST.json}
    name=$((10#${name##*/step-}))
    ((name > step)) && step=$name
  done
  echo "$step"
}

stopping=0 launcher=
pass_on() {  # to the workers, all of which save before the first one ends: their launcher would kill them after 30 s
  stopping=1
  [ -z "$launcher" ] || pkill -USR1 -P "$launcher" || kill -TERM "$launcher" 2>/dev/null
}
trap pass_on TERM INT USR1

codes=$(mktemp)
trap 'rm -f "$codes"' EXIT
restarts=0 best=$(newest)
while :; do
  : >"$codes"
  # Job control gives the launcher a group of its own: a Ctrl-C reaches it once, through us.
  set -m
  PRETRAIN_EXIT_FILE=$codes "$python" -m accelerate.commands.launch --config_file "$machine" "$project/scripts/pretrain.py" "$@" &
  launcher=$!
  set +m
  ((stopping)) && pass_on
  while kill -0 "$launcher" 2>/dev/null; do wait "$launcher"; done
  launcher=
  # The workers may outlive their launcher by a save: they hold the lock until they are gone.
  [ ! -f "$folder/.lock" ] || flock --wait 60 "$folder/.lock" true
  code=$(cat "$codes")
  case $code in
    0 | 2 | 75) exit "$code" ;;
  esac
  ((stopping)) && exit 75
  reached=$(newest)
  ((reached > best)) && restarts=0 && best=$reached
  reason=$(grep -o '"reason": ".*"' "$folder/status.json" 2>/dev/null)
  if ((restarts == 3)); then
    echo "supervise: three restarts without a checkpoint behind step $best; giving up. ${reason:-}" >&2
    exit 1
  fi
  restarts=$((restarts + 1))
  echo "supervise: the run ended (code ${code:-unknown}); restart $restarts of 3 from step $reached. ${reason:-}" >&2
  sleep "${SUPERVISE_PAUSE:-5}" &
  wait $!
  ((stopping)) && exit 75
done
