"""How long the published training run takes on other hardware, from counted FLOPs: the table in docs/scaling.md.

    python benchmarks/projection.py

Nothing is timed: the arithmetic of `paella-1b` is counted on the meta device, utilisation (MFU) is assumed. Rows are ratios to
the published run (11.5 images/s on each of 128 A100s); the last line is one JSON object.
"""

from __future__ import annotations

import json

from paella.config import PRESETS
from paella.flops import PEAK_TFLOPS, TEXT_TOKENS, training_flops

IMAGES = 1_300_000 * 2048
PUBLISHED_RATE = 11.5
MFUS = (0.266, 0.3, 0.4, 0.5)
GPUS = (8, 32, 128)


def main() -> None:
    flops = training_flops(PRESETS["paella-1b"])
    peak = PEAK_TFLOPS["A100"] * 1e12
    print(f"paella-1b: {flops / 1e12:.3f} TFLOP an image with {TEXT_TOKENS} text tokens; {IMAGES / 1e9:.2f} billion images\n")
    print("| MFU | images/s per A100 | against 11.5 | A100-hours | days on 8 | on 32 | on 128 |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for mfu in (PUBLISHED_RATE * flops / peak, *MFUS):
        rate = mfu * peak / flops
        hours = IMAGES / rate / 3600
        days = [hours / 24 / gpus for gpus in GPUS]
        rows.append({"mfu": mfu, "images_per_s": rate, "gpu_hours": hours, "days": dict(zip(GPUS, days, strict=True))})
        cells = [f"{mfu:.1%}", f"{rate:.1f}", f"{rate / PUBLISHED_RATE:.1f}×", f"{hours:,.0f}", *(f"{day:.1f}" for day in days)]
        print(f"| {' | '.join(cells)} |")
    print(json.dumps({"benchmark": "projection", "flops_per_image": flops, "rows": rows}))


if __name__ == "__main__":
    main()
