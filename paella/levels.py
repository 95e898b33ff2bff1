"""Losses by noise level: what is reported of them, and what an image counts so that levels count alike. B images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paella.parallel import mean_over_workers

NUM_BUCKETS = 4
"""Noise levels are reported in quarters of [0, 1]."""


@torch.no_grad()
def sums_by_level(t: Tensor, losses: Tensor, counted: Tensor | None = None, num_levels: int = NUM_BUCKETS) -> Tensor:
    """Sums of losses and numbers of samples by noise level: (B,), (B,) → (2·num_levels,); only samples that are counted (B,)."""
    weight = torch.ones_like(losses) if counted is None else counted.to(losses.dtype)
    values = torch.stack([losses * weight, weight])
    return values.new_zeros(2, num_levels).index_add_(1, level_of(t, num_levels), values).flatten()


def level_of(t: Tensor, num_levels: int) -> Tensor:
    """Which of so many equal parts of [0, 1] each noise level (B,) is in; 1 is in the last."""
    return (t * num_levels).long().clamp(max=num_levels - 1)


def means_by_level(sums: Tensor) -> dict[str, float]:
    """Named mean losses of the noise levels that occurred, from `sums_by_level`."""
    metrics = {}
    by_level, counts = sums.view(2, NUM_BUCKETS)
    for index in range(NUM_BUCKETS):
        if counts[index] > 0:
            low, high = index / NUM_BUCKETS, (index + 1) / NUM_BUCKETS
            metrics[f"loss_t_{low:.2f}_{high:.2f}"] = (by_level[index] / counts[index]).item()
    return metrics


class LevelBalance(nn.Module):
    """Weights of images by the mean loss at their noise level: near t = 0 it is a hundredth of what it is at t = 1.

    The means run over the steps before, those of all workers, so that weights do not depend on how a batch is shared out. They
    are a buffer, so that a checkpoint has them.
    """

    NUM_LEVELS = 20
    MAX_DECAY = 0.98
    """It grows to this as (1 + step) / (10 + step)."""
    MIN_MEAN = 0.02
    """Smaller means count as this: where hardly anything is left to learn, weights would grow without end."""

    def __init__(self) -> None:
        super().__init__()
        self.means: Tensor
        self.sums: Tensor
        self.register_buffer("means", torch.zeros(self.NUM_LEVELS))  # 0 where there has been no image
        self.register_buffer("sums", torch.zeros(2 * self.NUM_LEVELS), persistent=False)

    def weights(self, power: float) -> Tensor:
        """Weights (NUM_LEVELS,): mean losses to the power -power, scaled to average 1 over levels seen; 1 for other levels."""
        seen = self.means > 0
        weights = self.means.clamp(min=self.MIN_MEAN) ** -power
        return torch.where(seen, weights * seen.sum() / (weights * seen).sum(), 1.0)

    def forward(self, t: Tensor, losses: Tensor, power: float) -> Tensor:
        """The weighted mean of losses (B,) at levels t (B,); a power of 1 makes all levels count alike.

        In training the losses are kept for `update`.
        """
        if self.training:
            self.sums += sums_by_level(t, losses.detach(), num_levels=self.NUM_LEVELS)
        return (losses * self.weights(power)[level_of(t, self.NUM_LEVELS)]).mean()

    @torch.no_grad()
    def update(self, step: int, *, counts: bool) -> None:
        """Move the means by the losses of a step, after all its parts, unless it does not count. Every rank must call it."""
        if counts:
            losses, images = mean_over_workers(self.sums.clone()).view(2, self.NUM_LEVELS)
            found, decay = losses / images, min(self.MAX_DECAY, (1 + step) / (10 + step))
            moved = torch.where(self.means > 0, found.lerp(self.means, decay), found)
            self.means.copy_(torch.where(images > 0, moved, self.means))
        self.sums.zero_()
