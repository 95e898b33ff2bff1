"""The two stages of tokenizing, as Ray runs them: decode units of samples on CPUs; encode them, and write their shards.

With GPUs they are stages of their own, which overlap. Without, one process per CPU does both: encoding takes nearly all the time
there, and a process 500 MB and 10 s to start.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import pickle
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from paella.bundle import load_vqgan
from paella.images import ImageError
from pipelines.byt5_columns import Byt5Columns
from pipelines.clip_columns import ClipColumns, clip_digest, fixed_size_lists
from pipelines.duplicates import STAGED, move_into_place, perceptual_hash
from pipelines.output_store import Output
from pipelines.source_contract import Filtered, Reject, Row, Sample, Unit
from pipelines.sources import read_unit, read_units
from pipelines.token_format import TokenFormat, shard_name
from pipelines.token_shards import count, left_out, write_unit
from pipelines.tokenize_config import TokenizeConfig

ATTEMPTS = 5
"""How often a unit is read while the store fails."""


@dataclass
class DecodedUnit:
    """What became of a unit's samples: crops (H,W,3) uint8 and the values of their rows, or why there is none."""

    name: str
    images: list[np.ndarray] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    rejects: list[dict[str, str]] = field(default_factory=list)

    def to_arrow(self) -> pa.Table:
        """One row, to travel between processes: the images without a further copy, and not limited to 2 GB."""
        pixels = np.stack(self.images).reshape(-1) if self.images else np.zeros(0, np.uint8)
        offsets = pa.py_buffer(np.array([0, pixels.size], np.int64))
        images = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(pixels)])
        rest = {"name": [self.name], "rows": [json.dumps(self.rows)], "rejects": [json.dumps(self.rejects)]}
        return pa.table(rest | {"images": images})

    @classmethod
    def from_arrow(cls, table: pa.Table, height: int, width: int) -> DecodedUnit:
        images = np.frombuffer(table["images"][0].as_buffer(), dtype=np.uint8).reshape(-1, height, width, 3)
        rows, rejects = (json.loads(table[name][0].as_py()) for name in ("rows", "rejects"))
        return cls(table["name"][0].as_py(), list(images), rows, rejects)


class Decode:
    """Reads units of one shard and decodes their images."""

    def __init__(self, config: TokenizeConfig) -> None:
        self.config, self.crop, self.filters = config, config.cropping, config.filters

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for decoded in self.units(unpacked(table)):
            yield decoded.to_arrow()

    def units(self, units: Sequence[Unit]) -> Iterator[DecodedUnit]:
        """Each unit, in order. A store that fails is asked again; units done by then are not read twice."""
        done = attempt = 0
        while done < len(units):
            try:
                for decoded in self._once(units[done:]):
                    yield decoded
                    done, attempt = done + 1, 0
            except OSError:
                attempt += 1
                if attempt == ATTEMPTS:
                    raise
                time.sleep(2**attempt)

    def _once(self, units: Sequence[Unit]) -> Iterator[DecodedUnit]:
        read = itertools.groupby(read_units(units, self.filters.turned_down), key=lambda pair: pair[0].name)
        name, rows = next(read, (None, iter(())))
        for unit in units:
            decoded = DecodedUnit(unit.name)
            if unit.name == name:  # a damaged shard may give no row of a unit
                for _, row in rows:
                    self._add(row, decoded)
                name, rows = next(read, (None, iter(())))
            yield decoded

    def beginning(self, unit: Unit, num: int) -> DecodedUnit:
        """The first samples of a unit."""
        decoded = DecodedUnit(unit.name)
        for row in read_unit(unit, range(min(num, unit.num_samples)), self.filters.turned_down):
            self._add(row, decoded)
        return decoded

    def _add(self, row: Row, to: DecodedUnit) -> None:
        if isinstance(row, Sample):
            row = self._decoded(row, to) or row
        if isinstance(row, Filtered):
            row = Reject(row.id, "filter", row.reason, "not wanted")
        if isinstance(row, Reject):
            to.rejects.append(dataclasses.asdict(row))

    def _decoded(self, sample: Sample, to: DecodedUnit) -> Reject | Filtered | None:
        try:
            image = self.crop.decode(sample.image, sample.id)
        except ImageError as error:
            return Reject(sample.id, "decode", error.reason, str(error))
        if not self.config.in_bucket(image.width, image.height):
            return Filtered(sample.id, "other-aspect-ratio")
        width, height = sample.meta.get("width", image.width), sample.meta.get("height", image.height)
        if self.filters.too_small(width, height):
            return Filtered(sample.id, "min-size")
        values = {"width": int(width), "height": int(height), "sha256": _sha256(sample)}
        values |= {"aesthetic": sample.meta.get("aesthetic")}
        if self.config.deduplicate == "perceptual":
            values["phash"] = perceptual_hash(image.whole)
        to.images.append(image.pixels)
        to.rows.append({"id": sample.id, "caption": sample.caption} | values)
        return None


