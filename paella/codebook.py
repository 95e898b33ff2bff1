"""Codebook health in VQGAN training: a start from data, and revival of codes that nothing uses.

N latents of width D, K codes. Without both, codes that start far from the data never win a nearest-code search, get no
gradient, and rare colours end up sharing the code of a common one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paella.vqgan import Codebook


def flatten(latents: Tensor) -> Tensor:
    """(B,D,h,w) → (N,D) float32."""
    return latents.detach().permute(0, 2, 3, 1).flatten(0, 2).float()


@torch.no_grad()
def kmeans_init(codebook: Codebook, latents: Tensor, generator: torch.Generator, iterations: int = 10) -> None:
    """Set the codes to k-means centres of latents (N,D), seeded far apart so that rare latents get codes too."""
    size = codebook.codebook.num_embeddings
    if len(latents) < size:
        raise ValueError(f"k-means needs at least as many latents as codes: {len(latents)} latents, {size} codes")
    centres = _spread(latents, size, generator)
    for _ in range(iterations):
        nearest = _nearest(latents, centres)
        counts = torch.bincount(nearest, minlength=size)
        sums = torch.zeros_like(centres).index_add_(0, nearest, latents)
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centres)
    codebook.codebook.weight.copy_(centres)


@torch.no_grad()
def revive(codebook: Codebook, latents: Tensor, used: Tensor, generator: torch.Generator) -> int:
    """Move codes that were not `used` (K,) onto badly served latents (N,D); returns how many moved.

    Latents are drawn with a chance proportional to their squared distance from the nearest code (k-means++).
    """
    dead = (~used).nonzero()[:, 0][: len(latents)]
    if len(dead) == 0:
        return 0
    codes = codebook.codebook.weight
    distance = (latents - codes[_nearest(latents, codes)]).square().sum(1) + 1e-8
    chosen = torch.multinomial(distance, len(dead), generator=generator)
    codes[dead] = latents[chosen].to(codes.dtype)
    return len(dead)


def _spread(latents: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """k-means++ seeding in rounds: each round draws a batch of latents by squared distance from those chosen."""
    chosen = latents[torch.randint(len(latents), (1,), generator=generator)]
    distance = (latents - chosen).square().sum(1)
    while len(chosen) < size:
        num = min(size - len(chosen), max(1, size // 32))
        new = latents[torch.multinomial(distance + 1e-8, num, generator=generator)]
        distance = torch.minimum(distance, torch.cdist(latents, new).square().amin(1))
        chosen = torch.cat([chosen, new])
    return chosen


def _nearest(latents: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([torch.cdist(part, codes).argmin(1) for part in latents.split(4096)])
