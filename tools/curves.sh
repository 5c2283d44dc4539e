#!/bin/sh
# Trains a small Mamba and a small Mamba-2 for 200 steps on the texts of this repository, for the comparison of
# devices: tools/compare_curves.py, tools/plot_curve.py.
#
#     tools/curves.sh SSM TEXT OUT NAME --device cuda --dtype bf16      writes OUT/{mamba,mamba2}-NAME.jsonl
#
# TEXT is made where it is not there (in a checkout).
set -e
ssm=$1 text=$2 out=$3 name=$4
shift 4
[ -f "$text" ] || git ls-files '*.md' | LC_ALL=C sort | xargs cat > "$text"
run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT
for arch in mamba mamba2; do
    "$ssm" train --arch $arch --d-model 256 --layers 4 --data "$text" --length 256 --batch 4 --seed 1 \
        --steps 200 --warmup 20 --lr 1e-3 --log-every 1 --checkpoint-every 0 --quiet --out "$run/$arch" "$@"
    cp "$run/$arch/metrics.jsonl" "$out/$arch-$name.jsonl"
done
