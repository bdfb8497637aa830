#!/usr/bin/env bash
# Finds a Chromium or Chrome for the tests in tests/browser, or installs Debian's where that is possible.
set -euo pipefail

fail() { echo "browser: $*" >&2; exit 1; }

found() {
    local name
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        command -v "$name" >/dev/null && return 0
    done
    return 1
}

found && exit 0

command -v apt-get >/dev/null || fail "there is no Chromium on the PATH: install one (it may be called chromium or google-chrome)."
if [ "$(id -u)" = 0 ]; then
    as_root=()
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    as_root=(sudo)
else
    fail "there is no Chromium on the PATH: install one, for example with: sudo apt-get install chromium"
fi

echo "browser: installing chromium"
"${as_root[@]}" apt-get update -qq || fail "apt-get update failed: install Chromium yourself (it may be called chromium or google-chrome)."
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null ||
    fail "apt has no chromium to install: install Chromium or Chrome yourself."
hash -r
found || fail "apt installed chromium, but there is none on the PATH: install Chromium or Chrome yourself."
