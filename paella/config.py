"""Configurations of the networks and the named presets.

The field names are the seed's constructor arguments, so a published `config.json` reads as it stands.
Every config is frozen, checks itself in `__post_init__` and raises `ValueError` with the field, the value and
what is allowed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Self


def require(ok: bool, field: str, value: object, allowed: str) -> None:
    """Raises ValueError with the field, its value and what is allowed."""
    if not ok:
        raise ValueError(f"{field}={value!r} is not allowed: {allowed}")


class _Config:
    """to_dict/from_dict for the frozen dataclasses below."""

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises ValueError for a field this version does not know."""
        fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(set(values) - fields):
            raise ValueError(f"{cls.__name__} has no field {unknown[0]!r}; it has {', '.join(sorted(fields))}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@dataclass(frozen=True, kw_only=True)
class PaellaConfig(_Config):
    """The U-Net. The defaults are the published 1B model (`paella_v3.pt`)."""

    c_in: int = 256
    """Width of the token embedding."""
    c_out: int = 256
    """Width before the classifier over the codebook."""
    num_labels: int = 8192
    """Size of the VQGAN's codebook."""
    c_r: int = 64
    """Width of the noise-level embedding."""
    patch_size: int = 2
    """Tokens per side that are folded into one position of the first level."""
    c_cond: int = 1024
    """Width of the conditioning tokens."""
    c_hidden: tuple[int, ...] = (640, 1280, 1280)
    """Width of each level."""
    nhead: tuple[int, ...] = (-1, 16, 16)
    """Attention heads of each level; -1 where the level has no attention."""
    blocks: tuple[int, ...] = (6, 16, 6)
    """Repetitions of the level's block group, on the way down and again on the way up."""
    level_config: tuple[str, ...] = ("CT", "CTA", "CTA")
    """Block group of each level: C convolution, T noise level, A attention."""
    clip_embd: int = 1024
    """Width of the CLIP text and image embeddings."""
    byt5_embd: int = 2560
    """Width of the text encoder's states (ByT5-XL: 2560)."""
    clip_seq_len: int = 4
    """Conditioning tokens made of one CLIP embedding."""
    kernel_size: int = 3
    """Kernel of the depthwise convolutions."""
    dropout: float = 0.1
    """Dropout in the convolution and attention blocks."""
    self_attn: bool = True
    """Whether attention sees the image's own positions besides the conditioning tokens."""
    leave_one_out: bool = False
    """Predict each token from the others; what stands there is added by Bayes' rule (arXiv 2605.22765)."""
    position_grid: int = 0
    """Side of the grid of learned position embeddings that is added to the token embedding; 0: none. Best is the side of the
    training images' token grid divided by patch_size: to any other grid the embeddings are stretched, bilinearly."""

    def __post_init__(self) -> None:
        for name in ("c_hidden", "nhead", "blocks", "level_config"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        levels = len(self.c_hidden)
        for name in ("nhead", "blocks", "level_config"):
            require(
                len(getattr(self, name)) == levels,
                name,
                getattr(self, name),
                f"one value per level of c_hidden, {levels}",
            )
        for name in ("c_in", "c_out", "num_labels", "patch_size", "c_cond", "clip_embd", "byt5_embd", "clip_seq_len"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "an integer of at least 1")
        require(self.c_r >= 4, "c_r", self.c_r, "an integer of at least 4")
        require(self.kernel_size % 2 == 1, "kernel_size", self.kernel_size, "an odd integer")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "a number in [0, 1)")
        require(self.position_grid >= 0, "position_grid", self.position_grid, "an integer of at least 0")
        for width, heads, group in zip(self.c_hidden, self.nhead, self.level_config, strict=True):
            require(bool(group) and set(group) <= set("CTA"), "level_config", group, "letters of C, T and A")
            require(
                "A" not in group or (heads > 0 and width % heads == 0),
                "nhead",
                heads,
                f"a divisor of the width {width}",
            )

    @property
    def grid_multiple(self) -> int:
        """Sides of a token grid must be multiples of this: 8 for the published model."""
        return self.patch_size * 2 ** (len(self.c_hidden) - 1)


@dataclass(frozen=True, kw_only=True)
class VQConfig(_Config):
    """The VQGAN. The defaults are the published f4 model (`vqgan_f4.pt`)."""

    levels: int = 2
    """Resolutions; one token covers 2**levels pixels a side."""
    bottleneck_blocks: int = 12
    """Residual blocks of the decoder's lowest resolution."""
    c_hidden: int = 384
    """Width of the lowest resolution; halved at each higher one."""
    c_latent: int = 4
    """Width of a code."""
    codebook_size: int = 8192
    """Number of codes."""
    scale_factor: float = 0.3764
    """Latents are divided by this on the way out of `encode` and multiplied on the way into `decode`."""
    quantizer: str = "codebook"
    """What makes tokens of latents: codebook (published), cosine (directions count), fsq (rounding) or lfq (signs)."""
    fsq_levels: tuple[int, ...] = ()
    """Levels of each latent dimension, for fsq: 8 5 5 5 are 1,000 codes."""

    def __post_init__(self) -> None:
        require(self.levels >= 1, "levels", self.levels, "an integer of at least 1")
        require(self.bottleneck_blocks >= 1, "bottleneck_blocks", self.bottleneck_blocks, "an integer of at least 1")
        require(self.c_latent >= 1, "c_latent", self.c_latent, "an integer of at least 1")
        require(2 <= self.codebook_size <= 65536, "codebook_size", self.codebook_size, "2 to 65536 (tokens are uint16)")
        require(self.scale_factor > 0, "scale_factor", self.scale_factor, "a positive number")
        self._check_quantizer()
        divisor = 2 ** (self.levels - 1)
        require(
            self.c_hidden >= divisor and self.c_hidden % divisor == 0,
            "c_hidden",
            self.c_hidden,
            f"a multiple of {divisor}",
        )

    def _check_quantizer(self) -> None:
        kinds = ("codebook", "cosine", "fsq", "lfq")
        require(self.quantizer in kinds, "quantizer", self.quantizer, ", ".join(kinds))
        if self.quantizer == "fsq":
            fits = len(self.fsq_levels) == self.c_latent and min(self.fsq_levels) >= 2
            require(fits, "fsq_levels", self.fsq_levels, f"as many numbers of at least 2 as c_latent, {self.c_latent}")
        num_codes = {"fsq": math.prod(self.fsq_levels), "lfq": 2**self.c_latent}.get(self.quantizer, self.codebook_size)
        require(
            self.codebook_size == num_codes, "codebook_size", self.codebook_size, f"the {num_codes} codes of the {self.quantizer}"
        )

    @property
    def downsampling(self) -> int:
        """Pixels per token and side: 4 for f4."""
        return 2**self.levels


@dataclass(frozen=True, kw_only=True)
class PriorConfig(_Config):
    """The prior. The defaults are the published model (`prior_v1.pt`)."""

    clip_r: int = 1024
    """Width of the CLIP text and image embeddings."""
    c_hidden: int = 1280
    """Width of the residual stream; a block's hidden layer has four times that."""
    c_r: int = 64
    """Width of the noise-level embedding."""
    num_blocks: int = 48
    """Residual blocks."""

    def __post_init__(self) -> None:
        for name in ("clip_r", "c_hidden", "num_blocks"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "an integer of at least 1")
        require(self.c_r >= 4, "c_r", self.c_r, "an integer of at least 4")


@dataclass(frozen=True, kw_only=True)
class NewByT5(_Config):
    """Size of a ByT5 encoder that is made and trained together with the U-Net."""

    d_model: int = 128
    """Width of the states; the U-Net's byt5_embd."""
    d_ff: int = 256
    """Width of the feed-forward layers."""
    num_layers: int = 2
    """Transformer layers."""
    num_heads: int = 8
    """Attention heads."""

    def __post_init__(self) -> None:
        require(
            self.num_heads >= 1 and self.d_model % self.num_heads == 0,
            "num_heads",
            self.num_heads,
            "a divisor of d_model",
        )


@dataclass(frozen=True, kw_only=True)
class TextConfig(_Config):
    """The text encoders of a model."""

    byt5: str = "google/byt5-xl"
    """Hub name or directory (relative to the bundle) of a text encoder: ByT5, another of T5's family, or of BERT's."""
    clip: str | None = None
    """open_clip "ARCHITECTURE/PRETRAINED" or directory of a CLIP model; none if the U-Net is used without."""
    max_length: int = 512
    """Text tokens (bytes for ByT5) kept of a prompt."""
    new_byt5: NewByT5 | None = None
    """Make an encoder of this size and train it with the U-Net, in place of loading `byt5`."""
    train: bool = False
    """Train the loaded encoder together with the U-Net."""

    def __post_init__(self) -> None:
        if isinstance(self.new_byt5, dict):
            object.__setattr__(self, "new_byt5", NewByT5.from_dict(self.new_byt5))
        require(self.max_length >= 1, "max_length", self.max_length, "an integer of at least 1")
        require(not self.train or self.new_byt5 is None, "train", self.train, "new_byt5 is trained as it is, and nothing loaded")

    @property
    def trained(self) -> bool:
        """Whether the encoder is trained with the U-Net: sharded, averaged and saved with it."""
        return self.train or self.new_byt5 is not None


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Config):
    """Everything that can generate: U-Net, VQGAN, text encoders and, in some models, a prior."""

    unet: PaellaConfig
    vqgan: VQConfig
    text: TextConfig
    image_size: int = 256
    """Side of the images in training, in pixels."""
    prior: PriorConfig | None = None
    """The prior, if the model has one: it makes the image embedding of a prompt."""

    def __post_init__(self) -> None:
        for name, kind in (("unet", PaellaConfig), ("vqgan", VQConfig), ("text", TextConfig), ("prior", PriorConfig)):
            if isinstance(value := getattr(self, name), dict):
                object.__setattr__(self, name, kind.from_dict(value))
        require(
            self.unet.num_labels == self.vqgan.codebook_size,
            "unet.num_labels",
            self.unet.num_labels,
            f"the VQGAN's codebook_size, {self.vqgan.codebook_size}",
        )
        require(
            self.prior is None or self.prior.clip_r == self.unet.clip_embd,
            "prior.clip_r",
            self.prior and self.prior.clip_r,
            f"the U-Net's clip_embd, {self.unet.clip_embd}",
        )
        multiple = self.size_multiple
        require(
            self.image_size >= multiple and self.image_size % multiple == 0,
            "image_size",
            self.image_size,
            f"a multiple of {multiple}",
        )

    @property
    def single_threaded(self) -> bool:
        """Whether a CPU gives one thread to a pass: `tiny`'s matrices are too small to be shared out. A second thread gains
        nothing there, and where other programs run, waiting for it has been seen to take twenty times as long as the pass."""
        return max(self.unet.c_hidden) < 256

    @property
    def size_multiple(self) -> int:
        """Sides of an image are multiples of this: 32 for the published model."""
        return self.vqgan.downsampling * self.unet.grid_multiple

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(H, W) of the token grid of an image; raises ValueError for a size the model cannot make."""
        multiple = self.size_multiple
        if width < multiple or height < multiple or width % multiple or height % multiple:
            raise ValueError(f"size {width}x{height} is not allowed: width and height must be multiples of {multiple}")
        return height // self.vqgan.downsampling, width // self.vqgan.downsampling


PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        unet=PaellaConfig(
            c_in=128,
            c_out=128,
            num_labels=512,
            c_r=32,
            patch_size=1,
            c_cond=128,
            c_hidden=(128, 192),
            nhead=(4, 4),
            blocks=(1, 1),
            level_config=("CTA", "CTA"),
            clip_embd=64,
            byt5_embd=128,
            dropout=0.0,
            self_attn=False,
            leave_one_out=True,
            position_grid=16,
        ),
        vqgan=VQConfig(bottleneck_blocks=3, c_hidden=64, c_latent=8, codebook_size=512),
        text=TextConfig(byt5="encoders/byt5", max_length=128, new_byt5=NewByT5()),
        image_size=64,
    ),
    "small": ModelConfig(
        unet=PaellaConfig(
            c_in=128,
            c_out=128,
            num_labels=1024,
            c_cond=512,
            c_hidden=(256, 512),
            nhead=(-1, 8),
            blocks=(3, 8),
            level_config=("CT", "CTA"),
            clip_embd=1024,
            byt5_embd=1472,
        ),
        vqgan=VQConfig(bottleneck_blocks=4, c_hidden=192, codebook_size=1024),
        text=TextConfig(byt5="google/byt5-small"),
        image_size=128,
    ),
    "paella-1b": ModelConfig(
        unet=PaellaConfig(),
        vqgan=VQConfig(),
        text=TextConfig(byt5="google/byt5-xl", clip="ViT-H-14/laion2b_s32b_b79k"),
    ),
}
"""Named sizes: `tiny` for a CPU and tests, `small` for one GPU, `paella-1b` the published model."""
