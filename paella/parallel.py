"""Sharding, applied from outside the model: FSDP2 over all workers, on CPUs (gloo) and GPUs (nccl) alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
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


def mean_over_workers(values: Tensor) -> Tensor:
    """Mean of a small tensor over all workers. Every rank must call it."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values
