"""How good a small f4 VQGAN gets in minutes on a CPU, learned codes against FSQ: on scenes and on a photograph it has not seen.

    python benchmarks/train_vqgan.py --steps 2500 --quantizers codebook    # 20 minutes on 2 cores with AVX2
    python benchmarks/train_vqgan.py --steps 2600 --quantizers fsq         # 8 to 11 minutes there

`tiny` with 1,024 codes (FSQ: 8·5·5·5, what arXiv 2309.15505 has in place of 2^10) is trained on half scenes, half crops of the
photographs that scikit-learn and matplotlib carry, all but one. The table gives PSNR as ratios to the bars, 30 dB on held-out
scenes and 24 dB on the held-out photograph's crops, and the share of codes in use on both; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import sklearn.datasets
import torch
from PIL import Image

from paella import metrics
from paella.bundle import load_vqgan
from paella.config import PRESETS
from paella.images import to_tensor
from paella.vq_losses import VQLossConfig
from paella.vqgan import VQModel
from pipelines import scenes, train_vqgan

SIDE = 64
BARS = {"scenes": 30.0, "photograph": 24.0}
PHOTOGRAPHS = {
    "china": Path(sklearn.datasets.__file__).parent / "images" / "china.jpg",
    "flower": Path(sklearn.datasets.__file__).parent / "images" / "flower.jpg",
    "grace_hopper": Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg",
}
TINY = PRESETS["tiny"].vqgan
FSQ = dataclasses.replace(TINY, codebook_size=1000, c_latent=4, quantizer="fsq", fsq_levels=(8, 5, 5, 5))
PRESET = train_vqgan.presets()["tiny"]
SETTINGS: dict[str, dict[str, Any]] = {
    "codebook": {"model": dataclasses.replace(TINY, codebook_size=1024), "ema_decay": 0.995},
    # fixed codes do not come to the latents: the encoder has a longer way, for which it gets more and longer steps
    "fsq": {
        "model": FSQ,
        "batch_size": 16,
        "ema_decay": 0.9975,
        "optim": dataclasses.replace(PRESET.optim, lr=6e-3),
        "loss": VQLossConfig(l1=0, l2=40, edges=0),
    },
}


def crops(names: list[str], num: int, seed: int) -> Iterator[np.ndarray]:
    """Random crops of photographs, at full and at half resolution."""
    rng = np.random.default_rng(seed)
    full = [Image.open(PHOTOGRAPHS[name]).convert("RGB") for name in names]
    photographs = [np.asarray(image) for image in full] + [np.asarray(image.reduce(2)) for image in full]
    for _ in range(num):
        image = photographs[rng.integers(len(photographs))]
        top, left = (int(rng.integers(side - SIDE + 1)) for side in image.shape[:2])
        yield image[top : top + SIDE, left : left + SIDE]


def training_set(path: Path, names: list[str], num: int) -> Path:
    """Scenes and crops side by side, in PNG files."""
    path.mkdir()
    pictures = (image for _, image in scenes.scenes(num // 2, seed=0, held_out=False))
    for number, pair in enumerate(zip(pictures, crops(names, num // 2, seed=0), strict=True)):
        for kind, image in zip("sp", pair, strict=True):
            Image.fromarray(image).save(path / f"{number:05d}{kind}.png", compress_level=1)
            (path / f"{number:05d}{kind}.txt").write_text("a picture")
    return path


@torch.inference_mode()
def measure(model: VQModel, sets: dict[str, np.ndarray]) -> dict[str, float]:
    """PSNR on each held-out set, and the share of codes in use on all of them."""
    values, indices = {}, []
    for name, images in sets.items():
        tokens = [model.encode(to_tensor(part)) for part in np.array_split(images, 16)]
        outputs = torch.cat([model.decode_indices(part).clamp(0, 1) for part in tokens])
        values[name] = metrics.psnr(outputs, to_tensor(images)).mean().item()
        indices += tokens
    return values | {"codes_in_use": metrics.codebook_use(torch.cat(indices), model.config.codebook_size)[0]}


def train(kind: str, data: Path, output: Path, steps: int, seed: int, workers: int) -> tuple[VQModel, float]:
    """A trained VQGAN, and the seconds that took, start of Ray included."""
    began = time.monotonic()
    places = {"data": str(data), "output": str(output)}
    same = {"encoder_context": True, "steps": steps, "seed": seed, "num_workers": workers}
    config = dataclasses.replace(PRESET, **places, **same, **SETTINGS[kind])
    return load_vqgan(str(train_vqgan.run(config)))[0], time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--images", type=int, default=12_000)
    parser.add_argument("--held-out", choices=PHOTOGRAPHS, default="grace_hopper")
    parser.add_argument("--quantizers", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    others = [name for name in PHOTOGRAPHS if name != arguments.held_out]
    sets = {
        "scenes": np.stack([image for _, image in scenes.scenes(512, seed=1, held_out=True)]),
        "photograph": np.stack(list(crops([arguments.held_out], 512, seed=1))),
    }
    rows = []
    with tempfile.TemporaryDirectory() as root:
        data = training_set(Path(root, "images"), others, arguments.images)
        for kind in arguments.quantizers:
            for seed in arguments.seeds:
                model, seconds = train(kind, data, Path(root, f"{kind}-{seed}"), arguments.steps, seed, arguments.workers)
                rows.append({"quantizer": kind, "seed": seed, "steps": arguments.steps, "seconds": round(seconds)})
                rows[-1] |= measure(model, sets)
    print(f"\nheld out: {arguments.held_out}, {arguments.images} training images of {SIDE} pixels\n")
    print("quantizer  seed  steps  minutes  scenes          photograph      codes in use")
    for row in rows:
        against = "  ".join(f"{row[name]:5.1f} dB ({row[name] / bar:.2f}×)" for name, bar in BARS.items())
        shown = f"{row['quantizer']:9}  {row['seed']:4}  {row['steps']:5}  {row['seconds'] / 60:7.1f}"
        print(f"{shown}  {against}  {row['codes_in_use']:.1%}")
    print(json.dumps({"benchmark": "train_vqgan", "held_out": arguments.held_out, "rows": rows}))


if __name__ == "__main__":
    main()
