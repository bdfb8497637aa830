#!/usr/bin/env bash
# Proves and measures on a GPU, within 8 minutes, without a network and without an install: docs/gpu.md.
#   scripts/gpu_proof.sh                                       all parts, on a CUDA or HIP device
#   scripts/gpu_proof.sh --dry                                 all parts at toy sizes, on the CPU
#   scripts/gpu_proof.sh --wheels DIR                          packages that are missing come from wheels in DIR
#   scripts/gpu_proof.sh --collect-wheels DIR [--python 3.12]  puts them there, where there is a network
#   KVPOLICY_PYTHON=/path/to/python                            the interpreter to use (3.11 or newer)
set -euo pipefail
python=${KVPOLICY_PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
    echo "gpu_proof: $python is no Python 3.11 or newer; set KVPOLICY_PYTHON to one that has torch." >&2
    exit 2
fi
exec "$python" -P "$(dirname "${BASH_SOURCE[0]}")/gpu_proof/main.py" "$@"
