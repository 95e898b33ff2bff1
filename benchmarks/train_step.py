"""What makes a training step on a CPU fast: bfloat16 against float32, and keeping freed memory against giving it back.

    python benchmarks/train_step.py

Every variant runs in a process of its own (the allocator is set before it starts), all in turn, several times; the table gives
medians as ratios to the plain way (float32, the allocator's defaults). The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time

ROUNDS = 3
STEPS = 6
BATCH_SIZE = 32


def measure(precision: str) -> float:
    """Median seconds of forward and backward of `tiny` on one batch."""
    import torch

    from paella.config import PRESETS
    from paella.training import NoiseConfig, TextToTokens, draw_noise, loss_and_metrics

    torch.manual_seed(0)
    model = TextToTokens(PRESETS["tiny"])
    if precision == "bf16":
        model = model.bfloat16()
    tokens = torch.randint(PRESETS["tiny"].unet.num_labels, (BATCH_SIZE, 16, 16))
    text = model.text.tokenize(["a small red circle left of a large blue square on a black background"] * BATCH_SIZE)
    draws = draw_noise(tokens, PRESETS["tiny"].unet.num_labels, 0, range(BATCH_SIZE), NoiseConfig())
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        losses = model.losses(tokens, draws.noised, draws.t, text.ids, text.mask, draws.keep, label_smoothing=0.1)
        loss_and_metrics(*losses, draws)[0].backward()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def main() -> None:
    from pipelines.cli import WORKER_ENVIRONMENT

    variants = {
        "float32": ("float32", {}),
        "float32, memory kept": ("float32", WORKER_ENVIRONMENT),
        "bf16": ("bf16", {}),
        "bf16, memory kept": ("bf16", WORKER_ENVIRONMENT),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, (precision, environment) in variants.items():
            output = subprocess.check_output([sys.executable, __file__, precision], env=os.environ | environment, text=True)
            seconds[name].append(float(output))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    plain = medians["float32"]
    print(f"{'variant':24} {'s/step':>8} {'images/s':>9} {'speed':>7}")
    for name, value in medians.items():
        print(f"{name:24} {value:8.3f} {BATCH_SIZE / value:9.1f} {plain / value:6.2f}x")
    print(json.dumps({"batch_size": BATCH_SIZE, "seconds": medians, "speed": {n: plain / v for n, v in medians.items()}}))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(measure(sys.argv[1]))
    else:
        main()
