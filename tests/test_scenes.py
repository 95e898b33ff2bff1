"""Scenes: captions round-trip, the checker reads words back and sees wrong ones, writers keep the layout."""

import dataclasses
import io
import json
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter

from pipelines import img2dataset_layout, scene_checker, scenes

THING = scenes.SceneObject(size="large", colour="red", shape="circle")
OTHER = scenes.SceneObject(size="small", colour="blue", shape="square")
ONE = scenes.Scene(objects=(THING,), background="black", position="top left")
TWO = scenes.Scene(objects=(THING, OTHER), background="white", relation="left of")


def draw(scene, seed=0, image_size=64):
    return scenes.render(scene, np.random.default_rng(seed), image_size)


def as_jpeg(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling="4:4:4")
    return np.array(Image.open(buffer))


def blurred(image):
    return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.7)))


def noisy(image):
    noise = np.random.default_rng(int(image.sum())).normal(0, 6, image.shape)
    return (image + noise).round().clip(0, 255).astype(np.uint8)


def changed(scene, index=0, **words):
    objects = list(scene.objects)
    objects[index] = dataclasses.replace(objects[index], **words)
    return dataclasses.replace(scene, objects=tuple(objects))


@pytest.fixture(scope="module")
def drawn():
    return [*scenes.scenes(250, seed=11, held_out=False), *scenes.scenes(250, seed=12, held_out=True)]


# --- Captions -------------------------------------------------------------------------------------


def test_captions_read_as_written_in_the_documentation():
    two = changed(TWO, size="small")
    two = dataclasses.replace(changed(two, index=1, size="large"), background="black")
    assert scenes.caption(two) == "a small red circle left of a large blue square on a black background"
    assert scenes.caption(ONE) == "a large red circle at the top left on a black background"
    centre = dataclasses.replace(ONE, position="centre")
    assert scenes.caption(centre) == "a large red circle in the centre on a black background"


def test_captions_round_trip_over_all_words():
    things = [scenes.SceneObject(size=s, colour=c, shape=f) for s in scenes.SIZES for c in scenes.COLOURS for f in scenes.SHAPES]
    every = [
        scenes.Scene(objects=(thing,), background=background, position=position)
        for thing in things
        for background in scenes.BACKGROUNDS
        for position in scenes.POSITIONS
    ]
    every += [
        scenes.Scene(objects=(thing, things[(i + shift) % len(things)]), background=background, relation=relation)
        for i, thing in enumerate(things)
        for shift in (1, 17)
        for background in scenes.BACKGROUNDS
        for relation in scenes.RELATIONS
    ]
    captions = [scenes.caption(scene) for scene in every]
    assert len(set(captions)) == len(every)
    assert [scenes.parse_caption(text) for text in captions] == every


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle on a black background",
        "a large mauve circle at the top on a black background",
        "a large red circle at the centre on a black background",
        "a large red circle left of a small blue square",
        "a large red circle at the top on a black background, please",
    ],
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="not a scene's caption"):
        scenes.parse_caption(text)


def test_impossible_scenes_are_refused():
    with pytest.raises(ValueError, match="colour is 'mauve'"):
        scenes.SceneObject(size="large", colour="mauve", shape="circle")
    with pytest.raises(ValueError, match="relation"):
        scenes.Scene(objects=(THING, OTHER), background="black", position="top")
    with pytest.raises(ValueError, match="3 objects"):
        scenes.Scene(objects=(THING, OTHER, THING), background="black", relation="above")
    with pytest.raises(ValueError, match="image_size is 8"):
        draw(ONE, image_size=8)
    with pytest.raises(ValueError, match="float64"):
        scene_checker.read_scene(np.zeros((64, 64, 3)))


# --- Drawing and the split ------------------------------------------------------------------------


def test_colours_are_far_apart():
    palette = np.array([*scenes.COLOURS.values(), *scenes.BACKGROUNDS.values()], dtype=float)
    distances = np.linalg.norm(palette[:, None] - palette[None], axis=-1)
    assert distances[~np.eye(len(palette), dtype=bool)].min() >= 60


