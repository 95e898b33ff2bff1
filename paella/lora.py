"""LoRA (arXiv 2106.09685) on the U-Net's attention and conditioning layers: small additions to frozen weights.

An adapter is a submodule beside the weight that it adds to, so that all published names and shapes stay, and `merged` gives plain
weights. D, C shape of a weight, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paella.blocks import Attention2d, AttnBlock, linear
from paella.unet import Paella

PREFIX = "lora_"
"""The adapter of parameter `weight` is the submodule `lora_weight` beside it."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Train low-rank additions to attention and conditioning layers in place of the weights."""

    rank: int = 0
    """Rank of the additions; 0 trains the weights themselves."""
    alpha: float | None = None
    """The additions are scaled by alpha / rank; by 1 if not given."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank={self.rank} is not allowed: an integer of at least 0")

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


class Adapter(nn.Module):
    """scale · up @ down, an addition to a weight (D,C) that is zero at the start."""

    def __init__(self, weight: Tensor, config: LoraConfig) -> None:
        super().__init__()
        self.scale = config.scale
        self.down = nn.Parameter(torch.randn(config.rank, weight.shape[1], device=weight.device) * weight.shape[1] ** -0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], config.rank, device=weight.device))

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """What is added to x @ weight[rows].T: (…,C) → (…,D)."""
        return linear(linear(x, self.down, None), self.up[rows], None) * self.scale


def add_lora(unet: Paella, config: LoraConfig) -> None:
    """Freeze a U-Net and give its attention, key-value and condition layers adapters, which are then all that trains.

    What has been frozen before gets none: no loss may reach it.
    """
    mappers = (unet.byt5_mapper, unet.clip_mapper, unet.clip_image_mapper)
    layers: list[nn.Module] = [mapper for mapper in mappers if mapper.weight.requires_grad]
    unet.requires_grad_(False)
    for module in list(unet.modules()):
        if isinstance(module, AttnBlock):
            layers.append(module.kv_mapper[1])
        if isinstance(module, Attention2d):
            _adapt_attention(module, config)
    for layer in layers:
        _adapt_linear(layer, config)


def _adapt_linear(layer: Any, config: LoraConfig) -> None:
    adapter, plain = Adapter(layer.weight, config), layer.forward
    layer.add_module(f"{PREFIX}weight", adapter)
    layer.forward = lambda x: plain(x) + adapter(x)


def _adapt_attention(attention: Any, config: LoraConfig) -> None:
    project_in, project_out = attention.project_in, attention.project_out
    for owner, name in ((attention.attn, "in_proj_weight"), (attention.attn.out_proj, "weight")):
        owner.add_module(f"{PREFIX}{name}", Adapter(getattr(owner, name), config))
    into, out_of = attention.attn.lora_in_proj_weight, attention.attn.out_proj.lora_weight
    attention.project_in = lambda x, rows: project_in(x, rows) + into(x, rows)
    attention.project_out = lambda x: project_out(x) + out_of(x)


def merged(state: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """A state dict with every adapter added to its weight: the names and shapes of a model without adapters."""
    plain = {name: value for name, value in state.items() if f".{PREFIX}" not in name}
    for name, down in state.items():
        owner, _, rest = name.partition(f".{PREFIX}")
        if rest.endswith(".down"):
            parameter = rest.removesuffix(".down")
            added = state[f"{owner}.{PREFIX}{parameter}.up"].float() @ down.float() * config.scale
            weight = plain[f"{owner}.{parameter}"]
            plain[f"{owner}.{parameter}"] = (weight.float() + added).to(weight.dtype)
    return plain
