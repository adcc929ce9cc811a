#!/usr/bin/env bash
# From a fresh machine with Python 3.11 or newer to a trained, evaluated, exported tiny GPT-2, in minutes:
#   bash scripts/quickstart.sh
# No account, no GPU, no download but packages. It trains on the documentation of the packages that it installs, over two
# CPU processes under DeepSpeed ZeRO-1 (one process if there is a GPU). The result is runs/quickstart; run it again to
# continue a run that was interrupted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh "${VENV:-.venv}"
bin=${VENV:-.venv}/bin

machine=2cpu-zero1
if nvidia-smi -L >/dev/null 2>&1; then machine=1gpu; fi
export DS_ACCELERATOR OMP_NUM_THREADS
[ $machine = 1gpu ] || DS_ACCELERATOR=cpu  # the launcher asks, too, and would warn
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

"$bin/accelerate" launch --config_file configs/accelerate/$machine.yaml scripts/pretrain.py configs/quickstart.yaml "$@"

cat <<END

Your model is in runs/quickstart/export, its card beside it, its numbers in runs/quickstart/metrics.jsonl.
On a GPU, the real thing (GPT-2 124M on FineWeb, streamed):

  accelerate launch --config_file configs/accelerate/1gpu.yaml scripts/pretrain.py configs/gpt2-124m.yaml

END
