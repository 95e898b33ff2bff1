"""Sharding, recomputing and compiling, applied from outside the model: FSDP2, on CPUs (gloo) and GPUs (nccl) alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce as all_reduce_with_gradient
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial
from torch.utils.checkpoint import checkpoint

from paella.blocks import AttnBlock, ResBlock, TimestepBlock
from paella.prior import PriorBlock

MIN_UNIT_PARAMETERS = 1_000_000
"""Blocks smaller than this are gathered with the rest of the model: one large transfer beats many small ones."""
MAX_UNITS = 24
"""Groups of blocks that are gathered on their own: each costs the thread that launches a GPU's kernels a millisecond or more."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a model is spread over workers, and what is traded for memory and speed; none of it changes what is learned."""

    reshard_after_forward: bool = True
    """Give a unit's gathered weights back after its forward pass and gather them again for the backward pass (ZeRO-3);
    keeping them in between is faster where memory allows (ZeRO-2)."""
    shard_group_size: int | None = None
    """Hybrid sharding: weights are sharded over this many workers, those of a node say, and every group holds them all; gradients
    are summed over groups. All workers if not given."""
    activation_checkpointing: bool = False
    """Keep only what goes into each block and compute the rest again in the backward pass: a third more work, less memory."""
    compile: bool = False
    """Compile the blocks (torch.compile): minutes at the start, faster steps."""
    accumulate: int = 1
    """Parts in which each of all workers passes its share of a batch through the model, before one optimizer step."""
    loss_chunk: int | None = None
    """Tokens whose logits exist at the same time: float32 logits of all of them are 134 MB an image with 8192 codes. All if not
    given."""

    def __post_init__(self) -> None:
        for name in ("shard_group_size", "accumulate", "loss_chunk"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"parallel.{name}={value} is not allowed: an integer of at least 1")

    def require_fits(self, min_workers: int, num_workers: int, global_batch_size: int) -> None:
        """Raises ValueError where workers do not divide into groups, or their share of a batch into parts."""
        if (size := self.shard_group_size) is not None:
            for number in range(min_workers, num_workers + 1):
                if number % size:
                    raise ValueError(f"parallel.shard_group_size={size} must divide num_workers={number}")
        if global_batch_size % (num_workers * self.accumulate):
            raise ValueError(
                f"global_batch_size={global_batch_size} must be a multiple of num_workers={num_workers} times "
                f"parallel.accumulate={self.accumulate}"
            )


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of forward and backward for "auto", "bf16" or "float32"; weights and reductions stay float32."""
    if precision == "auto":
        fast = device.type == "cuda" or _cpu_multiplies_bf16()
        return torch.bfloat16 if fast else torch.float32
    return {"bf16": torch.bfloat16, "float32": torch.float32}[precision]


def _cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bfloat16 instructions; emulated, bfloat16 is slower than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def shard(model: nn.Module, dtype: torch.dtype, config: ParallelConfig | None = None) -> None:
    """Shard a model's parameters in place over all workers; forward and backward run in `dtype`.

    The model casts what it multiplies. FSDP would cast every input, noise levels too, and the embedding of t = 0.40507 is another
    than that of 0.40430, its nearest in bfloat16: training would not see the levels that sampling does.

    Besides `forward`, a method `losses` may be called on the sharded model.
    """
    config = config or ParallelConfig()
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = _mesh(config.shard_group_size)
    for block in blocks_of(model):
        _in_training(block, config)
    for unit in units(model):
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    if hasattr(model, "losses"):
        register_fsdp_forward_method(model, "losses")


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that are recomputed, compiled and gathered as one, in the order in which they run."""
    return [module for module in model.modules() if isinstance(module, ResBlock | TimestepBlock | AttnBlock | PriorBlock)]


def units(model: nn.Module) -> list[list[nn.Module]]:
    """Blocks that follow one another and whose weights are gathered together; the last ones may be left to the whole model."""
    enough = max(MIN_UNIT_PARAMETERS, count_parameters(model) / MAX_UNITS)
    made: list[list[nn.Module]] = [[]]
    for block in blocks_of(model):
        made[-1].append(block)
        if sum(map(count_parameters, made[-1])) >= enough:
            made.append([])
    return made[:-1]


def _mesh(group_size: int | None) -> DeviceMesh | None:
    """Groups of workers in order of rank, neighbours in a group; None for one group of all."""
    if group_size is None or group_size == num_workers():
        return None
    shape = num_workers() // group_size, group_size
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))


def _in_training(block: nn.Module, config: ParallelConfig) -> None:
    """Recompute and compile a block's forward as configured, in training only: sampling has other shapes and no gradients.

    The method is replaced in place, inside FSDP's hooks; no module is wrapped, so that names and classes stay what they are.
    """
    plain = training = block.forward
    if config.compile:
        # one compiled graph serves all blocks of a shape, but each shape and each length of text counts against this limit
        torch._dynamo.config.recompile_limit = 64
        training = torch.compile(training)
    if config.activation_checkpointing:
        training = functools.partial(checkpoint, training, use_reentrant=False)
    if training is not plain:
        block.forward = _Choice(block, training, plain)  # type: ignore[method-assign]


class _Choice:
    """A block's forward: one in training, another else."""

    def __init__(self, block: nn.Module, training: Callable, otherwise: Callable) -> None:
        self.block, self.training, self.otherwise = block, training, otherwise

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        return (self.training if self.block.training else self.otherwise)(*args, **kwargs)


def sum_gradients_with(model: nn.Module, is_last: bool, config: ParallelConfig) -> None:
    """Before a pass over a part of a batch: its gradients stay on this worker, in float32, until the last part's are there.

    So do the weights that it gathers, where they are kept after the forward pass: those of the next part are the same.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
        model.set_reshard_after_backward(is_last or config.reshard_after_forward)


@contextmanager
def evaluating(model: nn.Module, *, reshard: bool = True) -> Iterator[None]:
    """Passes without gradients, in eval mode, by all workers together, of a model that trains.

    Args:
        reshard: what a pass leaves gathered is given back: training would go on with it, even where the weights have been others
            in the block. Where they have not, to keep it saves gathering it again.
    """
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in model.modules():
            if reshard and isinstance(module, FSDPModule):
                module.reshard()
        model.train()


@contextmanager
def gathered(model: nn.Module, *, reshard_after_forward: bool = True) -> Iterator[None]:
    """Whole weights on every worker, so that parts of a sharded model can be called without its own forward and its collectives.

    Workers may then make different numbers of passes. No gradients.

    Args:
        reshard_after_forward: what the model was sharded with, and what holds again afterwards.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(reshard_after_forward and unit is not model, recurse=False)
            unit.reshard()


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the unsharded state on rank 0's CPU (other ranks: empty). Every rank must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    alone = num_workers() == 1  # nothing was gathered then: these are the model's own, which go on changing
    return {name: value.clone() if alone else value for name, value in state.items() if isinstance(value, Tensor)}


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


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Of all gradients together, whole ones or all sharded alike, in float32. Every rank must call it.

    Summed in float64, so that it is the same to the last bit however many workers hold them: of a last bit AdamW makes another
    step wherever a gradient is little more than rounding.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    local = [each.to_local() if isinstance(each, DTensor) else each for each in gradients]
    total = torch.stack(torch._foreach_norm(local, 2, dtype=torch.float64)).square().sum()
    if isinstance(gradients[0], DTensor):
        placements = [Partial() if each.is_shard() else each for each in gradients[0].placements]
        total = DTensor.from_local(total, gradients[0].device_mesh, placements).full_tensor()
    return total.sqrt().float()


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
