#!/usr/bin/env python3
"""Draws over the length of one sequence the time and memory of reading it and the time of a step of writing after it,
from the runs with --depth of a gpu.json (tools/gpu_check.sh), as SVG, by gnuplot.

    tools/plot_lengths.py bench/results/2026-11-23-gpu.json docs/images/length.svg
"""
import json
import subprocess
import sys

STYLE = """
set terminal svg size 760,360 dynamic background "white" font "DejaVu Sans,13"
set grid
set tics nomirror
set key top left
set logscale xyy2
set xlabel "tokens"
set ylabel "milliseconds"
set y2label "gigabytes"
set y2tics
set format x "%.0s%c"
"""


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    with open(sys.argv[1]) as file:
        runs = [run for run in json.load(file)["runs"] if run["options"].startswith("--depth")]
    rows = []
    for run in runs:
        reading, writing = run["results"]
        tokens = int(reading["test"][2:])
        rows.append((tokens, 1e3 * tokens / reading["tokens_per_second"], reading["peak_gigabytes"],
                     writing["milliseconds_per_step"]))
    data = "".join(f"{t} {ms} {gb} {step}\n" for t, ms, gb, step in rows) + "e\n"
    script = STYLE + f'set output "{sys.argv[2]}"\n'
    script += ('set yrange [0.1:*]\nplot "-" using 1:2 with linespoints lw 2 pt 7 lc rgb "#1f6feb" title "time to read", '
               '"-" using 1:4 with linespoints lw 2 pt 9 lc rgb "#8250df" title "time of a step of writing", '
               '"-" using 1:3 axes x1y2 with linespoints lw 2 pt 5 lc rgb "#d1242f" title "memory (right)"\n')
    return subprocess.run(["gnuplot"], input=script + 3 * data, text=True, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
