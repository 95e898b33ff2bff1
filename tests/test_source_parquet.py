"""Parquet tables with images and with URLs: columns found or named, row groups read once, bad rows and files named."""

import hashlib
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_sources import png, reasons
from web import Answer, site

from pipelines import source_parquet
from pipelines.source_contract import FetchConfig, Filtered, Reject, Sample, SourceConfig
from pipelines.sources import by_shard, find_units, read_unit, read_units


def table(num, **changed):
    columns = {"image": [png((n, 0, 0)) for n in range(num)], "caption": [f"picture {n}" for n in range(num)]} | changed
    return pa.table({name: values for name, values in columns.items() if values is not None})


def read(path, rows_per_unit=1024, source=None):
    return [row for unit in find_units(str(path), rows_per_unit, source) for row in read_unit(unit)]


def good(rows):
    return [row.id for row in rows if isinstance(row, Sample)]


@pytest.mark.parametrize("group_rows", [1, 4, 100])
@pytest.mark.parametrize("rows_per_unit", [1, 3, 5, 100])
def test_every_row_once_whatever_the_row_groups(tmp_path, group_rows, rows_per_unit):
    pq.write_table(table(11), tmp_path / "a.parquet", row_group_size=group_rows)
    pq.write_table(table(2), tmp_path / "b.parquet")
    units = find_units(str(tmp_path), rows_per_unit)
    rows = [row for unit in units for row in read_unit(unit)]
    assert good(rows) == [f"a/{n:08d}" for n in range(11)] + ["b/00000000", "b/00000001"]
    assert [row.image for row in rows[:11]] == [png((n, 0, 0)) for n in range(11)]
    assert max(unit.num_samples for unit in units) <= rows_per_unit and len({unit.name for unit in units}) == len(units)
    assert [row for together in by_shard(units) for _, row in read_units(together)] == rows
    for together in by_shard(units):  # of which some are finished
        assert (
            [row for _, row in read_units(together[1:])] == [r for u in together[1:] for r in read_unit(u)]
            if together[1:]
            else True
        )
    for unit in units:
        every = list(read_unit(pickle.loads(pickle.dumps(unit))))
        assert [list(read_unit(unit, [n])) for n in range(unit.num_samples)] == [[row] for row in every]


def test_row_groups_of_one_shard_are_read_once(tmp_path, monkeypatch):
    pq.write_table(table(200), tmp_path / "a.parquet", row_group_size=100)
    opened = []
    real = source_parquet.open_native
    units = find_units(str(tmp_path), 10)
    monkeypatch.setattr(source_parquet, "open_native", lambda uri: opened.append(uri) or real(uri))
    assert sum(len(list(read_units(together))) for together in by_shard(units)) == 200
    assert len(units) == 20 and len(opened) == 2


def test_columns_are_found_or_named(tmp_path):
    image = {"bytes": png(), "path": "x.png"}
    columns = {"Image": [image], "TEXT": ["of TEXT"], "German": ["ein Teller"], "name": ["n1"], "WIDTH": [900],
               "AESTHETIC_SCORE": [6.5], "punsafe": [None], "PWATERMARK": [0.1], "similarity": [float("nan")]}  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert read(tmp_path) == [Sample("a/00000000", png(), "of TEXT", {"width": 900, "aesthetic": 6.5, "pwatermark": 0.1})]
    (row,) = read(tmp_path, source=SourceConfig(caption_column="german", id_column="name", image_column="image"))
    assert (row.id, row.caption) == ("n1", "ein Teller")


@pytest.mark.parametrize(
    ("change", "source", "words"),
    [
        ({"caption": None}, {}, ["a caption column of text", "image (binary)"]),
        ({"caption": [1, 2]}, {}, ["a caption column of text", "caption (int64)"]),
        ({"image": ["a", "b"]}, {"format": "parquet"}, ["an image column of bytes", "image (string)"]),
        ({}, {"image_column": "picture", "format": "parquet"}, ["an image column of bytes", "image (binary)"]),
        ({}, {"id_column": "number"}, ["the id column number"]),
        ({"url": [1, 2]}, {"format": "urls"}, ["a url column of text", "url (int64)"]),
        ({"image": None}, {}, ["neither image bytes nor URLs"]),
    ],
)
def test_wrong_columns_are_one_sentence_that_names_those_found(tmp_path, change, source, words):
    pq.write_table(table(2, **change), tmp_path / "a.parquet")
    with pytest.raises(ValueError) as error:
        find_units(str(tmp_path), source=SourceConfig(**source))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_hostile_rows(tmp_path):
    captions = pa.Array.from_buffers(  # text that is no UTF-8, as other programs write it
        pa.string(), 7, [None, pa.py_buffer(np.array([0, 1, 2, 2, 6, 7, 8, 8], np.int32)), pa.py_buffer(b"abcaf\xe9de")]
    )
    images = [png(), bytes(5000), png(), png(), None, png(), png()]
    pq.write_table(pa.table({"image": images, "caption": captions}), tmp_path / "a.parquet")
    rows = read(tmp_path, source=SourceConfig(max_image_bytes=4000))
    assert good(rows) == ["a/00000000", "a/00000005"]
    assert reasons(rows) == {
        "a/00000001": "too-large",
        "a/00000002": "empty-caption",
        "a/00000003": "caption-not-utf8",
        "a/00000004": "no-image",
        "a/00000006": "empty-caption",
    }


