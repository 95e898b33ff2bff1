"""Endless batches of one token dataset, or of several mixed by weight, in the order that `token_order` says.

Shards are read a window ahead by threads, and batches put together in another, off the training thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa

from pipelines.prefetch import prefetched
from pipelines.token_dataset import ClipBatch, TokenBatch, TokenDataset
from pipelines.token_order import TokenOrder, Window, rows_before

SHUFFLE_ROWS = 100_000
SHUFFLE_STATES = 800
"""The same where rows have a text encoder's states, half a megabyte each; also with 512 states of 2,560 numbers in all of them
offsets of 32 bits do."""
READY_BATCHES = 4
READING_THREADS = 4


class TokenStream:
    """What a training run reads.

    Args:
        datasets: all of the same format.
        weights: shares of the rows that come from each; as many as each has rows, if not given.
        shuffle_rows: see TokenOrder; for each dataset.

    Raises ValueError where a dataset has fewer rows than a batch takes from it, or where they do not go together.
    """

    def __init__(
        self,
        datasets: Sequence[TokenDataset],
        *,
        seed: int,
        global_batch_size: int,
        weights: Sequence[float] = (),
        shuffle_rows: int = SHUFFLE_ROWS,
    ) -> None:
        require_mixture(datasets, weights, global_batch_size)
        self.datasets, self.global_batch_size = datasets, global_batch_size
        relative = weights or [dataset.num_rows for dataset in datasets]
        self.weights = [weight / sum(relative) for weight in relative]
        self.orders = [
            TokenOrder([rows for _, rows in dataset.shards], seed, global_batch_size, shuffle_rows) for dataset in datasets
        ]

    def batches(
        self, rank: int = 0, world_size: int = 1, start_step: int = 0, *, clip: bool = False, states: bool = False
    ) -> Iterator[TokenBatch]:
        """One worker's slices of the global batches start_step, start_step + 1, … if asked for with CLIP embeddings and the text
        encoder's states."""
        if clip:
            self._require_clip()
        first = self.datasets[0]
        tables = self._slices(first.columns(clip=clip, states=states), rank, world_size, start_step)
        return prefetched((first.to_batch(table) for table in tables), READY_BATCHES)

    def clip_batches(self, rank: int = 0, world_size: int = 1, start_step: int = 0) -> Iterator[ClipBatch]:
        """The CLIP embeddings of the same rows as those of `batches`."""
        self._require_clip()
        first = self.datasets[0]
        tables = self._slices(first.columns(tokens=False, clip=True), rank, world_size, start_step)
        return prefetched((first.to_clip(table) for table in tables), READY_BATCHES)

    def _require_clip(self) -> None:
        for dataset in self.datasets:
            dataset.require_clip()

    def _slices(self, columns: list[str], rank: int, world_size: int, step: int) -> Iterator[pa.Table]:
        size = self.global_batch_size
        if size % world_size:
            raise ValueError(f"global_batch_size={size} must be a multiple of the {world_size} workers")
        start, stop = rank * size // world_size, (rank + 1) * size // world_size
        with ThreadPoolExecutor(READING_THREADS, "read-tokens") as threads:
            lanes = [
                [_Lane(dataset, order, lane, columns, threads) for lane in range(order.num_lanes)]
                for dataset, order in zip(self.datasets, self.orders, strict=True)
            ]
            while True:
                before, after = (rows_before(at, size, self.weights) for at in (step, step + 1))
                tables, place = [], 0
                for order, own, first, last in zip(self.orders, lanes, before, after, strict=True):
                    for lane in own:
                        low, high = order.indices(lane.number, first, last)
                        # the part of this lane's rows that is in this worker's slice of the batch
                        begin, end = max(place, start), min(place + high - low, stop)
                        if begin < end:
                            tables += lane.take(low + begin - place, low + end - place)
                        place += high - low
                yield pa.concat_tables(tables)
                step += 1


class _Lane:
    """Reads one lane's rows, forwards; the window after that in use is being read meanwhile."""

    def __init__(
        self, dataset: TokenDataset, order: TokenOrder, number: int, columns: list[str], threads: ThreadPoolExecutor
    ) -> None:
        self.dataset, self.order, self.number, self.columns, self.threads = dataset, order, number, columns, threads
        self.windows: Iterator[tuple[Window, Future[pa.Table]]] | None = None
        self.window: Window | None = None
        self.next: tuple[Window, Future[pa.Table]] | None = None

    def take(self, first: int, last: int) -> list[pa.Table]:
        """The rows with indices first … last, in as many tables as they lie in windows."""
        tables = []
        while first < last:
            if self.window is None or first >= self.window.stop:
                self._move_to(first)
            assert self.window is not None
            stop = min(last, self.window.stop)
            tables.append(self.table.take(self.window.order[first - self.window.first : stop - self.window.first]))
            first = stop
        return tables

    def _move_to(self, index: int) -> None:
        if self.next is None or index >= self.next[0].stop:  # the start, or far ahead
            self.windows = self._reading(index)
            self.next = next(self.windows)
        assert self.windows is not None
        self.window, reading = self.next
        self.table = reading.result()
        self.next = next(self.windows)

    def _reading(self, index: int) -> Iterator[tuple[Window, Future[pa.Table]]]:
        for window in self.order.windows(self.number, index):
            yield window, self.threads.submit(self.dataset.read, window.pieces, self.columns)


def require_mixture(datasets: Sequence[TokenDataset], weights: Sequence[float], global_batch_size: int) -> None:
    """Raises ValueError where datasets cannot be trained on together, or have too few rows."""
    first = datasets[0]
    if weights and (len(weights) != len(datasets) or not all(weight > 0 for weight in weights)):
        raise ValueError(
            f"data_weights={tuple(weights)} is not allowed: a number above 0 for each of the {len(datasets)} datasets"
        )
    for dataset in datasets:
        for name in ("grid_height", "grid_width", "codebook_size", "vqgan_digest", "clip_embd"):
            if (here := getattr(dataset.format, name)) != (there := getattr(first.format, name)):
                raise ValueError(f"{dataset.uri} and {first.uri} cannot be mixed: their {name} is {here} and {there}")
    num_rows = sum(dataset.num_rows for dataset in datasets)
    if num_rows < global_batch_size:
        names = " and ".join(dataset.uri for dataset in datasets)
        raise ValueError(f"{names} has {num_rows} rows, fewer than global_batch_size={global_batch_size}")
    if global_batch_size < len(datasets) ** 2:
        raise ValueError(f"global_batch_size={global_batch_size} is too small for a mixture of {len(datasets)} datasets")
