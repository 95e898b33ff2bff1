"""Exponential moving average of a model's weights, sharded as the model is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Ema:
    """Averages of a model's trained parameters, in float32. With a decay of 0 they are the parameters, and take no memory.

    The decay grows to `decay` as (1 + step) / (10 + step), so that an early average is not mostly the random start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        trained = ((name, value) for name, value in model.named_parameters() if value.requires_grad)
        self.shadow = {name: value.detach().clone() for name, value in trained} if decay > 0 else {}

    @torch.no_grad()
    def restart(self, model: nn.Module) -> None:
        """Forget what was before: the averages are the weights."""
        for average, value in zip(*self._local(model), strict=True):
            average.copy_(value)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, values = self._local(model)
        if averages:
            torch._foreach_lerp_(averages, values, 1 - decay)

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
        for average, value in zip(*self._local(model), strict=True):
            kept = value.clone()
            value.copy_(average)
            average.copy_(kept)

    def _local(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Averages and weights of this rank: one call over plain tensors, where DTensors would cost a dispatch each."""
        pairs = [(self.shadow[name], value) for name, value in model.named_parameters() if name in self.shadow]
        return [_shard(average) for average, _ in pairs], [_shard(value) for _, value in pairs]


def _shard(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