@pytest.mark.parametrize("rows_per_unit", [7, 100])
def test_damaged_files_are_named_and_the_rest_is_read(tmp_path, rows_per_unit):
    pq.write_table(table(40), tmp_path / "a.parquet", row_group_size=10, compression="zstd", use_dictionary=False)
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(content[:-20])  # half written
    (tmp_path / "c.parquet").write_bytes(b"")
    place = pq.read_metadata(tmp_path / "a.parquet").row_group(2).column(0).data_page_offset
    (tmp_path / "a.parquet").write_bytes(content[:place] + b"\xff" * 200 + content[place + 200 :])
    rows = read(tmp_path, rows_per_unit)
    found = reasons(rows)
    assert found.pop("b.parquet") == found.pop("c.parquet") == "damaged-shard"
    assert set(found.values()) == {"damaged-shard"} and len(rows) == 42
    names = {f"a/{n:08d}" for n in range(40)}
    assert {*good(rows), *found} == names and set(good(rows)) >= {f"a/{n:08d}" for n in range(20)}


def test_a_changed_table_has_other_names(tmp_path):
    pq.write_table(table(10), tmp_path / "a.parquet")
    pq.write_table(table(10), tmp_path / "b.parquet")
    before = [unit.name for unit in find_units(str(tmp_path), 5)]
    pq.write_table(table(10, caption=["another"] * 10), tmp_path / "b.parquet")
    after = [unit.name for unit in find_units(str(tmp_path), 5)]
    assert after[:2] == before[:2] and not set(after[2:]) & set(before)
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.parquet").rename(tmp_path / "sub" / "b.parquet")
    assert [row.id for row in read(tmp_path / "sub")][:1] == ["b/00000000"]
    assert good(read(tmp_path))[-1] == "sub/b/00000009"


def test_a_single_file_is_a_source(tmp_path):
    pq.write_table(table(3), tmp_path / "a.parquet")
    pq.write_table(table(3), tmp_path / "b.parquet")
    assert good(read(tmp_path / "b.parquet")) == [f"b/0000000{n}" for n in range(3)]


LOCAL = FetchConfig(allow_private_addresses=True, retries=0)


def laion(web, num):
    """A table as LAION's, and what should come of each row."""
    image = png()
    rows = [
        {"URL": web.url("/a.png"), "TEXT": f" picture {n}", "WIDTH": 20, "HEIGHT": 16, "similarity": 0.3, "punsafe": 0.1 * n,
         "pwatermark": 0.2, "AESTHETIC_SCORE": 5.0 + n, "hash": 77, "md5": hashlib.md5(image).hexdigest()}
        for n in range(num)
    ]  # fmt: skip
    rows[1] |= {"URL": web.url("/none.png")}
    rows[2] |= {"TEXT": None}
    rows[3] |= {"md5": "0" * 32}
    rows[4] |= {"URL": None}
    rows[5] |= {"URL": web.url("/no.png")}
    expected = {1: "http-404", 2: "empty-caption", 3: "hash-mismatch", 4: "bad-url", 5: "opted-out"}
    return pa.Table.from_pylist(rows), {f"list/{n:08d}": reason for n, reason in expected.items()}


@pytest.mark.parametrize("rows_per_unit", [4, 100])
def test_laion_tables_of_urls(tmp_path, rows_per_unit):
    pages = {"/a.png": Answer(png()), "/no.png": Answer(png(), headers=[("X-Robots-Tag", "noai")])}
    with site(pages) as web:
        rows, expected = laion(web, 10)
        pq.write_table(rows, tmp_path / "list.parquet", row_group_size=5)
        units = find_units(str(tmp_path), rows_per_unit, SourceConfig(fetch=LOCAL))
        found = [row for together in by_shard(units) for _, row in read_units(together)]
        assert reasons(found) == expected and len(found) == 10
        last = found[-1]
        assert last == Sample(
            "list/00000009", png(), "picture 9",
            {"width": 20, "height": 16, "aesthetic": 14.0, "punsafe": 0.9, "pwatermark": 0.2, "similarity": 0.3,
             "sha256": hashlib.sha256(png()).hexdigest(), "url": web.url("/a.png")},
        )  # fmt: skip
        assert [row for unit in units for row in read_unit(unit)] == found
        assert list(read_unit(units[-1], [units[-1].num_samples - 1])) == [last]


def test_what_is_not_wanted_is_not_fetched(tmp_path):
    with site({"/a.png": Answer(png())}) as web:
        columns = {"url": [web.url("/a.png")] * 6, "caption": ["x"] * 6, "aesthetic": [float(n) for n in range(6)]}
        pq.write_table(pa.table(columns), tmp_path / "list.parquet")
        (unit,) = find_units(str(tmp_path), source=SourceConfig(fetch=LOCAL))
        rows = list(read_unit(unit, wanted=lambda _, meta: "aesthetic" if meta["aesthetic"] < 4 else None))
        assert rows[:4] == [Filtered(f"list/{n:08d}", "aesthetic") for n in range(4)]
        assert len(good(rows)) == 2 and web.asked["/a.png"] == 2


def test_private_addresses_are_refused_by_default(tmp_path):
    with site({"/a.png": Answer(png())}) as web:
        pq.write_table(pa.table({"url": [web.url("/a.png")], "caption": ["x"]}), tmp_path / "list.parquet")
        (row,) = read(tmp_path)
        assert isinstance(row, Reject) and row.reason == "private-address" and not web.asked


def test_a_large_row_group_of_urls_is_split_among_readers(tmp_path):
    pq.write_table(pa.table({"url": ["x"] * 100, "caption": ["x"] * 100}), tmp_path / "list.parquet")
    assert [len(together) for together in by_shard(find_units(str(tmp_path), 4))] == [16, 9]
