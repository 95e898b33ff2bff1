"""Turn captioned images into a token dataset: Ray Data decodes on CPUs and encodes with the VQGAN, each image once.

    python pipelines/tokenize_images.py --input runs/demo/images --vqgan runs/demo/vqgan/model --output runs/tokens --image-size 64

The same command again continues with the units that are not finished; a finished job says so and does nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext
from tqdm import tqdm

from paella.bundle import load_vqgan
from paella.images import center_crop, decode_image, to_tensor
from paella.storage import new_file
from pipelines import cli
from pipelines.sources import Reject, Sample, Unit, find_units, read_unit
from pipelines.token_dataset import TokenFormat

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

    def __post_init__(self) -> None:
        for name in ("image_size", "batch_size", "rows_per_unit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: an integer of at least 1")


def run(config: TokenizeConfig) -> Path:
    """Tokenize; returns the dataset's directory. Raises ValueError for the user's mistakes, before Ray starts."""
    config = dataclasses.replace(
        config, input=cli.absolute(config.input), vqgan=cli.absolute(config.vqgan), output=cli.absolute(config.output)
    )
    model, digest = load_vqgan(config.vqgan)
    if config.image_size % model.config.downsampling:
        raise ValueError(
            f"image_size={config.image_size} is not allowed: the VQGAN needs a multiple of {model.config.downsampling}"
        )
    units = find_units(config.input, config.rows_per_unit)
    output = cli.require_writable(config.output)
    (output / "rejects").mkdir(exist_ok=True)
    cli.require_same_config(output, cli.config_values(config) | {"vqgan": digest})
    unfinished = [unit for unit in units if not (output / shard_name(unit)).exists()]
    if not unfinished and (output / "dataset.json").exists():
        print(f"tokenizing is finished: {output}")
        return output
    began = time.monotonic()
    _tokenize(config, unfinished, sum(unit.stop - unit.start for unit in units))
    info = _write_info(config, digest, model.config.codebook_size, units, time.monotonic() - began)
    print(f"rows in {info['rows_in']} = written {info['rows']} + rejected {info['rejected']}: {output}")
    return output


def shard_name(unit: Unit) -> str:
    """The unit's output shard; the digest keeps shards of the same name in different folders apart."""
    place = hashlib.sha256(unit.shard.encode()).hexdigest()[:6]
    return f"part-{place}-{unit.name}.parquet"


def _tokenize(config: TokenizeConfig, units: list[Unit], total: int) -> None:
    cli.start_ray()
    context = DataContext.get_current()
    context.enable_progress_bars = False
    rows = [{"unit": dataclasses.asdict(unit)} for unit in units]
    cpus = int(ray.cluster_resources().get("CPU", 2))
    dataset = (
        ray.data.from_items(rows, override_num_blocks=max(1, len(rows)))
        .flat_map(DecodeUnit(config.image_size))
        .map_batches(
            EncodeUnit,
            fn_constructor_args=(config,),
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ActorPoolStrategy(min_size=1, max_size=max(1, cpus - 1)),
            num_cpus=1,
            num_gpus=1 if ray.cluster_resources().get("GPU") else 0,
        )
    )
    done = total - sum(unit.stop - unit.start for unit in units)
    with tqdm(total=total, initial=done, unit="images", desc="tokens", mininterval=2) as bar:
        for row in dataset.iter_rows():
            bar.update(int(row["rows_in"]))


