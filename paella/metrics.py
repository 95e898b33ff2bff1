"""Numbers about reconstructions and token grids."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image: two (B,3,H,W) in [0,1] → (B,)."""
    return -10 * (images - reference).square().mean((1, 2, 3)).clamp(min=1e-10).log10()


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each image as Wang et al. 2004 have it: two (B,3,H,W) in [0,1], sides of 11 or more → (B,).

    Gaussian windows of 11 pixels, sigma 1.5; the mean over channels and all whole windows.
    """
    window = torch.exp(-(torch.arange(-5.0, 6.0, dtype=torch.float64, device=images.device) ** 2) / (2 * 1.5**2))
    window /= window.sum()
    a, b = images.double(), reference.double()
    values = torch.cat([a, b, a * a, b * b, a * b]).flatten(0, 1)[:, None]
    blurred = F.conv2d(F.conv2d(values, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))
    mean_a, mean_b, aa, bb, ab = blurred.view(5, *images.shape[:2], *blurred.shape[2:])
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * (ab - mean_a * mean_b) + c2) / (aa - mean_a**2 + bb - mean_b**2 + c2)
    return (luminance * structure).mean((1, 2, 3)).to(images.dtype)


REGIONS = ("flat areas", "edges", "fine texture")
PATCH = 8


def regions(images: Tensor) -> Tensor:
    """What patches of 8 pixels show, as indices into REGIONS: (B,3,H,W) in [0,1] → (B,H/8,W/8).

    Gradients of an edge point one way, those of a texture all ways (the structure tensor's coherence).
    """
    grey = images.mean(1, keepdim=True)
    across, down = (F.pad(grey.diff(dim=axis), pad) for axis, pad in ((3, (0, 1)), (2, (0, 0, 0, 1))))
    xx, yy, xy = (F.avg_pool2d(product, PATCH)[:, 0] for product in (across**2, down**2, across * down))
    energy = xx + yy
    coherence = ((xx - yy).square() + 4 * xy.square()).sqrt() / energy.clamp(min=1e-12)
    shown = torch.where(coherence > 0.5, 1, 2)
    return torch.where(energy < 0.02**2, 0, shown)


def squared_error_by_region(images: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of mean squared errors and numbers of patches in each of REGIONS, of two (B,3,H,W) in [0,1]: two (3,)."""
    errors = F.avg_pool2d((images - reference).square().mean(1, keepdim=True), PATCH).flatten().double()
    shown = regions(reference).flatten()
    counts = torch.bincount(shown, minlength=len(REGIONS))
    return torch.zeros_like(counts, dtype=torch.float64).index_add_(0, shown, errors), counts


def codebook_use(indices: Tensor, codebook_size: int) -> tuple[float, float]:
    """Share of codes that occur in indices, and the perplexity of their distribution."""
    return use_and_perplexity(torch.bincount(indices.flatten(), minlength=codebook_size))


def use_and_perplexity(counts: Tensor) -> tuple[float, float]:
    """Share of codes that occur, and the perplexity of their distribution, from how often each does (K,)."""
    share = counts.double() / counts.sum()
    entropy = torch.special.entr(share).sum()
    return (share > 0).double().mean().item(), entropy.exp().item()
