"""Weights on disk: safetensors files, memory-mapped, whose digests stand in the `config.json` beside them.

Bytes from elsewhere are never executed: a pickle is read by `convert` alone, and only its tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paella.storage import local_directory

FORMAT_VERSION = 1
M = TypeVar("M", bound=nn.Module)


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of a state dict; nothing is copied of tensors that lie in one piece."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_weights(directory: Path, name: str, state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """Write `name`.safetensors, floating-point numbers in `dtype` if one is given; returns its digest.

    Raises OSError where the file cannot be written.
    """
    contiguous = {key: _cast(value, dtype).detach().cpu().contiguous() for key, value in state.items()}
    file = directory / f"{name}.safetensors"
    try:
        save_file(contiguous, file)
    except SafetensorError as error:  # a full disk, say
        raise OSError(f"{file} cannot be written: {error}") from error
    return state_digest(contiguous)


def _cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


def load_weights(make: Callable[[], M], root: Path, name: str, digest: str, *, verify: bool = True) -> M:
    """A model in eval mode, without gradients, whose parameters are the memory-mapped file itself: nothing is held twice.

    Raises ValueError for a missing or damaged file, weights of other names or shapes, and another digest.
    """
    file = root / f"{name}.safetensors"
    with torch.device("meta"):
        model = make()
    try:
        state = load_file(file)
        model.load_state_dict(state, assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{file} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if verify and (found := state_digest(state)) != digest:
        raise ValueError(f"{file} has digest {found}, but config.json says {digest}")
    return model.eval().requires_grad_(False)


def write_config(directory: Path, values: dict) -> None:
    """Write `config.json`."""
    (directory / "config.json").write_text(json.dumps({"format_version": FORMAT_VERSION, **values}, indent=1) + "\n")


def read_config(uri: str) -> tuple[Path, dict]:
    """A local directory with what is at `uri`, and the values of its `config.json`. Raises ValueError where there is none."""
    root = local_directory(uri)
    try:
        values = json.loads((root / "config.json").read_text())
        version = values.pop("format_version")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{uri} is not a bundle: it has no readable config.json") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{uri} has bundle format {version}; this version reads {FORMAT_VERSION}")
    return root, values
