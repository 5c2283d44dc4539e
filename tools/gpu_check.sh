#!/usr/bin/env bash
# Tests and measures the CUDA build on this machine's GPU; the results go to bench/results.
#
#   tools/gpu_check.sh            builds (preset cuda), then checks
#   tools/gpu_check.sh stage      builds, and gathers programs and libraries in build/gpu, to be carried elsewhere
#   tools/gpu_check.sh staged     checks what build/gpu holds: a machine with a GPU, but without the dependencies
#   tools/gpu_check.sh sanitize   the staged tests again under compute-sanitizer (slow)
#
# Leaves gpu_check.log, and gpu.json: machine, commit, and what `ssm bench` says of training and decoding.
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

prepare() {
    local cublas
    out=${OUT:-bench/results}
    mkdir -p "$out"
    cublas=$(find /usr/local/cuda*/ /opt -name 'libcublasLt.so.1[3-9]' 2>/dev/null | head -n 1)
    [[ -n $cublas ]] || cublas=$(find / -name 'libcublasLt.so.1[3-9]' -not -path '/proc/*' 2>/dev/null | head -n 1)
    export LD_LIBRARY_PATH=$PWD/$stage/lib:$(dirname "${cublas:-.}") SSM_SOURCE=${SSM_SOURCE:-$PWD}
}

# Each program with a log of its own, beside the others: most of their time is the CPU's, which they compare with.
tests() {
    local program name status=0
    rm -f "$stage"/*.test.log
    for program in "$stage"/bin/*_test; do
        name=$(basename "$program")
        { OMP_NUM_THREADS=2 "$program" --gtest_brief=1 || echo "FAILED: $name"; } >"$stage/$name.test.log" 2>&1 &
    done
    wait
    for program in "$stage"/*.test.log; do
        echo "== $(basename "$program" .test.log)"
        head -n 40 "$program" | cut -c1-300
        ! grep -q '^FAILED: ' "$program" || status=1
    done
    return $status
}

# One JSON value a line, in the order of the arguments' groups.
measure() {
    local ssm="$stage/bin/ssm bench --device cuda --dtype bf16 --json" shape extra
    for shape in mamba-130m mamba2-130m; do
        for extra in "" --recompute; do
            echo "{\"shape\": \"$shape\", \"options\": \"$extra\", \"results\": $($ssm --shape $shape --train-length 2048 --train-batch 8 $extra | tr -d '\n')}"
        done
    done
    for shape in mamba-130m mamba2-130m mamba-1.4b mamba2-1.3b; do
        echo "{\"shape\": \"$shape\", \"options\": \"\", \"results\": $($ssm --shape $shape --pp 2048 --tg 128 --batch 1,8,128 --repeats 3 | tr -d '\n')}"
    done
    for length in 1024 4096 16384 65536 262144 1048576; do
        echo "{\"shape\": \"mamba-130m\", \"options\": \"length\", \"results\": $($ssm --shape mamba-130m --pp $length --tg 64 --depth $length --repeats 3 | tr -d '\n')}"
    done
}

check() {
    local status=0 program
    prepare
    {
        echo "commit $(cat "$stage/commit"), $(date -u +%FT%TZ)"
        nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
        "$stage/bin/ssm" doctor || status=1
        tests || status=1
        measure >"$stage/measured.jsonl" || status=1
        python3 - "$stage" "$out/gpu.json" <<'PY' || status=1
import json, subprocess, sys
stage, out = sys.argv[1:]
gpu = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True)
json.dump({"machine": gpu.stdout.strip(), "commit": open(stage + "/commit").read().strip(),
           "runs": [json.loads(line) for line in open(stage + "/measured.jsonl")]},
          open(out, "w"), indent=1)
PY
        for program in "$stage"/bin/*_bench; do
            [[ -x $program ]] || continue
            echo "== $(basename "$program")"
            "$program" || status=1
        done
    } 2>&1 | tee "$out/gpu_check.log"
    return $status
}

# Out of memory is asked for by a test; everything else counts.
sanitize() {
    local program status=0
    prepare
    for program in "$stage"/bin/*_test; do
        compute-sanitizer --error-exitcode 1 --report-api-errors no "$program" --gtest_brief=1 \
            >"$stage/$(basename "$program").sanitized.log" 2>&1 &
    done
    wait
    for program in "$stage"/bin/*_test; do
        echo "== compute-sanitizer $(basename "$program")"
        tail -n 3 "$stage/$(basename "$program").sanitized.log"
        grep -q 'ERROR SUMMARY: 0 errors' "$stage/$(basename "$program").sanitized.log" || status=1
    done >"$out/gpu_sanitize.log"
    cat "$out/gpu_sanitize.log"
    return $status
}

case $mode in
all) build && gather && check ;;
stage) build && gather ;;
staged) check ;;
sanitize) sanitize ;;
*) echo "usage: tools/gpu_check.sh [stage|staged|sanitize]" >&2 && exit 2 ;;
esac
