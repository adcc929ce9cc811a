#!/usr/bin/env bash
# Create a virtual environment and install the recipe with the tested versions.
#   bash scripts/install.sh [VENV] [EXTRA]      default: .venv, no extra
# A machine without an NVIDIA GPU gets the CPU build of torch, which is a twentieth of the size.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:-.venv}
extra=${2:+[$2]}

python=$(command -v python3 || command -v python) || { echo "install Python 3.11 or newer first" >&2; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "$("$python" --version) is too old: Python 3.11 or newer is needed" >&2; exit 1; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || {
  echo "python3 -m venv failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }
torch=$(sed -n 's/^torch==/torch==/p' constraints.txt)
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
  echo "installing $torch ..."
  if [ "$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then
    # The configured index may hold the CPU build already (a mirror, an offline folder); PyTorch's own does.
    pip install -q "$torch+cpu" 2>/dev/null || pip install -q "$torch" --index-url https://download.pytorch.org/whl/cpu
  else
    pip install -q "$torch"
  fi
fi
echo "installing the recipe ..."
# DeepSpeed's own kernels are not used: nothing is compiled.
DS_BUILD_OPS=0 pip install -q -c constraints.txt -e ".$extra"
