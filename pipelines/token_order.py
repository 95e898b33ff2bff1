"""The order in which a training run sees rows: a pure function of seed, epoch and global batch size, known from row counts alone.

An epoch's shards are shuffled and laid end to end, and that row of rows is cut into lanes of equal length. A batch takes
its rows from all lanes, each lane's rows being shuffled within windows of neighbouring shards. A worker reads the lanes of its
slice of the batch, and no others; where a run continues, it reads the windows it is in, and nothing before them.

A dataset that fits in the shuffle window has one lane and one window: that is a full shuffle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

EPOCHS = 2**62
"""Added to an epoch's number, so that no random numbers of a sample (`paella.training.draw_noise`) are met again."""


class Piece(NamedTuple):
    """Rows start … stop of a shard."""

    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """Rows of a lane that are read together and shuffled: those with the lane's indices first, first + 1, …"""

    first: int
    pieces: tuple[Piece, ...]
    order: np.ndarray
    """(N,) which row of the pieces, laid end to end, comes at each index."""

    @property
    def stop(self) -> int:
        return self.first + len(self.order)


class TokenOrder:
    """The order of one dataset's rows.

    Args:
        rows: of each shard.
        shuffle_rows: rows in all lanes' windows together, though a window holds a shard at least: what all workers together have
            in memory, twice with what is read ahead.
    """

    MAX_LANES = 256

    def __init__(self, rows: Sequence[int], seed: int, global_batch_size: int, shuffle_rows: int) -> None:
        self.rows, self.seed = np.asarray(rows), seed
        num_rows = int(self.rows.sum())
        most = min(self.MAX_LANES, global_batch_size, max(1, num_rows // shuffle_rows))
        self.num_lanes = next(number for number in range(most, 0, -1) if global_batch_size % number == 0)
        self.lane_rows = num_rows // self.num_lanes
        """Rows of a lane in an epoch; fewer than num_lanes rows of a dataset are left out of it."""
        self.window_rows = max(1, shuffle_rows // self.num_lanes)

    def indices(self, lane: int, first: int, last: int) -> tuple[int, int]:
        """The indices in a lane of the rows first … last of the endless stream, whose row q is in lane q mod num_lanes."""
        return -((lane - first) // self.num_lanes), -((lane - last) // self.num_lanes)

    def windows(self, lane: int, index: int) -> Iterator[Window]:
        """A lane's windows over endless epochs, from that with `index` on."""
        epoch = index // self.lane_rows
        while True:
            for number, (first, pieces) in enumerate(self._pieces(lane, epoch)):
                first += epoch * self.lane_rows
                num_rows = sum(piece.stop - piece.start for piece in pieces)
                if first + num_rows > index:
                    yield Window(first, pieces, self._rng(epoch, lane, number + 1).permutation(num_rows))
            epoch += 1

    def _pieces(self, lane: int, epoch: int) -> Iterator[tuple[int, tuple[Piece, ...]]]:
        """Of each window of a lane's epoch: its first index in the epoch, and what lies in it."""
        shards = self._rng(epoch, 0, 0).permutation(len(self.rows))
        ends = np.cumsum(self.rows[shards])
        start, stop = lane * self.lane_rows, (lane + 1) * self.lane_rows
        first, pieces, held = 0, [], 0
        for place in range(int(np.searchsorted(ends, start, side="right")), len(shards)):
            begin = int(ends[place]) - int(self.rows[shards[place]])
            piece = Piece(int(shards[place]), max(0, start - begin), min(int(ends[place]), stop) - begin)
            if piece.stop > piece.start:
                pieces.append(piece)
                held += piece.stop - piece.start
            if held >= self.window_rows or ends[place] >= stop:
                if pieces:
                    yield first, tuple(pieces)
                first, pieces, held = first + held, [], 0
            if ends[place] >= stop:
                return

    def _rng(self, epoch: int, lane: int, window: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, EPOCHS + epoch], counter=[0, 0, lane, window]))


def rows_before(step: int, global_batch_size: int, weights: Sequence[float]) -> list[int]:
    """How many rows of each dataset of a mixture the batches before `step` have taken.

    Args:
        weights: of the datasets, 1 in sum; the largest takes what rounding leaves.
    """
    total = step * global_batch_size
    rows = [int(total * weight) for weight in weights]
    largest = max(range(len(weights)), key=lambda index: weights[index])
    rows[largest] = total - sum(rows) + rows[largest]
    return rows
