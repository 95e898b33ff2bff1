"""Train a small CLIP on captioned images: the encoder that image variations, blends and the prior look through.

    python pipelines/train_clip.py tiny --data runs/demo/images --output runs/my-clip

Large models name a published CLIP instead. This one is for images that no published CLIP knows, such as the demo's scenes.
The same command again continues from the newest checkpoint; a finished run says so and does nothing. The output holds
`model`, a directory in open_clip's own format, and `report.json`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from paella import command_line
from paella.ema import Ema
from paella.images import to_tensor
from paella.parallel import compute_dtype
from paella.storage import new_directory, new_file
from paella.training import OptimConfig
from pipelines import cli, loop, tracking
from pipelines.image_sets import decode_captioned
from pipelines.progress import Progress
from pipelines.recovery import RecoveryConfig
from pipelines.sources import find_units
from pipelines.workers import fit, setup_worker

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
"""By which pixels are shifted and scaled."""


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Size of a CLIP whose image tower is a vision transformer."""

    embed_dim: int = 64
    """Width of the embeddings: the U-Net's clip_embd."""
    patch_size: int = 8
    """Side of a patch in pixels."""
    width: int = 96
    """Width of the image tower."""
    layers: int = 2
    """Layers of the image tower."""
    text_width: int = 64
    """Width of the text tower."""
    text_layers: int = 1
    """Layers of the text tower."""
    context_length: int = 32
    """Word pieces that are kept of a caption."""

    def open_clip(self, image_size: int) -> dict[str, Any]:
        """The model_cfg of open_clip."""
        vision = {"image_size": image_size, "patch_size": self.patch_size, "width": self.width, "layers": self.layers}
        text = {"context_length": self.context_length, "width": self.text_width, "layers": self.text_layers}
        pooled = {"head_width": 32, "pool_type": "avg", "final_ln_after_pool": True}
        return {"embed_dim": self.embed_dim, "vision_cfg": vision | pooled, "text_cfg": text | {"heads": 2}}


@dataclass(frozen=True, kw_only=True)
class TrainClipConfig:
    """One CLIP training run."""

    data: str
    """Captioned images: a folder, or img2dataset's shards."""
    output: str
    """Directory of the run; the same command with the same output continues it."""
    model: ClipConfig = field(default_factory=ClipConfig)
    """The CLIP."""
    image_size: int = 64
    """Side of the training images in pixels."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning-rate schedule."""
    steps: int = 300
    """Optimizer steps."""
    batch_size: int = 128
    """Pairs per step: each caption is told from those of all other images."""
    ema_decay: float = 0.98
    """Decay of the averaged weights, which are the result."""
    max_images: int = 20_000
    """Images held in memory; an evenly spaced selection of a larger set."""
    precision: str = "auto"
    """Of forward and backward: bf16, float32, or auto."""
    seed: int = 0
    """Initial weights and order of the images."""
    checkpoint_every: int = 150
    """Steps between checkpoints."""
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    """Checkpoints beside those of checkpoint_every, and what happens when something goes wrong."""

    @property
    def num_workers(self) -> int:
        """One: the loss compares all pairs of a batch."""
        return 1

    def __post_init__(self) -> None:
        loop.require_counts(self, "steps", "batch_size", "checkpoint_every", "max_images")
        if self.image_size < self.model.patch_size or self.image_size % self.model.patch_size:
            raise ValueError(f"image_size={self.image_size} is not allowed: a multiple of {self.model.patch_size} is needed")


def presets() -> dict[str, TrainClipConfig]:
    """Training settings for each size; `data` and `output` have to be given."""
    from tyro import MISSING

    optim = OptimConfig(lr=2e-3, warmup_steps=50, final_lr_fraction=0.02, weight_decay=0.05, betas=(0.9, 0.98))
    return {"tiny": TrainClipConfig(data=MISSING, output=MISSING, optim=optim)}


def run(config: TrainClipConfig) -> Path:
    """Train; returns the model's directory. Raises ValueError for the user's mistakes, before the worker starts."""
    config = dataclasses.replace(config, data=cli.absolute(config.data), output=cli.absolute(config.output))
    find_units(config.data)
    output = loop.require_places(config)
    values = cli.config_values(config)
    cli.require_same_config(output, values, config)
    model = output / "model"
    if (output / "report.json").exists():
        print(f"CLIP training is finished: {model}")
        return model
    cli.start_ray()
    mlflow_run = tracking.open_run(output, f"train_clip {output.name}", values)
    fit(train_worker, {"config": config, "mlflow_run": mlflow_run})
    tracking.finish_run(mlflow_run)
    report = json.loads((output / "report.json").read_text())
    print(f"trained: {model}  of {report['images']} captions the right one is found for {report['retrieval']:.0%} of the images")
    return model


