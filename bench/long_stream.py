#!/usr/bin/env python3
"""Streams one sequence of growing length through `ssm eval --carry-state`; prints time per token and peak memory.

    bench/long_stream.py build/release/bin/ssm [MODEL]        writes one JSON line a length

Short lengths take milliseconds: of those the median of several runs counts.
"""
import array
import json
import os
import statistics
import subprocess
import sys
import tempfile

program, model = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "models/stories"
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "ids.bin")
    for length in (1_000, 10_000, 100_000, 1_000_000):
        # A fixed sequence of ids that every vocabulary has.
        state, ids = 1, array.array("H")
        for _ in range(length + 1):
            state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
            ids.append((state >> 33) % 256)
        with open(path, "wb") as file:
            ids.tofile(file)
        command = [program, "eval", "--model", model, "--ids", path, "--window", "512", "--carry-state", "--json"]
        times, peak = [], 0
        for _ in range(11 if length <= 10_000 else 3 if length <= 100_000 else 1):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            output = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            if status != 0:
                sys.exit(f"{command} failed")
            result = json.loads(output)
            times.append(1e6 / result["tokens_per_second"])
            peak = max(peak, usage.ru_maxrss / 1024)
        print(json.dumps({"tokens": result["tokens"], "microseconds_per_token": statistics.median(times),
                          "runs": len(times), "mean_nll": result["mean_nll"], "peak_megabytes": peak}), flush=True)
