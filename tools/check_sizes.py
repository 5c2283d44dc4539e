#!/usr/bin/env python3
"""Sizes and characters of sources. Limits: file 500 lines, header 200, function 60. Fails past twice that, unless
tools/size_allow.txt has a line "path: reason". Sources are ASCII and hold no absolute path of a home or work folder."""
import pathlib
import re
import subprocess
import sys

FILE, HEADER, FUNCTION = 500, 200, 60
ABSOLUTE = re.compile(r"(?<![\w.])/(?:home|work|root|Users)/\w")
SIGNATURE = re.compile(r"^(?:[A-Za-z_].*\)|\)|\s{4,}.*\))(?:\s*(?:const|noexcept|override|final))*\s*\{$")


def functions(lines):
    """(first line, length) of top-level braces that follow a parameter list: close enough to count."""
    depth, start = 0, None
    for number, line in enumerate(lines, 1):
        if start is None and depth == 0 and SIGNATURE.match(line) and not line.startswith(("namespace", " ")):
            start = number
        if not line.startswith(("namespace", "}  // namespace", "extern")):
            depth += line.count("{") - line.count("}")
        if start is not None and depth <= 0:
            yield start, number - start + 1
            start, depth = None, 0


def main():
    allowed = {}
    allow = pathlib.Path("tools/size_allow.txt")
    if allow.exists():
        for line in allow.read_text().splitlines():
            if ":" in line and not line.startswith("#"):
                path, reason = line.split(":", 1)
                allowed[path.strip()] = reason.strip()
    wrong = []
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, listed):
        path = pathlib.Path(name)
        code = path.suffix in {".h", ".cpp", ".cu", ".cuh"}
        script = path.suffix in {".py", ".sh", ".cmake"} or path.name == "CMakeLists.txt" or name == ".ci/run"
        prose = path.suffix in {".md", ".json", ".log"} and path.name != "tokenizer.json"
        if not code and not script and not prose:
            continue
        text = path.read_text()
        for number, line in enumerate(text.splitlines(), 1):
            if not line.isascii() and not prose:
                wrong.append(f"{name}:{number}: not ASCII")
            if ABSOLUTE.search(line) and name != "tools/check_sizes.py":
                wrong.append(f"{name}:{number}: absolute path")
        if not code or name in allowed:
            continue
        lines = text.splitlines()
        limit = 2 * (HEADER if path.suffix == ".h" else FILE)
        if len(lines) > limit:
            wrong.append(f"{name}: {len(lines)} lines (at most {limit})")
        if not re.search(r"_(test|bench|fuzz)$", path.stem):
            wrong += [f"{name}:{at}: a function of {n} lines (at most {2 * FUNCTION})"
                      for at, n in functions(lines) if n > 2 * FUNCTION]
    print("\n".join(wrong) or "sizes: within the limits; sources are ASCII")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
