"""What a training run starts from: the published initialisation, one for short runs, or the weights of a bundle."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import Tensor

from paella.bundle import TRAINED_TEXT, model_config, vqgan_digests
from paella.conditioning import TextEncoders, encoder_config
from paella.config import ModelConfig
from paella.lora import add_lora
from paella.short_run import initialise_byt5, initialise_unet
from paella.training import TextToTokens
from paella.unet import Paella
from paella.weights import load_weights, read_config
from pipelines.train_config import TrainConfig

NEW = ("published", "short-run")


def with_text_encoder(config: TrainConfig) -> TrainConfig:
    """The config whose model has the text encoder that it starts from: that of `config.text`, or that of the bundle in
    `config.init` where it has one of its own that had been loaded too. Raises ValueError where there is no such bundle."""
    name = config.text
    if name is None and config.init not in NEW and not config.model.text.train:
        name = TRAINED_TEXT if _bundle(config.init)[1].text.train else None
    if name is None:
        return config
    text = dataclasses.replace(config.model.text, byt5=name, train=True, new_byt5=None)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))


def text_root(config: TrainConfig) -> Path:
    """The directory in which a text encoder's relative name starts: the bundle that the model starts from, if there is one."""
    return Path() if config.init in NEW else _bundle(config.init)[0]


def check(config: TrainConfig) -> None:
    """Raises ValueError where the model cannot start from its text encoder or from the bundle in `config.init`."""
    if config.model.text.train:
        name, width = config.model.text.byt5, config.model.unet.byt5_embd
        if (theirs := encoder_config(name, text_root(config)).hidden_size) != width:
            raise ValueError(f"the text encoder {name} has states of width {theirs}, the model's byt5_embd is {width}")
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
            initialise_byt5(model.text.byt5)  # type: ignore[arg-type]  # a T5EncoderModel then
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
