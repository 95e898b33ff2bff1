"""The text-encoder columns of a token dataset: ByT5 states of captions, as the tokenizing workers compute them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from paella.conditioning import TextEncoders
from paella.config import TextConfig

CAPTION_LENGTH = 100
"""Characters of a caption, about, for the warning."""


class Byt5Columns:
    """One text encoder, which fills `byt5` and `byt5_length`. Its states are kept as float16."""

    def __init__(self, config: TextConfig, device: str, dtype: torch.dtype = torch.float32) -> None:
        self.text = TextEncoders.load(config, device=device, dtype=dtype)
        self.width: int = self.text([""])["byt5"].shape[2]

    @torch.inference_mode()
    def states(self, captions: Sequence[str]) -> list[np.ndarray]:
        """States (L,D) float16 of each caption, without padding."""
        conditions = self.text(captions)
        lengths = conditions["byt5_mask"].sum(1).tolist()
        states = conditions["byt5"].half().cpu().numpy()
        return [each[:length] for each, length in zip(states, lengths, strict=True)]

    def __call__(self, captions: Sequence[str]) -> tuple[pa.Array, pa.Array]:
        """Columns of captions: their states (L·D), one after another, and L."""
        states = self.states(captions)
        lengths = [len(each) for each in states]
        offsets = np.cumsum([0, *(self.width * length for length in lengths)], dtype=np.int32)
        values = pa.array(np.concatenate(states).reshape(-1))
        return pa.ListArray.from_arrays(pa.array(offsets), values), pa.array(lengths, type=pa.int32())


def warning(config: TextConfig, num_captions: int) -> str:
    """How large the states are. Raises ValueError where the encoder cannot be loaded."""
    width = TextEncoders.load(config)([""])["byt5"].shape[2]
    per_caption = 2 * width * CAPTION_LENGTH
    return (
        f"warning: states of {config.byt5} take about {per_caption / 1e6:.2f} MB for a caption of {CAPTION_LENGTH} characters, "
        f"{per_caption * num_captions / 1e9:.1f} GB for {num_captions} such; training can compute them instead"
    )
