#!/usr/bin/env python3
"""Draws what a command printed as a terminal window:  ./run.sh 2>&1 | tools/terminal_picture.py '$ ./run.sh' > x.svg"""
import html
import sys
import textwrap

COLUMNS, LINE, CHARACTER = 100, 19, 8.43


def main():
    lines = list(sys.argv[1:])
    for line in sys.stdin.read().rstrip("\n").split("\n"):
        lines += textwrap.wrap(line, COLUMNS, drop_whitespace=False) or [""]
    width, height = int(COLUMNS * CHARACTER) + 40, len(lines) * LINE + 62
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
           f'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="14">',
           f'<rect width="{width}" height="{height}" rx="8" fill="#16181d"/>']
    for i, colour in enumerate(("#ff5f57", "#febc2e", "#28c840")):
        out.append(f'<circle cx="{22 + 20 * i}" cy="20" r="6" fill="{colour}"/>')
    for i, line in enumerate(lines):
        colour = "#7ee787" if line.startswith("$ ") else "#8b949e" if line.startswith("== ") else "#e6edf3"
        out.append(f'<text x="20" y="{56 + i * LINE}" fill="{colour}" xml:space="preserve">{html.escape(line)}</text>')
    print("\n".join(out + ["</svg>"]))


if __name__ == "__main__":
    main()
