"""What a training run reads: one order for any number of workers, resumed anywhere, each row once an epoch, mixed by weight."""

import itertools
import json
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.prefetch import prefetched
from pipelines.token_dataset import TokenDataset
from pipelines.token_format import TokenFormat
from pipelines.token_order import TokenOrder, rows_before
from pipelines.token_stream import TokenStream


def write_tokens(path: Path, shards: list[int], prefix: str = "", digest: str = "0", side: int = 2, codes: int = 2**15) -> Path:
    """Shards of so many rows, in row groups of 10; every row's tokens count from its number."""
    path.mkdir(parents=True)
    schema = TokenFormat(grid_height=side, grid_width=side, codebook_size=32, vqgan_digest=digest).schema()
    number = itertools.count()
    for index, rows in enumerate(shards):
        table = [
            {
                "id": f"{prefix}{i:05d}",
                "tokens": [(i + place) % codes for place in range(side**2)],
                "caption": f"number {i}",
                "width": 8,
                "height": 8,
                "sha256": "0",
            }
            for i in itertools.islice(number, rows)
        ]
        pq.write_table(pa.Table.from_pylist(table, schema=schema), path / f"part-{index:03d}.parquet", row_group_size=10)
    files = [{"file": f"part-{index:03d}.parquet", "rows": rows} for index, rows in enumerate(shards)]
    (path / "dataset.json").write_text(json.dumps({"shards": files}))
    return path


SHARDS = [17, 30, 25, 0, 40, 33, 1, 55]  # 201 rows


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> TokenDataset:
    return TokenDataset(str(write_tokens(tmp_path_factory.mktemp("stream") / "tokens", SHARDS)))


def take(stream: TokenStream, num: int, **where) -> list[list[str]]:
    return [batch.ids for batch in itertools.islice(stream.batches(**where), num)]


@pytest.mark.parametrize("shuffle_rows, lanes", [(1000, 1), (50, 4), (20, 6)])
def test_the_order_is_the_same_for_any_number_of_workers_and_any_start(dataset, shuffle_rows, lanes):
    stream = TokenStream([dataset], seed=3, global_batch_size=12, shuffle_rows=shuffle_rows)
    assert stream.orders[0].num_lanes == lanes
    alone = take(stream, 40)
    for number in (2, 3, 4, 12):
        parts = [take(stream, 40, rank=rank, world_size=number) for rank in range(number)]
        assert [list(itertools.chain(*batch)) for batch in zip(*parts, strict=True)] == alone
    for start in (1, 16, 17, 39):
        assert take(stream, 3, start_step=start) == [*alone, *take(stream, 3, start_step=40)][start : start + 3]
    assert take(TokenStream([dataset], seed=4, global_batch_size=12, shuffle_rows=shuffle_rows), 40) != alone


def test_a_selection_of_captions_comes_from_all_over(dataset, monkeypatch):
    everything = [f"number {i}" for i in range(sum(SHARDS))]
    assert dataset.captions(10_000) == everything
    assert len(TokenDataset(dataset.uri, hold_out=10).captions(10_000)) == len(everything) - 10
    monkeypatch.setattr("pipelines.token_dataset.CAPTION_SHARDS", 4)
    first = [sum(SHARDS[:shard]) for shard in (0, 2, 4, 6)]  # of which the last has one row
    assert dataset.captions(20) == [everything[at + i] for at in first for i in range(5 if at != first[-1] else 1)]
    assert dataset.captions(1) == everything[:1]


