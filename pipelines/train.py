"""Train the U-Net (and, in `tiny`, its text encoder) on a token dataset, on any number of workers.

    python pipelines/train.py tiny --data runs/demo/tokens --vqgan runs/demo/vqgan --output runs/mine --steps 200
    ray job submit --working-dir . -- python pipelines/train.py paella-1b --data s3://me/tokens …

The same command again continues from the newest complete checkpoint; a finished run says so and does nothing.
The output holds `model` (a bundle), `samples/`, checkpoints and the id of the run in MLflow.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from paella import command_line
from paella.bundle import load_vqgan, save_bundle, vqgan_digests
from paella.conditioning import load_clip, unconditional
from paella.config import PRESETS, ModelConfig
from paella.ema import Ema
from paella.images import contact_sheet, to_uint8
from paella.parallel import compute_dtype, count_parameters, full_state_dict, gathered, shard
from paella.sampler import SamplingConfig, sample, start
from paella.short_run import initialise_byt5, initialise_unet
from paella.storage import new_file
from paella.training import NoiseConfig, OptimConfig, TextToTokens, draw_noise, loss_and_metrics, metrics_of
from paella.vqgan import VQModel
from pipelines import cli, loop, tracking
from pipelines.progress import Progress
from pipelines.token_dataset import TokenBatch, TokenDataset, require_vqgan
from pipelines.workers import fit, setup_worker


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    data: str
    """Token dataset (directory or URI), written by tokenize_images."""
    vqgan: str
    """Bundle with the VQGAN that made the tokens."""
    output: str
    """Directory of the run; the same command with the same output continues it."""
    model: ModelConfig
    """U-Net and text encoders."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning-rate schedule."""
    steps: int = 1_300_000
    """Optimizer steps."""
    global_batch_size: int = 2048
    """Images per step over all workers."""
    num_workers: int = 1
    """Workers; each has one GPU, or its share of the CPUs."""
    precision: str = "auto"
    """Of forward and backward: bf16, float32, or auto (bf16 where the hardware multiplies it)."""
    ema_decay: float = 0.9999
    """Decay of the averaged weights, which sampling uses."""
    label_smoothing: float = 0.1
    """Of the cross-entropy."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    """Of tokens, and what is taken away from the conditions."""
    init: str = "published"
    """Initial weights: published, or short-run, which starts faster where there are only thousands of steps."""
    seed: int = 0
    """Order of the samples, noise and initial weights."""
    checkpoint_every: int = 5000
    """Steps between checkpoints."""
    sample_every: int = 5000
    """Steps between sheets of samples."""
    sample_prompts: str | None = None
    """Text file with the prompts of those sheets, one a line; the dataset's first captions if not given."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Settings of those samples."""
    register_as: str = "paella"
    """Name under which MLflow registers the model."""

    def __post_init__(self) -> None:
        loop.require_run(self, "sample_every")
        if self.init not in ("published", "short-run"):
            raise ValueError(f"init={self.init!r} is not allowed: published or short-run")


def presets() -> dict[str, TrainConfig]:
    """Training settings for each model preset; `data`, `vqgan` and `output` have to be given."""
    from tyro import MISSING

    places = {"data": MISSING, "vqgan": MISSING, "output": MISSING}
    tiny = TrainConfig(
        **places,
        model=PRESETS["tiny"],
        optim=OptimConfig(lr=1.5e-3, matrix_lr=1e-2, warmup_steps=50, final_lr_fraction=0.02, betas=(0.9, 0.99)),
        steps=1400,
        global_batch_size=64,
        num_workers=2,
        ema_decay=0.995,
        label_smoothing=0.0,
        noise=NoiseConfig(t_scale=1.55, drop_caption=0.1, keep_clip=0.9, keep_clip_image=0.2),
        init="short-run",
        checkpoint_every=200,
        sample_every=280,
        sampling=SamplingConfig(temperature=(1.0, 0.3), cfg=(1.5, 1.5)),
    )
    small = TrainConfig(**places, model=PRESETS["small"], steps=100_000, global_batch_size=256, ema_decay=0.999)
    return {"tiny": tiny, "small": small, "paella-1b": TrainConfig(**places, model=PRESETS["paella-1b"])}


def run(config: TrainConfig) -> Path:
    """Train; returns the bundle's directory. Raises ValueError for the user's mistakes, before any worker starts."""
    text = dataclasses.replace(config.model.text, clip=cli.absolute_if_directory(config.model.text.clip))
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, text=text),
        data=cli.absolute(config.data),
        vqgan=cli.absolute(config.vqgan),
        output=cli.absolute(config.output),
        sample_prompts=None if config.sample_prompts is None else cli.absolute(config.sample_prompts),
    )
    _check_data(config)
    output = cli.require_writable(config.output)
    values = cli.config_values(config)
    cli.require_same_config(output, values)
    bundle, finished = output / "model", output / "registered_model.txt"
    if finished.exists():
        print(f"training is finished: {bundle} (MLflow: {finished.read_text().strip()})")
        return bundle
    mlflow_run = tracking.open_run(output, f"train {output.name}", values)
    if not (bundle / "config.json").exists():
        cli.start_ray()
        fit(train_worker, {"config": config, "mlflow_run": mlflow_run}, output, config.num_workers)
    uri = tracking.finish_run(mlflow_run, bundle, config.register_as)
    with new_file(finished) as file:
        file.write_text(f"{uri}\n")
    print(f"trained: {bundle} (MLflow: {uri})")
    return bundle


