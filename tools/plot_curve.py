#!/usr/bin/env python3
"""Draws the loss of a run (metrics.jsonl of `ssm train` or `ssm task`) over its tokens, as SVG, by gnuplot.

    tools/plot_curve.py RUN/metrics.jsonl curve.svg
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


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    with open(sys.argv[1]) as lines:
        rows = [json.loads(line) for line in lines]
    script = STYLE + f'set output "{sys.argv[2]}"\n'
    script += 'set xlabel "million tokens"\nset ylabel "loss, nats a token"\n'
    plots = ['"-" using 1:2 with lines lw 1.5 lc rgb "#1f6feb" title "training"']
    data = "".join(f'{r["tokens"] * 1e-6} {r["loss"]}\n' for r in rows) + "e\n"
    validated = [r for r in rows if "valid_loss" in r]
    if validated:
        plots.append('"-" using 1:2 with linespoints lw 1.5 lc rgb "#d1242f" title "validation"')
        data += "".join(f'{r["tokens"] * 1e-6} {r["valid_loss"]}\n' for r in validated) + "e\n"
    script += "plot " + ", ".join(plots) + "\n" + data
    return subprocess.run(["gnuplot"], input=script, text=True, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