@pytest.mark.parametrize("shuffle_rows", [1000, 50, 20])
def test_an_epoch_has_every_row_once_but_for_fewer_than_there_are_lanes(dataset, shuffle_rows):
    stream = TokenStream([dataset], seed=3, global_batch_size=12, shuffle_rows=shuffle_rows)
    order = stream.orders[0]
    epoch = order.num_lanes * order.lane_rows
    assert 201 - order.num_lanes < epoch <= 201
    rows = list(itertools.chain(*take(stream, 3 * epoch // 12 + 1)))
    epochs = [rows[start : start + epoch] for start in (0, epoch, 2 * epoch)]
    if shuffle_rows == 1000:  # batches go across the ends of epochs: there the lanes' rows are sorted by lane
        assert [len(set(part)) for part in epochs] == [epoch] * 3
    assert max(rows.count(row) for row in set(rows)) <= 4
    assert sorted(set(rows[: epoch - 12])) == sorted(rows[: epoch - 12])
    assert epochs[0] != epochs[1]


def test_rows_are_what_the_shards_say(dataset):
    for batch in itertools.islice(TokenStream([dataset], seed=0, global_batch_size=12, shuffle_rows=30).batches(), 20):
        for sample, caption, tokens in zip(batch.ids, batch.captions, batch.tokens, strict=True):
            assert caption == f"number {int(sample)}" and tokens.ravel().tolist() == [int(sample) + place for place in range(4)]


def test_workers_read_their_lanes_alone_and_a_start_reads_nothing_before_it(tmp_path, monkeypatch):
    dataset, read = TokenDataset(str(write_tokens(tmp_path / "tokens", [5] * 40))), []
    plain = TokenDataset.read

    def counting(self, pieces, columns):
        read.append(sum(piece.stop - piece.start for piece in pieces))
        return plain(self, pieces, columns)

    monkeypatch.setattr(TokenDataset, "read", counting)
    stream = TokenStream([dataset], seed=3, global_batch_size=12, shuffle_rows=20)

    def rows_read(num: int, **where) -> int:
        read.clear()
        slices = stream._slices(["id"], where.get("rank", 0), where.get("world_size", 1), where.get("start_step", 0))
        for _ in itertools.islice(slices, num):
            pass
        slices.close()
        return sum(read)

    everything = rows_read(15)
    assert 180 <= everything <= 180 + 6 * 2 * 5, "what is needed, and a window ahead in each lane"
    halves = [rows_read(15, rank=rank, world_size=2) for rank in range(2)]
    assert sum(halves) == everything and max(halves) < 0.65 * everything
    assert rows_read(1, start_step=14) < 0.4 * everything, "the windows it is in, and those after them"


def test_shards_are_read_by_row_groups(dataset):
    (piece,) = (p for w in itertools.islice(TokenOrder([55], 0, 1, 1000).windows(0, 0), 1) for p in w.pieces)
    part = dataset.read([piece._replace(shard=7, start=13, stop=28)], ["id"])
    assert part["id"].to_pylist() == [f"{146 + i:05d}" for i in range(13, 28)]


def test_datasets_are_mixed_by_weight(dataset, tmp_path):
    other = TokenDataset(str(write_tokens(tmp_path / "other", [64, 64, 64], prefix="o")))
    stream = TokenStream([dataset, other], seed=1, global_batch_size=16, weights=(3, 1), shuffle_rows=40)
    batches = take(stream, 30)
    shares = np.cumsum([sum(sample.startswith("o") for sample in batch) for batch in batches]) / np.arange(16, 16 * 31, 16)
    assert abs(shares[-1] - 0.25) < 0.01 and np.abs(shares - 0.25).max() < 0.07
    parts = [take(stream, 30, rank=rank, world_size=4) for rank in range(4)]
    assert [list(itertools.chain(*batch)) for batch in zip(*parts, strict=True)] == batches
    assert take(stream, 5, start_step=25) == batches[25:]
    by_rows = TokenStream([dataset, other], seed=1, global_batch_size=16)
    assert by_rows.weights == pytest.approx([201 / 393, 192 / 393])
    for step in range(50):
        before, after = rows_before(step, 16, [0.7, 0.2, 0.1]), rows_before(step + 1, 16, [0.7, 0.2, 0.1])
        assert sum(before) == 16 * step and all(high >= low for low, high in zip(before, after, strict=True))


def test_what_cannot_be_mixed_is_named(dataset, tmp_path):
    strange = TokenDataset(str(write_tokens(tmp_path / "strange", [20], digest="1")))
    for datasets, weights, size, words in [
        ([dataset, strange], (), 8, "their vqgan_digest is 1 and 0"),
        ([dataset, dataset], (1.0,), 8, "a number above 0 for each of the 2 datasets"),
        ([dataset, dataset], (1.0, -1.0), 8, "a number above 0"),
        ([dataset], (), 202, "has 201 rows, fewer than global_batch_size=202"),
        ([dataset] * 3, (), 8, "too small for a mixture of 3"),
    ]:
        with pytest.raises(ValueError, match=words):
            TokenStream(datasets, seed=0, global_batch_size=size, weights=weights)
    with pytest.raises(ValueError, match="no CLIP embeddings"):
        next(TokenStream([dataset], seed=0, global_batch_size=8).clip_batches())


def test_a_dataset_on_s3_is_read_the_same(dataset, bucket):
    import s3fs

    s3fs.S3FileSystem().put(dataset.root, f"{bucket.removeprefix('s3://')}/tokens", recursive=True)
    there = TokenStream([TokenDataset(f"{bucket}/tokens")], seed=3, global_batch_size=12, shuffle_rows=50)
    here = TokenStream([dataset], seed=3, global_batch_size=12, shuffle_rows=50)
    assert take(there, 20, rank=1, world_size=2, start_step=5) == take(here, 20, rank=1, world_size=2, start_step=5)


def test_how_well_rows_are_shuffled():
    """Rows sorted by what they are: how much more the means of batches scatter than those of a full shuffle."""
    order = TokenOrder([1000] * 2000, seed=0, global_batch_size=256, shuffle_rows=100_000)
    assert order.num_lanes == 16
    rows = []
    for lane in range(order.num_lanes):
        windows, parts = order.windows(lane, 0), []
        while sum(map(len, parts)) < 16 * 400:
            window = next(windows)
            source = [1000 * piece.shard + np.arange(piece.start, piece.stop) for piece in window.pieces]
            parts.append(np.concatenate(source)[window.order] / 2_000_000)
        rows.append(np.concatenate(parts)[: 16 * 400].reshape(400, 16))
    means = np.concatenate(rows, axis=1).mean(axis=1)  # of 400 batches
    assert 0.45 < means.mean() < 0.55
    scatter = means.var() / (1 / 12 / 256)
    assert scatter < 6, scatter


def test_prefetching_is_bounded_passes_errors_on_and_ends():
    made: list[int] = []

    def source():
        for number in range(100):
            made.append(number)
            if number == 50:
                raise OSError("gone")
            yield number

    ahead = prefetched(source(), 3)
    assert next(ahead) == 0
    time.sleep(0.3)
    assert len(made) <= 6
    with pytest.raises(OSError, match="gone"):
        list(ahead)
    endless = prefetched(itertools.count(), 2)
    next(endless)
    endless.close()
    deadline = time.monotonic() + 5
    while any(thread.name == "prefetch" for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())


def test_held_out_rows_are_read_in_parts(tmp_path):
    dataset = TokenDataset(str(write_tokens(tmp_path / "tokens", [60, 50, 40])), hold_out=7)
    whole = dataset.held_out().ids
    assert len(whole) == dataset.num_held_out == 7
    assert [each for first in range(0, 8, 2) for each in dataset.held_out(slice(first, first + 2)).ids] == whole
    assert dataset.held_out(slice(0)).ids == []
