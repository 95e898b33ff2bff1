"""The VQGAN: images to token grids and back.

Parameter names, shapes and numbers equal the published f4 model's. One token covers `config.downsampling` pixels a side.
B batch, H W image sides, h w token grid (H / downsampling), D = c_latent, K codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paella.blocks import EPS, Linear, PointwiseConv2d
from paella.config import VQConfig
from paella.quantizers import Codebook, make_quantizer

__all__ = ["Codebook", "VQModel", "VQResBlock"]

CPU_PIXELS, GPU_PIXELS = 2**18, 2**21
"""Pixels that are encoded at once. The published model takes 1.5 KB of memory for each."""
CPU_POSITIONS = 1024
"""Positions that pass an MLP at once: 3 MB between its layers in the published model."""


class VQResBlock(nn.Module):
    """Depthwise convolution and MLP, each behind a norm whose scale, shift and output gain are learned scalars."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Sequential(nn.ReplicationPad2d(1), nn.Conv2d(width, width, 3, groups=width))
        self.channelwise = nn.Sequential(Linear(width, width * 4), nn.GELU(), Linear(width * 4, width))
        # the gains start at a half, not at the published zero, where the block learns nothing in its first steps
        self.gammas = nn.Parameter(torch.tensor([0.0, 0.0, 0.5, 0.0, 0.0, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        scale1, shift1, gain1, scale2, shift2, gain2 = self.gammas.unbind()
        y = _norm(x, scale1, shift1)  # (B,H,W,C)
        x = torch.addcmul(x, self.depthwise(y.permute(0, 3, 1, 2)), gain1)
        y = _norm(x, scale2, shift2)
        return torch.addcmul(x, self._mixed(y).permute(0, 3, 1, 2), gain2)

    def _mixed(self, y: Tensor) -> Tensor:
        """The MLP of (B,H,W,C); on a CPU a few positions at a time, whose four times as many channels stay in its cache."""
        if y.is_cuda or torch.is_grad_enabled():
            return self.channelwise(y)
        return torch.cat([self.channelwise(part) for part in y.flatten(0, 2).split(CPU_POSITIONS)]).view_as(y)


def _norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm over the channels, times 1 + scale, plus shift, in one pass: (B,C,H,W) → (B,H,W,C)."""
    channels = x.shape[1:2]
    return F.layer_norm(x.permute(0, 2, 3, 1), channels, (1 + scale).expand(channels), shift.expand(channels), EPS)


class VQModel(nn.Module):
    """Encoder, codebook and decoder.

    Example:
        >>> model = VQModel(PRESETS["tiny"].vqgan)
        >>> indices = model.encode(images)            # (B,3,H,W) in [0,1] → (B,h,w)
        >>> images = model.decode_indices(indices)    # (B,h,w) → (B,3,H,W)
    """

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = c = config
        widths = [c.c_hidden // 2**i for i in reversed(range(c.levels))]
        self.in_block = nn.Sequential(nn.PixelUnshuffle(2), PointwiseConv2d(3 * 4, widths[0]))
        down: list[nn.Module] = []
        for i, width in enumerate(widths):
            if i > 0:
                down.append(nn.Conv2d(widths[i - 1], width, 4, stride=2, padding=1))
            down.append(VQResBlock(width))
        # the batch norm keeps latents at unit scale, so that codes and latents cannot drift apart
        down.append(nn.Sequential(PointwiseConv2d(widths[-1], c.c_latent, bias=False), nn.BatchNorm2d(c.c_latent)))
        self.down_blocks = nn.Sequential(*down)
        self.vquantizer = make_quantizer(c)
        up: list[nn.Module] = [nn.Sequential(PointwiseConv2d(c.c_latent, widths[-1]))]
        for i, width in reversed(list(enumerate(widths))):
            up.extend(VQResBlock(width) for _ in range(c.bottleneck_blocks if i == c.levels - 1 else 1))
            if i > 0:
                up.append(nn.ConvTranspose2d(width, widths[i - 1], 4, stride=2, padding=1))
        self.up_blocks = nn.Sequential(*up)
        self.out_block = nn.Sequential(PointwiseConv2d(widths[0], 3 * 4), nn.PixelShuffle(2))

    @property
    def latent_norm(self) -> nn.BatchNorm2d:
        """The batch norm of the latents."""
        head = self.down_blocks[-1]
        assert isinstance(head, nn.Sequential) and isinstance(head[1], nn.BatchNorm2d)
        return head[1]

    def encode_latents(self, images: Tensor) -> Tensor:
        """Continuous latents before quantization, at the codebook's scale: (B,3,H,W) in [0,1] → (B,D,h,w).

        Raises ValueError where a side is no multiple of `config.downsampling`.
        """
        factor = self.config.downsampling
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"images have shape {tuple(images.shape)}, but (batch, 3, height, width) with sides that are "
                f"multiples of {factor} are needed"
            )
        return self.vquantizer.project(self.down_blocks(self.in_block(images.contiguous(memory_format=torch.channels_last))))

    def encode(self, images: Tensor) -> Tensor:
        """Token grid of images: (B,3,H,W) in [0,1] → (B,h,w) int64; a few images at a time, so that memory stays small."""
        per_image = max(1, images.shape[-1] * images.shape[-2])
        some = images.split(max(1, (GPU_PIXELS if images.is_cuda else CPU_PIXELS) // per_image))
        return torch.cat([self.vquantizer.nearest(self.encode_latents(part)) for part in some])

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents as published, divided by scale_factor: (B,D,h,w) → (B,3,H,W), about [0,1]."""
        return self.decode_codes(latents * self.config.scale_factor)

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Images of a token grid: (B,h,w) → (B,3,H,W), about [0,1]."""
        return self.decode_codes(self.vquantizer(indices))

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Images of code vectors at the codebook's scale: (B,D,h,w) → (B,3,H,W)."""
        codes = codes.contiguous(memory_format=torch.channels_last)
        return self.out_block(self.up_blocks(codes)).contiguous()

    def forward(self, images: Tensor, commitment: float = 0.25) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One training pass.

        Returns:
            reconstruction (B,3,H,W), latents (B,D,h,w), indices (B,h,w), and the quantizer's loss, in which `commitment`
            weighs how latents are pulled to codes. Gradients pass the quantizer straight through.
        """
        latents = self.encode_latents(images)
        indices = self.vquantizer.nearest(latents)
        codes = self.vquantizer(indices)
        loss = self.vquantizer.loss(latents, codes, commitment)
        straight_through = latents + (codes - latents).detach()
        return self.decode_codes(straight_through), latents, indices, loss
