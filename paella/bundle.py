"""A bundle: one directory (or URI) that holds one model which can generate, or a VQGAN alone.

config.json          format version, the configs of the networks and text encoders, digests
vqgan.safetensors    unet.safetensors    prior.safetensors    encoders/    model_card.md
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from paella.conditioning import Conditions, TextEncoders, unconditional
from paella.config import ModelConfig, VQConfig
from paella.images import check_image
from paella.prior import Prior, load_prior, sample_prior
from paella.prompt_cache import PromptCache
from paella.sampler import MODEL_CARD, Canvas, SamplingConfig, sample, start
from paella.storage import LISTING, new_directory
from paella.unet import Paella
from paella.vqgan import VQModel
from paella.weights import load_weights, read_config, save_weights, write_config

TRAINED_TEXT = "encoders/byt5"
"""Where a bundle has a text encoder of its own."""


@dataclass(frozen=True)
class Bundle:
    """A loaded model: networks in eval mode on one device, and the digest that names its weights."""

    config: ModelConfig
    unet: Paella
    vqgan: VQModel
    text: TextEncoders
    digest: str
    prior: Prior | None = None

    @functools.cached_property
    def prompts(self) -> PromptCache:
        """Conditions of the prompts seen last."""
        return PromptCache(self.text)

    @property
    def default_size(self) -> tuple[int, int]:
        """(width, height) of the training images, in pixels."""
        return self.config.image_size, self.config.image_size

    @torch.inference_mode()
    def conditions(self, prompt: str, *, clip_image: Tensor | None = None, seed: int | None = None) -> dict[str, Tensor]:
        """The U-Net's conditions of a prompt, as a batch of one. An empty prompt is none: zeros, as where training drops it.

        Args:
            clip_image: embeddings of one image (1,D) or several (1,M,D).
            seed: of the image embedding that a model with a prior makes of the prompt, where clip_image is not given.
        """
        weight = next(self.unet.parameters())  # the text encoders may be elsewhere, and in another dtype
        conditions = {name: value.to(weight.device) for name, value in self.prompts([prompt])[0].items()}
        conditions = {name: value if value.dtype == torch.bool else value.to(weight.dtype) for name, value in conditions.items()}
        if not prompt:
            conditions = unconditional(conditions)
        elif clip_image is None and self.prior is not None and seed is not None and "clip" in conditions:
            clip_image = sample_prior(self.prior, conditions["clip"], seeds=[seed]).to(conditions["clip"].dtype)
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
        self.prompts(prompts)  # those that are new are encoded together
        canvases = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            conditions = self.conditions(prompt, seed=seed)
            canvases.append(
                self.canvas(conditions, self.negative(conditions), seed=seed, size=size, config=sampling or MODEL_CARD)
            )
        return sample(self.unet, canvases, codebook=self.vqgan.vquantizer, on_step=on_step)

    @torch.inference_mode()
    def encode(self, image: Tensor) -> Tensor:
        """Token grid (h,w) of one image (3,H,W) in [0,1]. Raises ValueError for what no token grid can be made of."""
        check_image(image)
        weight = self.vqgan.vquantizer.codebook.weight
        return self.vqgan.encode(image[None].to(weight.device, weight.dtype))[0]

    @torch.inference_mode()
    def clip_image_embeddings(self, images: Sequence[Tensor]) -> Tensor:
        """CLIP embeddings (M,D) of images (3,H,W) in [0,1]. Raises ValueError for a model without CLIP, and for other shapes."""
        for image in images:
            check_image(image)
        embeddings = self.text.clip_image_embeddings(images)
        if self.text.free_after_use:
            self.text.free()
        return embeddings

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """Images (B,3,H,W) in [0,1] of token grids."""
        return self.vqgan.decode_indices(tokens).float().clamp(0, 1)


def save_vqgan(path: Path, model: VQModel, same_tokens: Sequence[str] = ()) -> str:
    """Write a bundle with a VQGAN alone; returns the VQGAN's digest.

    Args:
        same_tokens: digests of VQGANs that make the same tokens: those with another decoder.
    """
    with new_directory(path, replace=True) as directory:
        digest = save_weights(directory, "vqgan", model.state_dict())
        values = {"vqgan": model.config.to_dict(), "digests": {"vqgan": digest}}
        write_config(directory, values | ({"same_tokens": list(same_tokens)} if same_tokens else {}))
    return digest


def save_bundle(
    path: Path,
    config: ModelConfig,
    weights: Mapping[str, Mapping[str, Tensor]],
    model_card: str,
    text: TextEncoders | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """Write a bundle that can generate; returns the U-Net's digest. A CLIP that config names by its directory is copied into it.

    Args:
        weights: state dicts of `unet`, `vqgan` and, where config has one, `prior`.
        text: the encoder that was trained with the U-Net, to be written beside it.
        dtype: of the floating-point weights in the files; None writes them as they come.
    """
    with new_directory(path, replace=True) as directory:
        digests = {name: save_weights(directory, name, state, dtype) for name, state in weights.items()}
        if text is not None:
            text.save(directory / TRAINED_TEXT)
            config = dataclasses.replace(config, text=dataclasses.replace(config.text, byt5=TRAINED_TEXT))
        if config.text.clip is not None and Path(config.text.clip).is_dir():
            shutil.copytree(config.text.clip, directory / "encoders" / "clip")
            config = dataclasses.replace(config, text=dataclasses.replace(config.text, clip="encoders/clip"))
        (directory / "model_card.md").write_text(model_card)
        write_config(directory, {**config.to_dict(), "digests": digests})
    return digests["unet"]


def load_vqgan(uri: str) -> tuple[VQModel, str]:
    """The VQGAN of a bundle in eval mode, without gradients, and its digest.

    Raises ValueError for a missing or damaged bundle.
    """
    root, values = read_config(uri)
    try:
        config, digest = VQConfig.from_dict(values["vqgan"]), values["digests"]["vqgan"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{uri} holds no VQGAN: its config.json lacks {error}") from error
    return load_weights(lambda: VQModel(config), root, "vqgan", digest), digest


def vqgan_digests(uri: str) -> list[str]:
    """The digest of a bundle's VQGAN, and those of VQGANs that make the same tokens. Raises ValueError where there is none."""
    _, values = read_config(uri)
    try:
        return [values["digests"]["vqgan"], *values.get("same_tokens", [])]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{uri} holds no VQGAN: its config.json lacks {error}") from error


