"""Both writers keep img2dataset's layout, appear whole or not at all, and keep what is finished."""

import io
import json
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import img2dataset_layout, scene_checker, scenes

SAMPLES = scenes.scenes(5, seed=1, held_out=False)
KEYS = ["000000000", "000000001", "000010000", "000010001", "000020000"]  # shards of two
COLUMNS = [
    "caption",
    "key",
    "status",
    "error_message",
    "width",
    "height",
    "original_width",
    "original_height",
]


def check_sidecars(root):
    stats = [json.loads((root / f"{shard:05d}_stats.json").read_text()) for shard in range(3)]
    assert [(s["count"], s["successes"], s["failed_to_download"]) for s in stats] == [
        (2, 2, 0),
        (2, 2, 0),
        (1, 1, 0),
    ]
    tables = [pq.read_table(root / f"{shard:05d}.parquet") for shard in range(3)]
    assert tables[0].column_names == [*COLUMNS, "exif", "sha256"]
    rows = [row for table in tables for row in table.to_pylist()]
    assert [row["key"] for row in rows] == KEYS
    assert [row["caption"] for row in rows] == [scenes.caption(scene) for scene, _ in SAMPLES]
    assert all(row["status"] == "success" and row["width"] == row["original_height"] == 64 for row in rows)
    return rows


def check_sample(row, jpg, txt, meta):
    scene = scenes.parse_caption(txt.decode())
    assert json.loads(meta) == row and row["caption"] == txt.decode()
    picture = Image.open(io.BytesIO(jpg))
    assert picture.format == "JPEG" and picture.layer[0][1:3] == (1, 1)  # 4:4:4
    assert scene_checker.check(np.array(picture), scene)["all"]


def test_folder_layout(tmp_path):
    root = img2dataset_layout.write_folder(tmp_path / "data", SAMPLES, shard_size=2)
    for row in check_sidecars(root):
        stem = root / row["key"][:5] / row["key"]
        check_sample(row, *(stem.with_suffix(suffix).read_bytes() for suffix in (".jpg", ".txt", ".json")))
    assert len(list(root.glob("*/*"))) == 15
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_webdataset_layout(tmp_path):
    root = img2dataset_layout.write_webdataset(tmp_path / "data", SAMPLES, shard_size=2)
    rows = check_sidecars(root)
    assert sorted(p.name for p in root.glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    names = []
    for row in rows:
        with tarfile.open(root / f"{row['key'][:5]}.tar") as tar:
            names += tar.getnames()
            parts = (tar.extractfile(f"{row['key']}.{kind}").read() for kind in ("jpg", "txt", "json"))
            check_sample(row, *parts)
    assert sorted(set(names)) == sorted(f"{key}.{kind}" for key in KEYS for kind in ("jpg", "txt", "json"))


def test_the_same_samples_give_the_same_tar(tmp_path):
    tars = [img2dataset_layout.write_webdataset(tmp_path / name, SAMPLES) / "00000.tar" for name in ("a", "b")]
    assert tars[0].read_bytes() == tars[1].read_bytes()


@pytest.mark.parametrize("write", [img2dataset_layout.write_folder, img2dataset_layout.write_webdataset])
def test_finished_datasets_are_reused_and_others_refused(tmp_path, write):
    root = write(tmp_path / "data", SAMPLES, shard_size=2)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert write(root, SAMPLES, shard_size=2) == root
    assert write(root, iter(SAMPLES), shard_size=2) == root
    for other in (scenes.scenes(5, seed=2, held_out=False), scenes.scenes(6, seed=1, held_out=False)):
        with pytest.raises(ValueError, match="not the finished dataset"):
            write(root, other, shard_size=2)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before
    opposite = {
        img2dataset_layout.write_folder: img2dataset_layout.write_webdataset,
        img2dataset_layout.write_webdataset: img2dataset_layout.write_folder,
    }[write]
    with pytest.raises(ValueError, match="not the finished dataset"):
        opposite(root, SAMPLES, shard_size=2)
    (root / "00001_stats.json").unlink()
    with pytest.raises(ValueError, match="not the finished dataset"):
        write(root, SAMPLES, shard_size=2)


@pytest.mark.parametrize("write", [img2dataset_layout.write_folder, img2dataset_layout.write_webdataset])
def test_an_interrupted_write_leaves_nothing(tmp_path, write):
    def interrupted():
        yield from list(SAMPLES)[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "data", interrupted(), shard_size=2)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="shard_size"):
        write(tmp_path / "data", SAMPLES, shard_size=0)
