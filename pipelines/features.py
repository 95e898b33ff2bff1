"""Features of sets of images: read, decoded and embedded by Ray Data, and kept by digest, so that no set is embedded twice.

A set is a list of chunks and a reader, both small enough to send to workers; no more than a chunk of images is in memory at once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext
from safetensors.torch import load_file, save_file
from torch import Tensor

from paella.bundle import load_vqgan, vqgan_digests
from paella.conditioning import clip_pixels, load_clip
from paella.images import center_crop, decode_image, to_uint8
from paella.storage import first_line, new_file
from paella.vqgan import VQModel
from pipelines import cli
from pipelines.clip_columns import clip_digest
from pipelines.image_sets import captions as source_captions
from pipelines.progress import Progress
from pipelines.source_contract import Sample, Unit
from pipelines.source_files import exists, join
from pipelines.sources import find_units, read_unit
from pipelines.token_dataset import TokenBatch, TokenDataset, require_vqgan

CHUNK = 64
"""Images that one task embeds."""

Captioned = tuple[str, np.ndarray]
"""A caption and an image (H,W,3) uint8."""


@dataclass(frozen=True)
class ImageSet:
    """Images with captions that can be read again and again."""

    name: str
    chunks: Sequence[dict[str, Any]]
    read: Callable[[dict[str, Any]], Iterator[Captioned]]
    digest: str
    """Of what is read, and how."""
    num_images: int


@dataclass(frozen=True)
class Networks:
    """What embeds: an open_clip name or directory, and a file of torch-fidelity's Inception weights; None for neither."""

    clip: str | None = None
    inception: str | None = None

    @property
    def digest(self) -> str:
        inception = None if self.inception is None else hashlib.sha256(Path(self.inception).read_bytes()).hexdigest()
        return _digest([clip_digest(self.clip), inception])


def files(name: str, root: Path, rows: Sequence[dict[str, Any]]) -> ImageSet:
    """Pictures of a manifest: rows have `file`, below root, `sha256` and `prompt`."""
    chunks = [{"root": str(root), "rows": list(rows[i : i + CHUNK])} for i in range(0, len(rows), CHUNK)]
    return ImageSet(name, chunks, _read_files, _digest([[row["sha256"], row["prompt"]] for row in rows]), len(rows))


def _read_files(chunk: dict[str, Any]) -> Iterator[Captioned]:
    for row in chunk["rows"]:
        image = decode_image((Path(chunk["root"]) / row["file"]).read_bytes())
        yield row["prompt"], np.asarray(image)


def reference(uri: str, model: str, side: int, num: int) -> ImageSet:
    """At most `num` images of a token dataset, decoded by the model's VQGAN, or of a source of images, cropped to `side`.

    An even selection of a larger set. Raises ValueError where there is neither, and for tokens of another VQGAN.
    """
    if _is_tokens(uri):
        return _tokens(uri, model, num)
    return _images(uri, side, num)


def captions(uri: str, num: int) -> list[str]:
    """At most `num` captions of a token dataset or a source of images. Raises ValueError where there is neither."""
    if not _is_tokens(uri):
        return source_captions(uri, num)
    return [caption for chunk in _tokens(uri, None, num).chunks for caption in _batch(chunk).captions]


def _is_tokens(uri: str) -> bool:
    return exists(join(uri, "dataset.json"))


def _tokens(uri: str, model: str | None, num: int) -> ImageSet:
    dataset = TokenDataset(uri)
    if model is not None:
        require_vqgan(dataset.format, vqgan_digests(model), uri)
    chosen = _evenly(dataset.num_rows, num)
    chunks, first = [], 0
    for file, rows in dataset.shards:
        own = chosen[(chosen >= first) & (chosen < first + rows)] - first
        chunks += [
            {"uri": uri, "file": file, "rows": own[i : i + CHUNK].tolist(), "vqgan": model} for i in range(0, len(own), CHUNK)
        ]
        first += rows
    digest = _digest([[[chunk["file"], chunk["rows"]] for chunk in chunks], dataset.format.vqgan_digest, dataset.info["shards"]])
    return ImageSet(uri, chunks, _read_tokens, digest, len(chosen))


def _read_tokens(chunk: dict[str, Any]) -> Iterator[Captioned]:
    batch, model = _batch(chunk), _vqgan(chunk["vqgan"])
    for start in range(0, len(batch.captions), 16):
        part = slice(start, start + 16)
        with torch.inference_mode():
            images = model.decode_indices(torch.from_numpy(batch.tokens[part]))
        yield from zip(batch.captions[part], to_uint8(images), strict=True)


def _batch(chunk: dict[str, Any]) -> TokenBatch:
    return TokenDataset(chunk["uri"]).rows(chunk["file"], chunk["rows"])


@functools.lru_cache(maxsize=1)
def _vqgan(uri: str) -> VQModel:
    return load_vqgan(uri)[0]


def _images(path: str, side: int, num: int) -> ImageSet:
    units = find_units(path, CHUNK)
    chosen = _evenly(sum(unit.num_samples for unit in units), num)
    chunks, first = [], 0
    for unit in units:
        own = chosen[(chosen >= first) & (chosen < first + unit.num_samples)] - first
        if len(own):
            chunks.append({"unit": unit, "rows": own.tolist(), "side": side})
        first += unit.num_samples
    digest = _digest([side, [[chunk["unit"].name, chunk["rows"]] for chunk in chunks]])
    return ImageSet(path, chunks, _read_unit, digest, len(chosen))


