"""Sharding, applied from outside the model: FSDP2 over all workers, on CPUs (gloo) and GPUs (nccl) alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce as all_reduce_with_gradient
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from paella.blocks import AttnBlock, ResBlock
from paella.prior import PriorBlock

MIN_UNIT_PARAMETERS = 1_000_000
"""A block smaller than this is gathered with its parent: one large transfer beats many small ones."""


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of forward and backward for "auto", "bf16" or "float32"; weights and reductions stay float32."""
    if precision == "auto":
        fast = device.type == "cuda" or _cpu_multiplies_bf16()
        return torch.bfloat16 if fast else torch.float32
    return {"bf16": torch.bfloat16, "float32": torch.float32}[precision]


def _cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bfloat16 instructions; emulated, bfloat16 is slower than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def shard(model: nn.Module, dtype: torch.dtype) -> None:
    """Shard a model's parameters in place over all workers; forward and backward run in `dtype`.

    The model casts what it multiplies. FSDP would cast every input, noise levels too, and the embedding of t = 0.40507 is another
    than that of 0.40430, its nearest in bfloat16: training would not see the levels that sampling does.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in model.modules():
        if isinstance(module, ResBlock | AttnBlock | PriorBlock) and count_parameters(module) >= MIN_UNIT_PARAMETERS:
            fully_shard(module, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Whole weights on every worker, so that parts of a sharded model can be called without its own forward and its collectives.

    Workers may then make different numbers of passes. No gradients.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not model, recurse=False)  # as `fully_shard` has it
            unit.reshard()


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The unsharded state on rank 0's CPU (other ranks: empty). Every rank must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def num_workers() -> int:
    """Workers that train together; 1 where no group has been started."""
    return dist.get_world_size() if dist.is_initialized() else 1


def cpu_group() -> dist.ProcessGroup:
    """A new group of all workers that talk over CPUs, for what goes on beside training. Every rank must call it."""
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


def mean_over_workers(values: Tensor) -> Tensor:
    """Mean of a small tensor over all workers. Every rank must call it."""
    if num_workers() > 1:
        dist.all_reduce(values)
        values /= num_workers()
    return values


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Mean of the gradients of replicated parameters over all workers, in one transfer. Every rank must call it."""
    if num_workers() > 1:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = mean_over_workers(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def gather_rows(values: Tensor) -> Tensor:
    """Rows (N,D) of all workers in order of rank, N being the same on each. Every rank must call it."""
    if num_workers() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(num_workers())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batches of all workers, each of the same size; `nn.SyncBatchNorm` does not run on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or num_workers() == 1:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        y = x.float()
        local = torch.stack([y.mean((0, 2, 3)), y.square().mean((0, 2, 3))])
        mean, square = all_reduce_with_gradient(local, "sum", dist.distributed_c10d._get_default_group()) / num_workers()
        variance = square - mean.square()
        with torch.no_grad():
            count = x.numel() / x.shape[1] * num_workers()
            self.running_mean.lerp_(mean, self.momentum or 0.0)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum or 0.0)
            self.num_batches_tracked += 1
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return ((y - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)
