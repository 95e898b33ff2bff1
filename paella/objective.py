"""The training objective: replace a random share t of the tokens by random ones, predict the originals.

Source: arXiv 2211.07292, section 3, with the loss weight of the published training code. B batch, K codes, H W token grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_NOISE = 1e-3
"""Noise level that stands for all below it where a token's own logit grows: at 0 it would be infinite."""


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


def add_own_token(logits: Tensor, tokens: Tensor, t: Tensor) -> Tensor:
    """Turn a prediction of each token from the others into one from all, by Bayes' rule (leave-one-out, arXiv 2605.22765).

    Uniform noise leaves a token as it is with probability 1 − t + t/K and makes it any one other with t/K. So the logit of the
    code that stands at a position grows by the logarithm of their ratio, log1p(K·(1 − t)/t); the other codes' stay as they are.
    That term depends on no condition: it is the same in all logits that guidance and regions mix, and so in their mixture.

    Args:
        logits: (B,K,…) of the clean token given the others. Written over, except in compiled code.
        tokens: (B,…) noised tokens.
        t: (B,) noise level in [0, 1].

    Returns:
        logits (B,K,…) of the clean token given all. Their gradient is that of the logits given.
    """
    level = t.float().clamp(min=MIN_NOISE).view(-1, *[1] * (logits.ndim - 1))  # (B,1,…)
    gain = torch.log1p(logits.shape[1] * (1 - level) / level).to(logits.dtype)
    own = tokens[:, None].long()  # (B,1,…)
    if torch.compiler.is_compiling():  # joins what reads the logits, where a scatter would have them written once more
        codes = torch.arange(logits.shape[1], device=logits.device).view(-1, *[1] * (tokens.ndim - 1))  # (K,…)
        return torch.where(codes == own, logits + gain, logits)
    rows = logits.detach().movedim(1, -1)  # a constant is added: autograd need not know of it
    rows.scatter_add_(-1, own.movedim(1, -1), gain.expand(own.shape).movedim(1, -1))  # five times as fast as over axis 1
    return logits
