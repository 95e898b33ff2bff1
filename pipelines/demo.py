"""The whole story on a CPU: captioned images → tokens → training → pictures, with the numbers that say how good they are.

    make demo                        # a generated set of 64-pixel scenes
    make demo DATA=my/photos         # your own images, each with a .txt caption beside it

Every stage is one of the programs beside this file. A second run reuses what is finished, and a killed one continues.
Results: runs/demo/index.html, contact_sheet.png, report.json and the model in runs/demo/train/model.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from paella import command_line
from pipelines import (
    cli,
    demo_flops,
    generate,
    img2dataset_layout,
    report,
    scenes,
    tokenize_images,
    train,
    train_clip,
    train_text,
    train_vqgan,
)
from pipelines.generate_config import GenerateConfig
from pipelines.stages import Stages


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demo does."""

    output: str = "runs/demo"
    """Directory of everything the demo makes."""
    data: str | None = None
    """Your own images with captions (folder, or img2dataset's shards); generated scenes if not given."""
    num_images: int = 10_000
    """Generated scenes."""
    vqgan_steps: int = 800
    """Optimizer steps of the VQGAN."""
    clip_steps: int = 250
    """Optimizer steps of the small CLIP."""
    text_steps: int = 500
    """Optimizer steps of the text encoder, before it is trained on with the U-Net."""
    train_steps: int = 1300
    """Optimizer steps of the U-Net."""
    num_prompts: int = 256
    """Pictures to generate at the end; the first 64 make the contact sheet."""
    seed: int = 0
    """Of all training and of the pictures; the scenes and the captions to generate stay the same."""


EXPECTED_S = {"images": 15, "vqgan": 180, "clip": 60, "tokens": 30, "text": 100, "train": 800, "pictures": 55, "report": 35}
"""Seconds of each stage on 2 cores, for the estimate of the time left."""


def run(config: DemoConfig) -> None:
    """Run or continue the demo."""
    root = cli.require_writable(config.output).absolute()
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{root.parent}/mlflow.db")
    cli.require_same_config(root, cli.config_values(config))
    stages = Stages(root / "stages.json", EXPECTED_S)
    with stages.measured():
        with stages("images", "captioned images"):
            images = config.data or str(make_images(root, config.num_images))
            prompts = write_prompts(root, config)
        with stages("vqgan", "a VQGAN that turns an image into tokens"):
            vqgan_config = _vqgan_config(config, images, root)
            vqgan = train_vqgan.run(vqgan_config)
        with stages("clip", "a CLIP that tells which caption belongs to which image"):
            clip_config = _clip_config(config, images, root)
            clip = train_clip.run(clip_config)
        with stages("tokens", "all images to tokens, and to what CLIP sees in them"):
            tokens = root / "tokens"
            tokenize_images.run(_tokenize_config(images, vqgan, clip, tokens))
        with stages("text", "a text encoder that knows which word speaks of which part of a picture"):
            text_config = _text_config(config, tokens, root)
            text = train_text.run(text_config)
        with stages("train", "a U-Net that predicts tokens from noise and a caption"):
            train_config = _train_config(config, tokens, vqgan, clip, text, prompts, root)
            model = train.run(train_config)
        with stages("pictures", f"{config.num_prompts} pictures"):
            generate.run(
                GenerateConfig(
                    model=str(model),
                    prompts=str(prompts),
                    output=str(root / "pictures"),
                    seed=config.seed,
                    sampling=train.presets()["tiny"].sampling,
                )
            )
    with stages("report", "numbers and a page"):
        flops = demo_flops.by_stage(vqgan_config, clip_config, text_config, train_config)
        report.write(root, model, prompts.read_text().splitlines(), stages, flops, generated_scenes=config.data is None)
    print(report.summary(root))


def _vqgan_config(config: DemoConfig, images: str, root: Path) -> train_vqgan.TrainVQConfig:
    tiny = train_vqgan.presets()["tiny"]
    return dataclasses.replace(tiny, data=images, output=str(root / "vqgan"), steps=config.vqgan_steps, seed=config.seed)


def _clip_config(config: DemoConfig, images: str, root: Path) -> train_clip.TrainClipConfig:
    tiny = train_clip.presets()["tiny"]
    return dataclasses.replace(tiny, data=images, output=str(root / "clip"), steps=config.clip_steps, seed=config.seed)


def _tokenize_config(images: str, vqgan: Path, clip: Path, tokens: Path) -> tokenize_images.TokenizeConfig:
    return tokenize_images.TokenizeConfig(
        input=images, vqgan=str(vqgan), clip=str(clip), clip_image=True, clip_text=True, output=str(tokens), resolution=64
    )


def _text_config(config: DemoConfig, tokens: Path, root: Path) -> train_text.TrainTextConfig:
    tiny = train_text.presets()["tiny"]
    made = dataclasses.replace(tiny, data=str(tokens), output=str(root / "text"), steps=config.text_steps, seed=config.seed)
    num_rows = made.training_data().num_rows  # your own images may be fewer than a batch
    most = min(made.global_batch_size, num_rows)
    return dataclasses.replace(made, global_batch_size=most - most % made.num_workers)


def _train_config(
    config: DemoConfig, tokens: Path, vqgan: Path, clip: Path, text: Path, prompts: Path, root: Path
) -> train.TrainConfig:
    tiny = train.presets()["tiny"]
    return dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, text=dataclasses.replace(tiny.model.text, clip=str(clip))),
        data=str(tokens),
        vqgan=str(vqgan),
        text=str(text),
        output=str(root / "train"),
        steps=config.train_steps,
        seed=config.seed,
        sample_prompts=str(prompts),
        register_as="paella-demo",
    )


def make_images(root: Path, num_images: int) -> Path:
    """Training scenes as webdataset shards, and held-out ones as a folder to measure reconstruction on."""
    img2dataset_layout.write_folder(root / "held-out", scenes.scenes(256, seed=1, held_out=True))
    return img2dataset_layout.write_webdataset(root / "images", scenes.scenes(num_images, seed=0, held_out=False))


def write_prompts(root: Path, config: DemoConfig) -> Path:
    """Captions to generate: held-out combinations, or the first captions of the user's own images."""
    if config.data is None:
        captions = [scenes.caption(scene) for scene, _ in scenes.scenes(config.num_prompts, seed=2, held_out=True)]
    else:
        from pipelines.image_sets import captions as source_captions

        captions = source_captions(config.data, config.num_prompts)
    file = root / "prompts.txt"
    file.write_text("\n".join(" ".join(caption.split()) for caption in captions) + "\n")
    return file


if __name__ == "__main__":
    from pipelines.demo import DemoConfig as _Config
    from pipelines.demo import run as _run

    command_line.main(_run, _Config, __doc__)
