"""Triton kernels for inference on a GPU, in place of what torch's operators read and write several times over.

With them a step of `paella-1b` for 32 images takes an H200 94 ms instead of 135 (benchmarks/results/gpu.md). They compute in
float32 and round once, each row by itself, so that a result depends neither on the batch nor on which thread came first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

POSITIONS, CHANNELS = 32, 128
"""Of a block of `scale_shift`."""


def scale_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x · scale + shift: (B,H,W,C), (B,1,1,C), (B or 1,1,1,C) → (B,H,W,C), in one pass over x.

    Torch's broadcasting goes number by number and takes three times as long as a copy.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    rows, height, width, channels = x.shape
    positions = height * width
    grid = (-(-channels // CHANNELS), -(-positions // POSITIONS), rows)
    strides = scale.stride(0), shift.stride(0) if len(shift) > 1 else 0
    _scale_shift[grid](x, scale, shift, out, positions, channels, *strides, POSITIONS, CHANNELS)
    return out


@triton.jit
def _scale_shift(
    x, scale, shift, out, positions, channels, scale_stride, shift_stride, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr
):
    row = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    position = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS)
    exists = channel < channels
    factor = tl.load(scale + row * scale_stride + channel, mask=exists).to(tl.float32)
    summand = tl.load(shift + row * shift_stride + channel, mask=exists).to(tl.float32)
    place = (row * positions + position[:, None]) * channels + channel[None, :]
    inside = exists[None, :] & (position[:, None] < positions)
    values = tl.load(x + place, mask=inside).to(tl.float32)
    tl.store(out + place, values * factor[None, :] + summand[None, :], mask=inside)


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """One code per position as by `drawing.draw`, in one pass over the logits: (N,K), (N,) → (N,) int64."""
    logits = logits.contiguous()
    codes = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    num_labels = logits.shape[1]
    _draw[(len(logits),)](logits, uniform, codes, 1 / temperature, num_labels, triton.next_power_of_2(num_labels), num_warps=8)
    return codes


@triton.jit
def _draw(logits, uniform, codes, inverse_temperature, num_labels, LABELS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label = tl.arange(0, LABELS)
    scores = tl.load(logits + row * num_labels + label, mask=label < num_labels, other=float("-inf")).to(tl.float32)
    weights = tl.exp((scores - tl.max(scores, 0)) * inverse_temperature)  # not normalised
    cumulative = tl.cumsum(weights, 0)
    threshold = tl.load(uniform + row) * tl.sum(weights, 0)
    code = tl.sum((cumulative <= threshold).to(tl.int32), 0)
    # a threshold above the cumulative sum, by rounding, belongs to the last code of any weight
    last = tl.max(tl.where(weights > 0, label, 0), 0)
    tl.store(codes + row, tl.minimum(code, last).to(tl.int64))
