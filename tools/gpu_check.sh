#!/usr/bin/env bash
# Tests and measures the CUDA build on this machine's GPU; the results go to bench/results.
#
#   tools/gpu_check.sh            builds (preset cuda), then checks
#   tools/gpu_check.sh stage      builds, and gathers programs and libraries in build/gpu, to be carried elsewhere
#   tools/gpu_check.sh staged     checks what build/gpu holds: a machine with a GPU, but without the dependencies
set -euo pipefail
cd "$(dirname "$0")/.."
mode=${1:-all}
stage=build/gpu

# What is carried elsewhere goes without oneDNN, which is larger than all the rest: its CPU products are slow.
build() {
    cmake --preset cuda -DSSM_ONEDNN=$([[ $mode == stage ]] && echo OFF || echo ON) >/dev/null
    cmake --build --preset cuda -- --quiet
}

# Programs with the label gpu, their benchmarks, the command; and every library but those of the system and CUDA.
gather() {
    rm -rf "$stage"
    mkdir -p "$stage/bin" "$stage/lib"
    find build/cuda -type f -perm -u+x \( -name '*_cuda_test' -o -name 'cuda_test' -o -name '*_cuda_bench' -o -path '*/bin/ssm' \) \
        -exec cp {} "$stage/bin/" \;
    local library
    for library in $(ldd "$stage"/bin/* | awk '$2 == "=>" {print $3}' | sort -u); do
        case $(basename "$library") in
        libc.so* | libm.so* | libcublas* | libpthread* | libdl* | librt* | libstdc++* | libgcc_s*) ;;
        *) cp -L "$library" "$stage/lib/" ;;
        esac
    done
    git rev-parse --short HEAD >"$stage/commit"
}

check() {
    local out=${OUT:-bench/results} cublas status=0 program
    mkdir -p "$out"
    cublas=$(find /usr/local/cuda*/ /opt -name 'libcublasLt.so.1[3-9]' 2>/dev/null | head -n 1)
    export LD_LIBRARY_PATH=$PWD/$stage/lib:$(dirname "${cublas:-.}") SSM_SOURCE=$PWD
    {
        echo "commit $(cat "$stage/commit"), $(date -u +%FT%TZ)"
        nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
        for program in "$stage"/bin/*_test; do
            echo "== $(basename "$program")"
            "$program" --gtest_brief=1 || status=1
        done
        if command -v compute-sanitizer >/dev/null; then
            for program in "$stage"/bin/*_test; do
                echo "== compute-sanitizer $(basename "$program")"
                compute-sanitizer --error-exitcode 1 "$program" --gtest_brief=1 2>&1 | tail -n 3 || status=1
            done
        fi
        for program in "$stage"/bin/*_bench; do
            [[ -x $program ]] || continue
            echo "== $(basename "$program")"
            "$program" || status=1
        done
        for type in f32 bf16; do
            "$stage/bin/ssm" bench --device cuda --shape mamba-130m --dtype $type --json || status=1
        done
    } 2>&1 | tee "$out/gpu_check.log"
    return $status
}

case $mode in
all) build && gather && check ;;
stage) build && gather ;;
staged) check ;;
*) echo "usage: tools/gpu_check.sh [stage|staged]" >&2 && exit 2 ;;
esac
