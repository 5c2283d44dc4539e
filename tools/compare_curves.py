#!/usr/bin/env python3
"""How far the losses of a run are from another's, step by step (metrics.jsonl of `ssm train --log-every 1`).

    tools/compare_curves.py CPU/metrics.jsonl CUDA/metrics.jsonl [LARGEST]

Prints the largest and the root mean square relative difference; exits 1 where the largest exceeds LARGEST.
"""
import json
import sys


def losses(path):
    with open(path) as lines:
        rows = [json.loads(line) for line in lines]
    return {r["step"]: r["loss"] for r in rows}


def main() -> int:
    if len(sys.argv) not in (3, 4):
        print(__doc__, file=sys.stderr)
        return 2
    a, b = losses(sys.argv[1]), losses(sys.argv[2])
    if a.keys() != b.keys() or not a:
        print("the runs have not the same steps", file=sys.stderr)
        return 1
    apart = {step: abs(b[step] / a[step] - 1) for step in a}
    worst = max(apart, key=apart.get)
    square = (sum(x * x for x in apart.values()) / len(apart)) ** 0.5
    print(f"{len(a)} steps, loss {a[min(a)]:.4f} to {a[max(a)]:.4f} and {b[max(b)]:.4f}; "
          f"furthest apart {apart[worst]:.2e} at step {worst}, root mean square {square:.2e}")
    return len(sys.argv) == 4 and apart[worst] > float(sys.argv[3])


if __name__ == "__main__":
    sys.exit(main())
