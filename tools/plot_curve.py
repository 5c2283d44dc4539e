#!/usr/bin/env python3
"""Draws the loss of runs (metrics.jsonl of `ssm train` or `ssm task`) over their tokens, as SVG, by gnuplot.

    tools/plot_curve.py RUN/metrics.jsonl curve.svg
    tools/plot_curve.py cpu=A/metrics.jsonl cuda=B/metrics.jsonl curve.svg
"""
import json
import subprocess
import sys

STYLE = """
set terminal svg size 760,360 dynamic background "white" font "DejaVu Sans,13"
set grid
set border 3
set tics nomirror
set key top right
"""
COLOURS = ["#1f6feb", "#bf8700", "#1a7f37", "#8250df"]


def read(path):
    with open(path) as lines:
        return [json.loads(line) for line in lines]


def curve(rows, column):
    return "".join(f'{r["tokens"] * 1e-6} {r[column]}\n' for r in rows if column in r) + "e\n"


def main() -> int:
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    script = STYLE + f'set output "{sys.argv[-1]}"\n'
    script += 'set xlabel "million tokens"\nset ylabel "loss, nats a token"\n'
    plots, data = [], ""
    for i, argument in enumerate(sys.argv[1:-1]):
        name, _, path = argument.rpartition("=")
        rows = read(path)
        colour = COLOURS[i % len(COLOURS)]
        plots.append(f'"-" using 1:2 with lines lw 1.5 lc rgb "{colour}" title "{name or "training"}"')
        data += curve(rows, "loss")
        if not name and any("valid_loss" in r for r in rows):
            plots.append('"-" using 1:2 with linespoints lw 1.5 lc rgb "#d1242f" title "validation"')
            data += curve(rows, "valid_loss")
    script += "plot " + ", ".join(plots) + "\n" + data
    return subprocess.run(["gnuplot"], input=script, text=True, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
