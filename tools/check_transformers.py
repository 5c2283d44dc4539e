#!/usr/bin/env python3
"""Loads model folders in Hugging Face transformers and compares them with expected.safetensors beside them.

    ssm train ... --out RUN            a model that this project trained
    ssm verify RUN --record            writes RUN/expected.safetensors: logits, loss, gradients, greedy ids
    python3 tools/check_transformers.py RUN...

Runs on a machine with torch and transformers; prints a line per quantity, exits 1 past the tolerances (relative L2:
logits 1e-4, loss 1e-4, each gradient 1e-3; greedy ids equal).
"""
import sys

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def relative_l2(actual, expected):
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def check(folder):
    expected = load_file(f"{folder}/expected.safetensors")
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model.eval()
    problems = {k: sorted(v) for k, v in info.items() if v}
    failures = [f"loading: {problems}"] if problems else []
    ids = expected["input_ids"]
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    rows = [("logits", relative_l2(out.logits.detach(), expected["logits"]), 1e-4),
            ("loss", relative_l2(out.loss.detach(), expected["loss"]), 1e-4)]
    parameters = dict(model.named_parameters())
    for key in sorted(expected):
        if key.startswith("grad."):
            rows.append((key, relative_l2(parameters[key[5:]].grad, expected[key]), 1e-3))
    missing = [name for name in parameters if f"grad.{name}" not in expected]
    if missing:
        failures.append(f"parameters that ssm does not have: {missing}")
    for name, error, tolerance in rows:
        if not error <= tolerance:
            failures.append(f"{name}: {error:.3g}")
    greedy = expected["greedy"]
    prompt = 0
    while prompt < min(greedy.shape[1], ids.shape[1]) and greedy[0, prompt] == ids[0, prompt]:
        prompt += 1
    with torch.no_grad():
        tokens = greedy[:, :prompt]
        while tokens.shape[1] < greedy.shape[1]:
            logits = model(input_ids=tokens, use_cache=False).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    differing = int((tokens != greedy).sum())
    if differing:
        failures.append(f"greedy: {differing} ids differ")
    worst = max((r for r in rows if r[0].startswith("grad.")), key=lambda r: r[1])
    print(f"{folder}: {type(model).__name__}, {sum(p.numel() for p in parameters.values())} parameters")
    print(f"  logits {rows[0][1]:.3g}   loss {rows[1][1]:.3g}   worst gradient {worst[1]:.3g} ({worst[0]})   "
          f"greedy: {differing} of {greedy.shape[1] - prompt} ids differ")
    for failure in failures:
        print(f"  FAIL {failure}")
    return not failures


if __name__ == "__main__":
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(0 if all([check(folder) for folder in sys.argv[1:]]) else 1)
