"""Quantizers: latents to indices of K codes and back. A learned codebook, as published, or one of its younger relatives.

All four keep their codes as `codebook.weight` (K,D), so that whatever reads a VQGAN's codes reads any of them. `project` takes
the encoder's output to where the codes lie, `nearest` takes that to indices. B batch, h w token grid, D width of a code.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paella.config import VQConfig

CPU_DISTANCES = 2**17
"""Distances to codes that are computed at once: 512 KB."""


class Codebook(nn.Module):
    """K code vectors of width D that are learned."""

    learned = True
    """Whether codes move in training, so that they need a start from data, and revival."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.codebook = nn.Embedding(size, width)
        nn.init.uniform_(self.codebook.weight, -1 / size, 1 / size)

    @property
    def codes(self) -> Tensor:
        """The codes (K,D) as latents are compared with them."""
        return self.codebook.weight

    def project(self, latents: Tensor) -> Tensor:
        """The encoder's output where the codes lie: (B,D,h,w) → (B,D,h,w)."""
        return latents

    def nearest(self, latents: Tensor) -> Tensor:
        """Index of the nearest code: (B,D,h,w) → (B,h,w) int64."""
        codes = self.codes.detach().float()  # (K,D)
        flat = latents.detach().permute(0, 2, 3, 1).reshape(-1, codes.shape[1]).float()
        # |x−c|² = |x|² − 2x·c + |c|²: the first term is the same for all codes
        bias, transposed = 0.5 * codes.square().sum(1), codes.T.contiguous()
        # on a CPU so few vectors at a time that their distances stay in its cache between the product and the search
        rows = flat.split(4096 if flat.is_cuda else max(16, CPU_DISTANCES // len(codes)))
        found = torch.cat([torch.addmm(bias, part, transposed, alpha=-1).argmin(1) for part in rows])
        return found.view(latents.shape[0], *latents.shape[2:])

    def forward(self, indices: Tensor) -> Tensor:
        """Codes of indices: (B,h,w) → (B,D,h,w)."""
        return F.embedding(indices, self.codes).permute(0, 3, 1, 2)

    def loss(self, latents: Tensor, codes: Tensor, commitment: float) -> Tensor:
        """Codes pulled to latents plus `commitment` times latents pulled to codes, two (B,D,h,w)."""
        return F.mse_loss(codes, latents.detach()) + commitment * F.mse_loss(latents, codes.detach())


class CosineCodebook(Codebook):
    """Codes and latents on a sphere of radius √D, so that only directions count (arXiv 2110.04627)."""

    @property
    def codes(self) -> Tensor:
        return F.normalize(self.codebook.weight, dim=1) * self.codebook.embedding_dim**0.5

    def project(self, latents: Tensor) -> Tensor:
        return F.normalize(latents, dim=1) * latents.shape[1] ** 0.5


class FiniteScalar(Codebook):
    """FSQ (arXiv 2309.15505): each of D numbers is rounded to one of its few levels. Nothing is learned, nothing can die.

    Numbers are bounded to (-1, 1), cut into bins of one width, of which the codes are the centres. Latents of unit variance, as
    the batch norm gives them, fill the bins about evenly.
    """

    learned = False

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__(1, len(levels))
        centres = [[(2 * i + 1) / num - 1 for i in range(num)] for num in levels]
        self.levels = levels
        self.codebook = nn.Embedding.from_pretrained(torch.tensor(list(itertools.product(*centres))), freeze=True)

    def project(self, latents: Tensor) -> Tensor:
        return torch.tanh(0.8 * latents)

    def nearest(self, latents: Tensor) -> Tensor:
        found = torch.zeros_like(latents[:, 0], dtype=torch.long)
        for axis, num in enumerate(self.levels):  # the last number counts fastest, as in `itertools.product`
            place = ((latents[:, axis].detach().float() + 1) / 2 * num).floor().long().clamp(0, num - 1)
            found = found * num + place
        return found

    def loss(self, latents: Tensor, codes: Tensor, commitment: float) -> Tensor:
        return latents.new_zeros(())


class LookupFree(Codebook):
    """LFQ (arXiv 2310.05737): a code is the signs of D = log2 K numbers.

    The entropy loss wants each latent sure of its bits and all bits used alike; it takes the bits as independent, as
    arXiv 2406.07548 does, since a sum over 65,536 codes for each latent would not be cheap.
    """

    learned = False
    ENTROPY_WEIGHT = 0.1

    def __init__(self, width: int) -> None:
        super().__init__(1, width)
        codes = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=width)))
        self.codebook = nn.Embedding.from_pretrained(codes, freeze=True)

    def nearest(self, latents: Tensor) -> Tensor:
        found = torch.zeros_like(latents[:, 0], dtype=torch.long)
        for axis in range(latents.shape[1]):
            found = found * 2 + (latents[:, axis] > 0).long()
        return found

    def loss(self, latents: Tensor, codes: Tensor, commitment: float) -> Tensor:
        chance = torch.sigmoid(4 * latents.float())  # of +1, by the squared distances to -1 and +1
        of_each, of_all = _bits(chance).mean((0, 2, 3)).sum(), _bits(chance.mean((0, 2, 3))).sum()
        return commitment * F.mse_loss(latents, codes.detach()) + self.ENTROPY_WEIGHT * (of_each - of_all)


def _bits(chance: Tensor) -> Tensor:
    """Entropy of a bit in nats; its gradient is infinite where the bit is certain."""
    chance = chance.clamp(1e-6, 1 - 1e-6)
    return torch.special.entr(chance) + torch.special.entr(1 - chance)


def make_quantizer(config: VQConfig) -> Codebook:
    """The quantizer that `config.quantizer` names."""
    if config.quantizer == "fsq":
        return FiniteScalar(config.fsq_levels)
    if config.quantizer == "lfq":
        return LookupFree(config.c_latent)
    kind = CosineCodebook if config.quantizer == "cosine" else Codebook
    return kind(config.codebook_size, config.c_latent)
