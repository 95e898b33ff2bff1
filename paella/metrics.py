"""Numbers about reconstructions and token grids."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image: two (B,3,H,W) in [0,1] → (B,)."""
    return -10 * (images - reference).square().mean((1, 2, 3)).clamp(min=1e-10).log10()


def codebook_use(indices: Tensor, codebook_size: int) -> tuple[float, float]:
    """Share of codes that occur in indices, and the perplexity of their distribution."""
    return use_and_perplexity(torch.bincount(indices.flatten(), minlength=codebook_size))


def use_and_perplexity(counts: Tensor) -> tuple[float, float]:
    """Share of codes that occur, and the perplexity of their distribution, from how often each does (K,)."""
    share = counts.double() / counts.sum()
    entropy = torch.special.entr(share).sum()
    return (share > 0).double().mean().item(), entropy.exp().item()
