"""Folders with metadata.jsonl or .csv, with .json files, and of img2dataset."""

import json

import pytest
from test_sources import png, reasons, write_files

from pipelines.img2dataset_layout import write_folder
from pipelines.scenes import scenes
from pipelines.source_contract import Filtered, Sample, SourceConfig
from pipelines.sources import find_units, read_unit, read_units


def read(path, rows_per_unit=1024, source=None, wanted=None):
    units = find_units(str(path), rows_per_unit, source)
    assert max(unit.num_samples for unit in units) <= rows_per_unit and len({unit.name for unit in units}) == len(units)
    rows = [row for unit in units for row in read_unit(unit, wanted=wanted)]
    assert len(rows) == sum(unit.num_samples for unit in units)
    for unit in units:
        assert [row for _, row in read_units([unit], wanted)] == [
            row for number in range(unit.num_samples) for row in read_unit(unit, [number], wanted)
        ]
    return rows


def good(rows):
    return {row.id: row.caption for row in rows if isinstance(row, Sample)}


def jsonl(*rows):
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


@pytest.mark.parametrize("rows_per_unit", [2, 100])
def test_metadata_jsonl(tmp_path, rows_per_unit):
    metadata = jsonl(
        {"file_name": "a.png", "text": "a plate", "width": 20},
        {"file_name": "sub/b.png", "text": " b "},
        {"file_name": "gone.png", "text": "x"},
        b"{half",
        b"",
        {"file_name": "a.png", "text": "again"},
        {"file_name": "../outside.png", "text": "x"},
        {"file_name": "/etc/passwd", "text": "x"},
        {"file_name": "c.png", "text": ""},
        {"file_name": "d.png"},
        {"file_name": 5, "text": "x"},
        [1],
        {"file_name": "e.png", "text": "\ud800"},
        {"file_name": "large.png", "text": "x"},
        b'{"file_name": "f.png", "text": "caf\xe9"}',
        {"file_name": "g.png", "text": "last"},
    )
    names = ["a.png", "sub/b.png", "c.png", "d.png", "e.png", "f.png", "g.png"]
    write_files(tmp_path / "set", [("metadata.jsonl", metadata), *[(name, png()) for name in names]])
    write_files(tmp_path / "set", [("large.png", bytes(5000)), ("unlisted.png", png()), ("own.png", png()), ("own.txt", b"own")])
    write_files(tmp_path, [("outside.png", png())])
    rows = read(tmp_path / "set", rows_per_unit, SourceConfig(max_image_bytes=4000))
    assert good(rows) == {"a.png": "a plate", "sub/b.png": "b", "g.png": "last", "own": "own"}
    assert rows[0].meta == {"width": 20}
    assert reasons(rows) == {
        "gone.png": "no-image",
        "./metadata#3": "metadata-not-readable",
        "a.png": "duplicate-key",
        "./metadata#5": "unsafe-member",
        "./metadata#6": "unsafe-member",
        "c.png": "empty-caption",
        "d.png": "empty-caption",
        "./metadata#9": "unsafe-member",
        "./metadata#10": "metadata-not-readable",
        "e.png": "caption-not-utf8",
        "large.png": "too-large",
        "f": "no-caption",
        "./metadata#13": "metadata-not-readable",
        "unlisted": "no-caption",
    }


@pytest.mark.parametrize("rows_per_unit", [1, 100])
def test_metadata_csv(tmp_path, rows_per_unit):
    metadata = b'\xef\xbb\xbffile_name,caption,aesthetic\r\na.png,"two\nlines, and ""quotes""",6.5\r\nb.png,only two\r\n'
    metadata += b"c.png,caf\xe9,1\r\nd.png,d,x\r\n"
    write_files(tmp_path, [("train/metadata.csv", metadata), *[(f"train/{name}.png", png()) for name in "abcd"]])
    rows = read(tmp_path, rows_per_unit)
    assert good(rows) == {"train/a.png": 'two\nlines, and "quotes"', "train/d.png": "d"}
    assert rows[0].meta == {"aesthetic": 6.5} and rows[3].meta == {}
    assert reasons(rows) == {
        "train/metadata#1": "metadata-not-readable",
        "train/c.png": "caption-not-utf8",
        "train/b": "no-caption",
    }


def test_the_caption_column_is_named_or_found(tmp_path):
    write_files(tmp_path, [("a.png", png()), ("metadata.jsonl", jsonl({"file_name": "a.png", "Title": "t", "Caption": "c"}))])
    assert good(read(tmp_path)) == {"a.png": "c"}
    assert good(read(tmp_path, source=SourceConfig(caption_column="title"))) == {"a.png": "t"}
    (tmp_path / "metadata.jsonl").write_bytes(jsonl({"file": "a.png", "title": "t"}))
    with pytest.raises(ValueError, match=r"metadata\.jsonl needs columns file_name and caption or .* but has file, title"):
        find_units(str(tmp_path))


def test_units_are_named_after_rows_and_images(tmp_path):
    rows = [{"file_name": f"{n}.png", "text": f"picture {n}"} for n in range(6)]
    write_files(tmp_path, [("metadata.jsonl", jsonl(*rows)), *[(f"{n}.png", png()) for n in range(6)]])
    before = [unit.name for unit in find_units(str(tmp_path), 2)]
    write_files(tmp_path, [("metadata.jsonl", jsonl(*rows, {"file_name": "new.png", "text": "x"})), ("new.png", png())])
    assert [unit.name for unit in find_units(str(tmp_path), 2)][:3] == before
    (tmp_path / "3.png").write_bytes(png(size=(30, 30)))
    after = [unit.name for unit in find_units(str(tmp_path), 2)]
    assert after[0] == before[0] and after[1] != before[1] and after[2] == before[2]


def test_unwanted_samples_and_json_beside_images(tmp_path):
    for n in range(3):
        write_files(tmp_path, [(f"{n}.png", png()), (f"{n}.json", json.dumps({"caption": f"c{n}", "punsafe": n / 2}).encode())])
    rows = read(tmp_path, wanted=lambda caption, meta: "unsafe" if meta["punsafe"] > 0.5 else None)
    assert good(rows) == {"0": "c0", "1": "c1"} and rows[2] == Filtered("2", "unsafe")


def test_only_finished_folders_of_img2dataset_and_files_that_are_lost(tmp_path):
    root = write_folder(tmp_path / "set", scenes(7, seed=0, held_out=False), shard_size=3)
    assert len(good(read(root, 2))) == 7
    (root / "00001_stats.json").unlink()
    (root / "00000" / "000000001.jpg").unlink()
    rows = read(root, 2)
    assert list(good(rows)) == ["00000/000000000", "00000/000000002", "00002/000020000"]
    assert reasons(rows) == {"00000/000000001": "missing-sample"}
