"""The settings of a training run of the U-Net: fields, presets, and what must fit together before a worker starts."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from paella.bundle import load_vqgan, vqgan_digests
from paella.config import PRESETS, ModelConfig
from paella.lora import LoraConfig
from paella.parallel import ParallelConfig
from paella.sampler import SamplingConfig
from paella.training import NoiseConfig, OptimConfig
from pipelines import cli, loop
from pipelines.clip_columns import clip_digest
from pipelines.recovery import RecoveryConfig
from pipelines.sight import steps_of
from pipelines.token_dataset import TokenDataset, require_vqgan
from pipelines.token_stream import SHUFFLE_ROWS, SHUFFLE_STATES, TokenStream, require_mixture

C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    data: str
    """Token dataset (directory or URI), written by tokenize_images."""
    more_data: tuple[str, ...] = ()
    """Further token datasets, mixed with `data`."""
    data_weights: tuple[float, ...] = ()
    """Of `data` and each of `more_data`: how much of it there is in a batch; by their numbers of rows if not given."""
    vqgan: str
    """Bundle with the VQGAN that made the tokens."""
    output: str
    """Directory of the run; the same command with the same output continues it."""
    model: ModelConfig
    """U-Net and text encoders."""
    text: str | None = None
    """Text encoder made by train_text (directory or URI): trained on together with the U-Net, in place of the preset's."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning-rate schedule."""
    steps: int = 1_300_000
    """Optimizer steps."""
    global_batch_size: int = 2048
    """Images per step over all workers."""
    num_workers: int = 1
    """Workers; each has one GPU, or its share of the CPUs."""
    min_workers: int | None = None
    """Train on as few workers as this where there is no room for num_workers, and on more once there is; None: wait for room."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the model is spread over workers, and what is traded for memory and speed."""
    precision: str = "auto"
    """Of forward and backward: bf16, float32, or auto (bf16 where the hardware multiplies it)."""
    ema_decay: float = 0.9999
    """Decay of the averaged weights, which sampling uses."""
    stored_text: bool = False
    """Take the states of captions from the datasets, where `tokenize_images --byt5` put them, and not from the text encoder."""
    text_actors: int = 0
    """Actors that encode captions beside the workers and ahead of them, each on a GPU of its own; 0: the workers do."""
    text_accelerator: str | None = None
    """Kind of GPU for those, as Ray names it (L4, T4); any, if not given."""
    accelerator: str | None = None
    """Kind of GPU for the workers (A100, H100), as Ray names it; any, if not given."""
    label_smoothing: float = 0.1
    """Of the cross-entropy."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    """Of tokens, what is taken away from the conditions, and what a noise level counts."""
    init: str = "published"
    """Initial weights: published; short-run, which starts faster where there are only thousands of steps; or a bundle (directory
    or URI) to fine-tune."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Train small additions to attention and conditioning layers in place of all weights."""
    seed: int = 0
    """Order of the samples, noise and initial weights."""
    checkpoint_every: int = 5000
    """Steps between checkpoints."""
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    """Checkpoints beside those of checkpoint_every, and what happens when something goes wrong."""
    sample_every: int = 5000
    """Steps between sheets of samples; 0 draws none."""
    validation_images: int = 2048
    """Rows of `data` held out of training, at most; never more than a twentieth of it. 0 holds none out."""
    validate_every: int = 5000
    """Steps between validations on them; 0 for none."""
    profile: str | None = None
    """Steps to record with torch's profiler: 10:20 leaves a trace of steps 10 to 19 in the output and in MLflow."""
    sample_prompts: str | None = None
    """Text file with the prompts of those sheets, one a line; the dataset's first captions if not given."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Settings of those samples."""
    register_as: str = "paella"
    """Name under which MLflow registers the model."""

    def __post_init__(self) -> None:
        loop.require_run(self)
        for name in ("sample_every", "validation_images", "validate_every", "text_actors"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: an integer of at least 0")
        self._check_text()
        if self.profile is not None:
            steps_of(self.profile)
        self.parallel.require_fits(self.min_workers or self.num_workers, self.num_workers, self.global_batch_size)
        self._check_own_draws()

    def _check_own_draws(self) -> None:
        """All workers must make as many passes for own draws as each other: one for each part of a batch."""
        numbers = range(self.min_workers or self.num_workers, self.num_workers + 1)
        smallest = min(self.part_size(self.global_batch_size // number) for number in numbers)
        if self.noise.own_draws > 0 and smallest * self.noise.own_share < 1:
            raise ValueError(
                f"noise.own_draws={self.noise.own_draws} is not allowed: 0, or at least one image in each part of a batch, "
                f"which has {smallest}"
            )

    def _check_text(self) -> None:
        if self.text_accelerator is not None and not self.text_actors:
            raise ValueError(f"text_accelerator={self.text_accelerator!r} is not allowed without text_actors")
        if self.stored_text and self.text_actors:
            raise ValueError(f"text_actors={self.text_actors} is not allowed with stored_text: nothing would be left to encode")
        if self.given_states and (self.model.text.trained or self.text is not None):
            name = f"text_actors={self.text_actors}" if self.text_actors else "stored_text=True"
            raise ValueError(f"{name} is not allowed: this model trains its own text encoder, whose states change")

    @property
    def given_states(self) -> bool:
        """Whether captions come to the workers encoded."""
        return self.stored_text or self.text_actors > 0

    @property
    def images_per_pass(self) -> int:
        """Images that pass the model together at most. Fewer workers than num_workers take more passes of the same images each,
        which need the same memory and round alike."""
        return self.global_batch_size // (self.num_workers * self.parallel.accumulate)

    def part_size(self, num_images: int) -> int:
        """Images in each pass of a worker that has so many in a step: all parts are alike, as gradients are means over them."""
        return next(size for size in range(self.images_per_pass, 0, -1) if num_images % size == 0)

    @property
    def datasets(self) -> tuple[str, ...]:
        """All token datasets of the mixture."""
        return (self.data, *self.more_data)

    def training_data(self) -> list[TokenDataset]:
        """The datasets without the rows that are held out. Raises ValueError where there is no such dataset."""
        return [TokenDataset(self.data, hold_out=self.validation_images), *(TokenDataset(uri) for uri in self.more_data)]

    def token_stream(self) -> TokenStream:
        """Batches of them. Raises ValueError where they cannot be mixed."""
        return TokenStream(
            self.training_data(),
            seed=self.seed,
            global_batch_size=self.global_batch_size,
            weights=self.data_weights,
            shuffle_rows=SHUFFLE_STATES if self.stored_text else SHUFFLE_ROWS,
        )


def presets() -> dict[str, TrainConfig]:
    """Training settings for each model preset; `data`, `vqgan` and `output` have to be given."""
    from tyro import MISSING

    places = {"data": MISSING, "vqgan": MISSING, "output": MISSING}
    tiny = TrainConfig(
        **places,
        model=PRESETS["tiny"],
        optim=OptimConfig(
            lr=1.5e-3, matrix_lr=1e-2, text_lr_share=0.1, warmup_steps=50, final_lr_fraction=0.02, betas=(0.9, 0.99)
        ),
        steps=1400,
        global_batch_size=64,
        num_workers=2,
        ema_decay=0.995,
        label_smoothing=0.0,
        noise=NoiseConfig(
            t_scale=1.3,
            final_t_scale=1.0,
            balance=0.5,
            final_balance=1.0,
            own_draws=0.5,
            drop_caption=0.1,
            keep_clip=0.5,
            keep_clip_image=0.1,
        ),
        init="short-run",
        checkpoint_every=200,
        sample_every=280,
        validation_images=128,
        validate_every=280,
        sampling=SamplingConfig(temperature=(0.7, 0.3), cfg=(1.5, 1.5)),
    )
    small = TrainConfig(**places, model=PRESETS["small"], steps=100_000, global_batch_size=256, ema_decay=0.999)
    parallel = ParallelConfig(compile=True, loss_chunk=16_384)
    return {"tiny": tiny, "small": small, "paella-1b": TrainConfig(**places, model=PRESETS["paella-1b"], parallel=parallel)}


def resolved(config: TrainConfig) -> TrainConfig:
    """The config with absolute paths: workers run in directories of their own."""
    text = config.model.text
    byt5, clip = cli.absolute_if_directory(text.byt5) or text.byt5, cli.absolute_if_directory(text.clip)
    text = dataclasses.replace(text, byt5=byt5, clip=clip)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, text=text),
        text=None if config.text is None else cli.absolute(config.text),
        data=cli.absolute(config.data),
        more_data=tuple(cli.absolute(uri) for uri in config.more_data),
        vqgan=cli.absolute(config.vqgan),
        output=cli.absolute(config.output),
        init=cli.absolute_if_directory(config.init) or config.init,
        sample_prompts=None if config.sample_prompts is None else cli.absolute(config.sample_prompts),
    )


def read_train_config(output: str) -> TrainConfig:
    """The config of the run in `output`. Raises ValueError where there is none, or none of this version."""
    file = Path(output) / "config.json"
    try:
        config = _from_values(TrainConfig, json.loads(file.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{output} is not the output of a training run of this version: {file} cannot be read ({error})"
        ) from error
    return dataclasses.replace(config, output=cli.absolute(output))


def _from_values(kind: type[C], values: dict[str, Any]) -> C:
    """A dataclass from what `asdict` and JSON made of it."""
    hints, made = get_type_hints(kind), {}
    for name, value in values.items():
        nested = hints[name] if dataclasses.is_dataclass(hints[name]) else None
        made[name] = _from_values(nested, value) if nested else tuple(value) if isinstance(value, list) else value
    return kind(**made)


def check_data(config: TrainConfig) -> None:
    """Raises ValueError where dataset, VQGAN, model and prompts do not fit together."""
    datasets = config.training_data()
    require_mixture(datasets, config.data_weights, config.global_batch_size)
    dataset = datasets[0]  # the others are like it
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
    grid, side = (dataset.format.grid_height, dataset.format.grid_width), config.model.image_size
    if grid != (expected := config.model.grid(side, side)):
        raise ValueError(
            f"{config.data} has a grid of {grid[0]}x{grid[1]} tokens, the model's image_size={side} means one of "
            f"{expected[0]}x{expected[1]}"
        )
    if config.model.text.clip is not None and (width := dataset.require_clip()) != config.model.unet.clip_embd:
        raise ValueError(
            f"{config.data} has CLIP embeddings of width {width}, the model's clip_embd is {config.model.unet.clip_embd}"
        )
    if config.stored_text:
        for each in datasets:
            each.require_states(clip_digest(config.model.text.byt5))
    sample_prompts(config)


def sample_prompts(config: TrainConfig, num: int = 32) -> list[str]:
    """The prompts of the sample sheets."""
    if config.sample_prompts is None:
        captions = TokenDataset(config.data).head(num).captions
        return (captions * num)[:num]
    try:
        lines = Path(config.sample_prompts).read_text().splitlines()
    except OSError as error:
        raise ValueError(f"sample_prompts {config.sample_prompts} cannot be read: {error.strerror}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"sample_prompts {config.sample_prompts} has no prompts")
    return prompts[:num]
