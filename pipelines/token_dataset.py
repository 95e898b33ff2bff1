"""Reading a token dataset (`pipelines.token_format`) for training: batches of tokens and captions in a fixed order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.held_out import split_rows
from pipelines.token_format import CLIP_COLUMNS, TokenFormat
from pipelines.token_order import Piece

STATES = ("byt5", "byt5_length")
"""Columns of the text encoder's states."""
CAPTION_SHARDS = 100
"""At most, that a selection of captions is read from."""


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
    """tokens (B,H,W) int64, captions and ids of one worker's part of a global batch; if asked for, CLIP embeddings, and the text
    encoder's states (L,D) float16 of each caption."""

    tokens: np.ndarray
    captions: list[str]
    ids: list[str]
    clip: ClipBatch | None = None
    states: list[np.ndarray] | None = None


class TokenDataset:
    """What lies in a token dataset, and reading parts of it; `pipelines.token_stream` makes a training run's batches of it.

    Args:
        hold_out: rows that are not among `shards`, see pipelines.held_out.

    Raises ValueError where there is none, or an empty one.
    """

    def __init__(self, uri: str, *, hold_out: int = 0) -> None:
        self.uri = uri
        self.filesystem, self.root = _filesystem(uri)
        self.info = self._read_info()
        shards = sorted((shard["file"], shard["rows"]) for shard in self.info["shards"])
        self.shards, self.held_out_rows = split_rows(shards, hold_out)
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
        if self.format.clip_embd is None or set(self.format.clip_columns) != set(CLIP_COLUMNS):
            raise ValueError(f"{self.uri} has no CLIP embeddings (columns {' and '.join(CLIP_COLUMNS)})")
        return self.format.clip_embd

    def require_states(self, encoder: str | None) -> None:
        """Raises ValueError where there are no states of captions by this text encoder, named by name or digest."""
        if self.format.byt5_embd is None:
            raise ValueError(f"{self.uri} has no states of a text encoder: tokenize with --byt5, or train without stored_text")
        if self.format.byt5 != encoder:
            raise ValueError(f"the states in {self.uri} are of the text encoder {self.format.byt5}, but the model has {encoder}")

    def columns(self, *, tokens: bool = True, clip: bool = False, states: bool = False) -> list[str]:
        """The columns of a batch: with tokens and captions, with CLIP embeddings, with the text encoder's states."""
        own = ("tokens", "caption") if tokens else ()
        return ["id", *own, *(CLIP_COLUMNS if clip else ()), *(STATES if states else ())]

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

    def head(self, num: int, *, clip: bool = False, states: bool = False) -> TokenBatch:
        """The first rows as they are stored, at most `num`."""
        return self.to_batch(self.read(self._first(num), self.columns(clip=clip, states=states)))

    def _first(self, num: int) -> list[Piece]:
        pieces, left = [], num
        for shard, (_, rows) in enumerate(self.shards):
            pieces += [Piece(shard, 0, min(rows, left))] if min(rows, left) else []
            left -= min(rows, left)
        return pieces

    def captions(self, most: int) -> list[str]:
        """At most so many captions, as many from each of CAPTION_SHARDS shards that are spread evenly over the dataset."""
        number = min(len(self.shards), CAPTION_SHARDS, most)
        chosen = [index * len(self.shards) // number for index in range(number)]
        lengths = [min(self.shards[shard][1], most // number) for shard in chosen]
        pieces = [Piece(shard, 0, length) for shard, length in zip(chosen, lengths, strict=True) if length]
        return self.read(pieces, ["caption"])["caption"].to_pylist()

    def rows(self, file: str, rows: list[int]) -> TokenBatch:
        """Some rows of one shard, in their order there."""
        shard = next(index for index, (name, _) in enumerate(self.shards) if name == file)
        table = self.read([Piece(shard, 0, self.shards[shard][1])], self.columns())
        return self.to_batch(table.take(rows))

    @property
    def num_held_out(self) -> int:
        """Rows that `hold_out` keeps from training."""
        return sum(stop - start for _, start, stop in self.held_out_rows)

    def held_out(self, rows: slice = slice(None), *, clip: bool = False, states: bool = False) -> TokenBatch:
        """Those rows, or some of them, in order; no others are read."""
        first, last, _ = rows.indices(self.num_held_out)
        pieces, before = [], 0
        for shard, start, stop in self.held_out_rows:
            piece = Piece(shard, max(start, start + first - before), min(stop, start + last - before))
            pieces += [piece] if piece.start < piece.stop else []
            before += stop - start
        columns = self.columns(clip=clip, states=states)
        table = self.read(pieces, columns) if pieces else self.format.schema().empty_table().select(columns)
        return self.to_batch(table)

    def to_clip(self, table: pa.Table) -> ClipBatch:
        """The CLIP columns of a table."""
        width = self.require_clip()
        flat = (table[name].combine_chunks().flatten().to_numpy() for name in CLIP_COLUMNS)
        text, image = (values.reshape(-1, width).astype(np.float32) for values in flat)
        complete = np.isfinite(text).all(axis=1) & np.isfinite(image).all(axis=1)
        text[~complete] = image[~complete] = 0
        return ClipBatch(text, image, complete, table["id"].to_pylist())

    def to_batch(self, table: pa.Table) -> TokenBatch:
        """The columns of a table."""
        tokens = table["tokens"].combine_chunks().flatten().to_numpy()
        grid = tokens.reshape(-1, self.format.grid_height, self.format.grid_width).astype(np.int64)
        clip = self.to_clip(table) if CLIP_COLUMNS[0] in table.column_names else None
        states = self._states(table) if STATES[0] in table.column_names else None
        return TokenBatch(grid, table["caption"].to_pylist(), table["id"].to_pylist(), clip, states)

    def _states(self, table: pa.Table) -> list[np.ndarray]:
        assert self.format.byt5_embd is not None
        flat = table["byt5"].combine_chunks().flatten().to_numpy().reshape(-1, self.format.byt5_embd)
        return np.split(flat, np.cumsum(table["byt5_length"].to_numpy())[:-1])


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
