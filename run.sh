#!/usr/bin/env bash
# Installs what is missing, builds the command `ssm`, and lets the model that ships with it tell a story.
# Safe to repeat; quick when nothing changed. Arguments are passed on: ./run.sh --prompt "One day" -n 100
set -euo pipefail
cd "$(dirname "$0")"
quiet=()
[[ -t 1 ]] || quiet=(-- --quiet)  # progress is for people; errors are always shown

echo "== dependencies"
tools/install_deps.sh
echo "== build (the first takes some minutes)"
[[ -f build/run/build.ninja ]] || cmake --preset release -B build/run -DSSM_DEV=OFF >/dev/null
cmake --build build/run --target ssm_command "${quiet[@]}"
echo "== a story, by the Mamba-2 in models/stories"
[[ $# -gt 0 ]] || set -- -n 420 --temperature 0.5 --top-p 0.9 --seed 26
case " $* " in
*" --prompt"* | *" --ids"* | *" --load-state"*) ;;
*) set -- --prompt "Once upon a time, there was a little" "$@" ;;
esac
build/run/bin/ssm generate "$@"
echo "== go on with: build/run/bin/ssm --help"
