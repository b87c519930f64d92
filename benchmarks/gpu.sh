#!/usr/bin/env bash
# Check and measure Pylorus on a machine with an NVIDIA GPU, without a network, in at most nine minutes.
#
#   benchmarks/gpu.sh                            everything; the table is printed and written to outputs/gpu.md
#   benchmarks/gpu.sh --device cpu --tiny        the same lines on a CPU, with a few small images
#   benchmarks/gpu.sh --only augmentation,frames some of the steps; --help names all options
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3 || command -v python)}
# Where packages have no bytecode, as in some containers, each process compiles them, for ten seconds and more: then it is
# saved in a folder of its own, for all contenders.
if ! "$PYTHON" -c 'import os, sys; from importlib.util import find_spec as f; sys.exit(not os.path.exists(f("numpy").cached))'; then
  unset PYTHONDONTWRITEBYTECODE
  export PYTHONPYCACHEPREFIX=${PYTHONPYCACHEPREFIX:-$(mktemp -d)}
fi
export PYTHONPATH="$PWD/src:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
# An installed package has its bytecode.
"$PYTHON" -c 'import contenders.pylorus_run, pylorus.launch.train, pylorus.report.page, timm.data, timm.optim, timm.scheduler'
exec "$PYTHON" benchmarks/gpu.py "$@"
