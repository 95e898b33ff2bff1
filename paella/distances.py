"""How far apart two sets of images are, by features of theirs, and how well images fit their captions.

N images, D features. Features of any network do: Inception's for FID, CLIP's for CLIP-FID and CMMD. All sums are float64, and
nothing of size N×N is held at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 2048
"""Rows of a distance matrix that are held at once."""


def frechet_distance(made: Tensor, reference: Tensor) -> float:
    """FID (arXiv 1706.08500) of features (N,D), (M,D), by the conventions of clean-fid and torch-fidelity.

    Raises ValueError for fewer than two rows.
    """
    (mean_a, covariance_a), (mean_b, covariance_b) = _moments(made), _moments(reference)
    # the trace of sqrt(A B) is that of the symmetric sqrt(sqrt(A) B sqrt(A)), whose eigenvalues are real
    values, vectors = torch.linalg.eigh(covariance_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * overlap
    return max(0.0, distance.item())


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    if len(features) < 2:
        raise ValueError(
            f"{len(features)} images are too few for a Fréchet distance: it needs 2, and thousands to mean something"
        )
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def cmmd(made: Tensor, reference: Tensor, sigma: float = 10.0) -> float:
    """CMMD (arXiv 2401.09603): squared maximum mean discrepancy of CLIP embeddings (N,D), (M,D), Gaussian kernel, times 1000."""
    a, b = (F.normalize(features.double(), dim=1) for features in (made, reference))
    kernel = lambda x, y: _mean_over_pairs(x, y, lambda squared: torch.exp(-squared / (2 * sigma**2)))  # noqa: E731
    return 1000 * (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))


def _mean_over_pairs(a: Tensor, b: Tensor, function: Callable[[Tensor], Tensor]) -> float:
    total = sum(function(torch.cdist(part, b).square()).sum().item() for part in a.split(BLOCK))
    return total / (len(a) * len(b))


def prdc(made: Tensor, reference: Tensor, neighbours: int = 5) -> dict[str, float]:
    """Precision, recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797) of features (N,D), (M,D).

    Raises ValueError unless both sets have more rows than `neighbours`.
    """
    if min(len(made), len(reference)) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} images on both sides")
    a, b = made.double(), reference.double()
    radius_a, radius_b = _radii(a, neighbours), _radii(b, neighbours)
    inside_b = torch.zeros(len(a), dtype=torch.long)  # in how many balls around reference images a made image lies
    inside_a = torch.zeros(len(b), dtype=torch.bool)  # whether a reference image lies in a ball around a made one
    nearest = torch.full((len(b),), float("inf"), dtype=torch.float64)  # the made image that is nearest to a reference image
    for start in range(0, len(a), BLOCK):
        part = slice(start, start + BLOCK)
        distances = torch.cdist(a[part], b)
        inside_b[part] = (distances <= radius_b).sum(1)
        inside_a |= (distances <= radius_a[part, None]).any(0)
        nearest = torch.minimum(nearest, distances.min(0).values)
    return {
        "precision": (inside_b > 0).double().mean().item(),
        "recall": inside_a.double().mean().item(),
        "density": inside_b.double().mean().item() / neighbours,
        "coverage": (nearest <= radius_b).double().mean().item(),
    }


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """Distance of each row to its k-th neighbour, itself apart."""
    parts = [torch.cdist(part, features).kthvalue(neighbours + 1, dim=1).values for part in features.split(BLOCK)]
    return torch.cat(parts)


def clip_scores(images: Tensor, texts: Tensor) -> Tensor:
    """CLIP score of each image with its caption (arXiv 2104.08718, times 100 as usual): two (N,D) → (N,)."""
    return 100 * F.cosine_similarity(images.double(), texts.double()).clamp(min=0)


def jackknife(statistic: Callable[[Tensor], float], num: int, blocks: int = 20) -> tuple[float, float]:
    """A statistic of `num` images and half the width of its 95 % confidence interval, by leaving out blocks of images.

    Args:
        statistic: takes the numbers of the images to use.
    """
    everything = torch.arange(num)
    blocks = min(blocks, num)
    left_out = torch.tensor([statistic(everything[everything % blocks != block]) for block in range(blocks)], dtype=torch.float64)
    variance = (blocks - 1) / blocks * (left_out - left_out.mean()).square().sum()
    return statistic(everything), 1.96 * variance.sqrt().item()