@pytest.mark.parametrize("relation", scenes.RELATIONS)
@pytest.mark.parametrize("sizes", [("large", "large"), ("small", "large"), ("small", "small")])
def test_squares_keep_their_size_a_gap_and_the_border(relation, sizes):
    objects = tuple(scenes.SceneObject(size=s, colour=c, shape="square") for s, c in zip(sizes, ("red", "blue"), strict=True))
    scene = scenes.Scene(objects=objects, background="black", relation=relation)
    for seed in range(40):
        image = draw(scene, seed)
        boxes = [np.argwhere(image[..., channel] > 110) for channel in (0, 2)]  # red, then blue
        for box, size in zip(boxes, sizes, strict=True):
            low, high = box.min(axis=0), box.max(axis=0)
            assert low.min() >= 1 and high.max() <= 62
            assert all(e in range(*((11, 15) if size == "small" else (21, 26))) for e in high - low + 1)
        gaps = np.maximum(boxes[0].min(0) - boxes[1].max(0), boxes[1].min(0) - boxes[0].max(0)) - 1
        assert gaps.max() >= 3


def test_held_out_combinations_are_a_fifth_and_never_in_training():
    rng = np.random.default_rng(5)
    drawn = [scenes.random_scene(rng) for _ in range(4000)]
    assert 0.17 < np.mean([scenes.is_held_out(scene) for scene in drawn]) < 0.23
    assert 0.30 < np.mean([scene.position is not None for scene in drawn]) < 0.37
    train = {scenes.combination(scene) for scene, _ in scenes.scenes(400, seed=3, held_out=False)}
    held_out = {scenes.combination(scene) for scene, _ in scenes.scenes(400, seed=3, held_out=True)}
    assert len(held_out) > 60 and not train & held_out


def test_a_held_out_pair_is_held_out_in_every_size_order_relation_and_background():
    mirrored = scenes.Scene(
        objects=(changed(TWO, index=1, size="large").objects[1], changed(TWO, size="small").objects[0]),
        background="brown",
        relation="above",
    )
    assert scenes.combination(TWO) == scenes.combination(mirrored) == "blue square + red circle"
    assert scenes.combination(ONE) == "large red circle"
    assert scenes.combination(changed(TWO, colour="green")) != scenes.combination(TWO)


def test_the_split_is_the_same_everywhere():
    """Golden: a change of the hash silently mixes the two parts of every existing dataset."""
    held_out = [
        f"{size} {colour} {shape}"
        for size in scenes.SIZES
        for colour in scenes.COLOURS
        for shape in scenes.SHAPES
        if scenes.is_held_out(changed(ONE, size=size, colour=colour, shape=shape))
    ]
    assert held_out == GOLDEN_HELD_OUT


GOLDEN_HELD_OUT = [
    "small yellow cross",
    "small pink triangle",
    "large yellow circle",
    "large yellow cross",
    "large purple square",
    "large cyan circle",
    "large orange square",
    "large orange cross",
    "large pink cross",
]


def test_sample_i_depends_on_seed_and_i_alone():
    long, short = scenes.scenes(50, seed=4, held_out=False), scenes.scenes(8, seed=4, held_out=False)
    for index in (7, 0, 3):
        assert long[index][0] == short[index][0]
        np.testing.assert_array_equal(long[index][1], short[index][1])
    assert len(list(short)) == len(short) == 8
    other = scenes.scenes(8, seed=5, held_out=False)
    assert [scene for scene, _ in short] != [scene for scene, _ in other]
    with pytest.raises(ValueError, match="negative"):
        scenes.scenes(8, seed=-1, held_out=False)


# --- The checker ----------------------------------------------------------------------------------


@pytest.mark.parametrize("distort", [lambda image: image, as_jpeg, blurred, noisy], ids=["clean", "jpeg", "blurred", "noisy"])
def test_checker_reads_pictures_right(drawn, distort):
    right = [scene_checker.check(distort(image), scene)["all"] for scene, image in drawn]
    assert np.mean(right) >= 0.99


def test_checker_reads_larger_pictures():
    samples = scenes.scenes(20, seed=6, held_out=False, image_size=128)
    assert samples[0][1].shape == (128, 128, 3)
    assert all(scene_checker.check(image, scene)["all"] for scene, image in samples)