def _read_unit(chunk: dict[str, Any]) -> Iterator[Captioned]:
    unit: Unit = chunk["unit"]
    for sample in read_unit(unit, chunk["rows"]):
        try:
            if isinstance(sample, Sample):
                yield sample.caption, center_crop(decode_image(sample.image), chunk["side"])
        except ValueError:
            continue  # tokenizing says by name and reason what cannot be read


def _evenly(total: int, num: int) -> np.ndarray:
    num = min(total, num)
    return np.arange(num) * total // max(1, num)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


class Embed:
    """Loads the networks once; a chunk becomes a row of features of each image. Always float32."""

    def __init__(self, networks: Networks) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.clip: Any = None
        if networks.clip is not None:
            self.clip, self.tokenizer = load_clip(networks.clip)
            self.clip.float().to(self.device)
        self.inception = None if networks.inception is None else load_inception(networks.inception).to(self.device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        number, read, chunk = pickle.loads(batch["chunk"][0])
        captioned = list(read(chunk))
        # of a chunk without any readable image the features of another one have the shapes
        features = self.features(captioned or [("", np.zeros((32, 32, 3), dtype=np.uint8))])
        values = {name: value.float().cpu().numpy()[: len(captioned)] for name, value in features.items()}
        return values | {"set": np.full(len(captioned), number)}

    @torch.inference_mode()
    def features(self, captioned: Sequence[Captioned]) -> dict[str, Tensor]:
        features: dict[str, Tensor] = {}
        images = [image for _, image in captioned]
        if self.clip is not None:
            features["clip"] = self.clip.encode_image(clip_pixels(self.clip, images).to(self.device))
            features["clip_text"] = self.clip.encode_text(self.tokenizer([text for text, _ in captioned]).to(self.device))
        if self.inception is not None:
            pixels = [torch.from_numpy(image.copy()).permute(2, 0, 1)[None].to(self.device) for image in images]
            features["inception"] = torch.cat([self.inception(image)[0] for image in pixels])
        return features


def load_inception(path: str) -> torch.nn.Module:
    """torch-fidelity's Inception, for its 2048 features. Raises ValueError where the file holds no weights of it.

    torch-fidelity would unpickle whatever the file holds; here it gets a copy that was read as weights only.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        with tempfile.NamedTemporaryFile(suffix=".pth") as copy:
            torch.save(torch.load(path, map_location="cpu", weights_only=True), copy.name)
            return FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=copy.name)
    except Exception as error:  # pickle's, zip's and torch's own, for files that are something else
        raise ValueError(f"{path} holds no Inception weights of torch-fidelity: {first_line(error)}") from error


def embed(images: ImageSet, networks: Networks, cache: Path) -> dict[str, Tensor]:
    """Features of a set by kind (`clip`, `clip_text`, `inception`): (N,D) float32, in order, unreadable images left out.

    Raises ValueError where no image can be read.
    """
    prepare([images], networks, cache)
    return load_file(_kept(images, networks, cache))


def _kept(images: ImageSet, networks: Networks, cache: Path) -> Path:
    return cache / f"{_digest([images.digest, networks.digest])}.safetensors"


def prepare(sets: Sequence[ImageSet], networks: Networks, cache: Path) -> None:
    """Embed those of the sets whose features are not kept yet, in one job: the networks are loaded once.

    Raises ValueError where of one of them no image can be read.
    """
    missing = [images for images in sets if not _kept(images, networks, cache).exists()]
    parts: dict[str, list[np.ndarray]] = {}
    current = 0
    progress = Progress("features of " + ", ".join(images.name for images in missing), sum(i.num_images for i in missing))
    done = 0
    for batch in _embedded(missing, networks) if missing else ():
        for number in np.unique(batch["set"]):  # in order
            while current < number:
                _keep(missing[current], parts, _kept(missing[current], networks, cache))
                parts, current = {}, current + 1
            for name, values in batch.items():
                parts.setdefault(name, []).append(values[batch["set"] == number])
        done += len(batch["set"])
        progress.update(done)
    for images in missing[current:]:
        _keep(images, parts, _kept(images, networks, cache))
        parts = {}


def _keep(images: ImageSet, parts: dict[str, list[np.ndarray]], place: Path) -> None:
    if not parts:
        raise ValueError(f"none of the images in {images.name} can be read")
    with new_file(place) as file:
        save_file({name: torch.from_numpy(np.concatenate(values)) for name, values in parts.items() if name != "set"}, file)


def _embedded(sets: Sequence[ImageSet], networks: Networks) -> Iterator[dict[str, np.ndarray]]:
    """Features of the images of several sets, in order, with the number of each image's set."""
    cli.start_ray()
    DataContext.get_current().execution_options.preserve_order = True
    gpus, cpus = (int(ray.cluster_resources().get(name, 0)) for name in ("GPU", "CPU"))
    chunks = [
        {"chunk": pickle.dumps((number, images.read, chunk))} for number, images in enumerate(sets) for chunk in images.chunks
    ]
    dataset = cli.dataset_of(chunks).map_batches(
        Embed,
        fn_constructor_args=(networks,),
        batch_size=1,
        batch_format="numpy",
        compute=ActorPoolStrategy(min_size=1, max_size=gpus or max(1, cpus // 2)),
        num_cpus=1,
        num_gpus=1 if gpus else 0,
    )
    return iter(dataset.iter_batches(batch_size=None, batch_format="numpy"))
