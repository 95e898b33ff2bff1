"""Train a text encoder whose tokens are words, on a token dataset's captions and tokens alone, on any number of workers.

    python pipelines/train_text.py tiny --data runs/my/tokens --output runs/my/text
    python pipelines/train.py tiny --text runs/my/text/model --data runs/my/tokens …
    ray job submit --working-dir . -- python pipelines/train_text.py small --data s3://me/tokens --output /shared/text

It learns to say from a caption which codes stand in each coarse cell of its picture, and so to which place each word belongs
(`paella.layout`); the U-Net, which sees a tenth as many captions in that time, then starts from there. Its tokenizer is learned
from the captions first. The same command again continues from the newest complete checkpoint; a finished run says so and does
nothing. The output holds `model` (encoder and tokenizer in transformers' format), checkpoints, the id of the run in MLflow and,
last, `report.json`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from paella import command_line
from paella.conditioning import TextEncoders
from paella.config import TextConfig
from paella.ema import Ema
from paella.layout import TextToLayout
from paella.parallel import compute_dtype, count_parameters, full_state_dict, shard
from paella.storage import new_directory, new_file
from paella.training import OptimConfig
from paella.words import NewWords, learn_tokenizer, new_encoder
from pipelines import cli, loop, tracking
from pipelines.progress import Progress
from pipelines.recovery import Guard, RecoveryConfig
from pipelines.token_dataset import TokenBatch, TokenDataset
from pipelines.token_stream import TokenStream, require_mixture
from pipelines.workers import fit, setup_worker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MOST_CAPTIONS = 100_000
"""That the tokenizer is learned from: words that are frequent are so in a part of a large dataset too."""


@dataclass(frozen=True, kw_only=True)
class TrainTextConfig:
    """One training run."""

    data: str
    """Token dataset (directory or URI), written by tokenize_images."""
    output: str
    """Directory of the run; the same command with the same output continues it."""
    model: NewWords = field(default_factory=NewWords)
    """The text encoder; its d_model is the U-Net's byt5_embd."""
    cells: int = 4
    """Cells per side of a picture in which codes are predicted."""
    head_layers: int = 2
    """Layers that attend to the words for each cell; they are dropped in the end."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-4, warmup_steps=1000, final_lr_fraction=0.05))
    """Optimizer and learning-rate schedule."""
    steps: int = 600
    """Optimizer steps."""
    global_batch_size: int = 256
    """Captions per step over all workers."""
    num_workers: int = 1
    """Workers; each has one GPU, or its share of the CPUs."""
    min_workers: int | None = None
    """Train on as few workers as this where there is no room for num_workers, and on more once there is; None: wait for room."""
    precision: str = "auto"
    """Of forward and backward: bf16, float32, or auto (bf16 where the hardware multiplies it)."""
    ema_decay: float = 0.98
    """Decay of the averaged weights, which are the result."""
    validation_images: int = 2048
    """Rows held out, at most, as train.py holds them out: give both the same number, and neither sees the other's."""
    seed: int = 0
    """Order of the samples and initial weights."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    """Checkpoints beside those of checkpoint_every, and what happens when something goes wrong."""

    def __post_init__(self) -> None:
        loop.require_run(self, "cells", "head_layers")
        if self.validation_images < 0:
            raise ValueError(f"validation_images={self.validation_images} is not allowed: an integer of at least 0")

    def training_data(self) -> TokenDataset:
        """The dataset without the rows that are held out. Raises ValueError where there is no such dataset."""
        return TokenDataset(self.data, hold_out=self.validation_images)


def presets() -> dict[str, TrainTextConfig]:
    """Training settings for each size; `data` and `output` have to be given."""
    from tyro import MISSING

    tiny = TrainTextConfig(
        data=MISSING,
        output=MISSING,
        optim=OptimConfig(lr=1.5e-3, warmup_steps=100, final_lr_fraction=0.05, betas=(0.9, 0.99)),
        num_workers=2,  # on a CPU two workers of one thread each, as a second thread gains nothing with matrices as small
        validation_images=128,
    )
    small = TrainTextConfig(
        data=MISSING,
        output=MISSING,
        model=NewWords(vocab_size=16_384, d_model=512, d_ff=2048, num_layers=4, num_heads=8),
        steps=20_000,
        ema_decay=0.999,
        checkpoint_every=1000,
    )
    return {"tiny": tiny, "small": small}


def run(config: TrainTextConfig) -> Path:
    """Train; returns the encoder's directory. Raises ValueError for the user's mistakes, before any worker starts."""
    config = dataclasses.replace(config, data=cli.absolute(config.data), output=cli.absolute(config.output))
    _check_data(config)
    output = loop.require_places(config)
    values = cli.config_values(config)
    cli.require_same_config(output, values, config)
    model = output / "model"
    if (output / "report.json").exists():
        print(f"training of the text encoder is finished: {model}")
        return model
    mlflow_run = tracking.open_run(output, f"train_text {output.name}", values)
    tokenizer = learned_tokenizer(config)
    cli.start_ray()
    fit(train_worker, {"config": config, "mlflow_run": mlflow_run, "tokenizer": tokenizer})
    tracking.finish_run(mlflow_run)
    print(f"trained: {model}  {_said(json.loads((output / 'report.json').read_text()))}")
    return model


def _check_data(config: TrainTextConfig) -> None:
    dataset = config.training_data()
    require_mixture([dataset], (), config.global_batch_size)
    height, width = dataset.format.grid_height, dataset.format.grid_width
    if config.cells > min(height, width):
        raise ValueError(f"cells={config.cells} is not allowed: {config.data} has a grid of {height}x{width} tokens")


def learned_tokenizer(config: TrainTextConfig) -> PreTrainedTokenizerFast:
    """The tokenizer of the run: learned once, and kept in the output for a run that is continued."""
    from transformers import PreTrainedTokenizerFast

    place = Path(config.output) / "tokenizer"
    if not place.exists():
        tokenizer = learn_tokenizer(config.training_data().captions(MOST_CAPTIONS), config.model)
        with new_directory(place) as directory:
            tokenizer.save_pretrained(directory)
    return PreTrainedTokenizerFast.from_pretrained(place)


def train_worker(arguments: dict) -> None:
    """One worker of the training group."""
    config: TrainTextConfig = arguments["config"]
    rank, world_size, device = setup_worker(arguments, config.seed)
    dataset = config.training_data()
    model = new_model(config, arguments["tokenizer"], dataset.format.codebook_size).to(device).train()
    num_parameters = count_parameters(model)
    shard(model, torch.float32)  # autocast keeps sums and norms in float32, where FSDP would round all
    optimizers = config.optim.optimizers(model)
    ema = Ema(model, config.ema_decay)
    report = loop.Report(
        arguments["mlflow_run"], means, steps=config.steps, global_batch_size=config.global_batch_size, unit="captions"
    )
    training = loop.Training(config, arguments["mlflow_run"], model, optimizers, ema, report)
    if rank == 0:
        print(f"{num_parameters / 1e6:.1f} M parameters on {world_size} workers, from step {training.step}", flush=True)
    progress = Progress("text", config.steps, training.step, enabled=rank == 0)
    stream = TokenStream([dataset], seed=config.seed, global_batch_size=config.global_batch_size)
    for step, batch in training.steps(functools.partial(stream.batches, rank, world_size)):
        sums, norm, lr = train_step(model, optimizers, config, step, batch, device, training.guard)
        ema.update(model, step)
        progress.update(step + 1, report.step(step, sums, norm, lr))
    if training.ended:
        return
    with ema.swapped_into(model):
        state = full_state_dict(model)
    if rank == 0:
        finish(config, arguments["tokenizer"], state, arguments["mlflow_run"])
    dist.barrier()


def new_model(config: TrainTextConfig, tokenizer: PreTrainedTokenizerFast, num_labels: int) -> TextToLayout:
    """An untrained encoder for the tokenizer, and its head over so many codes."""
    named = TextConfig(byt5="model", max_length=config.model.max_length)
    text = TextEncoders(named, new_encoder(config.model, tokenizer), tokenizer)
    return TextToLayout(text, num_labels, cells=config.cells, layers=config.head_layers)


def train_step(
    model: TextToLayout,
    optimizers: loop.Optimizers,
    config: TrainTextConfig,
    step: int,
    batch: TokenBatch,
    device: torch.device,
    guard: Guard,
) -> tuple[Tensor, float, float]:
    """One optimizer step on this worker's slice of a global batch; returns the metric's sum, the gradient's norm, the rate."""
    lr = config.optim.set_lr(optimizers, step, config.steps)
    dtype = compute_dtype(config.precision, device)
    text = model.text.tokenize(batch.captions)
    inputs = (values.to(device) for values in (text.ids, text.mask, torch.from_numpy(batch.tokens)))
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = model(*inputs).mean()
    return loss.detach(), loop.optimizer_step(model, optimizers, loss, config.optim.grad_clip, guard), lr


