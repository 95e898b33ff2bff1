"""Reads a scene back from pixels: which words of its caption came true, without any learned model.

Pixels go to the nearest colour of the palette; what is not background falls into connected components; a component's box
gives size and place, and the best-fitting template its shape. Lengths are in pixels of a 64-pixel picture.
"""

import functools
import itertools
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from pipelines.scenes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, Scene, coverage

SIZE_BOUNDARY = 17.5  # the checker's line between small and large
SPECK_AREA = 12  # components below this are noise, not objects
TEMPLATE_BLURS = (0, 0.7, 1.4)  # standard deviations
MIN_SHAPE_IOU = 0.7  # a blob less like every template than this has no shape
MIN_COLOUR_SHARE = 0.6  # of an object's inside; an object of several colours has none
MAX_ELONGATION = 1.5  # shapes are as wide as tall, but blur takes up to 3 pixels off a triangle's tip
_PALETTE_NAMES = (*COLOURS, *BACKGROUNDS)
_PALETTE = np.array([*COLOURS.values(), *BACKGROUNDS.values()], dtype=np.float32)  # (12, 3)


@dataclass(frozen=True, kw_only=True)
class DetectedObject:
    """One object found in a picture, centred at `cx`, `cy`; None for no clear colour or shape."""

    size: str
    colour: str | None
    shape: str | None
    cx: float
    cy: float


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What `read_scene` found; `background` may be a name from COLOURS when a picture went wrong."""

    objects: tuple[DetectedObject, ...]
    background: str


def read_scene(image: np.ndarray) -> Reading:
    """Objects and background of a picture, uint8 (H, W, 3), from its pixels alone.

    A pixel's label is its nearest palette colour; the border's most frequent label is the background; each
    connected region of other labels is an object.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1]:
        raise ValueError(f"image is {image.dtype} {image.shape}; allowed: uint8 (H, W, 3) with H = W.")
    pixels = image.astype(np.float32)
    labels = np.stack([((pixels - colour) ** 2).sum(axis=-1) for colour in _PALETTE]).argmin(axis=0)  # (H, W)
    edge = max(1, round(image.shape[0] / 32))
    inner = labels[edge:-edge, edge:-edge]
    border = np.bincount(labels.ravel(), minlength=len(_PALETTE)) - np.bincount(inner.ravel(), minlength=len(_PALETTE))
    background = int(border.argmax())
    regions, num_regions = ndimage.label(labels != background)
    found = (_read_object(pixels, labels, regions, region, background) for region in range(1, num_regions + 1))
    return Reading(objects=tuple(thing for thing in found if thing), background=_PALETTE_NAMES[background])


def _read_object(
    pixels: np.ndarray, labels: np.ndarray, regions: np.ndarray, region: int, background: int
) -> DetectedObject | None:
    """The object in one connected region, or None for a speck."""
    scale = pixels.shape[0] / 64
    rough = regions == region
    if rough.sum() < SPECK_AREA * scale**2:
        return None
    interior = ndimage.binary_erosion(rough)
    inner_labels = labels[interior if interior.any() else rough]
    counts = np.bincount(inner_labels, minlength=len(_PALETTE))
    colour = int(counts.argmax())
    is_plain = counts[colour] >= MIN_COLOUR_SHARE * len(inner_labels)
    # Edge pixels are mixtures and may look like a third colour (red on white: pink). Knowing both ends, read
    # off how much of each pixel is the object.
    axis = _PALETTE[colour] - _PALETTE[background]
    alpha = ((pixels - _PALETTE[background]) @ axis) / (axis @ axis)
    near = ndimage.binary_dilation(rough, iterations=max(1, round(2 * scale))) & (rough | (regions == 0))
    alpha = np.where(near, alpha.clip(0, 1), 0)
    parts, _ = ndimage.label(alpha > 0.5)
    areas = np.bincount(parts.ravel(), minlength=2)
    areas[0] = 0
    if areas.max() < SPECK_AREA * scale**2:
        return None
    rows, columns = ndimage.find_objects(parts)[areas.argmax() - 1]
    extent = (rows.stop - rows.start + columns.stop - columns.start) / 2 / scale
    return DetectedObject(
        size="small" if extent < SIZE_BOUNDARY else "large",
        colour=_PALETTE_NAMES[colour] if is_plain else None,
        shape=_nearest_shape(alpha, rows, columns),
        # The middle of the box, not of the mass: a triangle's mass sits low, and scenes are placed by boxes.
        cx=(columns.start + columns.stop) / 2 / scale,
        cy=(rows.start + rows.stop) / 2 / scale,
    )


