"""The token dataset: Parquet shards of VQGAN tokens and captions, with `dataset.json` beside them.

Contract (docs/architecture.md): `id`, `tokens` (fixed_size_list<uint16>, row-major), `caption`, `width`, `height`, `sha256`
and, if asked for, `clip_text` and `clip_image` (fixed_size_list<float16>, NaN in rows that have none: pyarrow 25 writes a null
there but cannot read it, apache/arrow#35692); schema metadata with grid, codebook size, VQGAN digest, width of the CLIP
embeddings and format version. Plain pyarrow, DuckDB or pandas read it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

FORMAT_VERSION = 1
CLIP_COLUMNS = ("clip_text", "clip_image")


@dataclass(frozen=True, kw_only=True)
class TokenFormat:
    """What a shard's schema metadata says."""

    grid_height: int
    grid_width: int
    codebook_size: int
    vqgan_digest: str
    clip_embd: int | None = None
    """Width of the CLIP embeddings; None where there are none."""

    def schema(self) -> pa.Schema:
        metadata = {f"paella.{name}": str(value) for name, value in vars(self).items() if value is not None}
        clip_type = None if self.clip_embd is None else pa.list_(pa.float16(), self.clip_embd)
        clip = [pa.field(name, clip_type, nullable=False) for name in CLIP_COLUMNS if clip_type is not None]
        return pa.schema(
            [
                pa.field("id", pa.string(), nullable=False),
                pa.field("tokens", pa.list_(pa.uint16(), self.grid_height * self.grid_width), nullable=False),
                pa.field("caption", pa.string(), nullable=False),
                pa.field("width", pa.int32()),
                pa.field("height", pa.int32()),
                pa.field("sha256", pa.string()),
                *clip,
            ],
            metadata={"paella.format_version": str(FORMAT_VERSION), **metadata},
        )

    @classmethod
    def of(cls, schema: pa.Schema, where: str) -> TokenFormat:
        """Raises ValueError where the schema is not a token dataset's."""
        metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
        if metadata.get("paella.format_version") != str(FORMAT_VERSION):
            raise ValueError(f"{where} is not a token dataset of format {FORMAT_VERSION}")
        return cls(
            grid_height=int(metadata["paella.grid_height"]),
            grid_width=int(metadata["paella.grid_width"]),
            codebook_size=int(metadata["paella.codebook_size"]),
            vqgan_digest=metadata["paella.vqgan_digest"],
            clip_embd=int(metadata["paella.clip_embd"]) if "paella.clip_embd" in metadata else None,
        )


@dataclass(frozen=True)
class ClipBatch:
    """CLIP embeddings of one worker's part of a global batch.

    text and image are (B,D) float32; complete (B,) is False for rows that lack one, whose embeddings are zeros.
    """

    text: np.ndarray
    image: np.ndarray
    complete: np.ndarray
    ids: list[str]


@dataclass(frozen=True)
class TokenBatch:
    """tokens (B,H,W) int64, captions and ids of one worker's part of a global batch, and their CLIP embeddings if asked for."""

    tokens: np.ndarray
    captions: list[str]
    ids: list[str]
    clip: ClipBatch | None = None


