"""How much arithmetic an image takes in training, and how much a device can do: what utilisation (MFU) is measured against."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from paella.blocks import linear
from paella.config import ModelConfig
from paella.unet import Paella

TEXT_TOKENS = 77
"""Length of the caption that is counted; the published model's 1B U-Net needs 0.3 % more for every 10."""

PEAK_TFLOPS = {
    "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "A800": 312, "L40S": 362, "L4": 121, "A10G": 70, "A10": 125,
    "RTX 6000 Ada": 364, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip
"""Dense bfloat16 TFLOP/s by NVIDIA's data sheets, for the first name that is part of a device's name."""


def counted(call: Callable[[], object]) -> int:
    """Return the FLOPs of what `call` multiplies, a multiplication with its addition being two.

    The counter knows neither oneDNN's products, which inference in float32 on a CPU has, nor a CPU's fused attention. So have
    gradients on, or the meta device; attention is by its plain products here.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def training_flops(config: ModelConfig) -> float:
    """FLOPs of the U-Net for one training image: the forward pass, counted, times three.

    A backward pass multiplies by the weights and by the activations where the forward pass multiplies once. What activation
    checkpointing computes again is not counted, as it is no progress; nor are the text encoder and the optimizer.
    """
    height, width = config.grid(config.image_size, config.image_size)
    with torch.device("meta"), torch.no_grad():
        unet, tokens = Paella(config.unet), torch.zeros(1, height, width, dtype=torch.long)
        states = torch.zeros(1, TEXT_TOKENS, config.unet.byt5_embd)
        return 3.0 * counted(lambda: unet(tokens, torch.ones(1), byt5=states))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that a device can do: by data sheet on a GPU (None if not listed, and for float32), measured on a CPU."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        listed = next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
        return listed * 1e12 if listed is not None and dtype == torch.bfloat16 else None
    return matrix_rate(dtype)


def matrix_rate(dtype: torch.dtype, size: int = 1024, seconds: float = 0.1) -> float:
    """FLOP/s of products of square matrices, as inference has them, on this process's CPU threads."""
    a = torch.randn(size, size).to(dtype)
    with torch.no_grad():
        return _rate(lambda: linear(a, a, None), seconds) * 2.0 * size**3


def _rate(call: Callable[[], Tensor], seconds: float) -> float:
    """Calls a second, the first left out."""
    call()
    began, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < seconds:
        call()
        count += 1
    return count / elapsed
