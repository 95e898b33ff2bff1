"""What a VQGAN is trained to do: its losses, each with a weight in the config; the discriminator's own are beside it.

B batch, H W image sides; images are in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paella.conditioning import load_clip


@dataclass(frozen=True, kw_only=True)
class VQLossConfig:
    """Weights of the losses, 0 leaving one out, and their settings."""

    l1: float = 1.0
    """Mean absolute error."""
    l2: float = 4.0
    """Mean squared error."""
    edges: float = 1.0
    """Mean absolute error of differences of neighbouring pixels: on flat pictures the mean error hardly sees the outlines."""
    commitment: float = 0.25
    """Of latents to their codes."""
    perceptual: float = 0.0
    """Distance between features of a network."""
    perceptual_model: str | None = None
    """That network: lpips (the package of that name), or an open_clip ARCHITECTURE/PRETRAINED or directory."""
    adversarial: float = 0.0
    """What a patch discriminator thinks of reconstructions."""
    adaptive: bool = True
    """Scale the adversarial weight so that its gradient at the last layer equals the reconstruction's (arXiv 2012.09841)."""
    adversarial_start: int = 0
    """First step of the discriminator, counted from when there are codes."""
    adversarial_warmup: int = 1000
    """Steps in which the adversarial weight then grows to its full size."""
    r1: float = 0.0
    """Penalty on the discriminator's gradient at real images (arXiv 1801.04406), applied every 16th step."""
    lecam: float = 0.0
    """Pull of the discriminator's outputs to their running means (arXiv 2104.03310)."""
    discriminator_width: int = 64
    """Channels of the discriminator's first layer."""

    def __post_init__(self) -> None:
        for name in ("l1", "l2", "edges", "commitment", "perceptual", "adversarial", "adversarial_start", "r1", "lecam"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name}={getattr(self, name)} is not allowed: 0 or more")
        if self.l1 == self.l2 == self.perceptual == 0:
            raise ValueError("loss.l1, loss.l2 and loss.perceptual are all 0: nothing says what is to be reconstructed")
        if self.perceptual > 0 and self.perceptual_model is None:
            raise ValueError("loss.perceptual needs loss.perceptual_model: lpips, or an open_clip model's name or directory")
        if self.discriminator_width < 8 or self.discriminator_width % 8:
            raise ValueError(f"loss.discriminator_width={self.discriminator_width} is not allowed: a multiple of 8")

    def adversarial_weight(self, steps: int) -> float:
        """The adversarial weight after `steps` steps with codes."""
        grown = (steps - self.adversarial_start + 1) / max(1, self.adversarial_warmup)
        return self.adversarial * min(1.0, max(0.0, grown))


def reconstruction_losses(
    reconstruction: Tensor, images: Tensor, config: VQLossConfig, perceptual: nn.Module | None
) -> dict[str, Tensor]:
    """Unweighted losses by name of two (B,3,H,W); those of weight 0 are left out."""
    losses = {}
    if config.l1:
        losses["l1"] = F.l1_loss(reconstruction, images)
    if config.l2:
        losses["l2"] = F.mse_loss(reconstruction, images)
    if config.edges:
        edges = [F.l1_loss(reconstruction.diff(dim=axis), images.diff(dim=axis)) for axis in (2, 3)]
        losses["edges"] = edges[0] + edges[1]
    if perceptual is not None:
        losses["perceptual"] = perceptual(reconstruction, images).mean()
    return losses


class ClipDistance(nn.Module):
    """LPIPS's distance (arXiv 1801.03924) over the features of an open_clip image tower, with all channels weighted alike."""

    def __init__(self, name: str) -> None:
        super().__init__()
        from open_clip import get_model_preprocess_cfg

        clip: Any = load_clip(name)[0]
        cfg = get_model_preprocess_cfg(clip)
        self.clip, self.size = clip.requires_grad_(False), cfg["size"]
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(cfg["mean"])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(cfg["std"])[:, None, None], persistent=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (B,) of two (B,3,H,W)."""
        pairs = zip(self.features(a), self.features(b), strict=True)
        distances = [(x - y).square().sum(1).mean((1, 2)) for x, y in pairs]
        return torch.stack(distances).mean(0)

    def pixels(self, images: Tensor) -> Tensor:
        """What the image tower takes of images (B,3,H,W)."""
        scaled = F.interpolate(images.float(), self.size, mode="bilinear", antialias=True)
        return (scaled - self.mean) / self.std

    def embed(self, images: Tensor) -> Tensor:
        """The tower's embeddings (B,D) of images (B,3,H,W)."""
        return self.clip.encode_image(self.pixels(images)).float()

    def features(self, images: Tensor) -> list[Tensor]:
        """Feature maps (B,C,h,w) of unit length in C."""
        maps = self.clip.visual.forward_intermediates(self.pixels(images), intermediates_only=True)["image_intermediates"]
        return [F.normalize(value.float(), dim=1) for value in maps]


class Lpips(nn.Module):
    """The published LPIPS with its weights, by the package `lpips`."""

    def __init__(self) -> None:
        super().__init__()
        try:
            import lpips

            self.distance = lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False).eval()
        except (ImportError, OSError) as error:  # the trunk's weights are downloaded
            raise ValueError(
                f"LPIPS is not at hand ({error}): install `lpips` and its weights, or name an open_clip model"
            ) from error

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (B,) of two (B,3,H,W)."""
        return self.distance(a.float(), b.float(), normalize=True).flatten()


def perceptual_distance(name: str) -> nn.Module:
    """The network of a perceptual loss: lpips, or an open_clip model. Raises ValueError where it cannot be loaded."""
    return Lpips() if name == "lpips" else ClipDistance(name)
