"""Text conditioning: prompts → the states that the U-Net attends to, and CLIP embeddings.

The encoders are the ecosystem's: a text encoder with its own tokenizer through transformers (the published model: ByT5-XL; any
of T5's or BERT's family) and a CLIP text tower through open_clip (the published model: ViT-H-14). Both load by hub name or from a
directory.
B prompts, S states, D width of the encoder.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from paella.config import TextConfig
from paella.images import to_uint8
from paella.int8 import quantize_linear
from paella.storage import first_line, local_directory

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel  # its import takes seconds: it waits until an encoder is wanted

Conditions = Mapping[str, Tensor]
"""Keyword arguments of `Paella.forward`: byt5, byt5_mask, clip, clip_image, attn_weights."""


@dataclass(frozen=True)
class Tokenized:
    """Padded ids (B,S) int64, mask (B,S) True where a token counts, and which prompts were cut to the maximum."""

    ids: Tensor
    mask: Tensor
    truncated: tuple[bool, ...]


class TextEncoders(nn.Module):
    """The text encoders of one model: one of transformers' and, by config, a CLIP text tower."""

    def __init__(self, config: TextConfig, byt5: PreTrainedModel, tokenizer, clip: Any = None, clip_tokenizer=None):
        super().__init__()
        self.config = config
        self.byt5 = byt5
        self.tokenizer = tokenizer
        self.clip = clip
        self.clip_tokenizer = clip_tokenizer
        self.source: Callable[[], TextEncoders] | None = None
        self.free_after_use = False

    @classmethod
    def create(cls, config: TextConfig) -> TextEncoders:
        """A new, untrained ByT5 of the size that `config.new_byt5` gives."""
        if config.new_byt5 is None:
            raise ValueError("text.new_byt5 is not set: this preset names an encoder to load, not one to make")
        from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

        size = config.new_byt5
        t5 = T5Config(
            vocab_size=384,  # 256 bytes, special tokens, padding to a multiple of 128, as in ByT5
            d_model=size.d_model,
            d_kv=size.d_model // size.num_heads,
            d_ff=size.d_ff,
            num_layers=size.num_layers,
            num_heads=size.num_heads,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
        byt5 = T5EncoderModel(t5)
        byt5.set_attn_implementation("eager")  # fused attention makes the encoder's training step half as long again on a CPU
        return cls(config, byt5, ByT5Tokenizer())

    @classmethod
    def to_train(cls, config: TextConfig, root: str | Path = ".") -> TextEncoders:
        """The encoder that is trained with the U-Net, in float32: a new one, or the one that is loaded. No CLIP."""
        if config.new_byt5 is not None:
            return cls.create(config)
        text = cls.load(dataclasses.replace(config, clip=None), root, dtype=torch.float32)
        text.source = None  # training's weights are nowhere else
        text.byt5.set_attn_implementation("eager")  # as in `create`
        return text

    @classmethod
    def load(
        cls,
        config: TextConfig,
        root: str | Path = ".",
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        load_in_8bit: bool = False,
    ) -> TextEncoders:
        """Load by hub name, from a URI, or from the directory `root / name` where there is one.

        Args:
            dtype: of weights and states; None leaves it to transformers and open_clip.
            load_in_8bit: round the encoder's linear layers to int8, which is a quarter of float32's memory.

        Raises ValueError naming the encoder that cannot be loaded.
        """
        from transformers import AutoModelForTextEncoding, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        options = _without_pooling(encoder_config(config.byt5, root)) | ({"dtype": dtype} if dtype else {})
        name = _resolve(config.byt5, root)
        try:
            byt5, tokenizer = (
                AutoModelForTextEncoding.from_pretrained(name, use_safetensors=True, **options),
                AutoTokenizer.from_pretrained(name),
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"the text encoder {config.byt5!r} cannot be loaded: {first_line(error)}") from error
        if hasattr(byt5.config, "max_position_embeddings"):  # absolute positions end
            config = dataclasses.replace(config, max_length=min(config.max_length, tokenizer.model_max_length))
        if load_in_8bit:
            quantize_linear(byt5)
        clip, clip_tokenizer = load_clip(config.clip, root) if config.clip else (None, None)
        text = cls(config, byt5.eval(), tokenizer, clip, clip_tokenizer).to(device, dtype)
        text.source = functools.partial(cls.load, config, root, device=device, dtype=dtype, load_in_8bit=load_in_8bit)
        return text

    def free(self) -> None:
        """Drop the weights; the next use loads them again. Raises ValueError for encoders that were made, not loaded."""
        if self.source is None:
            raise ValueError("these text encoders were not loaded from anywhere, so their weights cannot be dropped")
        self.to("meta")

    def restore(self) -> None:
        """Load the weights again if they have been dropped."""
        if self.device.type == "meta" and self.source is not None:
            loaded = self.source().requires_grad_(False)
            self.byt5, self.clip = loaded.byt5, loaded.clip

    def save(self, directory: Path) -> None:
        """Write encoder and tokenizer in transformers' format."""
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.byt5.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def tokenize(self, prompts: Sequence[str]) -> Tokenized:
        """Bytes (or word pieces) of prompts, padded to the longest."""
        longest = self.config.max_length
        batch = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        mask = batch["attention_mask"].bool()
        full = (mask.sum(1) == longest).tolist()  # those may have been cut, or fit exactly
        cut = tuple(at_limit and self._length(prompt) > longest for prompt, at_limit in zip(prompts, full, strict=True))
        return Tokenized(batch["input_ids"], mask, cut)

    def _length(self, prompt: str) -> int:
        return len(self.tokenizer(prompt, verbose=False)["input_ids"])

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encoder states (B,S,D); zero where padded."""
        states = self.byt5(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return states * mask[..., None]

    def forward(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The U-Net's conditions of prompts: byt5 (B,S,D), byt5_mask (B,S) and, with CLIP, clip (B,D)."""
        self.restore()
        tokenized = self.tokenize(prompts)
        ids, mask = tokenized.ids.to(self.device), tokenized.mask.to(self.device)
        conditions = {"byt5": self.states(ids, mask), "byt5_mask": mask}
        if (clip := self.clip_embeddings(prompts)) is not None:
            conditions["clip"] = clip
        return conditions

    def clip_embeddings(self, prompts: Sequence[str]) -> Tensor | None:
        """CLIP text embeddings (B,D) of prompts; None for a model without CLIP."""
        if self.clip is None:
            return None
        self.restore()
        return self.clip.encode_text(self.clip_tokenizer(list(prompts)).to(self.device))

    def clip_truncated(self, prompts: Sequence[str]) -> list[bool]:
        """Which prompts CLIP sees a part of only: those that begin otherwise where there is room for one piece more."""
        if self.clip is None:
            return [False] * len(prompts)
        ids = self.clip_tokenizer(list(prompts))
        longer = self.clip_tokenizer(list(prompts), context_length=ids.shape[1] + 1)
        return (longer[:, :-1] != ids).any(1).tolist()

    def clip_image_embeddings(self, images: Sequence[Tensor]) -> Tensor:
        """CLIP embeddings (B,D) of images (3,H,W) in [0,1]. Raises ValueError for a model without CLIP."""
        if self.clip is None:
            raise ValueError("this model has no CLIP encoder, so it cannot be given images to look at")
        self.restore()
        pixels = clip_pixels(self.clip, [array for image in images for array in to_uint8(image[None])])
        return self.clip.encode_image(pixels.to(self.device, next(self.clip.parameters()).dtype))


def unconditional(conditions: Conditions) -> dict[str, Tensor]:
    """Conditions without a prompt, as published: zeros in place of states and embeddings, no image embedding."""
    return {
        name: value if name == "byt5_mask" else torch.zeros_like(value)
        for name, value in conditions.items()
        if name not in ("clip_image", "attn_weights")
    }


def encoder_config(name: str, root: str | Path = ".") -> PreTrainedConfig:
    """The size and kind of a text encoder that `TextEncoders.load` loads by the same name.

    Raises ValueError naming the encoder whose config cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(_resolve(name, root))
    except (OSError, ValueError) as error:
        raise ValueError(f"the text encoder {name!r} cannot be loaded: {first_line(error)}") from error


def encoder_like(config: PreTrainedConfig) -> PreTrainedModel:
    """A text encoder of that size and kind with random weights."""
    from transformers import AutoModelForTextEncoding

    return AutoModelForTextEncoding.from_config(config, **_without_pooling(config))


def _without_pooling(config: PreTrainedConfig) -> dict[str, Any]:
    """Options that leave out the layer by which BERT's family makes one vector of a text: nothing here would train or use it."""
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING

    kind: Any = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None)
    pools = kind is not None and "add_pooling_layer" in inspect.signature(kind).parameters
    return {"add_pooling_layer": False} if pools else {}


