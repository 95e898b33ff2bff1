"""De-duplication: the first one stays, whatever is killed and added in between."""

import io
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from skimage import data

from pipelines.duplicates import STAGED, move_into_place, perceptual_hash, verdicts
from pipelines.output_store import Output
from pipelines.token_format import TokenFormat, shard_name, unit_name
from pipelines.token_shards import count, write_unit

SCHEMA = TokenFormat(grid_height=1, grid_width=1, codebook_size=9, vqgan_digest="0", phash=True).schema()


def stage(output: Output, unit: str, rows: list[tuple[str, int]]) -> None:
    """A staged unit of rows (content, look)."""
    values = [
        {"id": f"{unit}/{i}", "tokens": [1], "caption": "c", "width": 1, "height": 1, "aesthetic": None,
         "sha256": f"{ord(content):016x}" + "0" * 48, "phash": look}
        for i, (content, look) in enumerate(rows)
    ]  # fmt: skip
    reject = {"id": f"{unit}/bad", "stage": "decode", "reason": "damaged-image", "detail": "d"}
    write_unit(output / STAGED, unit, pa.Table.from_pylist(values, schema=SCHEMA), [reject])


UNITS = {
    "a": [("x", 1), ("y", 2), ("x", 1)],
    "b": [("y", 2), ("z", 2), ("w", 2**64 - 1)],
    "c": [],
    "d": [("w", 2**64 - 1), ("v", 1), ("u", 7)],
}
KEPT = {"exact": {"a/0", "a/1", "b/1", "b/2", "d/1", "d/2"}, "perceptual": {"a/0", "a/1", "b/2", "d/2"}}


def ids(output: Output) -> list[str]:
    names = sorted(name for name in output.names() if name.startswith("part-"))
    return [id for name in names for id in pq.read_table(io.BytesIO(output.read(name)))["id"].to_pylist()]


@pytest.mark.parametrize("kind", KEPT)
def test_the_first_stays_and_everything_is_counted(tmp_path, kind):
    output = Output(str(tmp_path))
    for unit, rows in UNITS.items():
        stage(output, unit, rows)
    for unit, verdict in list(verdicts(output, [], list(UNITS), kind == "perceptual")):
        move_into_place(output, unit, verdict)
    assert set(ids(output)) == KEPT[kind]
    counts = count(output, list(UNITS))
    assert counts.rows_in == 13 and counts.rejected == {"damaged-image": 4}
    near = {"near-duplicate": 2} if kind == "perceptual" else {}
    assert counts.filtered == {"exact-duplicate": 3} | near
    assert not (output / STAGED).names()


def test_kills_and_later_shards_change_nothing(tmp_path):
    """Units are moved in any order, with kills before and after each write, and a unit that sorts first comes later."""
    rng = random.Random(0)
    for attempt in range(20):
        output = Output(str(tmp_path / str(attempt)))
        for unit, rows in UNITS.items():
            stage(output, unit, rows)
        missing = list(UNITS)
        while missing:
            there = [unit_name(name) for name in output.names() if name.startswith("part-")]
            todo = list(verdicts(output, there, missing, perceptual=True))
            rng.shuffle(todo)
            for unit, verdict in todo[: rng.randrange(1, len(todo) + 1)]:
                move_into_place(output, unit, verdict)
            missing = [unit for unit in UNITS if shard_name(unit) not in output.names()]
        assert set(ids(output)) == KEPT["perceptual"]
        stage(output, "0", [("x", 1), ("n", 50)])
        ((unit, verdict),) = verdicts(output, list(UNITS), ["0"], perceptual=True)
        move_into_place(output, unit, verdict)
        assert set(ids(output)) == KEPT["perceptual"] | {"0/1"}


def recompressed(image: Image.Image, quality: int, scale: float = 1) -> np.ndarray:
    file = io.BytesIO()
    image.resize((round(image.width * scale), round(image.height * scale))).save(file, "JPEG", quality=quality)
    return np.array(Image.open(file))


def test_perceptual_hashes_survive_compression_and_scaling_but_tell_pictures_apart():
    rng = np.random.default_rng(0)
    pictures = []
    for photo in (data.astronaut(), data.coffee(), data.chelsea(), data.rocket()):
        for _ in range(15):
            side = int(rng.uniform(0.45, 0.9) * min(photo.shape[:2]))
            top, left = rng.integers(photo.shape[0] - side + 1), rng.integers(photo.shape[1] - side + 1)
            pictures.append(Image.fromarray(photo[top : top + side, left : left + side]))
    hashes = [perceptual_hash(recompressed(picture, 92)) for picture in pictures]
    assert len(set(hashes)) == len(pictures)
    again = [perceptual_hash(recompressed(picture, 70, 0.7)) for picture in pictures]
    assert np.mean([one == other for one, other in zip(hashes, again, strict=True)]) > 0.75
