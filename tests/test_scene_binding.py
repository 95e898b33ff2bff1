"""The judge of binding: a model that knows what is where has 1, one that knows only which colours there are 0.5."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage

from paella.bundle import load_bundle
from pipelines import scene_binding, scenes
from pipelines.scene_binding import binding, colour_codes, pairs, regions, right_shares

CODES = {name: [2 * number, 2 * number + 1] for number, name in enumerate(scenes.COLOURS)}
GRID, NUM_LABELS = (16, 16), 20


def knows_the_truth(captions):
    """Prefers a colour's second code where its object should be."""

    def predict(tokens, t):
        logits = torch.zeros(len(captions), NUM_LABELS, *GRID)
        for image, caption in enumerate(captions):
            scene = scenes.parse_caption(caption)
            for thing, (rows, columns) in zip(scene.objects, regions(scene.relation, GRID), strict=True):
                logits[image, CODES[thing.colour][1], rows, columns] = 20.0
        return logits

    return predict


def bag_of_words(captions):
    def predict(tokens, t):
        assert torch.equal(t, torch.ones(len(captions))) and tokens.shape == (len(captions), *GRID)
        logits = torch.zeros(len(captions), NUM_LABELS, *GRID)
        for image, caption in enumerate(captions):
            for word in set(caption.split()) & set(scenes.COLOURS):
                logits[image, CODES[word]] = 5.0
        return logits

    return predict


@pytest.mark.parametrize("model, share", [(knows_the_truth, 1.0), (bag_of_words, 0.5)])
def test_shares_of_known_models(model, share):
    found = right_shares(model, CODES, pairs(70), GRID, NUM_LABELS)
    assert found == dict.fromkeys(scenes.RELATIONS, pytest.approx(share, abs=1e-6))


def test_a_model_that_takes_the_first_for_the_second_has_nothing():
    swapped = [scenes.Scene(objects=scene.objects[::-1], background="black", relation=scene.relation) for scene in pairs(20)]

    def wrong(captions):
        return knows_the_truth([scenes.caption(scene) for scene in swapped])

    assert max(right_shares(wrong, CODES, pairs(20), GRID, NUM_LABELS).values()) < 1e-6


def test_pairs_are_held_out_and_of_two_colours():
    found = pairs(100)
    assert len(found) == 100 and {scene.relation for scene in found} == set(scenes.RELATIONS)
    assert all(scenes.is_held_out(scene) and len({thing.colour for thing in scene.objects}) == 2 for scene in found)


def test_places_are_where_scenes_have_their_objects():
    """The middle of most drawn objects lies in their region, and of none in the other's."""
    own = []
    for scene, image in scenes.scenes(150, seed=21, held_out=True):
        if len(scene.objects) == 1 or len({thing.colour for thing in scene.objects}) == 1:
            continue
        for thing, (rows, columns), other in zip(
            scene.objects, regions(scene.relation, GRID), regions(scene.relation, GRID)[::-1], strict=True
        ):
            y, x = (place / 4 for place in ndimage.center_of_mass((image == scenes.COLOURS[thing.colour]).all(-1)))
            own.append(rows.start <= y <= rows.stop and columns.start <= x <= columns.stop)
            assert not (other[0].start <= y <= other[0].stop and other[1].start <= x <= other[1].stop)
    assert np.mean(own) > 2 / 3


def test_codes_of_colours_are_those_of_flat_patches():
    palette = torch.tensor([*scenes.COLOURS.values(), *scenes.BACKGROUNDS.values()]) / 255  # code i is colour i

    def encode(images):
        patches = torch.nn.functional.avg_pool2d(images, 4).permute(0, 2, 3, 1)
        return torch.cdist(patches, palette[None].expand(len(images), -1, -1).unsqueeze(1)).argmin(-1)

    quantizer = SimpleNamespace(codebook=SimpleNamespace(weight=palette))
    vqgan = SimpleNamespace(config=SimpleNamespace(downsampling=4), vquantizer=quantizer, encode=encode)
    assert colour_codes(vqgan, 64) == {name: [number] for number, name in enumerate(scenes.COLOURS)}


def test_a_bundle_has_a_share_for_each_relation(model_bundle, monkeypatch):
    monkeypatch.setattr(scene_binding, "CODED_SCENES", 40)
    found = binding(load_bundle(str(model_bundle)), num_pairs=24)
    assert found.keys() == scenes.RELATIONS.keys()
    assert all(0 <= share <= 1 for share in found.values())