def _sha256(sample: Sample) -> str:
    """Of the original download where the source knows it, else of the bytes that were read."""
    known = str(sample.meta.get("sha256", "")).lower()
    return known if re.fullmatch("[0-9a-f]{64}", known) else hashlib.sha256(sample.image).hexdigest()


class Encode:
    """Loads the models once, encodes units and puts their shards in place whole.

    Always float32: tokens are data, and have to come out the same on every machine.
    """

    def __init__(self, config: TokenizeConfig) -> None:
        self.config = config
        self.output = Output(config.output) / STAGED if config.deduplicate != "no" else Output(config.output)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.backends.cudnn.allow_tf32 = False  # convolutions on GPUs are not float32 otherwise
        self.model, digest = load_vqgan(config.vqgan)
        self.model.to(self.device)
        self.clip = None if config.clip is None else ClipColumns(config.clip, self.device)
        self.byt5 = None if config.text is None else Byt5Columns(config.text, self.device)
        crop, factor = config.cropping, self.model.config.downsampling
        self.format = TokenFormat(
            grid_height=crop.height // factor,
            grid_width=crop.width // factor,
            codebook_size=self.model.config.codebook_size,
            vqgan_digest=digest,
            clip_embd=None if self.clip is None else self.clip.width,
            clip_columns=config.clip_columns,
            clip=clip_digest(config.clip),
            byt5_embd=None if self.byt5 is None else self.byt5.width,
            byt5=clip_digest(config.byt5),
            phash=config.deduplicate == "perceptual",
        )

    def __call__(self, table: pa.Table) -> pa.Table:
        crop = self.config.cropping
        return self.write(DecodedUnit.from_arrow(table, crop.height, crop.width))

    def write(self, decoded: DecodedUnit) -> pa.Table:
        """Encode a unit and put its shard in place; a row that says how many samples were written and left out."""
        write_unit(self.output, decoded.name, self.table(decoded), decoded.rejects)
        return _counts(len(decoded.rows), left_out(decoded.rejects))

    def written(self, unit: str) -> pa.Table | None:
        """What `write` gave for a unit whose shard is in place; None for one that is to be done."""
        if not self.output.has(shard_name(unit)):
            return None
        counts = count(self.output, [unit])
        return _counts(counts.written, counts.left_out)

    def table(self, decoded: DecodedUnit) -> pa.Table:
        """The unit's shard."""
        schema, size = self.format.schema(), self.config.batch_size
        starts = range(0, len(decoded.rows), size)
        batches = [self._batch(decoded.rows[i : i + size], decoded.images[i : i + size], schema) for i in starts]
        return pa.Table.from_batches(batches, schema=schema)

    @torch.inference_mode()
    def _batch(self, rows: list[dict[str, Any]], images: list[np.ndarray], schema: pa.Schema) -> pa.RecordBatch:
        captions, pixels = [row["caption"] for row in rows], np.stack(images)
        on_device = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float().div_(255)
        columns: dict[str, Any] = {"tokens": self.model.encode(on_device).cpu().numpy().astype(np.uint16)}
        if self.clip is not None:
            columns |= self.clip(pixels, captions, self.config.clip_columns)
        if self.byt5 is not None:
            columns["byt5"], columns["byt5_length"] = self.byt5(captions)
        arrays = [_column(field, columns.get(field.name), rows) for field in schema]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _counts(written: int, left_out: Counter[str]) -> pa.Table:
    filtered = sum(number for key, number in left_out.items() if key.startswith("filter/"))
    return pa.table({"written": [written], "filtered": [filtered], "rejected": [left_out.total() - filtered]})


def _column(field: pa.Field, values: Any, rows: list[dict[str, Any]]) -> pa.Array:
    if values is None:
        return pa.array([row[field.name] for row in rows], type=field.type)
    return fixed_size_lists([values], field.type) if pa.types.is_fixed_size_list(field.type) else values


class DecodeAndEncode:
    """Both stages in one process."""

    def __init__(self, config: TokenizeConfig) -> None:
        self.decode, self.encode = Decode(config), Encode(config)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        units = unpacked(table)
        done = {unit.name: self.encode.written(unit.name) for unit in units}  # by one that was lost before its last unit
        decoded = self.decode.units([unit for unit in units if done[unit.name] is None])
        for unit in units:
            yield done[unit.name] or self.encode.write(next(decoded))


class MoveIntoPlace:
    """After de-duplication: staged units become shards without their duplicates."""

    def __init__(self, output: str) -> None:
        self.output = Output(output)

    def __call__(self, table: pa.Table) -> pa.Table:
        counts = move_into_place(self.output, table["unit"][0].as_py(), table["verdict"][0].as_py())
        return pa.table({name: [number] for name, number in counts.items()})


def packed(tasks: Sequence[Any]) -> list[dict[str, bytes]]:
    """Lists of our own units, to travel through Ray."""
    return [{"units": pickle.dumps(task)} for task in tasks]


def unpacked(table: pa.Table) -> list[Unit]:
    return pickle.loads(table["units"][0].as_py())
