#!/usr/bin/env bash
# Train on Hugging Face Jobs and keep the run folder in a bucket of yours:
#
#   bash scripts/launch/hf_jobs.sh USER/BUCKET configs/gpt2-124m.yaml [--field value ...]
#
# `hf auth login` first; Jobs need a Pro account or an organization with credit. The code is this repository's at REPOSITORY and
# REVISION, so that what is to run must be pushed. The bucket is made if it does not exist and mounted; a job that ends early,
# by its time limit for instance, goes on from the newest checkpoint there when the same command is given again.
# Environment: FLAVOR (a100x8), TIMEOUT (12h), IMAGE (python:3.12), ATTEMPTS (1), REPOSITORY (the remote origin), REVISION (HEAD);
# DRY_RUN=1 prints the job without submitting it.
set -euo pipefail
case ${1:---help} in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;; esac
[ $# -ge 2 ] || { sed -n 4p "$0" >&2; exit 2; }
bucket=$1 config=$2
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ -f "$config" ] || { echo "$config: no such config file; the presets are in configs/" >&2; exit 2; }

flavor=${FLAVOR:-a100x8}
case $flavor in
  a100x8) machine=8xa100-zero1 ;;
  *x8) machine=8xh100-zero1 ;;
  *x[24]) echo "FLAVOR: $flavor has neither one GPU nor eight; hf jobs hardware lists the flavors" >&2; exit 2 ;;
  *) machine=1gpu ;;
esac
repository=${REPOSITORY:-$(git remote get-url origin)}
revision=${REVISION:-$(git rev-parse HEAD)}
run=/runs/$(basename "$config" .yaml)
[ -n "${DRY_RUN:-}" ] || hf buckets create "$bucket" --private --exist-ok

# Their files and ours: Triton needs a C compiler, which python:3.12 has.
script='set -e
git clone -q "$REPOSITORY" recipe && cd recipe && git checkout -q "$REVISION"
bash scripts/install.sh .venv gpu
export PATH=$PWD/.venv/bin:$PATH PYTHON=$PWD/.venv/bin/python
exec bash scripts/supervise.sh "configs/accelerate/$MACHINE.yaml" "$@"'

exec hf jobs run --flavor "$flavor" --timeout "${TIMEOUT:-12h}" --attempts "${ATTEMPTS:-1}" ${DRY_RUN:+--dry-run} \
  --secrets HF_TOKEN --env REPOSITORY="$repository" --env REVISION="$revision" --env MACHINE="$machine" \
  -v "hf://buckets/$bucket:/runs" "${IMAGE:-python:3.12}" \
  bash -c "$script" hf_jobs "$config" --output_dir "$run" "$@"
