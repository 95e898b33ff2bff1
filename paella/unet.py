"""The Paella U-Net: noisy tokens, a noise level and conditions in, logits over the codebook out.

Parameter names, shapes and numbers equal the published v3 model's, so its checkpoint loads as it is.
B batch, H W token grid, K codes, S conditioning tokens, D width of an input embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paella.blocks import EPS, AttnBlock, LayerNorm2d, PointwiseConv2d, ResBlock, TimestepBlock, embed_noise_level
from paella.config import PaellaConfig
from paella.objective import add_own_token


@dataclass(frozen=True)
class Prepared:
    """Conditions of B images, ready for every step of the sampler.

    keys_values holds what the attention blocks, in their order, made of the conditioning tokens: each (B,S,2C). mask (B,S) is
    True where a token counts; None if all do.
    """

    keys_values: tuple[Tensor, ...]
    mask: Tensor | None
    device: torch.device

    @classmethod
    def stack(cls, rows: Sequence[Prepared]) -> Prepared:
        """One batch of several; shorter ones are padded and the padding masked."""
        lengths = [row.keys_values[0].shape[1] if row.keys_values else 0 for row in rows]
        longest = max(lengths)
        device = rows[0].device
        keys_values = tuple(_padded(of_block, longest) for of_block in zip(*(row.keys_values for row in rows), strict=True))
        if not keys_values or (len(set(lengths)) == 1 and all(row.mask is None for row in rows)):
            return cls(keys_values, None, device)
        whole = (row.keys_values[0].new_ones(row.keys_values[0].shape[:2], dtype=torch.bool) for row in rows)
        masks = [every if row.mask is None else row.mask for row, every in zip(rows, whole, strict=True)]
        return cls(keys_values, torch.cat([F.pad(mask, (0, longest - mask.shape[1])) for mask in masks]), device)


def _padded(parts: Sequence[Tensor], length: int) -> Tensor:
    """(B,S,D) tensors of several lengths S, one behind the other, with zeros up to `length`: on a GPU in a call or two."""
    padded = parts[0].new_zeros(sum(map(len, parts)), length, parts[0].shape[2])
    places = padded.split([len(part) for part in parts])
    torch._foreach_copy_([place[:, : part.shape[1]] for place, part in zip(places, parts, strict=True)], list(parts))
    return padded


class Paella(nn.Module):
    """U-Net over token grids.

    Example:
        >>> model = Paella(PRESETS["tiny"].unet)
        >>> logits = model(tokens, t, byt5=states)  # (B,H,W) int, (B,), (B,S,D) → (B,K,H,W)
    """

    def __init__(self, config: PaellaConfig) -> None:
        super().__init__()
        self.config = c = config
        self.byt5_mapper = nn.Linear(c.byt5_embd, c.c_cond)
        self.clip_mapper = nn.Linear(c.clip_embd, c.c_cond * c.clip_seq_len)
        self.clip_image_mapper = nn.Linear(c.clip_embd, c.c_cond * c.clip_seq_len)
        self.in_mapper = nn.Sequential(
            nn.Embedding(c.num_labels, c.c_in), nn.LayerNorm(c.c_in, elementwise_affine=False, eps=EPS)
        )
        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(c.patch_size) if c.patch_size > 1 else nn.Identity(),
            PointwiseConv2d(c.c_in * c.patch_size**2, c.c_hidden[0]),
            LayerNorm2d(),
        )
        side = c.position_grid
        self.positions = nn.Parameter(torch.empty(c.c_hidden[0], side, side)) if side else None
        levels = range(len(c.c_hidden))
        self.down_blocks = nn.ModuleList(self._down_level(level) for level in levels)
        self.up_blocks = nn.ModuleList(self._up_level(level) for level in reversed(levels))
        self.clf = nn.Sequential(
            LayerNorm2d(),
            PointwiseConv2d(c.c_hidden[0], c.c_out * c.patch_size**2),
            nn.PixelShuffle(c.patch_size) if c.patch_size > 1 else nn.Identity(),
        )
        self.out_mapper = nn.Sequential(LayerNorm2d(), PointwiseConv2d(c.c_out, c.num_labels, bias=False))
        self._init_weights()

    def _group(self, level: int, skip_width: int = 0) -> list[nn.Module]:
        """One repetition of the level's blocks; only a convolution that leads the group takes the skip."""
        c, width = self.config, self.config.c_hidden[level]
        made: list[nn.Module] = []
        for index, kind in enumerate(c.level_config[level]):
            if kind == "C":
                made.append(ResBlock(width, skip_width if index == 0 else 0, c.kernel_size, c.dropout))
            elif kind == "T":
                made.append(TimestepBlock(width, c.c_r))
            else:
                made.append(AttnBlock(width, c.c_cond, c.nhead[level], c.dropout, c.self_attn))
        return made

    def _down_level(self, level: int) -> nn.ModuleList:
        widths = self.config.c_hidden
        blocks = nn.ModuleList()
        if level > 0:
            blocks.append(nn.Sequential(LayerNorm2d(), nn.Conv2d(widths[level - 1], widths[level], 2, stride=2)))
        for _ in range(self.config.blocks[level]):
            blocks.extend(self._group(level))
        return blocks

    def _up_level(self, level: int) -> nn.ModuleList:
        widths = self.config.c_hidden
        lowest = level == len(widths) - 1
        blocks = nn.ModuleList()
        for repetition in range(self.config.blocks[level]):
            blocks.extend(self._group(level, 0 if lowest or repetition > 0 else widths[level]))
        if level > 0:
            blocks.append(nn.Sequential(LayerNorm2d(), nn.ConvTranspose2d(widths[level], widths[level - 1], 2, stride=2)))
        return blocks

    def _init_weights(self) -> None:
        """The published initialisation: blocks start close to the identity and the classifier at the embedding."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        codes, fold, unfold, classifier = self.in_mapper[0], self.embedding[1], self.clf[1], self.out_mapper[1]
        assert isinstance(codes, nn.Embedding) and isinstance(fold, nn.Conv2d)
        assert isinstance(unfold, nn.Conv2d) and isinstance(classifier, nn.Conv2d)
        for mapper in (self.byt5_mapper, self.clip_mapper, self.clip_image_mapper):
            nn.init.normal_(mapper.weight, std=0.02)
        nn.init.xavier_uniform_(fold.weight, 0.02)
        nn.init.zeros_(unfold.weight)
        nn.init.normal_(codes.weight, std=self.config.num_labels**-0.5)
        if self.positions is not None:
            nn.init.normal_(self.positions, std=0.02)
        with torch.no_grad():
            classifier.weight.copy_(codes.weight[:, : self.config.c_out, None, None])
            for module in self.modules():
                if isinstance(module, ResBlock):
                    module.last_linear.weight.mul_(sum(self.config.blocks) ** -0.5)
                elif isinstance(module, TimestepBlock):
                    module.mapper.weight.zero_()

    def embed_r(self, t: Tensor) -> Tensor:
        """Sinusoidal embedding of the noise level: (B,) in [0, 1] → (B,c_r)."""
        return embed_noise_level(t, self.config.c_r)

    def embed_conditions(self, byt5: Tensor, clip: Tensor | None = None, clip_image: Tensor | None = None) -> Tensor:
        """All conditions as one sequence: byt5 (B,S,D), clip (B,D), clip_image (B,D) or several as (B,M,D) → (B,S',c_cond)."""
        dtype = self.byt5_mapper.weight.dtype
        sequence = [self.byt5_mapper(byt5.to(dtype))]
        if clip is not None:
            sequence.append(self.clip_mapper(clip.to(dtype)).unflatten(1, (self.config.clip_seq_len, -1)))
        if clip_image is not None:
            images = clip_image[:, None] if clip_image.ndim == 2 else clip_image
            groups = self.clip_image_mapper(images.to(dtype)).unflatten(2, (self.config.clip_seq_len, -1))
            sequence.append(groups.flatten(1, 2))
        return F.layer_norm(torch.cat(sequence, dim=1), (self.config.c_cond,), eps=EPS)

    @property
    def attention_blocks(self) -> list[AttnBlock]:
        """In the order in which `forward` meets them."""
        return [block for block in self.modules() if isinstance(block, AttnBlock)]

    @torch.inference_mode()
    def prepare(
        self,
        *,
        byt5: Tensor,
        clip: Tensor | None = None,
        clip_image: Tensor | None = None,
        byt5_mask: Tensor | None = None,
        attn_weights: Tensor | None = None,
    ) -> Prepared:
        """The part of `forward` that only depends on the conditions; arguments as there."""
        cond, mask, weight = self._sequence(byt5, clip, clip_image, byt5_mask, attn_weights)
        if mask is not None and bool(mask.all()):
            mask = None  # attention is faster without
        return Prepared(tuple(block.keys_values(cond, weight) for block in self.attention_blocks), mask, cond.device)

    def _sequence(
        self,
        byt5: Tensor,
        clip: Tensor | None,
        clip_image: Tensor | None,
        byt5_mask: Tensor | None,
        attn_weights: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The conditioning tokens (B,S',c_cond), their mask and their weights, each (B,S') or None."""
        cond = self.embed_conditions(byt5, clip, clip_image)
        mask, weight = byt5_mask, attn_weights
        if mask is not None:
            mask = F.pad(mask, (0, cond.shape[1] - mask.shape[1]), value=True)
        if weight is not None:
            weight = F.pad(weight.expand(len(cond), -1), (cond.shape[1] - weight.shape[-1], 0), value=1.0)
        return cond, mask, weight

    def forward(self, tokens: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """Logits (B,K,H,W) of the clean tokens; arguments and errors as of `features`."""
        return self.logits(self.features(tokens, t, **conditions), tokens, t)

    def logits(self, features: Tensor, tokens: Tensor, t: Tensor) -> Tensor:
        """Logits (B,K,H,W) of what `features` returned for tokens and t."""
        logits = self.out_mapper(features)
        return add_own_token(logits, tokens, t) if self.config.leave_one_out else logits

    def features(
        self,
        tokens: Tensor,
        t: Tensor,
        *,
        byt5: Tensor | None = None,
        clip: Tensor | None = None,
        clip_image: Tensor | None = None,
        byt5_mask: Tensor | None = None,
        attn_weights: Tensor | None = None,
        prepared: Prepared | None = None,
    ) -> Tensor:
        """What `logits` turns into logits, position by position.

        Args:
            tokens: (B,H,W) integers below num_labels; H and W multiples of `config.grid_multiple`.
            t: (B,) noise level in [0, 1], 1 = all noise.
            byt5, clip, clip_image: see `embed_conditions`.
            byt5_mask: (B,S) True where a text state counts; padding is kept out of attention. Or (B,S'), one for each
                conditioning token, to leave out others as well.
            attn_weights: (n,) or (B,n) factors of the attention, after its softmax, to the last n conditioning tokens: those of
                the image embedding, `config.clip_seq_len` each.
            prepared: all of the conditions, from `prepare`, in place of the above.

        Returns:
            (B,c_out,H,W). Raises ValueError on a grid of the wrong shape.
        """
        multiple = self.config.grid_multiple
        if tokens.ndim != 3 or tokens.shape[1] % multiple or tokens.shape[2] % multiple:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}, but (batch, height, width) with sides that are "
                f"multiples of {multiple} are needed"
            )
        if prepared is None:
            if byt5 is None:
                raise ValueError("the U-Net needs text states: byt5=…, or prepared=… in place of all conditions")
            cond, mask, weight = self._sequence(byt5, clip, clip_image, byt5_mask, attn_weights)
            attend = _Attend(cond, mask, weight, iter(()))
        else:
            attend = _Attend(None, prepared.mask, None, iter(prepared.keys_values))
        x = self.embedding(self.in_mapper(tokens).permute(0, 3, 1, 2))  # (B,C0,H/p,W/p)
        if self.positions is not None:
            x = x + _stretched(self.positions, x.shape[2:])
        x = x.contiguous(memory_format=torch.channels_last)
        r_embed = self.embed_r(t).to(x.dtype)
        skips: list[Tensor] = []
        for level in self.down_blocks:
            x = self._run(level, x, r_embed, attend)
            skips.append(x)
        skips.pop()
        for index, level in enumerate(self.up_blocks):
            x = self._run(level, x, r_embed, attend, skips.pop() if index > 0 else None)
        return self.clf(x)  # (B,c_out,H,W)

    @staticmethod
    def _run(level: nn.Module, x: Tensor, r_embed: Tensor, attend: _Attend, skip: Tensor | None = None) -> Tensor:
        for block in level.children():
            if isinstance(block, ResBlock):
                x, skip = block(x, skip), None
            elif isinstance(block, TimestepBlock):
                x = block(x, r_embed)
            elif isinstance(block, AttnBlock):
                x = block(x, attend.cond, attend.mask, attend.weight, next(attend.keys_values, None))
            else:
                x = block(x)
        return x


def _stretched(positions: Tensor, grid: torch.Size) -> Tensor:
    """Position embeddings (C,G,G) for a grid (h,w) of the first level: (C,h,w), bilinear where it is another than theirs.

    A place means its share of the width and of the height: the middle of a picture is the middle at any size and aspect.
    """
    if positions.shape[1:] == grid:
        return positions
    return F.interpolate(positions[None], size=grid, mode="bilinear", align_corners=False)[0]


@dataclass(frozen=True)
class _Attend:
    """What one pass gives its attention blocks: the conditioning tokens, or keys and values made ahead, block by block."""

    cond: Tensor | None
    mask: Tensor | None
    weight: Tensor | None
    keys_values: Iterator[Tensor]
