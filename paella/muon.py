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
        dtype: of the products; bfloat16 is exact enough, and faster where the hardware multiplies it.

    Raises ValueError for a parameter that is no matrix.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon steps matrices, not a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            # this rank's rows as plain tensors: as DTensors these small sums would take longer than the iterations below
            weights = [_rows(parameter) for parameter in parameters]
            gradients = [_rows(parameter.grad) for parameter in parameters]
            means = [_rows(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
            torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, means, group["momentum"])
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            for parameter, weight, update in zip(parameters, weights, updates, strict=True):
                size = group["lr"] * ADAMW_SCALE * max(parameter.shape) ** 0.5
                weight.add_(_orthogonal_rows(update, parameter, self.dtype), alpha=-size)


def _rows(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _orthogonal_rows(update: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """This rank's rows of the orthogonalized update; like tells how the matrix is sharded."""
    if not isinstance(like, DTensor):
        return orthogonalize(update, dtype)
    mesh, placements = like.device_mesh, like.placements
    sharded = DTensor.from_local(update, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
    whole = orthogonalize(sharded.full_tensor(), dtype).contiguous()
    return distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()  # every rank holds it: nothing is sent


def orthogonalize(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix (R,C) with its singular values brought near 1, by products in a dtype."""
    a, b, c = COEFFICIENTS
    matrix = matrix.to(dtype)
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)  # no singular value above 1
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
