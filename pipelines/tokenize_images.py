"""Turn captioned images into a token dataset: Ray Data decodes on CPUs and encodes with the VQGAN, each image once.

    python pipelines/tokenize_images.py --input runs/demo/images --vqgan runs/demo/vqgan/model --output runs/x --image-size 64

The same command again continues with the units that are not finished; a finished job says so and does nothing. Tars that
img2dataset has finished since are added.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import pickle
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext
from ray.util.debug import log_once
from tqdm import tqdm

from paella import command_line
from paella.bundle import load_vqgan
from paella.conditioning import load_clip
from paella.config import VQConfig
from paella.images import center_crop, decode_image, to_tensor
from paella.storage import new_file
from pipelines import cli
from pipelines.clip_columns import ClipColumns, clip_digest, fixed_size_lists
from pipelines.source_contract import Reject, Sample, Unit
from pipelines.sources import find_units, read_unit
from pipelines.token_dataset import FORMAT_VERSION, TokenFormat

REJECTS = pa.schema([(name, pa.string()) for name in ("id", "stage", "reason", "detail")])


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """One tokenizing job."""

    input: str
    """Captioned images: a folder with .txt captions, or img2dataset's webdataset shards."""
    vqgan: str
    """Bundle with the VQGAN."""
    output: str
    """Directory of the token dataset; the same command with the same output continues it."""
    image_size: int = 256
    """Side in pixels to which images are scaled and centre-cropped."""
    batch_size: int = 64
    """Images per pass of the VQGAN."""
    rows_per_unit: int = 1024
    """Samples per output shard, at most."""
    clip: str | None = None
    """CLIP whose embeddings of image and caption are kept with the tokens: an open_clip name (ViT-H-14/laion2b_s32b_b79k) or
    a directory. None keeps none."""

    def __post_init__(self) -> None:
        for name in ("image_size", "batch_size", "rows_per_unit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: an integer of at least 1")


def run(config: TokenizeConfig) -> Path:
    """Tokenize; returns the dataset's directory. Raises ValueError for the user's mistakes, before Ray starts."""
    config = dataclasses.replace(
        config,
        input=cli.absolute(config.input),
        vqgan=cli.absolute(config.vqgan),
        output=cli.absolute(config.output),
        clip=cli.absolute_if_directory(config.clip),
    )
    model, digest = load_vqgan(config.vqgan)
    if config.image_size % model.config.downsampling:
        raise ValueError(
            f"image_size={config.image_size} is not allowed: the VQGAN needs a multiple of {model.config.downsampling}"
        )
    if config.clip is not None:
        load_clip(config.clip)  # says here, and not in a worker, what is wrong with it
    units = find_units(config.input, config.rows_per_unit)
    output = cli.require_writable(config.output)
    cli.require_same_config(output, cli.config_values(config) | {"vqgan": digest, "clip": clip_digest(config.clip)})
    _require_same_input(config, units)
    unfinished = [unit for unit in units if not (output / shard_name(unit)).exists()]
    if not unfinished and _listed(output) == len(units):
        print(f"tokenizing is finished: {output}")
        return output
    seconds = _tokenize(config, unfinished, _count(units)) if unfinished else 0.0
    info = _write_info(config, digest, model.config, units)
    rate = _count(unfinished) / seconds if seconds else 0.0
    _finish(output, info | {"seconds": round(seconds, 2), "images_per_s": round(rate, 1)})
    print(f"rows in {info['rows_in']} = written {info['rows']} + rejected {info['rejected']}: {output}")
    return output


def shard_name(unit: Unit) -> str:
    """The unit's output shard."""
    return f"part-{unit.name}.parquet"


def _count(units: list[Unit]) -> int:
    return sum(unit.num_samples for unit in units)


def _listed(output: Path) -> int:
    """How many shards the finished dataset has; 0 where there is none yet."""
    file = output / "dataset.json"
    return len(json.loads(file.read_text())["shards"]) if file.exists() else 0


