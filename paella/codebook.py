"""Codebook health in VQGAN training: a start from data, running means as codes, revival of codes that nothing uses, counts.

N latents of width D, K codes. Without both, codes that start far from the data never win a nearest-code search, get no
gradient, and rare colours end up sharing the code of a common one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paella.metrics import use_and_perplexity
from paella.parallel import gather_rows, mean_over_workers, num_workers
from paella.quantizers import Codebook

DISTANCES = 2**24
"""Distances that are held at once: 64 MB."""


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
    codes = codebook.codes.detach()
    distance = (latents - codes[_nearest(latents, codes)]).square().sum(1) + 1e-8
    chosen = torch.multinomial(distance.cpu(), len(dead), generator=generator)
    codebook.codebook.weight[dead] = latents[chosen].to(codes.dtype)
    return len(dead)


def _spread(latents: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """k-means++ seeding in rounds: each round draws a batch of latents by squared distance from those chosen."""
    chosen = latents[torch.randint(len(latents), (1,), generator=generator)]
    distance = (latents - chosen).square().sum(1)
    while len(chosen) < size:
        num = min(size - len(chosen), max(1, size // 32))
        new = latents[torch.multinomial((distance + 1e-8).cpu(), num, generator=generator)]
        parts = [torch.cdist(part, new).square().amin(1) for part in latents.split(max(1, DISTANCES // num))]
        distance = torch.minimum(distance, torch.cat(parts))
        chosen = torch.cat([chosen, new])
    return chosen


def _nearest(latents: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([torch.cdist(part, codes).argmin(1) for part in latents.split(max(1, DISTANCES // len(codes)))])


class Health(nn.Module):
    """What is counted of a codebook's use, and the running sums that its codes are means of, where they are not trained.

    Buffers, so that a checkpoint has them. All workers hold the same.
    """

    EMA_DECAY = 0.99
    POOR_USE, POOR_PERPLEXITY = 0.1, 0.02
    """A smaller share of codes in use, and a smaller perplexity as a share of K: poor."""
    SAME = 1.1
    """Tokens of a smaller perplexity are poor in any case: nearly all the same."""
    PATIENCE = 8
    """As many poor counts in a row, in spite of new starts, are a collapse."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.counts: Tensor
        self.last: Tensor
        self.ema_counts: Tensor
        self.ema_sums: Tensor
        self.poor: Tensor
        self.register_buffer("counts", torch.zeros(size, dtype=torch.long))
        self.register_buffer("last", torch.zeros(size, dtype=torch.long), persistent=False)
        self.register_buffer("ema_counts", torch.ones(size))
        self.register_buffer("ema_sums", torch.zeros(size, width))
        self.register_buffer("poor", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def count(self, indices: Tensor) -> None:
        """Add a batch's indices, of all workers. Every rank must call it."""
        counts = torch.bincount(indices.flatten(), minlength=len(self.counts)).double()
        self.last = (mean_over_workers(counts) * num_workers()).round().long()
        self.counts += self.last

    def is_poor(self, counts: Tensor) -> bool:
        """Whether next to nothing of the codebook is in use, by counts (K,)."""
        use, perplexity = use_and_perplexity(counts)
        return perplexity < self.SAME or (use < self.POOR_USE and perplexity < max(3.0, self.POOR_PERPLEXITY * len(counts)))

    def collapsed(self) -> bool:
        """Note whether the counts, or those of the last batch, are poor, and whether that has been so for too long."""
        self.poor = (self.poor + 1) * int(self.is_poor(self.counts) or self.is_poor(self.last))
        return self.poor.item() >= self.PATIENCE

    @torch.no_grad()
    def restart_means(self, codebook: Codebook) -> None:
        """Take the codes as they are for means of one latent each."""
        self.ema_counts.fill_(1)
        self.ema_sums.copy_(codebook.codebook.weight)

    @torch.no_grad()
    def update_means(self, codebook: Codebook, latents: Tensor, indices: Tensor) -> None:
        """Codes become running means of their latents (arXiv 1711.00937): (B,D,h,w) and (B,h,w) of this worker."""
        rows, index = flatten(latents), indices.flatten()
        sums = torch.zeros_like(self.ema_sums).index_add_(0, index, rows)
        counts = torch.bincount(index, minlength=len(self.ema_counts)).float()
        both = mean_over_workers(torch.cat([sums, counts[:, None]], dim=1)) * num_workers()
        self.ema_sums.lerp_(both[:, :-1], 1 - self.EMA_DECAY)
        self.ema_counts.lerp_(both[:, -1], 1 - self.EMA_DECAY)
        # a code that nothing has used for long stays where it is, until revival moves it
        alive = self.ema_counts > 1e-3
        codebook.codebook.weight[alive] = self.ema_sums[alive] / self.ema_counts[alive, None]

    @torch.no_grad()
    def revive(self, codebook: Codebook, latents: Tensor, used: Tensor, generator: torch.Generator) -> int:
        """`revive` from the latents (B,D,h,w) of all workers; returns how many moved. Every rank must call it."""
        moved = revive(codebook, gather_rows(flatten(latents)), used, generator)
        self.ema_counts[~used] = 1
        self.ema_sums[~used] = codebook.codebook.weight[~used]
        return moved
