"""How much memory training takes: counted, without a weight being made, from what a forward pass keeps for the backward pass.

Adds up what `training` and `parallel` do: weights, gradients, optimizer and averages by shards; weights as they are gathered;
activations of a worker's images.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from paella.conditioning import TextEncoders, encoder_config, encoder_like
from paella.config import ModelConfig, TextConfig
from paella.flops import TEXT_TOKENS
from paella.parallel import ParallelConfig, blocks_of, count_parameters, units
from paella.unet import Paella

FROZEN_ENCODERS = {
    "google/byt5-small": (1472, 3584, 12, 6), "google/byt5-base": (1536, 3968, 18, 12), "google/byt5-large": (1536, 3840, 36, 16),
    "google/byt5-xl": (2560, 6720, 36, 32), "google/byt5-xxl": (4672, 12352, 36, 64),
}  # fmt: skip
"""d_model, d_ff, layers and heads of 64 of the encoders that a hub name means."""


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model, by what becomes of them in training."""

    unet: int
    text: int
    """Of the text encoder."""
    text_trained: bool
    root: int
    """Of those trained: gathered through the whole step, being too small to be sharded on their own."""
    largest_unit: int
    """Of those trained: the largest group of blocks that is gathered on its own."""

    @property
    def trained(self) -> int:
        return self.unet + self.text * self.text_trained

    @property
    def frozen(self) -> int:
        return self.text * (not self.text_trained)


@functools.cache
def sizes(config: ModelConfig) -> Sizes:
    """Count parameters. Raises ValueError for a text encoder of unknown size."""
    trained = config.text.trained
    with torch.device("meta"):
        unet = Paella(config.unet)
        encoder = _trained_encoder(config.text) if trained else nn.Module()
    text = count_parameters(encoder) if trained else _frozen_size(config.text.byt5)
    big = [sum(map(count_parameters, unit)) for unit in units(nn.ModuleList([unet, encoder]))]
    number = count_parameters(unet)
    return Sizes(number, text, trained, number + text * trained - sum(big), max(big, default=0))


def _frozen_size(name: str) -> int:
    """Parameters of an encoder that is loaded; of ByT5 attention's four matrices, the feed-forward layers' three, and norms."""
    if Path(name).is_dir():
        with torch.device("meta"):
            return count_parameters(encoder_like(encoder_config(name)))
    if name not in FROZEN_ENCODERS:
        raise ValueError(f"the size of the text encoder {name} is not known: known are {', '.join(FROZEN_ENCODERS)}, directories")
    width, d_ff, layers, heads = FROZEN_ENCODERS[name]
    return layers * (4 * width * heads * 64 + 3 * width * d_ff + 2 * width) + 384 * width


def _trained_encoder(config: TextConfig) -> nn.Module:
    """The encoder that is trained with the U-Net, with random weights."""
    if config.new_byt5 is not None:
        return TextEncoders.create(config).byt5
    encoder = encoder_like(encoder_config(config.byt5))
    encoder.set_attn_implementation("eager")  # as `TextEncoders.to_train`
    return encoder


@dataclass(frozen=True)
class Kept:
    """Bytes that a step keeps of one image for the backward pass."""

    activations: int
    """Logits not counted."""
    recomputed: int
    """The same where blocks are computed again."""
    logits: int
    """In float32, with what the loss keeps and gives of them."""


@functools.cache
def kept(config: ModelConfig, dtype: torch.dtype, device: str = "cpu") -> Kept:
    """Count what a model keeps on CPUs or GPUs ("cuda", which need not be there), whose attention keeps less."""
    height, width = config.grid(config.image_size, config.image_size)
    fused = _FusedAttention() if device == "cuda" else nullcontext()
    with FakeTensorMode(), torch.device(device), fused:
        with _weights_in(dtype):
            unet = Paella(config.unet)
        counter = _Counter(unet)
        with counter.watching():
            unet.features(
                torch.zeros(1, height, width, dtype=torch.long),
                torch.ones(1),
                byt5=torch.zeros(1, TEXT_TOKENS, config.unet.byt5_embd, dtype=dtype),
                byt5_mask=torch.ones(1, TEXT_TOKENS, dtype=torch.bool),
            )
    text = _kept_of_text(config, dtype) if config.text.trained else 0
    return Kept(
        activations=counter.total + text,
        recomputed=counter.total - sum(counter.inside) + sum(counter.inputs) + max(counter.inside) + text,
        logits=height * width * config.unet.num_labels * (2 * 4 + dtype.itemsize),
    )