def means(sums: Tensor, num_steps: int) -> dict[str, float]:
    """Named means from the sums of some steps."""
    return {"loss": sums.item() / num_steps}


def finish(
    config: TrainTextConfig, tokenizer: PreTrainedTokenizerFast, state: dict[str, Tensor], mlflow_run: tracking.Run
) -> None:
    """Write the averaged encoder and, last, the report that marks the run as finished (rank 0)."""
    dataset, output = config.training_data(), Path(config.output)
    model = new_model(config, tokenizer, dataset.format.codebook_size).eval()
    model.load_state_dict(state)
    report = held_out_losses(model, dataset)
    with new_directory(output / "model", replace=True) as directory:
        model.text.save(directory)
    tracking.log_metrics(mlflow_run, report, config.steps)
    with new_file(output / "report.json") as file:
        file.write_text(json.dumps(report, indent=1) + "\n")


@torch.inference_mode()
def held_out_losses(model: TextToLayout, dataset: TokenDataset, size: int = 256) -> dict[str, float]:
    """Losses on held-out rows by their own captions and by their neighbours': what lies between is heard of a caption.

    Empty where no rows are held out.
    """
    rows = dataset.held_out()
    if not rows.ids:
        return {}
    tokens, losses = torch.from_numpy(rows.tokens), {}
    for name, shift in (("held_out_loss", 0), ("held_out_loss_of_another", 1)):
        captions, parts = rows.captions[shift:] + rows.captions[:shift], []
        for first in range(0, len(captions), size):
            text = model.text.tokenize(captions[first : first + size])
            parts.append(model(text.ids, text.mask, tokens[first : first + size]))
        losses[name] = torch.cat(parts).mean().item()
    return losses


def _said(report: dict[str, float]) -> str:
    """What the report says, in words."""
    if not report:
        return "no rows were held out"
    own, other = report["held_out_loss"], report["held_out_loss_of_another"]
    return f"codes of held-out pictures cost {own:.3f} nats by their captions, {other:.3f} by others'"


if __name__ == "__main__":
    from pipelines.train_text import presets as _presets
    from pipelines.train_text import run as _run

    command_line.main(_run, _presets(), __doc__)
