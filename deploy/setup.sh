#!/usr/bin/env bash
# Make the virtual environment: deploy/setup.sh VENV. CPU or GPU packages, by what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || { echo "error: PYTHON = $python: not found; install Python 3.11 or set PYTHON" >&2; exit 1; }

say() { printf '\033[1m%s\033[0m\n' "$*"; }
pip_install() {
  # pip would byte-compile on one core.
  "$venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-compile "$@"
}
compile_all() {
  # What cannot be compiled says so here, and again where it is imported. Of torch's files one is
  # of a later Python.
  "$venv/bin/python" -W ignore -m compileall -q -j 0 -x '/py31[2-9]_[^/]*[.]py$' "$@" || true
}

say "1/4 virtual environment $venv ($("$python" --version))"
"$python" -m venv "$venv"

if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
  say "2/4 GPU packages (several GB; a few minutes)"
  pip_install -r deploy/requirements/gpu.txt
else
  say "2/4 torch for CPUs"
  # A wheel folder or index configured in pip may hold the CPU build. PyPI itself holds only the CUDA
  # build; uv knows where the public CPU builds are.
  pip_install --no-deps 'torch==2.13.0+cpu' 2>/dev/null || {
    say "    not in pip's configured places; taking it from PyTorch's CPU index"
    pip_install 'uv==0.13.8'
    "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --no-deps --torch-backend cpu 'torch==2.13.0'
  }
  say "    CPU packages (about a minute)"
  pip_install --no-deps -r deploy/requirements/cpu.txt
fi

say "3/4 tools for tests and lint"
pip_install --no-deps -r deploy/requirements/dev.txt
pip_install --no-deps --upgrade --target "$venv/lora" -r deploy/requirements/lora.txt
say "4/4 isentrope itself"
pip_install --no-deps 'setuptools==78.1.1'
pip_install --no-deps --no-build-isolation --editable .
say "    byte-compiling"
compile_all "$venv"/lib/python*/site-packages "$venv/lora"
touch "$venv/.ready"
