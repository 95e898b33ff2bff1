"""The CLIP columns of a token dataset: embeddings of images and captions, as the tokenizing workers compute them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from paella.conditioning import clip_pixels, load_clip


class ClipColumns:
    """One open_clip model, which fills `clip_text` and `clip_image`.

    Always float32, and kept as float16: data has to come out the same on every machine.
    """

    def __init__(self, name: str, device: str) -> None:
        self.model: Any
        self.model, self.tokenizer = load_clip(name)
        self.model.float().to(device)
        self.device = device
        with torch.inference_mode():
            self.width: int = self.model.encode_text(self.tokenizer([""]).to(device)).shape[1]

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, captions: Sequence[str], wanted: Sequence[str]) -> dict[str, np.ndarray]:
        """The CLIP_COLUMNS wanted (B,D) float16 of images (B,H,W,3) uint8 and their captions."""
        columns = {}
        if "clip_text" in wanted:
            columns["clip_text"] = self.model.encode_text(self.tokenizer(list(captions)).to(self.device))
        if "clip_image" in wanted:
            columns["clip_image"] = self.model.encode_image(clip_pixels(self.model, list(images)).to(self.device))
        return {name: values.cpu().half().numpy() for name, values in columns.items()}


def fixed_size_lists(parts: Sequence[np.ndarray], type: pa.FixedSizeListType) -> pa.FixedSizeListArray:
    """A column of arrays (B,D) that follow one another; none at all is an empty column."""
    values = pa.array(np.concatenate([part.reshape(-1) for part in parts]) if parts else [], type=type.value_type)
    return pa.FixedSizeListArray.from_arrays(values, type=type)


def clip_digest(name: str | None) -> str | None:
    """The name of a published CLIP; for a directory the SHA-256 of its files, so that a retrained one is another one."""
    if name is None or not Path(name).is_dir():
        return name
    digest = hashlib.sha256()
    for file in sorted(file for file in Path(name).rglob("*") if file.is_file()):
        digest.update(file.relative_to(name).as_posix().encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