def _kept_of_text(config: ModelConfig, dtype: torch.dtype) -> int:
    """By a text encoder that is trained, of one caption."""
    with FakeTensorMode(), _weights_in(dtype):
        encoder = _trained_encoder(config.text)
        counter = _Counter(encoder)
        with counter.watching():
            encoder(torch.zeros(1, TEXT_TOKENS, dtype=torch.long), torch.ones(1, TEXT_TOKENS, dtype=torch.long))
    return counter.total


@contextmanager
def _weights_in(dtype: torch.dtype) -> Iterator[None]:
    """New parameters are of this dtype inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _FusedAttention(TorchFunctionMode):
    """Attention by the kernel that GPUs have for masks, which torch does not choose where there is none: it keeps no scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args
        bias = kwargs["attn_mask"].to(q.dtype).expand(-1, q.shape[1], q.shape[2], -1)
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, kwargs["dropout_p"])[0]


class _Counter:
    """Bytes of distinct tensors that autograd keeps, weights left out: in all, and inside each block."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen: dict[int, torch.UntypedStorage] = {}
        self.total = 0
        self.inside: list[int] = []
        self.inputs: list[int] = []
        self.seen |= {value.untyped_storage()._cdata: value.untyped_storage() for value in model.parameters()}

    @contextmanager
    def watching(self) -> Iterator[None]:
        hooks = [hook for block in blocks_of(self.model) for hook in self._hooks(block)]
        with saved_tensors_hooks(self._pack, lambda kept: kept):
            yield
        for hook in hooks:
            hook.remove()

    def _pack(self, value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen[storage._cdata] = storage  # held, so that no other gets its number
            self.total += storage.nbytes()
        return value

    def _hooks(self, block: nn.Module) -> list:
        def before(block: nn.Module, inputs: tuple) -> None:
            self.inside.append(-self.total)
            self.inputs.append(inputs[0].numel() * inputs[0].itemsize)

        def after(block: nn.Module, inputs: tuple, output: Tensor) -> None:
            self.inside[-1] += self.total

        return [block.register_forward_pre_hook(before), block.register_forward_hook(after)]


@dataclass(frozen=True)
class WorkerMemory:
    """What one worker holds in a training step, in bytes."""

    process: float
    """Python, its libraries and, on a GPU, CUDA's context and the allocator's waste."""
    text_encoder: float
    """Of a frozen one."""
    state: float
    """Its shards of weights, gradients, AdamW's two means and the averages, float32."""
    gathered: float
    """Whole weights and gradients of what is gathered at the same time."""
    accumulated: float
    """Gradients of earlier parts of the batch, whole, in float32."""
    activations: float
    logits: float
    checkpoint_copy: float
    """On CPUs: of its shards, while a checkpoint is written beside training. GPUs copy to their node's memory."""

    @property
    def total(self) -> float:
        return sum(vars(self).values())


COMPILED = 0.83
"""Share of the activations that compiled blocks keep, since they join operations: `paella-1b` on an H200."""
PROCESS_BYTES = {"cpu": 1.3e9, "cuda": 3e9}
"""Python, libraries and the allocator's waste: on CPUs what a worker of train.py had beyond what is counted, on GPUs assumed."""


def worker_memory(
    config: ModelConfig,
    images: int,
    dtype: torch.dtype,
    *,
    num_shards: int,
    parallel: ParallelConfig,
    device: str = "cpu",
    averages: bool = True,
    asynchronous: bool = True,
) -> WorkerMemory:
    """Memory of a worker that passes so many images through the model at a time, the model being sharded over `num_shards`."""
    size, keeps = sizes(config), kept(config, dtype, device)
    height, width = config.grid(config.image_size, config.image_size)
    chunk = min(images, (parallel.loss_chunk or images * height * width) / (height * width))
    activations = float(keeps.recomputed if parallel.activation_checkpointing else keeps.activations)
    if parallel.compile and device == "cuda" and not parallel.activation_checkpointing:
        activations *= COMPILED
    gathered = size.root + size.largest_unit if parallel.reshard_after_forward else size.trained
    shard = size.trained / num_shards
    return WorkerMemory(
        process=PROCESS_BYTES[device],
        text_encoder=size.frozen * dtype.itemsize,
        state=shard * (16 + 4 * averages),
        # weights, gradients, and the largest group's once more in float32 while it is summed over workers
        gathered=gathered * 2 * dtype.itemsize + max(size.root, size.largest_unit) * 4,
        accumulated=4.0 * size.trained * (parallel.accumulate > 1),
        activations=images * activations,
        logits=keeps.logits * chunk,
        checkpoint_copy=shard * (12 + 4 * averages) if device == "cpu" and asynchronous else 0.0,
    )
