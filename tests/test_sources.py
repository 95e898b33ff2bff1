"""Units and samples of both layouts; what cannot be used is named, and never mixed up with what can."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from pipelines.image_sets import captions, decode_all
from pipelines.img2dataset_layout import write_folder, write_webdataset
from pipelines.scenes import scenes
from pipelines.source_contract import Reject, Sample
from pipelines.source_files import IMAGE_SUFFIXES
from pipelines.sources import find_units, read_unit


def png(colour=(200, 30, 30), size=(20, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def write_files(root, files):
    for name, data in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def read_all(path, rows_per_unit=1024):
    return [row for unit in find_units(path, rows_per_unit) for row in read_unit(unit)]


def reasons(rows):
    return {row.id: row.reason for row in rows if isinstance(row, Reject)}


HOSTILE = [
    ("good.png", png()), ("good.txt", b" a plate \n"),
    ("nocaption.jpg", png()),
    ("empty.jpg", png()), ("empty.txt", b" \n"),
    ("latin1.webp", png()), ("latin1.txt", "caf\xe9".encode("latin-1")),
    ("twice.jpg", png()), ("twice.png", png()), ("twice.txt", b"one caption, two images"),
]  # fmt: skip
HOSTILE_REASONS = {
    "nocaption": "no-caption",
    "empty": "empty-caption",
    "latin1": "caption-not-utf8",
    "twice": "duplicate-key",
}


@pytest.mark.parametrize("write", [write_folder, write_webdataset])
@pytest.mark.parametrize("rows_per_unit", [1024, 3])
def test_both_img2dataset_layouts_give_every_sample_once(tmp_path, write, rows_per_unit):
    root = write(tmp_path / "set", scenes(10, seed=0, held_out=False), shard_size=4)
    units = find_units(str(root), rows_per_unit)
    rows = [row for unit in units for row in read_unit(unit)]
    assert all(isinstance(row, Sample) for row in rows)
    keys = [f"{shard:05d}{index:04d}" for shard, count in ((0, 4), (1, 4), (2, 2)) for index in range(count)]
    in_folder = write is write_folder
    assert [row.id for row in rows] == [f"{key[:5]}/{key}" if in_folder else key for key in keys]
    for row, key in zip(rows, keys, strict=True):
        original = tmp_path / "set" / key[:5] / key
        if in_folder:
            assert row.image == original.with_suffix(".jpg").read_bytes()
            assert row.caption == original.with_suffix(".txt").read_text()
        assert row.image.startswith(b"\xff\xd8") and row.caption.startswith("a ")
    assert max(unit.num_samples for unit in units) <= rows_per_unit
    assert len({unit.name for unit in units}) == len(units)
    assert find_units(str(root), rows_per_unit) == units


def test_both_layouts_hold_the_same(tmp_path):
    sequence = scenes(6, seed=3, held_out=False)
    folder = read_all(str(write_folder(tmp_path / "folder", sequence, shard_size=4)))
    tars = read_all(str(write_webdataset(tmp_path / "tars", sequence, shard_size=4)))
    assert [(row.image, row.caption) for row in folder] == [(row.image, row.caption) for row in tars]


def test_hostile_files_in_a_folder(tmp_path):
    write_files(tmp_path, [*HOSTILE, ("README.txt", b"about these pictures"), ("_tmp/part.jpg", png())])
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "dangling.txt").write_text("a link to nothing")
    rows = read_all(str(tmp_path))
    assert reasons(rows) == HOSTILE_REASONS | {"dangling": "unreadable-file"}
    assert [row for row in rows if isinstance(row, Sample)] == [Sample("good", png(), "a plate")]


def test_hostile_members_of_a_tar(tmp_path):
    repeated = [("again.jpg", png()), ("again.txt", b"first"), ("again.jpg", png()), ("again.txt", b"second")]
    write_tar(tmp_path / "a.tar", HOSTILE + repeated + [("lonely.txt", b"no image")])
    rows = read_all(str(tmp_path), rows_per_unit=2)
    expected = HOSTILE_REASONS | {"again": "duplicate-key", "lonely": "no-image"}
    assert reasons(rows) == {f"a/{key}": reason for key, reason in expected.items()}
    assert [row for row in rows if isinstance(row, Sample)] == [Sample("a/good", png(), "a plate")]


def test_an_unfinished_tar_is_left_out_and_a_plain_one_is_not(tmp_path):
    root = write_webdataset(tmp_path / "set", scenes(6, seed=0, held_out=False), shard_size=2)
    (root / "00001_stats.json").unlink()
    write_tar(root / "_tmp" / "00009.tar", [("x.png", png()), ("x.txt", b"half written")])
    assert {row.id[:5] for row in read_all(str(root))} == {"00000", "00002"}
    for stats in root.glob("*_stats.json"):
        stats.unlink()
    assert [row.id for row in read_all(str(root))][2:4] == ["00001/000010000", "00001/000010001"]


def test_ids_stay_unique_where_tars_repeat_their_keys(tmp_path):
    for name in ("a.tar", "b.tar", "sub/a.tar"):
        write_tar(tmp_path / name, [("0.png", png()), ("0.txt", b"a plate")])
    assert [row.id for row in read_all(str(tmp_path))] == ["a/0", "b/0", "sub/a/0"]
    for part in ("one", "two"):
        write_webdataset(tmp_path / "runs" / part, scenes(1, seed=0, held_out=False))
    assert [row.id for row in read_all(str(tmp_path / "runs"))] == ["one/000000000", "two/000000000"]


def test_a_unit_is_named_after_its_samples(tmp_path):
    write_files(tmp_path, [(f"{i}{s}", d) for i in (1, 3, 5, 7) for s, d in ((".png", png()), (".txt", b"x"))])
    before = [unit.name for unit in find_units(str(tmp_path), 2)]
    write_files(tmp_path, [("6.png", png()), ("6.txt", b"x")])
    after = [unit.name for unit in find_units(str(tmp_path), 2)]
    assert after[0] == before[0] and before[1] not in after


def test_names_that_are_not_utf8(tmp_path):
    for suffix, data in ((b".png", png()), (b".txt", b"a plate")):
        with open(bytes(tmp_path) + b"/caf\xe9" + suffix, "wb") as file:
            file.write(data)
    assert read_all(str(tmp_path)) == [Sample("caf\\xe9", png(), "a plate")]


def test_a_user_s_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a directory"):
        find_units(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="has no images"):
        find_units(str(tmp_path))
    write_files(tmp_path / "a", [(f"x{suffix}", png()) for suffix in IMAGE_SUFFIXES])
    with pytest.raises(ValueError, match="has no captions: each image needs"):
        find_units(str(tmp_path / "a"))


def test_decode_all_selects_evenly_and_leaves_out_what_it_cannot_read(tmp_path, capsys):
    for i in range(10):
        write_files(tmp_path, [(f"{i}.png", png((20 * i, 0, 0))), (f"{i}.txt", b"x")])
    every = decode_all(str(tmp_path), 8, 100)
    assert every.shape == (10, 8, 8, 3) and every.dtype == np.uint8
    assert every[:, 4, 4, 0].tolist() == [20 * i for i in range(10)]
    assert decode_all(str(tmp_path), 8, 4)[:, 4, 4, 0].tolist() == [0, 40, 100, 140]
    assert capsys.readouterr().out == ""
    (tmp_path / "3.png").write_bytes(b"<html>not found</html>")
    assert len(decode_all(str(tmp_path), 8, 100)) == 9
    assert "1 of 10 images" in capsys.readouterr().out
    for i in range(10):
        (tmp_path / f"{i}.png").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="none of the images"):
        decode_all(str(tmp_path), 8, 100)


def test_decode_all_is_the_same_for_both_layouts(tmp_path):
    sequence = scenes(7, seed=1, held_out=False)
    folder, tars = write_folder(tmp_path / "f", sequence, 3), write_webdataset(tmp_path / "t", sequence, 3)
    assert np.array_equal(decode_all(str(folder), 32, 5), decode_all(str(tars), 32, 5))


def test_captions(tmp_path):
    root = write_webdataset(tmp_path / "set", scenes(5, seed=0, held_out=False), shard_size=2)
    every = [row.caption for row in read_all(str(root))]
    assert captions(str(root), 3) == every[:3]
    assert captions(str(root), 99) == every
