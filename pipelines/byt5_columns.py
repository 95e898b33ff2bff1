"""The text-encoder columns of a token dataset: ByT5 states of captions, as the tokenizing workers compute them."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import torch

from paella.conditioning import TextEncoders
from paella.config import TextConfig

CAPTION_LENGTH = 100
"""Characters of a caption, about, for the warning."""


class Byt5Columns:
    """One text encoder, which fills `byt5` and `byt5_length`. Always float32, kept as float16."""

    def __init__(self, config: TextConfig, device: str) -> None:
        self.text = TextEncoders.load(config, device=device, dtype=torch.float32)
        self.width: int = self.text([""])["byt5"].shape[2]

    @torch.inference_mode()
    def __call__(self, captions: Sequence[str]) -> tuple[pa.Array, pa.Array]:
        """Columns of captions: their states (L·D), one after another and without padding, and L."""
        conditions = self.text(captions)
        lengths = conditions["byt5_mask"].sum(1).tolist()
        states = [values[:length].flatten() for values, length in zip(conditions["byt5"], lengths, strict=True)]
        offsets = torch.tensor([0, *(len(part) for part in states)]).cumsum(0).int().numpy()
        values = pa.array(torch.cat(states).cpu().half().numpy())
        return pa.ListArray.from_arrays(pa.array(offsets), values), pa.array(lengths, type=pa.int32())


def warning(config: TextConfig, num_captions: int) -> str:
    """How large the states are. Raises ValueError where the encoder cannot be loaded."""
    width = TextEncoders.load(config)([""])["byt5"].shape[2]
    per_caption = 2 * width * CAPTION_LENGTH
    return (
        f"warning: states of {config.byt5} take about {per_caption / 1e6:.2f} MB for a caption of {CAPTION_LENGTH} characters, "
        f"{per_caption * num_captions / 1e9:.1f} GB for {num_captions} such; training can compute them instead"
    )
