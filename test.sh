#!/usr/bin/env bash
# Installs what is missing, builds everything with warnings as errors, and runs all tests that need no GPU.
# Safe to repeat; quick when nothing changed.
set -euo pipefail
cd "$(dirname "$0")"
quiet=()
[[ -t 1 ]] || quiet=(-- --quiet)  # progress is for people; errors are always shown

echo "== dependencies"
tools/install_deps.sh dev
echo "== build (the first takes some minutes)"
cmake --preset release >/dev/null
cmake --build --preset release "${quiet[@]}"
echo "== tests"
[[ -d ../shared ]] || echo "note: no folder ../shared beside the checkout; tests that need its data skip"
ctest --preset release --label-exclude gpu --output-on-failure
