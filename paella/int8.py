"""Linear layers with 8-bit weights: a text encoder in a quarter of float32's memory, on a CPU or a GPU.

Each row of a weight (one output) has a scale and integers of -127 to 127; a pass multiplies them out, a layer at a time. Written
here because torch.ao's dynamic quantization, which runs on CPUs only, is about to be removed from PyTorch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """`nn.Linear` whose weight (O,I) is int8 times a scale (O,1)."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)  # int8 is exact in bfloat16
        return F.linear(x, weight, self.bias)


def quantize_linear(module: nn.Module) -> None:
    """Put an `Int8Linear` in place of each linear layer inside a module, one after the other."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child))
        else:
            quantize_linear(child)
