"""Tars whole, in slices and damaged: every good row read, every bad one named, nothing twice."""

import io
import json
import pickle
import tarfile

import pytest
from test_sources import png, reasons, write_tar

from pipelines import tar_walk
from pipelines.img2dataset_layout import write_webdataset
from pipelines.scenes import scenes
from pipelines.source_contract import Filtered, Reject, Sample, SourceConfig
from pipelines.sources import by_shard, find_units, read_unit, read_units


def read(path, rows_per_unit=1024, source=None):
    return [row for unit in find_units(str(path), rows_per_unit, source) for row in read_unit(unit)]


def good(rows):
    return [row.id for row in rows if isinstance(row, Sample)]


def shard(keys, caption=b"a plate"):
    return [file for key in keys for file in ((f"{key}.png", png()), (f"{key}.txt", caption))]


def append(path, *members):
    """Add members (TarInfo, data) to a tar as they are."""
    with tarfile.open(path, "a") as tar:
        for member, data in members:
            member.size = len(data) if member.size == 0 else member.size
            tar.addfile(member, io.BytesIO(data))


def member(name, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("rows_per_unit", [1, 2, 3, 100])
def test_slices_are_the_whole_whatever_their_size(tmp_path, rows_per_unit):
    write_tar(tmp_path / "a.tar", [*shard("abc"), ("d.txt", b"no image"), *shard("efg"), *shard("b")])
    whole = read(tmp_path)
    units = find_units(str(tmp_path), rows_per_unit)
    assert max(unit.num_samples for unit in units) <= rows_per_unit
    assert sum(unit.num_samples for unit in units) == len(whole) == 8
    assert [row for unit in units for row in read_unit(unit)] == whole
    assert [row for _, row in read_units(units)] == whole and len(by_shard(units)) == 1
    assert good(whole) == [f"a/{key}" for key in "abcefg"]
    assert reasons(whole) == {"a/d": "no-image", "a/b": "duplicate-key"}
    for unit in units:
        every = list(read_unit(pickle.loads(pickle.dumps(unit))))
        for row in range(unit.num_samples):
            assert list(read_unit(unit, [row])) == [every[row]]
        assert len(pickle.dumps(unit)) < 3000


@pytest.mark.parametrize("rows_per_unit", [2, 3, 100])
def test_units_that_are_left_are_read_alone(tmp_path, rows_per_unit):
    """After a kill, some units of a shard are finished."""
    root = write_webdataset(tmp_path / "set", scenes(11, seed=0, held_out=False), shard_size=11)
    write_tar(tmp_path / "plain" / "a.tar", shard("abcdefghijk"))
    for path in (root, tmp_path / "plain"):
        units = find_units(str(path), rows_per_unit)
        whole = {unit.name: [row for found, row in read_units(units) if found == unit] for unit in units}
        left = units[1::2]
        if left:
            expected = [(unit.name, row) for unit in left for row in whole[unit.name]]
            assert [(unit.name, row) for unit, row in read_units(left)] == expected


def test_what_is_known_of_a_sample(tmp_path):
    known = {"original_width": 900, "width": 64, "HEIGHT": 700, "AESTHETIC_SCORE": 6.5, "punsafe": "0.25", "pwatermark": None,
             "similarity": float("nan"), "sha256": "ab", "url": "http://a/b", "key": "0", "caption": "of the json"}  # fmt: skip
    files = [("0.png", png()), ("0.json", json.dumps(known).encode()), ("0.txt", b"of the txt")]
    write_tar(tmp_path / "a.tar", files)
    (row,) = read(tmp_path)
    assert row.caption == "of the txt"
    assert row.meta == {"width": 900, "height": 700, "aesthetic": 6.5, "punsafe": 0.25, "sha256": "ab", "url": "http://a/b"}
    (row,) = read(tmp_path, source=SourceConfig(caption_column="caption"))
    assert row.caption == "of the json"
    write_tar(tmp_path / "a.tar", files[:2])
    assert read(tmp_path)[0].caption == "of the json"  # where there is no .txt


def test_unwanted_samples_are_filtered(tmp_path):
    files = [
        file
        for n in range(4)
        for file in ((f"{n}.png", png()), (f"{n}.txt", b"x" * (n + 1)), (f"{n}.json", b'{"width": %d}' % n))
    ]
    write_tar(tmp_path / "a.tar", files)
    (unit,) = find_units(str(tmp_path))

    def wanted(caption, meta):
        return "short" if len(caption) < 2 else "narrow" if meta["width"] == 2 else None

    rows = list(read_unit(unit, wanted=wanted))
    assert rows[0] == Filtered("a/0", "short") and rows[2] == Filtered("a/2", "narrow")
    assert good(rows) == ["a/1", "a/3"]


def test_a_hostile_tar(tmp_path, monkeypatch):
    """Good samples stand between bad ones of every kind."""
    monkeypatch.setattr(tar_walk, "MAX_MEMBERS", 4)
    path = tmp_path / "a.tar"
    write_tar(
        path,
        [*shard(["g1"]), ("large.png", bytes(5000)), ("large.txt", b"x"), *shard(["g2"]),
         ("deep.png", png()), ("deep.txt", b"x"), ("deep.json", b"[" * 100_000), ("list.png", png()), ("list.txt", b"x"),
         ("list.json", b"[1]"), ("half.png", png()), ("half.json", b'{"caption": "\\ud800"}'), ("number.png", png()),
         ("number.json", b'{"caption": 5}'), *[(f"many.{n}", b"") for n in range(9)], ("two.json", b"{}"), ("two.json", b"{}"),
         ("two.png", png()), ("two.txt", b"x")],
    )  # fmt: skip
    append(
        path,
        (member("link.png", tarfile.SYMTYPE, "/etc/passwd"), b""),
        (member("link.txt"), b"a link"),
        (member("hard.png", tarfile.LNKTYPE, "g1.png"), b""),
        (member("hard.txt"), b"a link"),
        (member("device.png", tarfile.CHRTYPE), b""),
        (member("fifo.txt", tarfile.FIFOTYPE), b""),
        (member("directory", tarfile.DIRTYPE), b""),
        (member("../../outside.png"), png()),
        (member("../../outside.txt"), b"x"),
        (member("/absolute.png"), png()),
        (member("/absolute.txt"), b"x"),
        (member("x" * 300 + ".png"), png()),
        (member("x" * 300 + ".txt"), b"a long name"),
        *[(member(name), data) for name, data in shard(["sub/dir/g3"])],
    )
    rows = read(tmp_path, source=SourceConfig(max_image_bytes=4000))
    assert good(rows) == ["a/g1", "a/g2", "a/list", "a/" + "x" * 300, "a/sub/dir/g3"]
    assert reasons(rows) == {
        "a/large": "too-large",
        "a/deep": "json-not-readable",
        "a/half": "caption-not-utf8",
        "a/number": "empty-caption",
        "a/many": "unsafe-member",
        "a/two": "duplicate-key",
        "a/link": "unsafe-member",
        "a/hard": "unsafe-member",
        "a/device": "unsafe-member",
        "a/fifo": "unsafe-member",
        "a/../../outside": "unsafe-member",
        "a/absolute": "unsafe-member",
    }
    for row in rows:
        row.id.encode()
    assert [row for unit in find_units(str(tmp_path), 2, SourceConfig(max_image_bytes=4000)) for row in read_unit(unit)] == rows


def cut_points(path):
    """A place in each part of a tar: headers, data, padding, between samples, before and in the end mark."""
    with tarfile.open(path) as tar:
        places = [
            place
            for m in tar
            for place in (m.offset, m.offset + 100, m.offset_data, m.offset_data + m.size // 2, m.offset_data + m.size)
        ]
    return sorted({*places, places[-1] + 512, 0})


@pytest.mark.parametrize("rows_per_unit", [1, 2, 100])
def test_a_tar_cut_anywhere_gives_what_lies_before_and_says_that_it_is_cut(tmp_path, rows_per_unit):
    whole = tmp_path / "whole.tar"
    write_tar(whole, shard("abcd"))
    content, cut = whole.read_bytes(), tmp_path / "cut" / "a.tar"
    cut.parent.mkdir()
    with tarfile.open(whole) as tar:
        ends = {m.name.removesuffix(".txt"): m.offset_data + m.size for m in tar if m.name.endswith(".txt")}
    for length in cut_points(whole):
        cut.write_bytes(content[:length])
        units = find_units(str(cut.parent), rows_per_unit)
        rows = [row for unit in units for row in read_unit(unit)]
        assert len(rows) == sum(unit.num_samples for unit in units), length
        assert good(rows) == [f"a/{key}" for key, end in ends.items() if end <= length], length
        assert isinstance(rows[-1], Reject) and (rows[-1].id, rows[-1].reason) == ("a.tar", "damaged-shard"), length
        assert [row for _, row in read_units(units)] == rows, length


@pytest.mark.parametrize("rows_per_unit", [2, 100])
def test_bytes_overwritten_in_the_middle_are_damage_not_the_end(tmp_path, rows_per_unit):
    path = tmp_path / "a.tar"
    write_tar(path, shard("abcd"))
    with tarfile.open(path) as tar:
        third = tar.getmember("c.png").offset
    content = bytearray(path.read_bytes())
    content[third : third + 512] = b"\x55" * 512
    path.write_bytes(content)
    rows = read(tmp_path, rows_per_unit)
    assert good(rows) == ["a/a", "a/b"] and reasons(rows) == {"a.tar": "damaged-shard"}
    assert "header is damaged" in rows[-1].detail


def test_headers_that_ask_for_gigabytes_or_for_endless_recursion(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, shard("a"))
    content = path.read_bytes()[: 4 * 512]  # a.png, a.txt
    greedy = member("pax", tarfile.XHDTYPE)
    greedy.size = 5 << 30
    path.write_bytes(content + greedy.tobuf(tarfile.USTAR_FORMAT) + bytes(2048))
    rows = read(tmp_path)
    assert good(rows) == ["a/a"] and reasons(rows) == {"a.tar": "damaged-shard"}
    nested = member("pax", tarfile.XHDTYPE).tobuf(tarfile.USTAR_FORMAT) * 5000
    path.write_bytes(content + nested + bytes(2048))
    rows = read(tmp_path)
    assert good(rows) == ["a/a"] and reasons(rows) == {"a.tar": "damaged-shard"}


def test_what_was_walked_is_not_walked_again(tmp_path, monkeypatch):
    root = finished(tmp_path, 40, 40)
    units = find_units(str(root), 5)
    walked = []
    real = tar_walk._split
    monkeypatch.setattr(tar_walk, "_split", lambda name: walked.append(name) or real(name))
    rows = [row for unit in units for row in read_unit(unit)]
    assert good(rows) == [f"0000000{n:02d}" for n in range(40)]
    assert len(walked) < 1.3 * 40 * 3  # a unit sees the header after its last sample, too
    assert [row for _, row in read_units(units)] == rows
    assert [row for unit in reversed(units) for row in reversed(list(read_unit(unit)))] == rows[::-1]


def finished(tmp_path, num=7, shard_size=7):
    return write_webdataset(tmp_path / "set", scenes(num, seed=0, held_out=False), shard_size=shard_size)


@pytest.mark.parametrize("rows_per_unit", [2, 3, 100])
def test_a_finished_tar_that_was_damaged_later(tmp_path, rows_per_unit):
    """img2dataset's table says what was in it: every row is accounted for by name."""
    root = finished(tmp_path)
    tar = root / "00000.tar"
    with tarfile.open(tar) as opened:
        fourth = opened.getmember("000000003.jpg")
    tar.write_bytes(tar.read_bytes()[: fourth.offset_data + 10])
    units = find_units(str(root), rows_per_unit)
    rows = [row for unit in units for row in read_unit(unit)]
    assert good(rows) == [f"00000000{n}" for n in range(3)]
    found = reasons(rows)
    assert found.pop("00000.tar") == "damaged-shard"
    assert found == {"000000003": "truncated-member"} | {f"00000000{n}": "missing-sample" for n in (4, 5, 6)}
    assert len(rows) == 8  # its seven rows, and the damage
    assert sorted(row.id for _, row in read_units(units)) == sorted(row.id for row in rows)
    for unit in units:  # those who ask for rows get as many
        assert len(list(read_unit(unit, range(unit.num_samples)))) == unit.num_samples


def test_members_that_were_removed_or_added(tmp_path):
    root = finished(tmp_path)
    with tarfile.open(root / "00000.tar") as tar:
        kept = [(m.name, tar.extractfile(m).read()) for m in tar if not m.name.startswith("000000002")]
    write_tar(root / "00000.tar", kept + shard(["new1", "new2"]))
    rows = read(root, 3)
    assert good(rows) == [f"00000000{n}" for n in (0, 1, 3, 4, 5, 6)] + ["new1", "new2"]
    assert reasons(rows) == {"000000002": "missing-sample"}


def test_a_tar_without_its_table(tmp_path):
    root = finished(tmp_path)
    (root / "00000.parquet").unlink()
    assert len(good(read(root, 3))) == 7


def test_listing_opens_no_finished_tar_and_names_follow_contents(tmp_path, monkeypatch):
    root = finished(tmp_path, 8, 4)
    before = find_units(str(root), 3)
    monkeypatch.setattr(tar_walk, "_TarFile", lambda *_: pytest.fail("a finished tar was opened"))
    assert find_units(str(root), 3) == before and [unit.num_samples for unit in before] == [3, 1, 3, 1]
    stats = root / "00001_stats.json"
    stats.write_text(stats.read_text().replace('"duration": ', '"duration": 1'))  # written anew
    after = find_units(str(root), 3)
    assert [unit.name for unit in after[:2]] == [unit.name for unit in before[:2]]
    assert not {unit.name for unit in after[2:]} & {unit.name for unit in before}
    stats.write_text("{")
    with pytest.raises(ValueError, match=r"00001_stats\.json is not one of img2dataset's"):
        find_units(str(root), 3)
