"""The checker reads words back from clean and damaged pictures, and sees each wrong one."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image, ImageFilter
from test_scenes import ONE, THING, TWO, changed, draw

from pipelines import scene_checker, scenes


def as_jpeg(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling="4:4:4")
    return np.array(Image.open(buffer))


def blurred(image):
    return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.7)))


def noisy(image):
    noise = np.random.default_rng(int(image.sum())).normal(0, 6, image.shape)
    return (image + noise).round().clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def drawn():
    return [*scenes.scenes(250, seed=11, held_out=False), *scenes.scenes(250, seed=12, held_out=True)]


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


def test_pictures_of_another_type_are_refused():
    with pytest.raises(ValueError, match="float64"):
        scene_checker.read_scene(np.zeros((64, 64, 3)))