class TokenDataset:
    """Reads batches in an order that is a pure function of (seed, epoch, global batch size).

    Shards are visited in a random order and rows are shuffled within a window of `shuffle_rows` rows, so that memory
    is bounded by the window and reads are large and sequential. Every worker computes the same order and takes
    its own slice of each global batch. The rows after the last full batch of an epoch are left out of that epoch.
    """

    def __init__(self, uri: str, *, shuffle_rows: int = 100_000) -> None:
        self.uri = uri
        self.shuffle_rows = shuffle_rows
        self.filesystem, self.root = _filesystem(uri)
        self.info = self._read_info()
        self.shards: list[tuple[str, int]] = sorted((shard["file"], shard["rows"]) for shard in self.info["shards"])
        self.num_rows = sum(rows for _, rows in self.shards)
        if self.num_rows == 0:
            raise ValueError(f"{uri} has no rows")
        with self._open(self.shards[0][0]) as file:
            self.format = TokenFormat.of(pq.read_schema(file), uri)

    def _read_info(self) -> dict:
        try:
            with self._open("dataset.json") as file:
                return json.loads(file.read())
        except FileNotFoundError as error:
            raise ValueError(f"{self.uri} is not a finished token dataset: it has no dataset.json") from error

    def _open(self, name: str) -> pa.NativeFile:
        return self.filesystem.open_input_file(f"{self.root}/{name}")

    def num_batches(self, global_batch_size: int) -> int:
        """Full batches per epoch. Raises ValueError where there are fewer rows than a batch."""
        if self.num_rows < global_batch_size:
            raise ValueError(f"{self.uri} has {self.num_rows} rows, fewer than global_batch_size={global_batch_size}")
        return self.num_rows // global_batch_size

    def require_clip(self) -> int:
        """The width of the CLIP embeddings. Raises ValueError where there are none."""
        if self.format.clip_embd is None:
            raise ValueError(f"{self.uri} has no CLIP embeddings (columns {' and '.join(CLIP_COLUMNS)})")
        return self.format.clip_embd

    def batches(
        self,
        *,
        seed: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        clip: bool = False,
    ) -> Iterator[TokenBatch]:
        """This worker's slices of global batches start_step, start_step+1, …, over endless epochs.

        With CLIP embeddings if asked for; raises ValueError where there are none.
        """
        if clip:
            self.require_clip()
        columns = ["id", "tokens", "caption", *(CLIP_COLUMNS if clip else ())]
        for table in self._slices(columns, seed, global_batch_size, rank, world_size, start_step):
            yield self._to_batch(table, clip)

    def rows(self, file: str, rows: list[int]) -> TokenBatch:
        """Some rows of one shard, in their order there."""
        return self._to_batch(self._read(file, ["id", "tokens", "caption"]).take(rows), clip=False)

    def clip_batches(
        self, *, seed: int, global_batch_size: int, rank: int = 0, world_size: int = 1, start_step: int = 0
    ) -> Iterator[ClipBatch]:
        """The CLIP embeddings of the same rows in the same order as `batches`. Raises ValueError where there are none."""
        self.require_clip()
        for table in self._slices(["id", *CLIP_COLUMNS], seed, global_batch_size, rank, world_size, start_step):
            yield self._to_clip(table)

    def _slices(
        self, columns: list[str], seed: int, global_batch_size: int, rank: int, world_size: int, start_step: int
    ) -> Iterator[pa.Table]:
        if global_batch_size % world_size:
            raise ValueError(f"global_batch_size={global_batch_size} must be a multiple of the {world_size} workers")
        epoch, skip = divmod(start_step, self.num_batches(global_batch_size))
        size = global_batch_size // world_size
        while True:
            for table in self._global_batches(columns, seed, epoch, global_batch_size, skip):
                yield table.slice(rank * size, size)
            epoch, skip = epoch + 1, 0

    def _global_batches(self, columns: list[str], seed: int, epoch: int, size: int, skip: int) -> Iterator[pa.Table]:
        rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
        rest: pa.Table | None = None
        for window in self._windows(rng):
            num_rows = sum(rows for _, rows in window)
            order = rng.permutation(num_rows)
            table = pa.concat_tables([self._read(file, columns) for file, _ in window]).take(order)
            if rest is not None:
                table = pa.concat_tables([rest, table])
            for start in range(0, len(table) - size + 1, size):
                if skip > 0:
                    skip -= 1
                else:
                    yield table.slice(start, size)
            rest = table.slice(len(table) - len(table) % size)

    def _windows(self, rng: np.random.Generator) -> Iterator[list[tuple[str, int]]]:
        window: list[tuple[str, int]] = []
        for index in rng.permutation(len(self.shards)):
            window.append(self.shards[index])
            if sum(rows for _, rows in window) >= self.shuffle_rows:
                yield window
                window = []
        if window:
            yield window

    def _read(self, name: str, columns: list[str]) -> pa.Table:
        with self._open(name) as file:
            return pq.read_table(file, columns=columns)

    def _to_clip(self, table: pa.Table) -> ClipBatch:
        width = self.require_clip()
        flat = (table[name].combine_chunks().flatten().to_numpy() for name in CLIP_COLUMNS)
        text, image = (values.reshape(-1, width).astype(np.float32) for values in flat)
        complete = np.isfinite(text).all(axis=1) & np.isfinite(image).all(axis=1)
        text[~complete] = image[~complete] = 0
        return ClipBatch(text, image, complete, table["id"].to_pylist())

    def _to_batch(self, table: pa.Table, clip: bool) -> TokenBatch:
        tokens = table["tokens"].combine_chunks().flatten().to_numpy()
        grid = tokens.reshape(-1, self.format.grid_height, self.format.grid_width).astype(np.int64)
        embeddings = self._to_clip(table) if clip else None
        return TokenBatch(grid, table["caption"].to_pylist(), table["id"].to_pylist(), embeddings)


def require_vqgan(format: TokenFormat, digests: Sequence[str], uri: str) -> None:
    """Raises ValueError naming both digests where tokens were made by another VQGAN.

    Args:
        digests: of the model's VQGAN, and of those that make the same tokens.
    """
    if format.vqgan_digest not in digests:
        raise ValueError(f"the tokens in {uri} were made by VQGAN {format.vqgan_digest}, but the model has VQGAN {digests[0]}")


def _filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    filesystem, root = pafs.FileSystem.from_uri(uri if "://" in uri else str(Path(uri).absolute()))
    return filesystem, root.rstrip("/")
