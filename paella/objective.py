"""The training objective: replace a random share t of the tokens by random ones, predict the originals.

Source: arXiv 2211.07292, section 3, with the loss weight of the published training code. B batch, K codes, H W token grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def add_noise(
    tokens: Tensor,
    t: Tensor,
    *,
    mask: Tensor | None = None,
    random_tokens: Tensor | None = None,
    num_labels: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Replace each token with probability t.

    Args:
        tokens: (B,H,W) integers.
        t: (B,) share of noise in [0, 1].
        mask: (B,H,W) 1 where a token is replaced; drawn (uniform ≤ t) if not given.
        random_tokens: (B,H,W) the replacements; drawn from `num_labels` codes if not given.

    Returns:
        noised tokens and the mask, both (B,H,W).
    """
    if mask is None:
        uniform = torch.rand(tokens.shape, generator=generator, device=tokens.device)
        mask = (uniform <= t[:, None, None]).long()
    if random_tokens is None:
        if num_labels is None:
            raise ValueError("add_noise needs random_tokens, or num_labels to draw them")
        random_tokens = torch.randint(num_labels, tokens.shape, generator=generator, device=tokens.device)
    return torch.where(mask.bool(), random_tokens, tokens), mask


def loss_weight(t: Tensor, mask: Tensor, min_weight: float = 0.3) -> Tensor:
    """Weight of each token's loss: 1 where noised; elsewhere 1 at t = 1 and falling to min_weight at t = 0. (B,H,W)."""
    return 1 - (1 - mask) * ((1 - t) * (1 - min_weight))[:, None, None]


def loss_per_image(logits: Tensor, tokens: Tensor, weight: Tensor, label_smoothing: float = 0.1) -> Tensor:
    """Weighted mean cross-entropy of each image: logits (B,K,H,W), tokens and weight (B,H,W) → (B,)."""
    per_token = F.cross_entropy(logits, tokens, label_smoothing=label_smoothing, reduction="none")
    return (per_token * weight).sum((1, 2)) / weight.sum((1, 2))