class DecodeUnit:
    """First stage: one unit becomes one row with all its images decoded, cropped and stacked."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size

    def __call__(self, row: dict) -> Iterator[dict]:
        unit = Unit(**row["unit"])
        images: list[np.ndarray] = []
        samples: list[dict] = []
        rejects: list[dict] = []
        for item in read_unit(unit):
            if isinstance(item, Sample):
                item = self._decode(item, images, samples)
            if isinstance(item, Reject):
                rejects.append(dataclasses.asdict(item))
        yield {
            "unit": json.dumps(dataclasses.asdict(unit)),
            "images": b"".join(image.tobytes() for image in images),
            "samples": json.dumps(samples),
            "rejects": json.dumps(rejects),
        }

    def _decode(self, sample: Sample, images: list[np.ndarray], samples: list[dict]) -> Reject | None:
        try:
            image = decode_image(sample.image)
        except ValueError as error:
            return Reject(sample.id, "decode", "unreadable-image", str(error))
        images.append(center_crop(image, self.image_size))
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
        self.model, digest = load_vqgan(config.vqgan)
        self.model.to(self.device, memory_format=torch.channels_last)
        side = config.image_size // self.model.config.downsampling
        self.format = TokenFormat(
            grid_height=side, grid_width=side, codebook_size=self.model.config.codebook_size, vqgan_digest=digest
        )

    def __call__(self, table: pa.Table) -> pa.Table:
        counts = [self._unit(row) for row in table.to_pylist()]
        return pa.table({"rows_in": counts})

    def _unit(self, row: dict) -> int:
        unit = Unit(**json.loads(row["unit"]))
        samples, rejects = json.loads(row["samples"]), json.loads(row["rejects"])
        side = self.config.image_size
        images = np.frombuffer(row["images"], dtype=np.uint8).reshape(-1, side, side, 3)
        output, name = Path(self.config.output), shard_name(unit)
        with new_file(output / "rejects" / name) as file:
            pq.write_table(pa.Table.from_pylist(rejects, schema=REJECTS), file)
        with new_file(output / name) as file:
            pq.write_table(self._table(samples, images), file)
        return len(samples) + len(rejects)

    @torch.inference_mode()
    def _table(self, samples: list[dict], images: np.ndarray) -> pa.Table:
        size = self.config.batch_size
        parts = [to_tensor(images[start : start + size]) for start in range(0, len(images), size)]
        tokens = [self.model.encode(part.to(self.device)).cpu().numpy().astype(np.uint16).ravel() for part in parts]
        schema = self.format.schema()
        values = pa.array(np.concatenate(tokens) if tokens else np.empty(0, np.uint16))
        columns = {name: [sample[name] for sample in samples] for name in schema.names if name != "tokens"}
        arrays = {name: pa.array(column, type=schema.field(name).type) for name, column in columns.items()}
        arrays["tokens"] = pa.FixedSizeListArray.from_arrays(values, type=schema.field("tokens").type)
        return pa.table([arrays[name] for name in schema.names], schema=schema)


def _write_info(config: TokenizeConfig, digest: str, codebook_size: int, units: list[Unit], seconds: float) -> dict:
    """Count what lies in the shards and write `dataset.json`, which marks the dataset as complete."""
    output = Path(config.output)
    names = [shard_name(unit) for unit in units]
    shards = [{"file": name, "rows": pq.read_metadata(output / name).num_rows} for name in names]
    rejects: Counter[str] = Counter()
    for name in names:
        rejects.update(pq.read_table(output / "rejects" / name, columns=["reason"])["reason"].to_pylist())
    rows, rows_in = sum(shard["rows"] for shard in shards), sum(unit.stop - unit.start for unit in units)
    if rows_in != rows + rejects.total():
        raise RuntimeError(f"{rows_in} rows in, but {rows} written and {rejects.total()} rejected: a bug, please report it")
    if rows == 0:
        reason, count = rejects.most_common(1)[0]
        raise ValueError(f"none of the {rows_in} samples in {config.input} can be used; {count} times: {reason}")
    info = {
        "format_version": 1,
        "rows": rows,
        "rows_in": rows_in,
        "rejected": rejects.total(),
        "rejects": dict(rejects),
        "shards": shards,
        "image_size": config.image_size,
        "codebook_size": codebook_size,
        "vqgan_digest": digest,
        "config": cli.config_values(config),
        "seconds": round(seconds, 2),
        "images_per_s": round(rows_in / max(seconds, 1e-9), 1),
    }
    with new_file(output / "dataset.json") as file:
        file.write_text(json.dumps(info, indent=1) + "\n")
    return info


if __name__ == "__main__":
    from pipelines.tokenize_images import TokenizeConfig as _Config
    from pipelines.tokenize_images import run as _run

    cli.main(_run, _Config, __doc__)
