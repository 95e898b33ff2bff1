"""How far apart two sets of images are, by features of theirs, and how well images fit their captions.

N images, D features. Features of any network do: Inception's for FID, CLIP's for CLIP-FID and CMMD. All sums are float64, and
nothing of size N×N is held at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 2048
"""Rows of a distance matrix that are held at once."""


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and covariance (D,D) of features, float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Raises ValueError for fewer than two rows."""
        _require_two(features)
        return cls(features.double().mean(0), torch.cov(features.double().T))

    @functools.cached_property
    def root(self) -> Tensor:
        """Square root of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet_distance(made: Tensor, reference: Tensor | Moments) -> float:
    """FID (arXiv 1706.08500) of features (N,D), (M,D), by the conventions of clean-fid and torch-fidelity.

    Raises ValueError for fewer than two rows.
    """
    _require_two(made)
    b = reference if isinstance(reference, Moments) else Moments.of(reference)
    mean = made.double().mean(0)
    a = (made.double() - mean) / (len(made) - 1) ** 0.5  # the covariance is a.T @ a
    # the trace of sqrt(A B) is that of the square root of a symmetric matrix with the same eigenvalues but zeros: the smaller one
    symmetric = a @ b.covariance @ a.T if len(a) < a.shape[1] else b.root @ (a.T @ a) @ b.root
    overlap = torch.linalg.eigvalsh(symmetric).clamp(min=0).sqrt().sum()
    distance = (mean - b.mean).square().sum() + a.square().sum() + b.covariance.trace() - 2 * overlap
    return max(0.0, distance.item())


def _require_two(features: Tensor) -> None:
    if len(features) < 2:
        raise ValueError(
            f"{len(features)} images are too few for a Fréchet distance: it needs 2, and thousands to mean something"
        )


def cmmd(made: Tensor, reference: Tensor, sigma: float = 10.0, blocks: int = 1) -> Tensor:
    """CMMD (arXiv 2401.09603): squared maximum mean discrepancy of CLIP embeddings (N,D), (M,D), Gaussian kernel, times 1000.

    Returns a scalar; with `blocks` > 1 the values (blocks,) of the sets that leave out every blocks-th made image from the first
    on, from the second on, and so on, for hardly more work.
    """
    a, b = (F.normalize(features.double(), dim=1) for features in (made, reference))
    sums = lambda x, y: _sum_over_pairs(x, y, lambda squared: torch.exp(-squared / (2 * sigma**2)))  # noqa: E731
    parts = [a[block::blocks] for block in range(blocks)]
    within = torch.tensor([[sums(x, y) for y in parts] for x in parts], dtype=torch.float64)
    across = torch.tensor([sums(x, b) for x in parts], dtype=torch.float64)
    sizes = torch.tensor([len(part) for part in parts], dtype=torch.float64)
    keep = torch.ones(1, 1, dtype=torch.float64) if blocks == 1 else 1 - torch.eye(blocks, dtype=torch.float64)
    num = keep @ sizes
    values = (keep @ within * keep).sum(1) / num**2 - 2 * keep @ across / (num * len(b)) + sums(b, b) / len(b) ** 2
    return 1000 * (values[0] if blocks == 1 else values)


def _sum_over_pairs(a: Tensor, b: Tensor, function: Callable[[Tensor], Tensor]) -> float:
    return sum(function(torch.cdist(part, b).square()).sum().item() for part in a.split(BLOCK))


def prdc(made: Tensor, reference: Tensor, neighbours: int = 5, reference_radii: Tensor | None = None) -> dict[str, float]:
    """Precision, recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797) of features (N,D), (M,D).

    `reference_radii` spares the computation of `radii(reference, neighbours)`, where many sets have one reference.

    Raises ValueError unless both sets have more rows than `neighbours`.
    """
    if min(len(made), len(reference)) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} images on both sides")
    a, b = made.double(), reference.double()
    radius_a = radii(a, neighbours)
    radius_b = radii(b, neighbours) if reference_radii is None else reference_radii
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


def radii(features: Tensor, neighbours: int = 5) -> Tensor:
    """Distance (N,) of each row to its k-th neighbour, itself apart."""
    features = features.double()
    parts = [torch.cdist(part, features).kthvalue(neighbours + 1, dim=1).values for part in features.split(BLOCK)]
    return torch.cat(parts)


def clip_scores(images: Tensor, texts: Tensor) -> Tensor:
    """CLIP score of each image with its caption (arXiv 2104.08718, times 100 as usual): two (N,D) → (N,)."""
    return 100 * F.cosine_similarity(images.double(), texts.double()).clamp(min=0)


def jackknife(statistic: Callable[[Tensor], Tensor], num: int, blocks: int = 20) -> Tensor:
    """Half the width (…) of the 95 % confidence interval of a statistic (…) of `num` images, by leaving out blocks of images.

    Args:
        statistic: takes the numbers of the images to use.
    """
    everything = torch.arange(num)
    blocks = min(blocks, num)
    return interval(torch.stack([statistic(everything[everything % blocks != block]) for block in range(blocks)]))


def interval(left_out: Tensor) -> Tensor:
    """Half the width (…) of the 95 % confidence interval, from the values (blocks,…) without each of the blocks of images."""
    blocks = len(left_out)
    return 1.96 * ((blocks - 1) / blocks * (left_out - left_out.mean(0)).square().sum(0)).sqrt()
