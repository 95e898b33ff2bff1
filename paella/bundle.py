"""A bundle: one directory (or URI) that holds one model which can generate, or a VQGAN alone.

    config.json          format version, the configs of U-Net, VQGAN and text encoders, digests
    vqgan.safetensors    unet.safetensors    encoders/byt5    model_card.md

Weights are safetensors: bytes from elsewhere are never executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paella.conditioning import Conditions, TextEncoders, unconditional
from paella.config import ModelConfig, VQConfig
from paella.sampler import MODEL_CARD, Canvas, SamplingConfig, sample, start
from paella.storage import local_directory, new_directory
from paella.unet import Paella
from paella.vqgan import VQModel

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Bundle:
    """A loaded model: networks in eval mode on one device, and the digest that names its weights."""

    config: ModelConfig
    unet: Paella
    vqgan: VQModel
    text: TextEncoders
    digest: str

    @property
    def default_size(self) -> tuple[int, int]:
        """(width, height) of the training images, in pixels."""
        return self.config.image_size, self.config.image_size

    @torch.inference_mode()
    def conditions(self, prompt: str, *, clip_image: Tensor | None = None) -> dict[str, Tensor]:
        """The U-Net's conditions of a prompt, and of image embeddings (1,D) or (1,M,D) where given, as a batch of one."""
        conditions = self.text([prompt])
        if clip_image is not None:
            conditions["clip_image"] = clip_image
        return conditions

    def negative(self, conditions: Conditions, negative_prompt: str | None = None) -> dict[str, Tensor]:
        """What guidance leads away from: the conditions without their prompt, or those of a negative prompt."""
        return unconditional(conditions) if not negative_prompt else self.conditions(negative_prompt)

    def canvas(
        self,
        conditions: Conditions,
        negative: Conditions,
        *,
        seed: int,
        size: tuple[int, int] | None = None,
        config: SamplingConfig = MODEL_CARD,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Canvas:
        """A new picture under one prompt's conditions: of `size` in pixels, or as large as (h,w) `tokens`; see `start`."""
        grid = self.config.grid(*(size or self.default_size)) if tokens is None else (tokens.shape[0], tokens.shape[1])
        prepared = [self.unet.prepare(**conditions)], self.unet.prepare(**negative)
        return start(self.config.unet.num_labels, grid, *prepared, seed=seed, config=config, tokens=tokens, mask=mask)

    @torch.inference_mode()
    def generate_tokens(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        size: tuple[int, int] | None = None,
        sampling: SamplingConfig | None = None,
        on_step: Callable[[Sequence[Canvas]], None] | None = None,
    ) -> Tensor:
        """Token grids (B,H,W) of prompts; size is (width, height) in pixels, the training size if not given."""
        canvases = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            conditions = self.conditions(prompt)
            canvases.append(
                self.canvas(conditions, self.negative(conditions), seed=seed, size=size, config=sampling or MODEL_CARD)
            )
        return sample(self.unet, canvases, codebook=self.vqgan.vquantizer, on_step=on_step)

    @torch.inference_mode()
    def encode(self, image: Tensor) -> Tensor:
        """Token grid (h,w) of one image (3,H,W) in [0,1]."""
        weight = self.vqgan.vquantizer.codebook.weight
        return self.vqgan.encode(image[None].to(weight.device, weight.dtype))[0]

    @torch.inference_mode()
    def clip_image_embeddings(self, images: Sequence[Tensor]) -> Tensor:
        """CLIP embeddings (M,D) of images (3,H,W) in [0,1]. Raises ValueError for a model without CLIP."""
        return self.text.clip_image_embeddings(images)

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """Images (B,3,H,W) in [0,1] of token grids."""
        return self.vqgan.decode_indices(tokens).float().clamp(0, 1)


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_vqgan(path: Path, model: VQModel) -> str:
    """Write a bundle with a VQGAN alone; returns the VQGAN's digest."""
    with new_directory(path, replace=True) as directory:
        state = _contiguous(model.state_dict())
        save_file(state, directory / "vqgan.safetensors")
        digest = state_digest(state)
        _write_config(directory, {"vqgan": model.config.to_dict(), "digests": {"vqgan": digest}})
    return digest


def save_bundle(
    path: Path, config: ModelConfig, unet: Mapping[str, Tensor], vqgan: VQModel, text: TextEncoders, model_card: str
) -> str:
    """Write a bundle that can generate; returns the U-Net's digest."""
    with new_directory(path, replace=True) as directory:
        states = {"unet": _contiguous(unet), "vqgan": _contiguous(vqgan.state_dict())}
        for name, state in states.items():
            save_file(state, directory / f"{name}.safetensors")
        if config.text.new_byt5 is not None:
            text.save(directory / "encoders")
        (directory / "model_card.md").write_text(model_card)
        digests = {name: state_digest(state) for name, state in states.items()}
        _write_config(directory, {**config.to_dict(), "digests": digests})
    return digests["unet"]


def load_vqgan(uri: str) -> tuple[VQModel, str]:
    """The VQGAN of a bundle in eval mode, and its digest.

    Raises ValueError for a missing or damaged bundle.
    """
    root, values = _read_config(uri)
    model = VQModel(VQConfig.from_dict(values["vqgan"]))
    _load_weights(model, root, "vqgan", values["digests"]["vqgan"])
    return model.eval(), values["digests"]["vqgan"]


def load_bundle(uri: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Bundle:
    """Load a bundle that can generate. Raises ValueError for a missing or damaged one."""
    root, values = _read_config(uri)
    if "unet" not in values:
        raise ValueError(f"{uri} holds a VQGAN but no U-Net, so it cannot generate")
    digests = values.pop("digests")
    config = ModelConfig.from_dict(values)
    unet, vqgan = Paella(config.unet), VQModel(config.vqgan)
    _load_weights(unet, root, "unet", digests["unet"])
    _load_weights(vqgan, root, "vqgan", digests["vqgan"])
    text = TextEncoders.load(config.text, root)
    modules: list[nn.Module] = [unet, vqgan, text]
    for module in modules:
        module.to(device, dtype).eval().requires_grad_(False)
    return Bundle(config, unet, vqgan, text, digests["unet"])


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def _write_config(directory: Path, values: dict) -> None:
    (directory / "config.json").write_text(json.dumps({"format_version": FORMAT_VERSION, **values}, indent=1) + "\n")


def _read_config(uri: str) -> tuple[Path, dict]:
    root = local_directory(uri)
    try:
        values = json.loads((root / "config.json").read_text())
        version = values.pop("format_version")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{uri} is not a bundle: it has no readable config.json") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{uri} has bundle format {version}; this version reads {FORMAT_VERSION}")
    return root, values


def _load_weights(model: nn.Module, root: Path, name: str, digest: str) -> None:
    file = root / f"{name}.safetensors"
    try:
        state = load_file(file)
        model.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{file} cannot be loaded: {str(error).splitlines()[0]}") from error
    if (found := state_digest(state)) != digest:
        raise ValueError(f"{file} has digest {found}, but config.json says {digest}")
