"""Muon, an optimizer for weight matrices whole or sharded, for runs of thousands of steps.

The update is the gradient's running mean with all singular values near 1, so that rare directions move as fast as common ones
(Jordan 2024, "Muon: An optimizer for hidden layers"; step size as arXiv 2502.16982, section 2.2). `torch.optim.Muon` computes the
same from whole tensors; a shard of a matrix has other singular values, so here FSDP's shards are gathered first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration: steepest at 0, values end between 0.7 and 1.2."""
ADAMW_SCALE = 0.2
"""Root mean square of an AdamW update at learning rate 1, matched here."""


class Muon(torch.optim.Optimizer):
    """Steps (R,C) parameters, DTensors among them; every rank must call `step`.

    Args:
        parameters: matrices inside a network; embeddings, output layers and vectors belong to AdamW.
        lr: learning rate, on AdamW's scale.
        momentum: decay of the gradient's running mean (with Nesterov's look ahead).
        weight_decay: decoupled.

    Raises ValueError for a parameter that is no matrix.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon steps matrices, not a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group["lr"], group["momentum"], group["weight_decay"])

    def _step(self, parameter: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        update = gradient.lerp(mean, momentum)
        if isinstance(update, DTensor):
            whole = orthogonalize(update.full_tensor())
            update = distribute_tensor(whole, update.device_mesh, update.placements, src_data_rank=None)  # all ranks hold it
        else:
            update = orthogonalize(update)
        parameter.mul_(1 - lr * weight_decay)
        parameter.add_(update, alpha=-lr * ADAMW_SCALE * max(parameter.shape) ** 0.5)


def orthogonalize(matrix: Tensor) -> Tensor:
    """A matrix (R,C) with its singular values brought near 1, in bfloat16."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16().T if tall else matrix.bfloat16()
    x = x / x.norm().clamp(min=1e-7)  # no singular value above 1
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