def _require_same_input(config: TokenizeConfig, units: list[Unit]) -> None:
    """Clear away what a killed job left half written.

    Raises ValueError where shards hold samples that the input lists otherwise now: some would be there twice.
    """
    output = Path(config.output)
    for leftover in [*output.glob(".part-*.tmp"), *output.glob("rejects/.part-*.tmp")]:  # of a killed job
        leftover.unlink(missing_ok=True)
    strange = {file.name for file in output.glob("part-*.parquet")} - {shard_name(unit) for unit in units}
    if strange:
        raise ValueError(
            f"files were added to or removed from {config.input} since {len(strange)} of the shards in {output} were "
            "written; choose another --output"
        )


def _tokenize(config: TokenizeConfig, units: list[Unit], total: int) -> float:
    """Write the units' shards; returns the seconds it took. Each task yields a count when its shard is in place."""
    cli.start_ray()
    _quiet_ray_data()
    gpus, cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
    rows = [{"unit": pickle.dumps(unit)} for unit in units]
    dataset: ray.data.Dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    if gpus:
        dataset = dataset.map_batches(DecodeUnit(config.image_size), batch_size=1, batch_format="pyarrow", num_cpus=1)
    dataset = dataset.map_batches(
        EncodeUnit if gpus else DecodeAndEncodeUnit,
        fn_constructor_args=(config,),
        batch_size=1,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ActorPoolStrategy(size=min(max(1, gpus or cpus), len(units))),
        num_cpus=1,
        num_gpus=1 if gpus else 0,
    )
    began = time.monotonic()
    with tqdm(total=total, initial=total - _count(units), unit="images", desc="tokens", mininterval=2) as bar:
        for row in dataset.iter_rows():
            bar.update(row["rows_in"])
    return time.monotonic() - began


def _quiet_ray_data() -> None:
    """One bar in images says more than one per operator, and one plan per job is for Ray's log files."""
    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    log_once("ray_data_progress_manager_disabled")  # Ray would remind of the line above
    logging.getLogger("ray.data").setLevel(logging.WARNING)