def train_worker(arguments: dict) -> None:
    """The training worker; one process, with all CPUs or one GPU."""
    import open_clip  # 1 s of import

    config: TrainClipConfig = arguments["config"]
    _, _, device = setup_worker(arguments, config.seed)
    images, captions = decode_captioned(config.data, config.image_size, config.max_images)
    ids = open_clip.SimpleTokenizer(context_length=config.model.context_length)(captions)
    held_back = torch.arange(len(ids)) % max(20, len(ids) // 512) == 0
    model = open_clip.CLIP(**config.model.open_clip(config.image_size)).to(device).train()
    optimizers = config.optim.optimizers(model)
    ema = Ema(model, config.ema_decay)
    run = loop.Training(config, arguments["mlflow_run"], model, optimizers, ema)
    dtype = compute_dtype(config.precision, device)
    training, loss_of = torch.nonzero(~held_back)[:, 0], open_clip.ClipLoss()
    print(f"CLIP on {len(training)} images, from step {run.step}", flush=True)
    progress, curve = Progress("clip", config.steps, run.step), tracking.Curve(arguments["mlflow_run"], "loss")
    for step, _ in run.steps(itertools.count):
        # one generator per step: a resumed run draws what an undisturbed one would
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        chosen = training[torch.randperm(len(training), generator=generator)[: config.batch_size]]
        config.optim.set_lr(optimizers, step, config.steps)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            image, text, scale = model(pixels(images[chosen.numpy()]).to(device), ids[chosen].to(device))
        loss = loss_of(image.float(), text.float(), scale.float())
        loop.optimizer_step(model, optimizers, loss, config.optim.grad_clip, run.guard)
        ema.update(model, step)
        done = step + 1
        if done % 50 == 0 or done == config.steps:
            curve.log({"loss": loss.item()}, done)
            progress.update(done, f"loss {loss.item():.3f}")
        progress.update(done)
    if run.ended:
        return
    with ema.swapped_into(model):
        finish(config, model.cpu().eval(), images[held_back.numpy()], ids[held_back], arguments["mlflow_run"])


def pixels(images: np.ndarray) -> Tensor:
    """What the image tower takes: (B,H,W,3) uint8 → (B,3,H,W)."""
    return (to_tensor(images) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@torch.inference_mode()
def retrieval(model: nn.Module, images: np.ndarray, ids: Tensor) -> float:
    """Share of images whose own caption is the nearest, or has the same words as the nearest."""
    parts = [model.encode_image(pixels(images[start : start + 256])) for start in range(0, len(images), 256)]  # type: ignore[operator]
    image, text = F.normalize(torch.cat(parts)), F.normalize(model.encode_text(ids))  # type: ignore[operator]
    nearest = (image @ text.T).argmax(1)
    return (ids[nearest] == ids).all(1).float().mean().item()


def finish(config: TrainClipConfig, model: nn.Module, images: np.ndarray, ids: Tensor, mlflow_run: tracking.Run) -> None:
    """Write the model and, last, the report that marks the run as finished."""
    output = Path(config.output)
    save_clip(output / "model", model, config.model, config.image_size)
    share = retrieval(model, images, ids)
    tracking.log_metrics(mlflow_run, {"retrieval": share}, config.steps)
    with new_file(output / "report.json") as file:
        file.write_text(json.dumps({"retrieval": share, "images": len(images)}, indent=1) + "\n")


def save_clip(path: Path, model: nn.Module, config: ClipConfig, image_size: int) -> None:
    """Write a CLIP as a directory that `open_clip.create_model("local-dir:…")` loads."""
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    with new_directory(path, replace=True) as directory:
        described = {"model_cfg": config.open_clip(image_size), "preprocess_cfg": preprocess}
        (directory / "open_clip_config.json").write_text(json.dumps(described, indent=1) + "\n")
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(weights, directory / "open_clip_model.safetensors")


if __name__ == "__main__":
    from pipelines.train_clip import presets as _presets
    from pipelines.train_clip import run as _run

    command_line.main(_run, _presets(), __doc__)
