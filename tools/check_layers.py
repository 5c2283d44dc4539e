#!/usr/bin/env python3
"""Fails when an #include points against the layers (STYLE: an arrow means "may include")."""
import pathlib
import re
import subprocess
import sys

MAY_INCLUDE = {
    "core": set(),
    "ops": {"core"},
    "autograd": {"core", "ops"},
    "io": {"core"},
    "nn": {"core", "ops", "autograd"},
    "models": {"core", "ops", "autograd", "nn", "io"},
    "generate": {"core", "ops", "autograd", "nn", "io", "models"},
    "train": {"core", "ops", "autograd", "nn", "io", "models"},
    "tasks": {"core", "ops", "autograd", "nn", "io", "models", "train"},
    "apps": {"core", "ops", "autograd", "nn", "io", "models", "generate", "train", "tasks"},
}
TEST = re.compile(r"(_test|_bench|_fuzz|_reference|test_files)\b|^tests/")


def layer(path):
    parts = pathlib.PurePosixPath(path).parts
    if parts[0] == "ssm" and len(parts) > 2:
        return parts[1]
    return "apps" if parts[0] == "apps" else None


def main():
    files = subprocess.run(["git", "ls-files", "*.h", "*.cpp", "*.cu"], capture_output=True, text=True, check=True)
    wrong = []
    for name in files.stdout.split():
        source = layer(name)
        for number, line in enumerate(pathlib.Path(name).read_text().splitlines(), 1):
            match = re.match(r'\s*#\s*include\s+["<]([^">]+)[">]', line)
            if not match:
                continue
            target_path = match.group(1)
            target = layer(target_path)
            is_test = TEST.search(name) is not None
            if target_path.startswith("tests/") and not is_test:
                wrong.append(f"{name}:{number}: only tests may include {target_path}")
            elif source and source not in MAY_INCLUDE:
                wrong.append(f"{name}: unknown layer '{source}'")
            elif source and target and target != source and target not in MAY_INCLUDE[source] and not is_test:
                wrong.append(f"{name}:{number}: {source} may not include {target_path}")
    print("\n".join(sorted(set(wrong))) or "layers: every include points down")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