class DecodeUnit:
    """First stage: one unit becomes one row with all its images decoded, cropped and stacked."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size

    def __call__(self, table: pa.Table) -> pa.Table:
        warnings.filterwarnings("ignore", module="PIL")  # odd metadata is common, and one line per image is noise
        packed = table["unit"][0].as_py()
        unit: Unit = pickle.loads(packed)
        images = np.empty((unit.num_samples, self.image_size, self.image_size, 3), np.uint8)
        samples: list[dict] = []
        rejects: list[dict] = []
        for item in read_unit(unit):
            reject = self._decode(item, images, samples) if isinstance(item, Sample) else item
            if isinstance(reject, Reject):
                rejects.append(dataclasses.asdict(reject))
        pixels = pa.py_buffer(images[: len(samples)].reshape(-1))
        return pa.table(
            {
                "unit": [packed],
                # without a copy, and not limited to the 2 GB of a plain binary column
                "images": pa.Array.from_buffers(
                    pa.large_binary(), 1, [None, pa.py_buffer(np.array([0, pixels.size], np.int64)), pixels]
                ),
                "samples": [json.dumps(samples)],
                "rejects": [json.dumps(rejects)],
            }
        )

    def _decode(self, sample: Sample, images: np.ndarray, samples: list[dict]) -> Reject | None:
        try:
            image = decode_image(sample.image)
        except ValueError as error:
            return Reject(sample.id, "decode", "unreadable-image", str(error))
        images[len(samples)] = center_crop(image, self.image_size)
        digest = hashlib.sha256(sample.image).hexdigest()
        samples.append(
            {"id": sample.id, "caption": sample.caption, "width": image.width, "height": image.height, "sha256": digest}
        )
        return None


class EncodeUnit:
    """Second stage: loads the VQGAN once, encodes a unit and moves its shard into place whole.

    Always float32: tokens are data, and have to come out the same on every machine.
    """

    def __init__(self, config: TokenizeConfig) -> None:
        self.config = config
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.backends.cudnn.allow_tf32 = False  # convolutions on GPUs are not float32 otherwise
        self.model, digest = load_vqgan(config.vqgan)
        self.model.to(self.device)
        self.clip = None if config.clip is None else ClipColumns(config.clip, self.device)
        side = config.image_size // self.model.config.downsampling
        self.format = TokenFormat(
            grid_height=side,
            grid_width=side,
            codebook_size=self.model.config.codebook_size,
            vqgan_digest=digest,
            clip_embd=None if self.clip is None else self.clip.width,
        )

    def __call__(self, table: pa.Table) -> pa.Table:
        unit: Unit = pickle.loads(table["unit"][0].as_py())
        samples, rejects = (json.loads(table[name][0].as_py()) for name in ("samples", "rejects"))
        side = self.config.image_size
        images = np.frombuffer(table["images"][0].as_buffer(), dtype=np.uint8).reshape(-1, side, side, 3)
        output, name = Path(self.config.output), shard_name(unit)
        with new_file(output / "rejects" / name) as file:
            pq.write_table(pa.Table.from_pylist(rejects, schema=REJECTS), file)
        with new_file(output / name) as file:  # last: a shard that exists is a finished unit
            pq.write_table(self._table(samples, images), file)
        return pa.table({"rows_in": [len(samples) + len(rejects)]})

    @torch.inference_mode()
    def _table(self, samples: list[dict], images: np.ndarray) -> pa.Table:
        size, schema = self.config.batch_size, self.format.schema()
        columns: dict[str, list[np.ndarray]] = {"tokens": []}
        for start in range(0, len(images), size):
            part = images[start : start + size]
            columns["tokens"].append(self.model.encode(to_tensor(part).to(self.device)).cpu().numpy().astype(np.uint16))
            if self.clip is not None:
                captions = [sample["caption"] for sample in samples[start : start + size]]
                for name, values in self.clip(part, captions).items():
                    columns.setdefault(name, []).append(values)
        arrays = [
            fixed_size_lists(columns.get(field.name, []), field.type)
            if pa.types.is_fixed_size_list(field.type)
            else pa.array([sample[field.name] for sample in samples], type=field.type)
            for field in schema
        ]
        return pa.table(arrays, schema=schema)


class DecodeAndEncodeUnit(EncodeUnit):
    """Both stages in one process per CPU: encoding takes nearly all the time there, and a process 500 MB and 10 s to start."""

    def __init__(self, config: TokenizeConfig) -> None:
        super().__init__(config)
        self.decode = DecodeUnit(config.image_size)

    def __call__(self, table: pa.Table) -> pa.Table:
        return super().__call__(self.decode(table))


def _write_info(config: TokenizeConfig, digest: str, vqgan: VQConfig, units: list[Unit]) -> dict:
    """What lies in the shards, counted there. Raises ValueError where that is nothing."""
    output = Path(config.output)
    names = [shard_name(unit) for unit in units]
    shards = [{"file": name, "rows": pq.read_metadata(output / name).num_rows} for name in names]
    rejects: Counter[str] = Counter()
    for name in names:
        rejects.update(pq.read_table(output / "rejects" / name, columns=["reason"])["reason"].to_pylist())
    rows, rows_in = sum(shard["rows"] for shard in shards), _count(units)
    if rows_in != rows + rejects.total():
        raise RuntimeError(f"{rows_in} rows in, but {rows} written and {rejects.total()} rejected: a bug, please report it")
    if rows == 0:
        for name in names:  # or the same command would call the job finished once the images are repaired
            (output / name).unlink()
        reason, count = rejects.most_common(1)[0]
        raise ValueError(
            f"none of the {rows_in} samples in {config.input} can be used; {count} of them: {reason} "
            f"(details in {output / 'rejects'})"
        )
    return {
        "format_version": FORMAT_VERSION,
        "rows": rows,
        "rows_in": rows_in,
        "rejected": rejects.total(),
        "rejects": dict(rejects.most_common()),
        "shards": shards,
        "image_size": config.image_size,
        "grid": [config.image_size // vqgan.downsampling] * 2,
        "codebook_size": vqgan.codebook_size,
        "vqgan_digest": digest,
        "config": cli.config_values(config),
    }


def _finish(output: Path, info: dict) -> None:
    """Write `dataset.json`, which marks the dataset as complete."""
    with new_file(output / "dataset.json") as file:
        file.write_text(json.dumps(info, indent=1) + "\n")


if __name__ == "__main__":
    from pipelines.tokenize_images import TokenizeConfig as _Config
    from pipelines.tokenize_images import run as _run

    command_line.main(_run, _Config, __doc__)
