"""Exponential moving average of a model's weights, sharded as the model is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averages of a model's trained parameters, in float32.

    The decay grows to `decay` as (1 + step) / (10 + step), so that an early average is not mostly the random start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for average, value in self._pairs(model):
            average.lerp_(value, 1 - decay)

    @contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """The model holds the averages inside the block."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for average, value in self._pairs(model):
            kept = value.clone()
            value.copy_(average)
            average.copy_(kept)

    def _pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        for name, value in model.named_parameters():
            if name in self.shadow:
                yield self.shadow[name], value
