"""The token dataset: Parquet shards of VQGAN tokens and captions, with `dataset.json` beside them.

Contract (docs/architecture.md): `id`, `tokens` (fixed_size_list<uint16>, row-major), `caption`, `width`, `height`, `sha256`
and, if asked for, `clip_text` and `clip_image` (fixed_size_list<float16>, NaN in rows that have none: pyarrow 25 writes a null
there but cannot read it, apache/arrow#35692); schema metadata with grid, codebook size, VQGAN digest, width of the CLIP
embeddings and format version. Plain pyarrow, DuckDB or pandas read it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.token_order import Piece

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
    """What lies in a token dataset, and reading parts of it; `pipelines.token_stream` makes a training run's batches of it.

    Raises ValueError where there is none, or an empty one.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
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

    def require_clip(self) -> int:
        """The width of the CLIP embeddings. Raises ValueError where there are none."""
        if self.format.clip_embd is None:
            raise ValueError(f"{self.uri} has no CLIP embeddings (columns {' and '.join(CLIP_COLUMNS)})")
        return self.format.clip_embd

    def columns(self, clip: bool, tokens: bool = True) -> list[str]:
        """The columns of a batch: with tokens and captions, with CLIP embeddings."""
        return ["id", *(("tokens", "caption") if tokens else ()), *(CLIP_COLUMNS if clip else ())]

    def read(self, pieces: Sequence[Piece], columns: list[str]) -> pa.Table:
        """Pieces of shards, end to end; of a shard only the row groups that hold wanted rows are read."""
        return pa.concat_tables([self._read_piece(piece, columns) for piece in pieces]).combine_chunks()

    def _read_piece(self, piece: Piece, columns: list[str]) -> pa.Table:
        with self._open(self.shards[piece.shard][0]) as source:
            file = pq.ParquetFile(source, pre_buffer=True)  # one request for columns that lie side by side, not one a column
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            ends = np.cumsum(sizes)
            groups = range(
                int(np.searchsorted(ends, piece.start, side="right")), int(np.searchsorted(ends, piece.stop, side="left")) + 1
            )
            first = int(ends[groups[0]]) - sizes[groups[0]]
            return file.read_row_groups(list(groups), columns).slice(piece.start - first, piece.stop - piece.start)

    def head(self, num: int, *, clip: bool = False) -> TokenBatch:
        """The first rows as they are stored, at most `num`."""
        pieces, left = [], num
        for shard, (_, rows) in enumerate(self.shards):
            pieces += [Piece(shard, 0, min(rows, left))] if min(rows, left) else []
            left -= min(rows, left)
        return self.to_batch(self.read(pieces, self.columns(clip)), clip)

    def rows(self, file: str, rows: list[int]) -> TokenBatch:
        """Some rows of one shard, in their order there."""
        shard = next(index for index, (name, _) in enumerate(self.shards) if name == file)
        table = self.read([Piece(shard, 0, self.shards[shard][1])], self.columns(clip=False))
        return self.to_batch(table.take(rows), clip=False)

    def to_clip(self, table: pa.Table) -> ClipBatch:
        """The CLIP columns of a table."""
        width = self.require_clip()
        flat = (table[name].combine_chunks().flatten().to_numpy() for name in CLIP_COLUMNS)
        text, image = (values.reshape(-1, width).astype(np.float32) for values in flat)
        complete = np.isfinite(text).all(axis=1) & np.isfinite(image).all(axis=1)
        text[~complete] = image[~complete] = 0
        return ClipBatch(text, image, complete, table["id"].to_pylist())

    def to_batch(self, table: pa.Table, clip: bool) -> TokenBatch:
        """The columns of a table, with or without those of CLIP."""
        tokens = table["tokens"].combine_chunks().flatten().to_numpy()
        grid = tokens.reshape(-1, self.format.grid_height, self.format.grid_width).astype(np.int64)
        embeddings = self.to_clip(table) if clip else None
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