@pytest.mark.parametrize("scene", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize("word", ["colour", "shape", "size", "background", "position"])
def test_checker_sees_each_single_wrong_word(scene, word):
    if word == "background":
        wrongs = [dataclasses.replace(scene, background=name) for name in scenes.BACKGROUNDS]
    elif word == "position":
        name, names = ("position", scenes.POSITIONS) if scene is ONE else ("relation", scenes.RELATIONS)
        wrongs = [dataclasses.replace(scene, **{name: value}) for value in names]
    else:
        names = {"colour": scenes.COLOURS, "shape": scenes.SHAPES, "size": scenes.SIZES}[word]
        wrongs = [changed(scene, i, **{word: name}) for i in range(len(scene.objects)) for name in names]
    wrongs = [wrong for wrong in wrongs if wrong != scene]
    assert wrongs
    for wrong in wrongs:
        expected = dict.fromkeys(("colour", "shape", "size", "position", "background"), True)
        assert scene_checker.check(draw(wrong), scene) == expected | {word: False, "all": False}, scenes.caption(wrong)


def test_random_scenes_do_not_pass_for_each_other(drawn):
    for (scene, _), (other, image) in zip(drawn[:250], drawn[250:], strict=True):
        assert not scene_checker.check(image, scene)["all"], (scene, other)


def test_swapped_objects_are_a_wrong_relation():
    swapped = dataclasses.replace(TWO, objects=TWO.objects[::-1])
    result = scene_checker.check(draw(swapped), TWO)
    assert result["colour"] and result["shape"] and result["size"]
    assert not result["position"] and not result["all"]


def test_swapped_colours_do_not_pass():
    red_circle_blue_square = draw(TWO)
    crossed = changed(changed(TWO, colour="blue"), index=1, colour="red")
    assert not scene_checker.check(red_circle_blue_square, crossed)["colour"]


def test_missing_and_extra_objects_fail_all_but_the_background():
    for scene, image in (
        (TWO, draw(scenes.Scene(objects=(THING,), background="white", position="left"))),
        (dataclasses.replace(ONE, background="white"), draw(TWO)),
        (ONE, np.zeros((64, 64, 3), np.uint8)),
    ):
        only_background = dict.fromkeys(("colour", "shape", "size", "position", "all"), False) | {"background": True}
        assert scene_checker.check(image, scene) == only_background
    image = draw(ONE)
    image[50:57, 50:57] = scenes.COLOURS["green"]
    assert not scene_checker.check(image, ONE)["all"]


def test_specks_are_not_objects_and_strange_blobs_have_no_shape():
    image = draw(ONE)
    image[50:53, 50:53] = scenes.COLOURS["green"]
    assert scene_checker.check(image, ONE)["all"]
    bar = np.zeros((64, 64, 3), np.uint8)
    bar[28:36, 20:44] = scenes.COLOURS["red"]
    corner = np.zeros((64, 64, 3), np.uint8)
    corner[20:44, 20:28] = corner[36:44, 20:44] = scenes.COLOURS["red"]
    for blob in (bar, corner):
        (thing,) = scene_checker.read_scene(blob).objects
        assert thing.colour == "red" and thing.shape is None


def test_an_object_of_two_colours_has_none():
    square = scenes.Scene(objects=(changed(ONE, shape="square").objects[0],), background="black", position="centre")
    image = draw(square)
    assert scene_checker.check(image, square)["all"]
    right = image[:, 32:]
    right[right[..., 0] > 110] = scenes.COLOURS["purple"]
    assert scene_checker.read_scene(image).objects[0].colour is None
    assert not scene_checker.check(image, square)["colour"]


def test_noise_and_flat_pictures_do_not_pass(drawn):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)]
    pictures += [np.full((64, 64, 3), colour, np.uint8) for colour in scenes.COLOURS.values()]
    for picture in pictures:
        assert not any(scene_checker.check(picture, scene)["all"] for scene, _ in drawn[:20])


# --- Writers --------------------------------------------------------------------------------------

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
