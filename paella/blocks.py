"""The U-Net's building blocks, with the published modules' parameter names.

B batch, C channels, H W positions, S conditioning tokens, N = H·W + S keys, L channels of the noise-level embedding.
Feature maps are (B,C,H,W) tensors that lie in memory channels-last, so that the permutes below are free views.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from paella import kernels
except ImportError:  # Triton comes with torch for CUDA on Linux
    kernels = None  # type: ignore[assignment]

EPS = 1e-6  # of every norm


def embed_noise_level(t: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding of noise levels in [0, 1]: (B,) → (B,width) float32."""
    half = width // 2
    scale = -math.log(10_000) / (half - 1)
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * scale)
    angles = t.float()[:, None] * 10_000 * frequencies  # (B,half)
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias: (...,C), (D,C), (D,) → (...,D).

    For inference in float32 on a CPU by oneDNN, which on AMD's processors is twice as fast as the MKL behind `F.linear` (240
    against 110 GFLOP/s on one core with AVX-512) and elsewhere as fast.
    """
    if _onednn_linear is None or not _by_onednn(x):
        return F.linear(x, weight, bias)
    return _onednn_linear(x, weight, bias, "none", [], "")


_onednn_linear = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None
"""What torch.compile puts in F.linear's place."""


def _by_onednn(x: Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.float32 and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def scale_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x · scale + shift, over the channels: (B,H,W,C), (B,1,1,C), (B or 1,1,1,C) → (B,H,W,C)."""
    if kernels and x.is_cuda and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return kernels.scale_shift(x, scale, shift)
    return torch.addcmul(shift, x, scale)


class Linear(nn.Linear):
    """A linear layer by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class PointwiseConv2d(nn.Conv2d):
    """A 1×1 convolution; by `linear` where that is faster: with one thread torch leaves float32 to the MKL here too."""

    def __init__(self, channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if not _by_onednn(x):
            return super().forward(x)
        return linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of a feature map, without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=EPS).permute(0, 3, 1, 2)


class GlobalResponseNorm(nn.Module):
    """ConvNeXt V2's GRN (arXiv 2301.00808): channels compete by their norm over all positions. x: (B,H,W,C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and not x.requires_grad:
            norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        else:
            # of the two squares one has the quicker backward, the other the quicker forward; both, and the sum's root, are many
            # times faster on a CPU than linalg.vector_norm over strided positions
            squared = x.square() if x.requires_grad else x * x
            norm = squared.sum((1, 2), keepdim=True).clamp(min=1e-12).sqrt()
        # gamma·(x·norm/mean) + beta + x, with the two products by x joined
        return scale_shift(x, 1 + self.gamma * (norm / (norm.mean(-1, keepdim=True) + EPS)), self.beta)


class ResBlock(nn.Module):
    """Depthwise convolution, norm and MLP (ConvNeXt); takes a skip connection by widening the convolution's input."""

    def __init__(self, width: int, skip_width: int, kernel_size: int, dropout: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width + skip_width, width, kernel_size, padding=kernel_size // 2, groups=width)
        self.norm = LayerNorm2d()
        self.channelwise = nn.Sequential(
            Linear(width, width * 4),
            nn.GELU(),
            GlobalResponseNorm(width * 4),
            nn.Dropout(dropout),
            Linear(width * 4, width),
        )

    @property
    def last_linear(self) -> nn.Linear:
        last = self.channelwise[4]
        assert isinstance(last, nn.Linear)
        return last

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        hidden = self.depthwise(x) if skip is None else self._depthwise_of_both(x, skip)
        hidden = self.norm(hidden).permute(0, 2, 3, 1)  # (B,H,W,C)
        return x + self.channelwise(hidden).permute(0, 3, 1, 2)

    def _depthwise_of_both(self, x: Tensor, skip: Tensor) -> Tensor:
        """The convolution over x and skip, one behind the other: each output channel is made of two that follow one another.

        As one depthwise convolution, and the sum of such two: libraries have no fast kernel for groups of two.
        """
        weight, bias = self.depthwise.weight, self.depthwise.bias
        assert bias is not None
        both = torch.cat([x, skip], dim=1)  # (B,2C,H,W)
        biases = torch.stack([bias, torch.zeros_like(bias)], dim=1).flatten()
        out = F.conv2d(both, weight.flatten(0, 1)[:, None], biases, padding=self.depthwise.padding, groups=both.shape[1])
        first, second = out.permute(0, 2, 3, 1).unflatten(3, (-1, 2)).unbind(4)  # (B,H,W,C)
        return (first + second).permute(0, 3, 1, 2)


class TimestepBlock(nn.Module):
    """Scale and shift by the noise level."""

    def __init__(self, width: int, c_r: int) -> None:
        super().__init__()
        self.mapper = nn.Linear(c_r, width * 2)

    def forward(self, x: Tensor, r_embed: Tensor) -> Tensor:
        scale, shift = self.mapper(r_embed)[:, None, None].chunk(2, dim=-1)  # (B,1,1,C)
        return scale_shift(x.permute(0, 2, 3, 1), 1 + scale, shift).permute(0, 3, 1, 2)


class Attention2d(nn.Module):
    """Attention from positions to (positions and) conditioning tokens; `attn` holds the published parameters."""

    def __init__(self, width: int, heads: int, dropout: float, self_attn: bool) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.self_attn = self_attn

    def keys_values(self, tokens: Tensor) -> Tensor:
        """Keys and values of tokens, one behind the other: (B,S,C) → (B,S,2C)."""
        return self.project_in(tokens, slice(tokens.shape[-1], None))

    def project_in(self, x: Tensor, rows: slice) -> Tensor:
        """Queries, keys or values: the rows of the one weight that makes all three."""
        return linear(x, self.attn.in_proj_weight[rows], self.attn.in_proj_bias[rows])

    def project_out(self, x: Tensor) -> Tensor:
        """What the heads found, mixed: (B,·,C) → (B,·,C)."""
        return linear(x, self.attn.out_proj.weight, self.attn.out_proj.bias)

    def forward(self, x: Tensor, cond: Tensor, cond_mask: Tensor | None) -> Tensor:
        """x (B,H·W,C), cond (B,S,2C) keys and values, cond_mask (B,S) True where a token counts → (B,H·W,C)."""
        batch, positions, width = x.shape
        q = self.project_in(x, slice(width))
        keys_values = torch.cat([self.keys_values(x), cond], dim=1) if self.self_attn else cond  # (B,N,2C)
        if cond_mask is not None and self.self_attn:
            cond_mask = F.pad(cond_mask, (positions, 0), value=True)  # (B,N)
        k, v = keys_values.chunk(2, dim=-1)
        split = (batch, -1, self.attn.num_heads, width // self.attn.num_heads)
        q, k, v = (y.reshape(split).transpose(1, 2) for y in (q, k, v))  # (B,heads,·,C/heads)
        mask = None if cond_mask is None else cond_mask[:, None, None, :]
        out = attend(q, k, v, mask, self.attn.dropout if self.training else 0.0)
        out = out.transpose(1, 2).reshape(batch, positions, width)
        return self.project_out(out)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Scaled dot-product attention; mask is True where a key counts."""
    if q.is_cuda or not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    # the fused kernel's backward on a CPU takes twice the time of these two products. Keys come before queries: over a last axis
    # of some twenty keys a softmax takes four times as long as over one before it
    scores = k @ (q * q.shape[-1] ** -0.5).transpose(-1, -2)  # (B,heads,keys,queries)
    if mask is not None:
        scores = scores + scores.new_zeros(mask.shape).masked_fill_(~mask, float("-inf")).transpose(-1, -2)
    return F.dropout(scores.softmax(-2), dropout).transpose(-1, -2) @ v


class AttnBlock(nn.Module):
    """Norm and attention to the conditioning tokens."""

    def __init__(self, width: int, c_cond: int, heads: int, dropout: float, self_attn: bool) -> None:
        super().__init__()
        self.norm = LayerNorm2d()
        self.attention = Attention2d(width, heads, dropout, self_attn)
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(c_cond, width))

    def keys_values(self, cond: Tensor, weight: Tensor | None = None) -> Tensor:
        """Keys and values of conditioning tokens (B,S,c_cond) → (B,S,2C); weight (B,S) scales what each token adds.

        Attention weights that are multiplied after the softmax and not renormalised are the same as values multiplied.
        """
        keys_values = self.attention.keys_values(self.kv_mapper(cond))
        if weight is not None:
            keys, values = keys_values.chunk(2, dim=-1)
            keys_values = torch.cat([keys, values * weight[..., None].to(values.dtype)], dim=-1)
        return keys_values

    def forward(
        self,
        x: Tensor,
        cond: Tensor | None,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        keys_values: Tensor | None = None,
    ) -> Tensor:
        """x (B,C,H,W) attends to cond (B,S,c_cond), or to what `keys_values` made of it; mask (B,S) True where a token counts."""
        if keys_values is None:
            assert cond is not None
            keys_values = self.keys_values(cond, weight)
        flat = self.norm(x).flatten(2).transpose(1, 2)  # (B,H·W,C)
        out = self.attention(flat, keys_values, mask)
        return x + out.transpose(1, 2).unflatten(2, x.shape[2:])
