"""How fast the VQGAN encodes: ours against the plain way, which lays feature maps out channels-first, multiplies by PyTorch's
linear layers, scales and adds in operations of their own, and builds the distances of all vectors to all codes at once.

    python benchmarks/vqgan.py

The published f4 model's size on random weights, images of 256 pixels; everything in one process, in turn. The last line is
one JSON object.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from paella.blocks import EPS
from paella.config import PRESETS
from paella.vqgan import VQModel, VQResBlock

ROUNDS = 5
IMAGES, SIDE = 2, 256


def build() -> VQModel:
    torch.manual_seed(0)
    model = VQModel(PRESETS["paella-1b"].vqgan).eval().requires_grad_(False)
    model.vquantizer.codebook.weight.normal_()
    return model


def plain_nearest(model: VQModel, latents: Tensor) -> Tensor:
    """Distances as published: |x|² + |c|² − 2xc for all vectors and codes, and their minimum."""
    codes = model.vquantizer.codebook.weight
    flat = latents.permute(0, 2, 3, 1).reshape(-1, codes.shape[1])
    distances = flat.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * flat @ codes.T
    return distances.min(1).indices.view(latents.shape[0], *latents.shape[2:])


def plain_block(block: VQResBlock, x: Tensor) -> Tensor:
    """A residual block as its formula reads, (B,C,H,W) between all of its parts."""
    g = block.gammas
    norm = lambda x: F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=EPS).permute(0, 3, 1, 2)  # noqa: E731
    x = x + block.depthwise(norm(x) * (1 + g[0]) + g[1]) * g[2]
    y = norm(x) * (1 + g[3]) + g[4]
    return x + block.channelwise(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * g[5]


@mock.patch("paella.blocks._by_onednn", lambda x: False)
@mock.patch.object(VQResBlock, "forward", plain_block)
def plain_encode(model: VQModel, images: Tensor) -> Tensor:
    return plain_nearest(model, model.down_blocks(model.in_block(images)))


def timed(function: Callable[[], object]) -> float:
    function()
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


@torch.inference_mode()
def main() -> None:
    model = build()
    images = torch.rand(IMAGES, 3, SIDE, SIDE)
    latents = model.encode_latents(images[:1])
    seconds = {
        "nearest code": (timed(lambda: plain_nearest(model, latents)), timed(lambda: model.vquantizer.nearest(latents))),
        "encode": (timed(lambda: plain_encode(model, images)), timed(lambda: model.encode(images))),
    }
    same_nearest = torch.equal(plain_nearest(model, latents), model.vquantizer.nearest(latents))
    same = (plain_encode(model, images) == model.encode(images)).float().mean().item()
    print(f"{'':16} {'plain s':>9} {'ours s':>9} {'speed':>7}")
    for name, (plain, ours) in seconds.items():
        print(f"{name:16} {plain:9.4f} {ours:9.4f} {plain / ours:6.2f}x")
    print(f"indices: nearest code alone {'identical' if same_nearest else 'NOT identical'}, encode {same:.4%} equal")
    peak = int(subprocess.check_output([sys.executable, __file__, "memory"], text=True))
    print(f"peak memory of a process that encodes 32 images of {SIDE} pixels: {peak / 1e9:.2f} GB")
    figures = {name: {"plain_s": plain, "ours_s": ours, "speed": plain / ours} for name, (plain, ours) in seconds.items()}
    print(json.dumps({**figures, "identical": same_nearest, "encode_equal": same, "peak_bytes": peak}))


@torch.inference_mode()
def memory() -> None:
    build().encode(torch.rand(32, 3, SIDE, SIDE))
    status = Path("/proc/self/status").read_text()  # getrusage would count what the parent had at the fork
    print(int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024)


if __name__ == "__main__":
    memory() if sys.argv[1:] == ["memory"] else main()