def model_config(uri: str, values: dict) -> tuple[ModelConfig, dict[str, str]]:
    """The config in the values of a config.json, and the digests of its networks. Raises ValueError where one is missing."""
    try:
        digests = values.pop("digests")
        values.pop("same_tokens", None)
        config = ModelConfig.from_dict(values)
        return config, {name: digests[name] for name in ("unet", "vqgan", "prior") if name != "prior" or config.prior}
    except (KeyError, TypeError) as error:
        raise ValueError(f"the config.json of {uri} is incomplete: {error}") from error


def load_bundle(
    uri: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    text_device: str | torch.device | None = None,
    text_dtype: torch.dtype | None = None,
    text_8bit: bool = False,
    free_text: bool = False,
    verify: bool = True,
) -> Bundle:
    """Load a bundle that can generate, from a directory, `s3://…` or `models:/name@alias`.

    Weights are memory-mapped and moved tensor by tensor, so that no second copy of a network ever exists. The text encoders may
    be larger than the U-Net (ByT5-XL: 10 GB in float32, 5 in bfloat16, 2.6 in 8 bits). Of a small model on a CPU this process's
    passes have one thread from then on (`ModelConfig.single_threaded`): in float32 another number rounds otherwise. Raises
    ValueError for a missing or damaged bundle.

    Args:
        text_device, text_dtype: of the text encoders; by default as the networks.
        text_8bit: round the T5 encoder's weights to int8. The states change a little, and so do images.
        free_text: drop the text encoders after each use; only prompts that have not been seen load them again.
        verify: compare the weights with their digests, which reads all of them: half a second per gigabyte, and the disk.
    """
    root, values = read_config(uri)
    if "unet" not in values:
        raise ValueError(f"{uri} holds no U-Net, so it cannot generate")
    config, digests = model_config(uri, values)
    if torch.device(device).type == "cpu" and config.single_threaded:
        torch.set_num_threads(1)
    unet = load_weights(lambda: Paella(config.unet), root, "unet", digests["unet"], verify=verify).to(device, dtype)
    vqgan = load_weights(lambda: VQModel(config.vqgan), root, "vqgan", digests["vqgan"], verify=verify).to(device, dtype)
    prior = None
    if (prior_config := config.prior) is not None:
        prior = load_weights(lambda: Prior(prior_config), root, "prior", digests["prior"], verify=verify).to(device, dtype)
    text = TextEncoders.load(config.text, root, device=text_device or device, dtype=text_dtype or dtype, load_in_8bit=text_8bit)
    text.eval().requires_grad_(False)
    text.free_after_use = free_text
    return Bundle(config, unet, vqgan, text, digests["unet"], prior)


def add_prior(uri: str, prior_uri: str, path: Path) -> None:
    """Write a copy of a bundle with a trained prior in it. Raises ValueError where they do not fit."""
    prior, digest = load_prior(prior_uri)
    root, values = read_config(uri)
    if "unet" not in values:
        raise ValueError(f"{uri} holds no U-Net, so a prior is of no use to it")
    without, digests = model_config(uri, values)
    config = dataclasses.replace(without, prior=prior.config)
    with new_directory(path, replace=True) as directory:
        shutil.copytree(root, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns(LISTING))
        save_weights(directory, "prior", prior.state_dict())
        write_config(directory, {**config.to_dict(), "digests": digests | {"prior": digest}})


def replace_vqgan(uri: str, vqgan_uri: str, path: Path) -> None:
    """Write a copy of a bundle with a VQGAN that makes the same tokens. Raises ValueError where it makes others."""
    vqgan, digest = load_vqgan(vqgan_uri)
    root, values = read_config(uri)
    if "unet" not in values:
        raise ValueError(f"{uri} holds no U-Net, so there is nothing to join the VQGAN to")
    config, digests = model_config(uri, values)
    if digests["vqgan"] not in (same := vqgan_digests(vqgan_uri)):
        raise ValueError(f"the VQGAN {digest} in {vqgan_uri} makes other tokens than VQGAN {digests['vqgan']} of {uri}")
    with new_directory(path, replace=True) as directory:
        shutil.copytree(root, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns(LISTING, "vqgan.safetensors"))
        save_weights(directory, "vqgan", vqgan.state_dict())
        write_config(directory, {**config.to_dict(), "digests": digests | {"vqgan": digest}, "same_tokens": same[1:]})
