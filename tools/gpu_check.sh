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
    local ssm="$stage/bin/ssm bench --device cuda --dtype bf16 --json" shape length
    run() { # shape, options that count, the rest
        echo "{\"shape\": \"$1\", \"options\": \"$2\", \"results\": $($ssm --shape "$1" $2 $3 | tr -d '\n')}"
    }
    for shape in mamba-130m mamba2-130m; do
        for recompute in none cheap layers; do
            run $shape "--recompute $recompute" "--train-length 2048 --train-batch 8"
        done
    done
    for shape in mamba-130m mamba2-130m mamba-1.4b mamba2-1.3b; do
        run $shape "" "--pp 2048 --tg 128 --batch 1,8,128 --repeats 3"
        run $shape "--state-dtype bf16" "--pp 0 --tg 128 --batch 1,128 --repeats 3"
    done
    for length in 1024 4096 16384 65536 262144 1048576; do
        run mamba-130m "--depth $length" "--pp $length --tg 64 --repeats 3"
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

# Every test in a process of its own, as many beside each other as there are cores: under the sanitizer a program of many
# kernels takes minutes. Out of memory is asked for by a test; everything else counts.
sanitize() {
    local program count shard
    prepare
    rm -f "$stage"/*.sanitized.log
    for program in "$stage"/bin/*_test; do
        count=$("$program" --gtest_list_tests | grep -c '^  ')
        for ((shard = 0; shard < count; ++shard)); do echo "$program $count $shard"; done
    done >"$stage/sanitize.list"
    # shellcheck disable=SC2016
    xargs -P "$(nproc)" -L 1 bash -c 'GTEST_TOTAL_SHARDS=$2 GTEST_SHARD_INDEX=$3 compute-sanitizer --error-exitcode 1 \
        --report-api-errors no "$1" --gtest_brief=1 >"$0/$(basename "$1").$3.sanitized.log" 2>&1' "$stage" \
        <"$stage/sanitize.list" || true
    sanitized | tee "$out/gpu_sanitize.log"
    ! grep -q FAILED "$out/gpu_sanitize.log"
}

# A line for each program: how many of its tests ended without an error.
sanitized() {
    local program name all clean log
    for program in "$stage"/bin/*_test; do
        name=$(basename "$program")
        all=$(grep -c "^$program " "$stage/sanitize.list")
        clean=$( (grep -l 'ERROR SUMMARY: 0 errors' "$stage/$name".*.sanitized.log || true) | wc -l)
        echo "$name: $clean of $all tests without an error"
        [[ $clean == "$all" ]] || for log in "$stage/$name".*.sanitized.log; do
            grep -q 'ERROR SUMMARY: 0 errors' "$log" || { echo "FAILED: $name" && tail -n 20 "$log"; }
        done
    done
}

case $mode in
all) build && gather && check ;;
stage) build && gather ;;
staged) check ;;
sanitize) sanitize ;;
*) echo "usage: tools/gpu_check.sh [stage|staged|sanitize]" >&2 && exit 2 ;;
esac
