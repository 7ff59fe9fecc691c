#!/usr/bin/env bash
# The CUDA kernels under compute-sanitizer: memory errors, then races in shared memory. Needs a GPU, and a torch that
# uses it; takes minutes.
#
#   scripts/cuda_sanitize.sh [TOOL ...]      # memcheck racecheck; also initcheck, synccheck
#   PYTHON=python3 scripts/cuda_sanitize.sh
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
command -v compute-sanitizer > /dev/null || { echo "compute-sanitizer is not on the PATH; it comes with CUDA" >&2; exit 2; }
"$python" tests/kernels/cuda_gpu.py  # also compiles the kernels, which the tools need not watch

# Each tensor in memory of its own: inside a shared block an access past its end would go unseen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in "${@:-memcheck racecheck}"; do
  for name in $tool; do
    echo "== $name"
    compute-sanitizer --tool "$name" --error-exitcode 1 "$python" tests/kernels/cuda_gpu.py
  done
done