def _nearest_shape(alpha: np.ndarray, rows: slice, columns: slice) -> str | None:
    """The shape whose template has the best soft intersection over union with alpha (H, W) around the box."""
    height, width = rows.stop - rows.start, columns.stop - columns.start
    if max(height, width) > MAX_ELONGATION * min(height, width):
        return None
    scale = alpha.shape[0] / 64
    pad = max(1, round(2 * scale))
    top, left = rows.start, columns.start  # in the padded picture the window starts here
    window = np.pad(alpha, pad)[top : rows.stop + 2 * pad, left : columns.stop + 2 * pad]
    shapes, templates = _templates(width, height, pad, scale)
    ious = np.minimum(templates, window).sum(axis=(1, 2)) / np.maximum(templates, window).sum(axis=(1, 2))
    best = int(ious.argmax())
    return shapes[best] if ious[best] >= MIN_SHAPE_IOU else None


# How much wider and taller an object may have been than the box found after blur, which eats tips and curves.
_BLUR_EATS = {
    "circle": ((0, 0), (1, 1)),
    "square": ((0, 0),),
    "triangle": ((0, 0), (0, 1), (0, 2), (1, 2), (1, 3)),
    "cross": ((0, 0), (1, 1)),
}


@functools.lru_cache(maxsize=64)
def _templates(width: int, height: int, pad: int, scale: float) -> tuple[tuple[str, ...], np.ndarray]:
    """Every shape drawn into a box with `pad` pixels around it, sharp and blurred: names, float32 (N, H, W).

    Blur is what codecs and decoders do to edges.
    """
    shapes, templates = [], []
    canvas = (width + 2 * pad, height + 2 * pad)
    for shape in SHAPES:
        for wider, taller in _BLUR_EATS[shape]:
            tip = taller - wider  # what was lost at the top alone
            centre = (canvas[0] / 2, canvas[1] / 2 - tip * scale / 2)
            sharp = coverage(shape, centre, (width + wider * scale, height + taller * scale), canvas)
            for sigma in TEMPLATE_BLURS:
                shapes.append(shape)
                templates.append(ndimage.gaussian_filter(sharp, sigma * scale).astype(np.float32))
    return tuple(shapes), np.stack(templates)


def position_of(thing: DetectedObject) -> str:
    """The cell of the 3x3 grid that an object's centre lies in."""
    column, row = (min(2, int(centre * 3 / 64)) for centre in (thing.cx, thing.cy))
    return POSITIONS[row * 3 + column]


def relation_of(first: DetectedObject, second: DetectedObject) -> str:
    """The relation along the axis on which the two centres lie further apart."""
    dx, dy = first.cx - second.cx, first.cy - second.cy
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def check(image: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Which words of the scene's caption a picture, uint8 (H, W, 3), makes true; "all": every one of them.

    "position" is the relation if there are two objects. With a wrong number of objects only the background
    can be right. Two objects are matched to the scene's by their words alone, and the relation is judged
    under that match.
    """
    reading = read_scene(image)
    result = dict.fromkeys(("colour", "shape", "size", "position"), False)
    if len(reading.objects) == len(scene.objects):
        result = _check_objects(reading.objects, scene)
    result["background"] = reading.background == scene.background
    return result | {"all": all(result.values())}


def _check_objects(found: tuple[DetectedObject, ...], scene: Scene) -> dict[str, bool]:
    """The four keys about objects, for as many found objects as the scene has."""
    words = ("colour", "shape", "size")

    def agreements(order: tuple[DetectedObject, ...]) -> list[tuple[bool, ...]]:
        return [tuple(getattr(a, w) == getattr(b, w) for w in words) for a, b in zip(order, scene.objects, strict=True)]

    def in_place(order: tuple[DetectedObject, ...]) -> bool:
        return position_of(*order) == scene.position if len(order) == 1 else relation_of(*order) == scene.relation

    orders = list(itertools.permutations(found))
    scores = [sum(map(sum, agreements(order))) for order in orders]
    best = [order for order, score in zip(orders, scores, strict=True) if score == max(scores)]
    # Matches that fit equally well leave open which object is which: the relation must then hold under all of
    # them, unless the scene's own objects are the same and it does not matter.
    holds = any if len(set(scene.objects)) < len(scene.objects) else all
    result = {word: all(column) for word, column in zip(words, zip(*agreements(best[0]), strict=True), strict=True)}
    return result | {"position": holds(map(in_place, best))}
