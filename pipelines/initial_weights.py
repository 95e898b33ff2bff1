"""What a training run starts from: the published initialisation, one for short runs, or the weights of a bundle."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import Tensor

from paella.bundle import model_config, vqgan_digests
from paella.conditioning import TextEncoders
from paella.config import ModelConfig
from paella.lora import add_lora
from paella.short_run import initialise_byt5, initialise_unet
from paella.training import TextToTokens
from paella.unet import Paella
from paella.weights import load_weights, read_config
from pipelines.train_config import TrainConfig

NEW = ("published", "short-run")


def check(config: TrainConfig) -> None:
    """Raises ValueError where `config.init` is a bundle that the model cannot start from, or there is no such bundle."""
    if config.init in NEW:
        return
    _, model, digests = _bundle(config.init)
    theirs, ours = ({**part.to_dict(), "dropout": None} for part in (model.unet, config.model.unet))
    if differ := [f"{name} {theirs[name]!r}, not {ours[name]!r}" for name in ours if theirs[name] != ours[name]]:
        raise ValueError(f"the U-Net of the bundle {config.init} is another than the model's: {'; '.join(differ)}")
    if digests["vqgan"] not in (mine := vqgan_digests(config.vqgan)):
        raise ValueError(
            f"the bundle {config.init} is for tokens of VQGAN {digests['vqgan']}, but the tokens are of VQGAN {mine[0]}"
        )


def initialise(model: TextToTokens, codebook: Tensor, config: TrainConfig) -> None:
    """Set a model's weights in place, and give it adapters if they are what trains; codebook is the VQGAN's, (K,D)."""
    if config.init == "short-run":
        initialise_unet(model.unet, codebook)
        if config.model.text.new_byt5 is not None:
            initialise_byt5(model.text.byt5)
    elif config.init != "published":
        root, theirs, digests = _bundle(config.init)
        unet = load_weights(lambda: Paella(config.model.unet), root, "unet", digests["unet"])
        model.unet.load_state_dict(unet.state_dict())
        if config.model.text.new_byt5 is not None:
            text = TextEncoders.load(dataclasses.replace(theirs.text, clip=None), root)
            model.text.byt5.load_state_dict(text.byt5.state_dict())
    if config.lora.rank > 0:
        model.text.requires_grad_(False)
        add_lora(model.unet, config.lora)


def _bundle(uri: str) -> tuple[Path, ModelConfig, dict[str, str]]:
    """Where a bundle with a U-Net lies, its config and its digests."""
    try:
        root, values = read_config(uri)
        return root, *model_config(uri, values)
    except ValueError as error:
        raise ValueError(f"init={uri!r} is not allowed: {', '.join(NEW)} or a bundle with a U-Net ({error})") from error
