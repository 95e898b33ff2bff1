"""The inspector: what is there, and every kind of damage by name."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from paella.bundle import load_vqgan
from pipelines import inspect_tokens
from pipelines.inspect_tokens import InspectConfig, run
from pipelines.output_store import Output
from pipelines.token_format import TokenFormat
from pipelines.token_shards import count, write_unit


@pytest.fixture
def dataset(tmp_path, vqgan_bundle):
    """Three shards of five rows, of random tokens."""
    model, digest = load_vqgan(str(vqgan_bundle))
    format = TokenFormat(grid_height=4, grid_width=4, codebook_size=model.config.codebook_size, vqgan_digest=digest)
    output = Output(str(tmp_path / "tokens"))
    generator = torch.Generator().manual_seed(0)
    for unit in "abc":
        tokens = torch.randint(32, (5, 16), generator=generator).tolist()
        rows = [{"id": f"{unit}{i}", "tokens": tokens[i], "caption": f"picture {unit}{i}"} for i in range(5)]
        rejects = [{"id": f"{unit}x", "stage": stage, "reason": "why", "detail": "d"} for stage in ("decode", "filter")]
        columns = {field.name: [row.get(field.name) for row in rows] for field in format.schema()}
        write_unit(output, unit, pa.table(columns, schema=format.schema()), rejects)
    write_info(output)
    return output


def write_info(output: Output) -> None:
    counts = count(output, list("abc"))
    info = {
        "rows": counts.written, "rows_in": counts.rows_in, "shards": counts.shards, "filters": counts.filtered,
        "rejects": counts.rejected, "filtered": 3, "rejected": 3, "config": {"resolution": 16},
    }  # fmt: skip
    output.write("dataset.json", json.dumps(info).encode())


def test_a_whole_dataset_is_described_and_drawn(dataset, vqgan_bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inspect_tokens, "IDS_AT_ONCE", 4)  # ids are looked at in four shares
    sheet = tmp_path / "sheet.png"
    run(InspectConfig(uri=str(dataset), vqgan=str(vqgan_bundle), sheet=str(sheet), num_images=6))
    out = capsys.readouterr().out
    for words in (
        "15 in 3 shards",
        "4x4 of 32 codes",
        "filtered  3: why 3",
        "rejected  3: why 3",
        "picture a0",
        '"resolution": 16',
    ):
        assert words in out
    assert "whole: 3 shards read, 15 rows" in out
    image = Image.open(sheet)
    assert image.width > 100 and len(image.getcolors(100_000) or []) > 10


def shard(dataset: Output, name: str) -> pa.Table:
    return pq.read_table(io.BytesIO(dataset.read(name)))


def rewrite(dataset: Output, name: str, table: pa.Table) -> None:
    file = io.BytesIO()
    pq.write_table(table, file)
    dataset.write(name, file.getvalue())


def with_column(table: pa.Table, name: str, values: list) -> pa.Table:
    index = table.schema.get_field_index(name)
    return table.set_column(index, table.schema.field(name), pa.array(values, type=table.schema.field(name).type))


def torn(dataset: Output) -> None:
    data = dataset.read("part-b.parquet")
    dataset.write("part-b.parquet", data[: len(data) // 2])


def lost(dataset: Output) -> None:
    dataset.delete("part-b.parquet")


def short(dataset: Output) -> None:
    rewrite(dataset, "part-b.parquet", shard(dataset, "part-b.parquet").slice(0, 4))


def wild_token(dataset: Output) -> None:
    table = shard(dataset, "part-b.parquet")
    rewrite(dataset, "part-b.parquet", with_column(table, "tokens", [[32] * 16] * 5))


def repeated(dataset: Output) -> None:
    table = shard(dataset, "part-b.parquet")
    rewrite(dataset, "part-b.parquet", with_column(table, "id", ["b0", "a3", "b2", "b3", "b4"]))


def other_vqgan(dataset: Output) -> None:
    table = shard(dataset, "part-b.parquet")
    metadata = table.schema.metadata | {b"paella.vqgan_digest": b"another"}
    rewrite(dataset, "part-b.parquet", table.replace_schema_metadata(metadata))


def fewer_rejects(dataset: Output) -> None:
    table = shard(dataset, "rejects/part-b.parquet")
    rewrite(dataset, "rejects/part-b.parquet", table.slice(0, 1))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (torn, r"part-b.parquet cannot be read"),
        (lost, r"part-b.parquet cannot be read"),
        (short, r"part-b.parquet has 4 rows, dataset.json says 5"),
        (wild_token, r"part-b.parquet has a token 32, the codebook has 32 codes"),
        (repeated, r"the id 'a3' is in part-a.parquet and in part-b.parquet"),
        (other_vqgan, r"another format than the first shard: .*another"),
        (fewer_rejects, r"part-b.parquet says that .* were left out, rejects/part-b.parquet"),
    ],
)
def test_damage_is_named(dataset, damage, words):
    damage(dataset)
    with pytest.raises(ValueError, match=f"is not whole: .*{words}"):
        run(InspectConfig(uri=str(dataset)))


def test_what_is_no_dataset_is_said(tmp_path, dataset, clip_bundle):
    with pytest.raises(ValueError, match="not a finished token dataset"):
        run(InspectConfig(uri=str(tmp_path)))
    with pytest.raises(ValueError, match="were made by VQGAN"):
        run(InspectConfig(uri=str(dataset), vqgan=str(clip_bundle)))
