"""Scenes: captions round-trip, drawings keep their sizes and gaps, the held-out split never moves."""

import dataclasses

import numpy as np
import pytest

from pipelines import scenes

THING = scenes.SceneObject(size="large", colour="red", shape="circle")
OTHER = scenes.SceneObject(size="small", colour="blue", shape="square")
ONE = scenes.Scene(objects=(THING,), background="black", position="top left")
TWO = scenes.Scene(objects=(THING, OTHER), background="white", relation="left of")


def draw(scene, seed=0, image_size=64):
    return scenes.render(scene, np.random.default_rng(seed), image_size)


def changed(scene, index=0, **words):
    objects = list(scene.objects)
    objects[index] = dataclasses.replace(objects[index], **words)
    return dataclasses.replace(scene, objects=tuple(objects))


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
