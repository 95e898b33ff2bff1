"""Whole tokenizing jobs on hostile tars and on tables of URLs: every good row written, every bad one by its name."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_image_decoding import jpeg_of_size, zip_bomb
from test_sources import write_tar
from tokenizing import config, rejects_of, rows_of, run_in_process
from web import Answer, site

from pipelines.img2dataset_layout import write_folder
from pipelines.sample_filters import FilterConfig
from pipelines.scenes import scenes
from pipelines.source_contract import FetchConfig, SourceConfig


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    root = write_folder(tmp_path_factory.mktemp("images") / "set", scenes(8, seed=4, held_out=False))
    return [file.read_bytes() for file in sorted(root.rglob("*.jpg"))]


def test_hostile_tars(tmp_path, jpegs, vqgan_bundle, capsys):
    bad = {
        "truncated": [(".jpg", jpegs[0][: len(jpegs[0]) // 2]), (".txt", b"x")],
        "html": [(".jpg", b"<!doctype html><title>404</title>"), (".txt", b"x")],
        "bomb": [(".png", zip_bomb(20_000, 20_000)), (".txt", b"x")],
        "megapixels": [(".jpg", jpeg_of_size(10_000, 10_000)), (".txt", b"x")],
        "blank": [(".jpg", jpegs[0]), (".txt", b" \n")],
        "latin1": [(".jpg", jpegs[0]), (".txt", b"caf\xe9")],
        "uncaptioned": [(".jpg", jpegs[0])],
        "imageless": [(".txt", b"x"), (".json", b"{}")],
        "double": [(".jpg", jpegs[0]), (".png", jpegs[0]), (".txt", b"x")],
        "json": [(".jpg", jpegs[0]), (".txt", b"x"), (".json", b"{half")],
        "good0": [(".jpg", jpegs[1]), (".txt", b"the same key again")],
    }
    files = []
    for number, (name, members) in enumerate(bad.items()):
        files += [(f"good{number}.jpg", jpegs[number % 8]), (f"good{number}.txt", b"a scene")]
        files += [(f"{name}{suffix}", data) for suffix, data in members]
    write_tar(tmp_path / "in" / "hostile.tar", files)
    with tarfile.open(tmp_path / "in" / "hostile.tar", "a") as tar:
        for name, data in (("link.jpg", b""), ("link.txt", b"x"), ("../out.jpg", jpegs[0]), ("../out.txt", b"x")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.type, member.linkname = (tarfile.REGTYPE, "") if data else (tarfile.SYMTYPE, "/etc/passwd")
            tar.addfile(member, io.BytesIO(data))
    write_tar(tmp_path / "in" / "torn.tar", [(f"{n}{s}", d) for n in range(4) for s, d in ((".jpg", jpegs[n]), (".txt", b"x"))])
    torn = tmp_path / "in" / "torn.tar"
    with tarfile.open(torn) as tar:
        cut = tar.getmember("2.jpg").offset_data + 100
    torn.write_bytes(torn.read_bytes()[:cut])  # half written

    output = run_in_process(config(tmp_path / "in", vqgan_bundle, tmp_path / "out", rows_per_unit=100))
    assert set(rows_of(output)) == {f"hostile/good{n}" for n in range(len(bad))} | {"torn/0", "torn/1"}
    assert rejects_of(output) == {
        "hostile/truncated": "damaged-image",
        "hostile/html": "not-an-image",
        "hostile/bomb": "too-large",
        "hostile/megapixels": "too-large",
        "hostile/blank": "empty-caption",
        "hostile/latin1": "caption-not-utf8",
        "hostile/uncaptioned": "no-caption",
        "hostile/imageless": "no-image",
        "hostile/double": "duplicate-key",
        "hostile/json": "json-not-readable",
        "hostile/good0": "duplicate-key",
        "hostile/link": "unsafe-member",
        "hostile/../out": "unsafe-member",
        "torn/2": "truncated-member",
        "torn.tar": "damaged-shard",
    }
    assert "rows in 28 = written 13 + filtered 0 + rejected 15" in capsys.readouterr().out


def test_urls_are_fetched_in_the_job_and_only_those_wanted(tmp_path, jpegs, vqgan_bundle, capsys):
    pages = {f"/{n}.jpg": Answer(data) for n, data in enumerate(jpegs)}
    pages["/0.jpg"] = Answer(jpegs[0], headers=[("X-Robots-Tag", "noai")])
    with site(pages) as web:
        rows = [{"URL": web.url(f"/{n}.jpg"), "TEXT": f"scene {n}", "AESTHETIC_SCORE": 5 + n % 2 * 2.0} for n in range(10)]
        rows += [{"URL": web.url("/0.jpg"), "TEXT": "not to be used", "AESTHETIC_SCORE": 9.0}]
        (tmp_path / "in").mkdir()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / "laion.parquet")
        source = SourceConfig(fetch=FetchConfig(allow_private_addresses=True, retries=0))
        filters = FilterConfig(min_aesthetic=6.0)
        output = run_in_process(config(tmp_path / "in", vqgan_bundle, tmp_path / "out", source=source, filters=filters))
        assert set(web.asked) == {f"/{n}.jpg" for n in (0, 1, 3, 5, 7, 9)}  # 9 is not there
        assert sum(web.asked.values()) < 2 * 6  # some again for the contact sheet
    written = rows_of(output)
    assert {id: row["caption"] for id, row in written.items()} == {f"laion/{n:08d}": f"scene {n}" for n in (1, 3, 5, 7)}
    assert all(row["aesthetic"] == 7.0 and len(row["sha256"]) == 64 for row in written.values())
    rejects = rejects_of(output)
    assert rejects["laion/00000009"] == "http-404" and rejects["laion/00000010"] == "opted-out"
    assert json.loads((output / "dataset.json").read_text())["filters"] == {"min-aesthetic": 5}
    assert "rows in 11 = written 4 + filtered 5 + rejected 2" in capsys.readouterr().out
