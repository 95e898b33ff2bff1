"""Drawing codes from logits: fast and exact over large codebooks, and the filters of unlikely codes. K codes."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from paella import kernels
except ImportError:  # Triton comes with torch for CUDA on Linux
    kernels = None  # type: ignore[assignment]

BLOCK = 128
"""Codes that are summed up before the search for the drawn one goes inside a block."""
ROWS_AT_ONCE = 2**24
"""Logits that are exponentiated at once, at most: 64 MB."""


def draw(logits: Tensor, uniform: Tensor, temperature: float = 1.0) -> Tensor:
    """One code per position from softmax(logits / temperature), by inverting its cumulative sum: (...,K), (...) → (...) int64.

    On a GPU by a kernel. Elsewhere the sum is inverted in two levels, blocks of codes first: one exponential and one reading of
    the K numbers, where a softmax, a cumulative sum and a search would read them six times over.
    """
    num_labels = logits.shape[-1]
    rows, thresholds = logits.reshape(-1, num_labels), uniform.reshape(-1)
    if kernels and rows.is_cuda:
        return kernels.draw(rows, thresholds, temperature).view(uniform.shape)
    per_chunk = max(1, ROWS_AT_ONCE // num_labels)
    chunks = zip(rows.split(per_chunk), thresholds.split(per_chunk), strict=True)
    return torch.cat([_draw(part, threshold, temperature) for part, threshold in chunks]).view(uniform.shape)


def _draw(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """(N,K), (N,) → (N,)."""
    num_labels = logits.shape[1]
    weights = logits.float().sub(logits.amax(1, keepdim=True)).div_(temperature).exp_()  # not normalised
    if missing := -num_labels % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, missing))
    weights = weights.view(len(weights), -1, BLOCK)  # (N,K/BLOCK,BLOCK)
    blocks = weights.sum(2).cumsum(1)
    threshold = uniform[:, None] * blocks[:, -1:]
    block = (blocks <= threshold).sum(1, keepdim=True).clamp_(max=blocks.shape[1] - 1)  # (N,1)
    before = torch.where(block > 0, blocks.gather(1, (block - 1).clamp(min=0)), 0)
    inside = weights.gather(1, block[..., None].expand(-1, 1, BLOCK))[:, 0].cumsum(1)  # (N,BLOCK)
    # a remainder above the block's sum, by rounding, belongs to the block's last code of any weight
    last = (inside < inside[:, -1:]).sum(1, keepdim=True)
    code = torch.minimum((inside <= threshold - before).sum(1, keepdim=True), last)
    return (block * BLOCK + code)[:, 0]


def keep_likely(
    logits: Tensor, *, top_k: int | None = None, top_p: float | None = None, typical_p: float | None = None
) -> Tensor:
    """Logits (...,K) with the codes that are not to be drawn at −∞; at least one stays."""
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p is not None and top_p < 1:
        logits = _keep_mass(logits, logits, top_p)
    if typical_p is not None and typical_p < 1:
        log_p = logits.float().log_softmax(-1)
        entropy = -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1, keepdim=True)
        logits = _keep_mass(logits, -(-log_p - entropy).abs(), typical_p)
    return logits


def _keep_mass(logits: Tensor, rank_by: Tensor, mass: float) -> Tensor:
    """Keep the codes of highest rank, up to the one with which their probability reaches `mass`."""
    order = rank_by.argsort(dim=-1, descending=True)
    probability = logits.float().softmax(-1).gather(-1, order)
    dropped = probability.cumsum(-1) - probability >= mass
    dropped[..., 0] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), float("-inf"))
