"""Whether a model binds colours to places, on the demo's scenes: read from its first prediction, without a picture being made.

At t = 1 nothing but the caption says what is where. Of the probability that the codes of the two objects' colours have together,
the first object's colour should have all where the first object should be, and nothing where the second should be. A bag of words
knows which colours there are, not which is where: 0.5.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paella.bundle import Bundle
from paella.images import to_tensor
from paella.vqgan import VQModel
from pipelines import scenes
from pipelines.hearing import Model, model_of

Region = tuple[slice, slice]
"""Rows and columns of a token grid."""
SPANS = {-1: (1 / 16, 6 / 16), 0: (4 / 16, 12 / 16), 1: (10 / 16, 15 / 16)}
"""Where along an axis the middle of an object lies that is before, beside or behind the other, as shares of the side."""
CODED_SCENES = 300
"""Training scenes in which the codes of colours are looked up."""
CODES_PER_COLOUR = 4
PAIR_SEED = 9
"""No other scenes of the demo have it."""
BATCH_SIZE = 64


def binding(bundle: Bundle, num_pairs: int = 128) -> dict[str, float]:
    """Return the share of right colours by relation, over held-out captions of two objects: 0.5 for a bag of words, at best 1."""
    config = bundle.config
    codes = colour_codes(bundle.vqgan, config.image_size)
    grid = config.grid(config.image_size, config.image_size)
    return right_shares(model_of(bundle), codes, pairs(num_pairs), grid, config.unet.num_labels)


def pairs(num: int) -> list[scenes.Scene]:
    """Return held-out scenes of two objects whose colours differ."""
    held_out: Any = scenes.scenes(20 * num, seed=PAIR_SEED, held_out=True)
    two = (scene for scene, _ in held_out if len({thing.colour for thing in scene.objects}) == 2)
    return list(itertools.islice(two, num))


@torch.inference_mode()
def colour_codes(vqgan: VQModel, image_size: int) -> dict[str, list[int]]:
    """Return the codes of each colour: those that flat patches of it have most often in training scenes."""
    side = vqgan.config.downsampling
    images = np.stack([image for _, image in scenes.scenes(CODED_SCENES, seed=0, held_out=False, image_size=image_size)])
    tokens = vqgan.encode(to_tensor(images).to(vqgan.vquantizer.codebook.weight)).flatten().cpu().numpy()
    number = image_size // side
    patches = images.reshape(-1, number, side, number, side, 3).swapaxes(2, 3).reshape(len(tokens), side * side, 3)
    found = {}
    for name, colour in scenes.COLOURS.items():
        codes, counts = np.unique(tokens[(patches == colour).all((1, 2))], return_counts=True)
        found[name] = codes[np.argsort(-counts, kind="stable")[:CODES_PER_COLOUR]].tolist()
    return found


def regions(relation: str, grid: tuple[int, int]) -> tuple[Region, Region]:
    """Return where in a grid of (H, W) tokens the first and the second object of a relation should be."""
    x, y = scenes.RELATIONS[relation]

    def region(x: int, y: int) -> Region:
        rows, columns = (slice(*(round(share * side) for share in SPANS[at])) for at, side in zip((y, x), grid, strict=True))
        return rows, columns

    return region(x, y), region(-x, -y)


@torch.inference_mode()
def right_shares(
    model: Model, codes: Mapping[str, Sequence[int]], found: Sequence[scenes.Scene], grid: tuple[int, int], num_labels: int
) -> dict[str, float]:
    """Return the mean over both places of all scenes, by relation.

    Args:
        codes: of each colour.
        found: scenes of two objects.
        grid: (H, W) of the model's tokens.
    """
    by_relation: dict[str, list[float]] = {name: [] for name in scenes.RELATIONS}
    for start in range(0, len(found), BATCH_SIZE):
        part = found[start : start + BATCH_SIZE]
        rngs = (np.random.Generator(np.random.Philox(key=[PAIR_SEED, start + place])) for place in range(len(part)))
        noise = torch.from_numpy(np.stack([rng.integers(num_labels, size=grid) for rng in rngs]))
        logits = model([scenes.caption(scene) for scene in part])(noise, torch.ones(len(part)))
        for scene, probabilities in zip(part, logits.float().softmax(1), strict=True):
            by_relation[str(scene.relation)] += _shares(probabilities, scene, codes)
    return {name: float(np.mean(shares)) for name, shares in by_relation.items() if shares}


def _shares(probabilities: Tensor, scene: scenes.Scene, codes: Mapping[str, Sequence[int]]) -> Iterator[float]:
    """Of probabilities (K,H,W), the share of the right colour in each place."""
    colours = [thing.colour for thing in scene.objects]
    places = regions(str(scene.relation), (probabilities.shape[1], probabilities.shape[2]))
    for (rows, columns), right, wrong in zip(places, colours, colours[::-1], strict=True):
        here = probabilities[:, rows, columns]
        of_right, of_wrong = (here[list(codes[colour])].sum().item() for colour in (right, wrong))
        yield of_right / max(of_right + of_wrong, 1e-9)
