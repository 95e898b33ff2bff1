"""A training run becomes a bundle: from any of its checkpoints, finished or not.

    python pipelines/export.py --run runs/demo/train --output runs/exported
    python pipelines/export.py --run runs/mine --step 400 --output bundle --register-as paella --alias candidate

The bundle has the averaged weights, the config, the VQGAN of the tokens and a model card that says what it was trained on and how
well. With `--register-as` it is logged to the run in MLflow and registered under an alias. `train.py` does the same at its end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from paella import command_line
from paella.bundle import load_vqgan, save_bundle
from paella.checkpoint import MANIFEST, reader
from paella.conditioning import TextEncoders
from paella.lora import merged
from paella.unet import Paella
from pipelines import cli, tracking
from pipelines.checkpoints import PREFIX, name_of, open_directory
from pipelines.initial_weights import text_root
from pipelines.train_config import TrainConfig, read_train_config


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Which state of which run becomes a bundle."""

    run: str
    """Output directory of train.py."""
    output: str
    """Directory of the bundle; it must not exist yet."""
    step: int | None = None
    """Optimizer steps of the checkpoint; the newest one if not given."""
    register_as: str | None = None
    """Name under which MLflow registers the bundle; it is not registered if not given."""
    alias: str = "newest"
    """Alias of the registered version."""


def run(config: ExportConfig) -> Path:
    """Write the bundle; returns its directory. Raises ValueError where there is no such run or checkpoint."""
    training = read_train_config(config.run)
    bundle = Path(cli.absolute(config.output))
    if bundle.exists():
        raise ValueError(f"{bundle} exists already; choose another --output")
    step, place = find_checkpoint(training.recovery.place(training.output), config.step)
    mlflow_run = tracking.run_of(Path(config.run))
    write_bundle(bundle, training, averaged_state(place), step, tracking.metrics_at(mlflow_run, step))
    print(f"exported: {bundle} ({step} steps)")
    if config.register_as is not None:
        print(f"registered: {tracking.register(mlflow_run, bundle, config.register_as, config.alias)}")
    return bundle


def find_checkpoint(place: str, step: int | None) -> tuple[int, str]:
    """The step and URI of the newest complete checkpoint in a directory, or of that after `step` steps.

    Raises ValueError where there is none.
    """
    filesystem, root = open_directory(place)
    found = filesystem.get_file_info(pafs.FileSelector(root, recursive=True, allow_not_found=True))
    names = [Path(info.path).parent.name for info in found if info.base_name == MANIFEST]
    steps = sorted(int(name.removeprefix(PREFIX)) for name in names if name.startswith(PREFIX))
    if not steps or (step is not None and step not in steps):
        wanted = "" if step is None else f" of step {step}"
        raise ValueError(f"there is no checkpoint{wanted} in {place}; there are those of steps {steps}")
    chosen = steps[-1] if step is None else step
    return chosen, f"{place}/{name_of(chosen)}"


def averaged_state(uri: str) -> dict[str, Tensor]:
    """The whole state of the trained module in a checkpoint: averages of what was trained, the weights of what was not."""
    source = reader(uri)
    entries = source.read_metadata().state_dict_metadata
    kinds = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    names = {name.removeprefix("model."): name for name in kinds if name.startswith("model.")}
    names |= {name.removeprefix("ema."): name for name in kinds if name.startswith("ema.")}
    state = {name: torch.empty(kinds[name].size, dtype=kinds[name].properties.dtype) for name in names.values()}
    dcp.load(state, storage_reader=source, no_dist=True)
    return {name: state[key] for name, key in names.items()}


def write_bundle(path: Path, config: TrainConfig, state: Mapping[str, Tensor], step: int, metrics: Mapping[str, float]) -> str:
    """Write the bundle of a trained module's whole state after `step` steps; returns the U-Net's digest."""
    unet = {name.removeprefix("unet."): value for name, value in state.items() if name.startswith("unet.")}
    if config.lora.rank > 0:
        unet = merged(unet, config.lora)
    with torch.device("meta"):
        Paella(config.model.unet).load_state_dict(unet, assign=True)  # raises where names or shapes are not a U-Net's
    text = None
    if config.model.text.trained:
        text = TextEncoders.to_train(config.model.text, text_root(config))
        text.load_state_dict({name.removeprefix("text."): value for name, value in state.items() if name.startswith("text.")})
    weights = {"unet": unet, "vqgan": load_vqgan(config.vqgan)[0].state_dict()}
    return save_bundle(path, config.model, weights, model_card(config, step, metrics), text)


def model_card(config: TrainConfig, step: int, metrics: Mapping[str, float]) -> str:
    """What a person needs to know of a bundle: data, training, numbers, use."""
    datasets = config.training_data()
    form, rows = datasets[0].format, sum(dataset.num_rows for dataset in datasets)
    images = step * config.global_batch_size
    start = {"published": "new weights", "short-run": "new weights"}.get(config.init, f"the bundle `{_name(config.init)}`")
    return MODEL_CARD.format(
        size=config.model.image_size,
        data="`, `".join(_name(uri) for uri in config.datasets),
        rows=rows,
        grid=f"{form.grid_height}x{form.grid_width}",
        vqgan=form.vqgan_digest,
        step=step,
        steps=config.steps,
        batch=config.global_batch_size,
        images=images,
        epochs=images / rows,
        start=start + (f", LoRA of rank {config.lora.rank}" if config.lora.rank > 0 else ""),
        metrics="\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items()) or "| none logged | |",
        cfg=json.dumps(config.sampling.cfg),
    )


def _name(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1]


MODEL_CARD = """# A Paella text-to-image model

Trained by paella-ray to make images of {size} pixels from captions.

| | |
|---|---|
| data | `{data}`: {rows} images as grids of {grid} tokens |
| VQGAN of the tokens | `{vqgan}` |
| steps | {step} of {steps}, {batch} images each: {images} image views, {epochs:.2f} epochs |
| start | {start} |
| weights | averages over the steps, merged |

What was measured at the end, on training images unless it says validation:

| metric | value |
|---|---|
{metrics}

Images it makes are made by a model: say so where they are shown.

    python pipelines/generate.py --model . --prompts prompts.txt --output images

In training, samples were drawn with guidance {cfg}.
"""


if __name__ == "__main__":
    from pipelines.export import ExportConfig as _Config
    from pipelines.export import run as _run

    command_line.main(_run, _Config, __doc__)
