#!/usr/bin/env bash
# Installs what is missing, builds everything with warnings as errors, and runs all tests that need no GPU.
# Safe to repeat; quick when nothing changed.
set -euo pipefail
cd "$(dirname "$0")"

echo "== dependencies"
tools/install_deps.sh dev
echo "== build (the first takes some minutes)"
cmake --preset release >/dev/null
cmake --build --preset release | tail -n 1
echo "== tests"
[[ -d ../shared ]] || echo "note: no folder ../shared beside the checkout; tests that need its data skip"
ctest --preset release --label-exclude gpu --output-on-failure
