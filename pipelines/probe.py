"""What a model hears of its captions, and what it binds to places: for any model and token dataset, without a picture being made.

    python -m pipelines.probe --model runs/demo/train/model --data runs/demo/tokens
    python -m pipelines.probe --model bundle --data s3://me/tokens --images 1024 --output runs/probed

HEARS: words that stand between the same neighbours somewhere in the captions make sets (red, blue, … or left, right). Each is
replaced by another; how many nats a noised token is predicted worse then says how much the word is heard. 0: not at all. Tokens
of rare codes, outlines for example, are counted apart as well.

BINDS: of captions with two words of a set, which exchange their places: a red square left of a blue circle becomes a blue square
left of a red circle. A model that hears words as a bag predicts the same, so that its own caption makes a picture more probable
in one case of two (0.50); a model that binds words to what they belong to is near 1.00.

Rows that training has held out are measured where the model lies in the output of a run on this dataset, else the first rows.
Leaves probe.json and probe.png in the output.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from paella import command_line
from paella.bundle import load_bundle, vqgan_digests
from paella.parallel import compute_dtype
from paella.storage import new_file
from pipelines import cli
from pipelines.hearing import Listener, NoisyImages, model_of
from pipelines.token_dataset import TokenBatch, TokenDataset, require_vqgan
from pipelines.train_config import read_train_config
from pipelines.word_sets import WordSets

BINDING_LEVELS = (0.9, 1.0)
"""Below these the tokens themselves say what is where."""
CAPTIONS_READ = 20_000
"""Captions in which words are looked for that replace each other."""
PLOTTED = 10
"""Sets with a line of their own, the most frequent ones: there are no more colours."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What to measure, and on what."""

    model: str
    """Bundle: directory, URI or models:/name@alias."""
    data: str
    """Token dataset (directory or URI), of tokens of the model's VQGAN."""
    output: str | None = None
    """Directory of probe.json and probe.png; `probe` beside the model if not given."""
    images: int = 256
    """Rows to measure on, at most."""
    levels: tuple[float, ...] = (0.1, 0.3, 0.5, 0.8, 1.0)
    """Shares of noise at which words are replaced; 1: nothing but the caption says what the picture is."""
    words: int = 40
    """Words to replace: the most frequent that another stands in the place of."""
    captions_per_word: int = 64
    """Captions in which a word is replaced, at most."""
    batch_size: int = 64
    """Images of a pass."""

    def __post_init__(self) -> None:
        for name in ("images", "words", "captions_per_word", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: an integer of at least 1")
        if not self.levels or not all(0 < level <= 1 for level in self.levels):
            raise ValueError(f"levels={self.levels} is not allowed: numbers above 0, at most 1")
        if self.output is None and ("://" in self.model or self.model.startswith("models:/")):
            raise ValueError(f"output has to be given for a model that is not in a local directory, as {self.model}")

    @property
    def directory(self) -> Path:
        """Where the results go."""
        return Path(self.model).absolute().parent / "probe" if self.output is None else Path(self.output)


def run(config: ProbeConfig) -> None:
    """Measure, print and write. Raises ValueError where model and dataset do not fit, or no word could be another."""
    dataset_of(config)
    cli.require_writable(str(config.directory))
    values = measure(config)
    if not values["words"]:
        raise ValueError(f"there is nothing to replace: no two words of {config.data}'s captions stand in the same context")
    print("\n".join(table(values)))
    write(values, config.directory)
    print(f"\nnumbers: {config.directory / 'probe.json'}  plots: {config.directory / 'probe.png'}")


def measure(config: ProbeConfig) -> dict[str, Any]:
    """Return all numbers as plain values; see `Heard` and `Bound`. Raises ValueError where model and dataset do not fit."""
    dataset = dataset_of(config)
    batch, held_out = rows_of(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bundle = load_bundle(config.model, device, compute_dtype("auto", device))
    captions = [" ".join(caption.split()) for caption in batch.captions]
    sets = WordSets([*dataset.captions(CAPTIONS_READ), *captions], config.words)
    noisy = NoisyImages.of(batch.tokens, dataset.format.codebook_size)
    listener = Listener(model_of(bundle), noisy, captions, sets, config.batch_size)
    by_set, by_word = listener.hears(config.levels, config.captions_per_word)
    return {
        "model_digest": bundle.digest,
        "images": len(captions),
        "held_out": held_out,
        "levels": list(config.levels),
        "hears": [asdict(heard) for heard in by_set],
        "words": [asdict(heard) for heard in by_word],
        "binding_levels": list(BINDING_LEVELS),
        "binds": [asdict(bound) for bound in listener.binds(BINDING_LEVELS)],
    }


def dataset_of(config: ProbeConfig) -> TokenDataset:
    """Return the whole dataset. Raises ValueError where there is none, or its tokens are another VQGAN's than the model's."""
    dataset = TokenDataset(config.data)
    require_vqgan(dataset.format, vqgan_digests(config.model), config.data)
    return dataset


def rows_of(config: ProbeConfig) -> tuple[TokenBatch, bool]:
    """Return what to measure on, and whether it is known to have been held out of the model's training."""
    dataset = TokenDataset(config.data, hold_out=num_held_out(config))
    held_out = dataset.num_held_out > 0
    return dataset.held_out(slice(config.images)) if held_out else dataset.head(config.images), held_out


def num_held_out(config: ProbeConfig) -> int:
    """Return the rows that the run whose output the model lies in held out of this dataset; 0 where there is no such run."""
    try:
        trained = read_train_config(str(Path(config.model).absolute().parent))
    except ValueError:
        return 0
    return trained.validation_images if trained.data == cli.absolute(config.data) else 0


def table(values: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the numbers for a console."""
    rows = "rows that training has not seen" if values["held_out"] else "of the first rows, which training may have seen"
    yield f"\n{values['images']} {rows}"
    yield "\nHEARS: nats by which a noised token is less probable with another word (of those with rare codes)"
    yield _line("words", "captions", [f"t = {level:g}" for level in values["levels"]])
    single = {heard["words"][0]: heard for heard in values["words"]}
    for heard in values["hears"]:
        yield _line(name_of(heard["words"]), heard["captions"], _costs(heard))
        for word in heard["words"]:
            if word in single and len(heard["words"]) > 1:
                yield _line(f"  {word}", single[word]["captions"], _costs(single[word]))
    if values["binds"]:
        yield "\nBINDS: nats likewise with two words exchanged (how often the true caption fits better; 0.50: a bag of words)"
        yield _line("words", "captions", [f"t = {level:g}" for level in values["binding_levels"]])
    for bound in values["binds"]:
        costs = [f"{cost:.3f} ({share:.2f})" for cost, share in zip(bound["nats"], bound["share"], strict=True)]
        yield _line(name_of(bound["words"]), bound["captions"], costs)


def _line(name: str, captions: object, cells: Sequence[str]) -> str:
    return f"{name:<34}{captions:>9}" + "".join(f"{cell:>17}" for cell in cells)


def _costs(heard: dict[str, Any]) -> list[str]:
    return [f"{cost:.3f} ({rare:.3f})" for cost, rare in zip(heard["nats"], heard["nats_rare"], strict=True)]


def name_of(words: Sequence[str]) -> str:
    """Return a set's name: its first words."""
    return ", ".join(words[:4]) + (f", … ({len(words)})" if len(words) > 4 else "")


def write(values: dict[str, Any], directory: Path) -> None:
    """Write probe.json and probe.png."""
    with new_file(directory / "probe.json") as file:
        file.write_text(json.dumps(values, indent=1) + "\n")
    with new_file(directory / "probe.png") as file:
        plots(values).savefig(file, dpi=100, format="png")


def plots(values: dict[str, Any]) -> Figure:
    """Draw what each set of words costs at each noise level, and how often the own caption wins over the exchanged one."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    hears, binds = figure.subplots(1, 2)
    for heard in values["hears"][:PLOTTED]:
        hears.plot(values["levels"], heard["nats"], marker="o", markersize=3, label=name_of(heard["words"]))
    hears.set(title="heard: another word in its place", xlabel="t, share of noise", ylabel="nats a noised token")
    if values["hears"]:
        hears.legend(fontsize="small")
    names = [name_of(bound["words"]) for bound in values["binds"]]
    binds.barh(names, [bound["share"][-1] for bound in values["binds"]])
    binds.axvline(0.5, color="black", linestyle="dashed")
    binds.set(
        title="bound: two words exchanged, t = 1",
        xlabel="how often the true caption fits better (0.5: a bag of words)",
        xlim=(0, 1),
    )
    binds.invert_yaxis()
    return figure


if __name__ == "__main__":
    from pipelines.probe import ProbeConfig as _Config
    from pipelines.probe import run as _run

    command_line.main(_run, _Config, __doc__)
