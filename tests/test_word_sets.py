"""Words that replace each other are found by their neighbours alone."""

import numpy as np
import pytest

from pipelines import scenes
from pipelines.word_sets import WordSets, exchanged


@pytest.fixture(scope="module")
def found():
    return WordSets(scenes.caption(scene) for scene, _ in scenes.scenes(256, seed=0, held_out=False))


def test_words_of_a_kind_come_out_by_themselves(found):
    sets = set(map(frozenset, found.sets))
    kinds = (scenes.COLOURS, scenes.SHAPES, scenes.SIZES, scenes.BACKGROUNDS, ("left", "right"))
    assert {frozenset(kind) for kind in kinds} <= sets
    assert "background" not in found.words and "a" not in found.words, "nothing stands in their place"


def test_a_word_gives_way_to_one_that_stands_in_its_context(found):
    caption = "a small red circle left of a large red square on a black background"
    made = {found.replaced(caption, "red", np.random.default_rng(seed)) for seed in range(200)}
    words = [changed.split() for changed in made]
    assert {changed[2] for changed in words} == set(scenes.COLOURS) - {"red"}, "each place has its own draw, none keeps its word"
    assert {changed[8] for changed in words} == set(scenes.COLOURS) - {"red"}
    assert all([*changed[:2], *changed[3:8], *changed[9:]] == [w for w in caption.split() if w != "red"] for changed in words)
    assert found.replaced(caption, "left", np.random.default_rng(0)) == caption.replace("left", "right")
    assert found.replaced(caption, "green", np.random.default_rng(0)) is None
    assert found.replaced(caption, "background", np.random.default_rng(0)) is None
    assert found.replaced(caption, "red", np.random.default_rng(3)) == found.replaced(caption, "red", np.random.default_rng(3))


def test_the_most_frequent_words_are_looked_at_and_rare_company_makes_no_set():
    captions = ["a red box"] * 9 + ["a blue box"] * 7 + ["the big box"] * 5 + ["the old box"] * 4 + ["a big box"]
    sets = WordSets(captions)
    assert sets.words == ("red", "blue", "big", "the", "old", "a"), "big 6 times, the 5 times where a could be"
    found = set(map(frozenset, sets.sets))
    assert found == set(map(frozenset, [("red", "blue"), ("big", "old"), ("the",), ("a",)])), "a single big box joins nothing"
    assert WordSets(captions, num_words=2).sets == (("red", "blue"),)
    assert WordSets(["one and the same"] * 3).sets == ()
    assert WordSets(["", "word"]).sets == ()


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("a red box on a blue one", "a blue box on a red one"),
        ("a red box on a red one", None),
        ("a red box", None),
        ("red and blue and green", None),
    ],
)
def test_two_words_of_a_set_change_places(caption, expected):
    assert exchanged(caption, ("red", "blue", "green")) == expected