def load_clip(name: str, root: str | Path = ".") -> tuple[nn.Module, Any]:
    """An open_clip model and its tokenizer.

    Args:
        name: "ARCHITECTURE/PRETRAINED" (ViT-H-14/laion2b_s32b_b79k) or a directory with open_clip_config.json.

    Raises ValueError naming the model that cannot be loaded.
    """
    import open_clip  # 1 s of import, wanted only where a model names a CLIP

    directory = Path(root) / name
    try:
        if directory.is_dir():
            source, pretrained = f"local-dir:{directory}", None
        else:
            source, _, pretrained = name.partition("/")
        model = open_clip.create_model(source, pretrained=pretrained or None, require_pretrained=True)
        return model.eval(), open_clip.get_tokenizer(source)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"the CLIP model {name!r} cannot be loaded: {first_line(error)}") from error


def clip_pixels(clip: nn.Module, images: Sequence[np.ndarray]) -> Tensor:
    """What the CLIP's image tower takes of images (H,W,3) uint8: scaled, cropped and normalized as its own config says."""
    from open_clip import get_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg, image_transform_v2

    preprocess: Any = image_transform_v2(PreprocessCfg(**get_model_preprocess_cfg(clip)), is_train=False)
    return torch.stack([preprocess(Image.fromarray(image)) for image in images])


def _resolve(name: str, root: str | Path) -> str:
    if "://" in name:
        return str(local_directory(name))
    local = Path(root) / name
    return str(local) if local.is_dir() else name
