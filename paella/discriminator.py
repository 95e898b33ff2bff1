"""The patch discriminator of VQGAN training (arXiv 1611.07004): it tells patches of reconstructions from patches of images.

B batch, H W image sides, h w patches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paella.parallel import mean_over_workers
from paella.vq_losses import VQLossConfig

R1_EVERY = 16
"""Steps between applications of R1, which costs a second backward pass."""
LECAM_DECAY = 0.99
"""Of the running means of the outputs."""


class Discriminator(nn.Module):
    """Convolutions to one number per patch, above 0 for what looks like an image; it keeps running means of its outputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for factor, stride in ((1, 2), (2, 1)):
            layers += [
                nn.Conv2d(width * factor, 2 * width * factor, 4 if stride == 2 else 3, stride=stride, padding=1),
                nn.GroupNorm(8, 2 * width * factor),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(4 * width, 1, 3, padding=1))
        self.means: Tensor
        self.register_buffer("means", torch.zeros(2))  # of images, of reconstructions

    def forward(self, images: Tensor) -> Tensor:
        """(B,3,H,W) in [0,1] → (B,1,h,w)."""
        return self.layers(images * 2 - 1)

    def loss(self, images: Tensor, reconstructions: Tensor, config: VQLossConfig, step: int) -> dict[str, Tensor]:
        """Weighted losses of the discriminator by name; reconstructions are taken without gradient."""
        real, fake = self(images).float(), self(reconstructions.detach()).float()
        losses = {"discriminator": 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())}
        if config.lecam:
            distance = F.relu(real - self.means[1]).square() + F.relu(self.means[0] - fake).square()
            losses["lecam"] = config.lecam * distance.mean()
            now = mean_over_workers(torch.stack([real.mean(), fake.mean()]).detach())
            self.means = torch.lerp(now, self.means, LECAM_DECAY)
        if config.r1 and step % R1_EVERY == 0:
            losses["r1"] = config.r1 * R1_EVERY * self.gradient_penalty(images)
        return losses

    def gradient_penalty(self, images: Tensor) -> Tensor:
        """Half the squared gradient at images, mean over them."""
        with torch.autocast(images.device.type, enabled=False):
            images = images.detach().float().requires_grad_(True)
            (gradient,) = torch.autograd.grad(self(images).mean((1, 2, 3)).sum(), images, create_graph=True)
        return 0.5 * gradient.square().sum((1, 2, 3)).mean()


def generator_loss(discriminator: Callable[[Tensor], Tensor], reconstructions: Tensor) -> Tensor:
    """What the decoder is to lower: minus the mean output."""
    return -discriminator(reconstructions).float().mean()


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: nn.Parameter) -> Tensor:
    """Ratio of the two gradients' norms at the decoder's last layer, the same on every worker."""
    norms = []
    for loss in (reconstruction_loss, adversarial_loss):
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        norms.append(mean_over_workers(gradient).norm())
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4).detach()