def _check_data(config: TrainConfig) -> None:
    dataset = TokenDataset(config.data)
    dataset.num_batches(config.global_batch_size)
    load_vqgan(config.vqgan)
    require_vqgan(dataset.format, vqgan_digests(config.vqgan), config.data)
    labels, multiple = config.model.unet.num_labels, config.model.unet.grid_multiple
    if dataset.format.codebook_size != labels:
        raise ValueError(
            f"{config.data} has a codebook of {dataset.format.codebook_size} codes, the model's num_labels is {labels}"
        )
    if dataset.format.grid_height % multiple or dataset.format.grid_width % multiple:
        raise ValueError(
            f"{config.data} has a grid of {dataset.format.grid_height}x{dataset.format.grid_width} tokens, "
            f"the model needs sides that are multiples of {multiple}"
        )
    if config.model.text.clip is not None and (width := dataset.require_clip()) != config.model.unet.clip_embd:
        raise ValueError(
            f"{config.data} has CLIP embeddings of width {width}, the model's clip_embd is {config.model.unet.clip_embd}"
        )
    sample_prompts(config)


def sample_prompts(config: TrainConfig, num: int = 32) -> list[str]:
    """The prompts of the sample sheets."""
    if config.sample_prompts is None:
        batch = next(TokenDataset(config.data).batches(seed=0, global_batch_size=1))
        return batch.captions * num
    try:
        lines = Path(config.sample_prompts).read_text().splitlines()
    except OSError as error:
        raise ValueError(f"sample_prompts {config.sample_prompts} cannot be read: {error.strerror}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"sample_prompts {config.sample_prompts} has no prompts")
    return prompts[:num]


def train_worker(arguments: dict) -> None:
    """One worker of the training group."""
    config: TrainConfig = arguments["config"]
    rank, world_size, device = setup_worker(arguments, config.seed)
    model = TextToTokens(config.model).to(device).train()
    vqgan = load_vqgan(config.vqgan)[0].to(device)
    if config.init == "short-run":
        initialise_unet(model.unet, vqgan.vquantizer.codebook.weight)
        if config.model.text.new_byt5 is not None:
            initialise_byt5(model.text.byt5)
    num_parameters = count_parameters(model)
    shard(model, compute_dtype(config.precision, device))
    optimizers = config.optim.optimizers(model)
    ema = Ema(model, config.ema_decay)
    start = loop.resume(model, optimizers, ema)
    samples = Samples(config, vqgan, arguments["mlflow_run"], rank, world_size, device)
    if rank == 0:
        print(f"{num_parameters / 1e6:.1f} M parameters on {world_size} workers, from step {start}", flush=True)

    batches = TokenDataset(config.data).batches(
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        rank=rank,
        world_size=world_size,
        start_step=start,
        clip=config.model.text.clip is not None,
    )
    progress = Progress("train", config.steps, start, enabled=rank == 0)
    report = loop.Report(
        arguments["mlflow_run"],
        metrics_of,
        shown=("loss", "accuracy"),
        steps=config.steps,
        global_batch_size=config.global_batch_size,
        unit="images",
    )
    for step, batch in zip(range(start, config.steps), batches, strict=False):
        sums, norm, lr = train_step(model, optimizers, config, step, batch, device)
        ema.update(model, step)
        progress.update(step + 1, report.step(step, sums, norm, lr))
        done = step + 1
        if done % config.sample_every == 0 or done == config.steps:
            samples.draw(model, ema, done)
        if done % config.checkpoint_every == 0 and done < config.steps:
            loop.save_checkpoint(model, optimizers, ema, done)
    with ema.swapped_into(model):
        state = full_state_dict(model)
    if rank == 0:
        save_trained(config, state)
    dist.barrier()


def train_step(
    model: TextToTokens, optimizers: loop.Optimizers, config: TrainConfig, step: int, batch: TokenBatch, device: torch.device
) -> tuple[Tensor, Tensor, float]:
    """One optimizer step on this worker's slice of a global batch; returns the metrics' sums, the gradient's norm, the rate."""
    lr = config.optim.set_lr(optimizers, step, config.steps)
    tokens = torch.from_numpy(batch.tokens)
    numbers = loop.sample_numbers(step, config.global_batch_size)
    draws = draw_noise(tokens, config.model.unet.num_labels, config.seed, numbers, config.noise)
    text = model.text.tokenize(batch.captions)
    inputs = [value.to(device) for value in (draws.noised, draws.t, text.ids, text.mask)]
    if batch.clip is None:
        logits = model(*inputs, draws.keep.to(device))
    else:
        complete = torch.from_numpy(batch.clip.complete)
        keep = dataclasses.replace(draws.keep, clip=draws.keep.clip & complete, clip_image=draws.keep.clip_image & complete)
        embeddings = [torch.from_numpy(values).to(device) for values in (batch.clip.text, batch.clip.image)]
        logits = model(*inputs, keep.to(device), *embeddings)
    moved = dataclasses.replace(draws, t=draws.t.to(device), weight=draws.weight.to(device))
    loss, sums = loss_and_metrics(logits, tokens.to(device), moved, config.label_smoothing)
    return sums, loop.optimizer_step(model, optimizers, loss, config.optim.grad_clip), lr


class Samples:
    """Sheets of samples from the averaged weights: every rank generates its share with the sharded model."""

    def __init__(
        self, config: TrainConfig, vqgan: VQModel, mlflow_run: tracking.Run, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.config, self.vqgan, self.mlflow_run = config, vqgan, mlflow_run
        self.rank, self.world_size, self.device = rank, world_size, device
        prompts = sample_prompts(config)
        self.prompts = prompts[: max(world_size, len(prompts) // world_size * world_size)]
        name = config.model.text.clip
        self.clip = None if name is None else clip_text_embeddings(name, self.prompts)

    @torch.no_grad()
    def draw(self, model: TextToTokens, ema: Ema, step: int) -> None:
        """Generate, gather on rank 0 and keep the sheet."""
        indices = range(self.rank, len(self.prompts), self.world_size)
        side = self.config.model.image_size
        model.eval()
        with ema.swapped_into(model):
            clip = None if self.clip is None else self.clip[list(indices)].to(self.device)
            tokens = sample_sharded(model, [self.prompts[i] for i in indices], list(indices), side, self.config, clip)
        model.train()
        images = to_uint8(self.vqgan.decode_indices(tokens.to(self.device)))
        gathered: list = [None] * self.world_size
        dist.all_gather_object(gathered, dict(zip(indices, images, strict=True)))
        if self.rank == 0:
            by_index = {index: image for part in gathered for index, image in part.items()}
            self._keep(contact_sheet([by_index[i] for i in sorted(by_index)], self.prompts), step)

    def _keep(self, sheet: Image.Image, step: int) -> None:
        """Into the output and MLflow."""
        file = Path(self.config.output) / "samples" / f"step-{step:07d}.png"
        file.parent.mkdir(exist_ok=True)
        sheet.save(file)
        tracking.log_image(self.mlflow_run, sheet, "samples", step)
        print(f"samples after {step} steps: {file}", flush=True)


def sample_sharded(
    model: TextToTokens, prompts: list[str], seeds: list[int], side: int, config: TrainConfig, clip: Tensor | None
) -> Tensor:
    """Token grids of prompts, with their CLIP embeddings (B,D), by a sharded model, whose weights are gathered for as long."""
    size, num_labels = config.model.grid(side, side), config.model.unet.num_labels
    with gathered(model):
        canvases = []
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            conditions = model.text([prompt])
            if clip is not None:
                conditions["clip"] = clip[index : index + 1].to(conditions["byt5"].dtype)
            prepared = [model.unet.prepare(**conditions)], model.unet.prepare(**unconditional(conditions))
            canvases.append(start(num_labels, size, *prepared, seed=seed, config=config.sampling))
        return sample(model.unet, canvases)


@torch.inference_mode()
def clip_text_embeddings(name: str, prompts: list[str]) -> Tensor:
    """CLIP's embeddings (B,D) of prompts."""
    clip: Any
    clip, tokenizer = load_clip(name)
    return clip.encode_text(tokenizer(prompts))


def save_trained(config: TrainConfig, state: dict[str, Tensor]) -> None:
    """Write the bundle from the full state of the trained module (rank 0)."""
    vqgan, _ = load_vqgan(config.vqgan)
    trained = TextToTokens(config.model)
    trained.load_state_dict(state)
    card = MODEL_CARD.format(
        steps=config.steps,
        batch=config.global_batch_size,
        data=config.data.rstrip("/").rsplit("/", 1)[-1],
        images=config.steps * config.global_batch_size,
    )
    weights = {"unet": trained.unet.state_dict(), "vqgan": vqgan.state_dict()}
    made = trained.text if config.model.text.new_byt5 is not None else None
    save_bundle(Path(config.output) / "model", config.model, weights, card, made)


MODEL_CARD = """# A Paella text-to-image model

Trained by paella-ray for {steps} steps of {batch} images ({images} image views) on the token dataset `{data}`.
The weights are the exponential moving average at the last step. Images it makes are made by a model: say so where they are shown.

    python pipelines/generate.py --model . --prompts prompts.txt --output images
"""


if __name__ == "__main__":
    from pipelines.train import presets as _presets
    from pipelines.train import run as _run

    command_line.main(_run, _presets(), __doc__)
