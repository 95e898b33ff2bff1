"""The demo's data: captioned pictures of simple objects, and a checker that reads the caption from pixels.

What is special about it: a caption names everything that matters (size, colour and shape of one or two
objects, where they are, the background), so `check` can say of a generated picture, without any learned
model, which words came true. Combinations are split by a stable hash into a training and a held-out part, so
the demo measures generalisation and not memory. Lengths are in pixels of a 64-pixel picture and scale with
`image_size`.

    for scene, image in scenes(3, seed=0, held_out=False):
        print(caption(scene), check(image, scene)["all"])
"""

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 60, 220),
    "yellow": (250, 220, 30),
    "purple": (130, 30, 170),
    "cyan": (30, 210, 220),
    "orange": (255, 135, 0),
    "pink": (255, 130, 190),
}
BACKGROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255), "grey": (128, 128, 128), "brown": (110, 65, 30)}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": (12, 13), "large": (22, 23, 24)}  # extents to draw from, pixels
POSITIONS = (
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
RELATIONS = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}  # (x, y)

SUPERSAMPLING = 4
CELL_CENTRES = (15, 32, 49)  # of the 3x3 grid; a large object jittered by CELL_JITTER still lies inside
CELL_JITTER = 2
PAIR_DISTANCES = (28, 34)  # between centres along the relation's axis: two large objects keep a gap of 4
PAIR_OFF_AXIS = 8
MARGIN = 1  # to the picture's border, two objects


# --- Scenes and their captions --------------------------------------------------------------------


def _check_word(what: str, word: str | None, allowed: Collection[str]) -> None:
    if word not in allowed:
        raise ValueError(f"{what} is {word!r}; allowed: {', '.join(allowed)}.")


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One object, by the words of its caption."""

    size: str
    colour: str
    shape: str

    def __post_init__(self) -> None:
        _check_word("SceneObject.size", self.size, SIZES)
        _check_word("SceneObject.colour", self.colour, COLOURS)
        _check_word("SceneObject.shape", self.shape, SHAPES)

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a picture shows: one object with a `position`, or two with a `relation` of first to second."""

    objects: tuple[SceneObject, ...]
    background: str
    relation: str | None = None
    position: str | None = None

    def __post_init__(self) -> None:
        _check_word("Scene.background", self.background, BACKGROUNDS)
        if len(self.objects) not in (1, 2):
            raise ValueError(f"Scene.objects has {len(self.objects)} objects; allowed: 1 or 2.")
        needed, unused = ("position", "relation") if len(self.objects) == 1 else ("relation", "position")
        _check_word(f"Scene.{needed}", getattr(self, needed), POSITIONS if needed == "position" else RELATIONS)
        if getattr(self, unused) is not None:
            raise ValueError(f"Scene.{unused} must be None for {len(self.objects)} object(s).")


def caption(scene: Scene) -> str:
    """The scene in words; `parse_caption` is the inverse."""
    if scene.relation is not None:
        first, second = scene.objects
        return f"a {first} {scene.relation} a {second} on a {scene.background} background"
    place = "in the centre" if scene.position == "centre" else f"at the {scene.position}"
    return f"a {scene.objects[0]} {place} on a {scene.background} background"


def _either(words: Iterable[str]) -> str:
    return "(" + "|".join(words) + ")"


_OBJECT = f"a {_either(SIZES)} {_either(COLOURS)} {_either(SHAPES)}"
_ON = f"on a {_either(BACKGROUNDS)} background"
_PLACES = {"in the centre" if name == "centre" else f"at the {name}": name for name in POSITIONS}
_ONE = re.compile(f"{_OBJECT} {_either(_PLACES)} {_ON}")
_TWO = re.compile(f"{_OBJECT} {_either(RELATIONS)} {_OBJECT} {_ON}")


def parse_caption(text: str) -> Scene:
    """The scene that `caption` calls `text`; ValueError for any other text. Case and spacing are free."""
    plain = " ".join(text.lower().split())
    if match := _ONE.fullmatch(plain):
        size, colour, shape, place, background = match.groups()
        thing = SceneObject(size=size, colour=colour, shape=shape)
        return Scene(objects=(thing,), background=background, position=_PLACES[place])
    if match := _TWO.fullmatch(plain):
        *words, background = match.groups()
        objects = tuple(SceneObject(size=s, colour=c, shape=f) for s, c, f in (words[:3], words[4:]))
        return Scene(objects=objects, background=background, relation=words[3])
    raise ValueError(
        f"{text!r} is not a scene's caption; write for example 'a small red circle left of a large blue "
        "square on a black background' or 'a large green triangle at the top left on a white background'."
    )


def _pick(rng: np.random.Generator, values: Iterable[T]) -> T:
    choices = tuple(values)
    return choices[rng.integers(len(choices))]


def _random_object(rng: np.random.Generator) -> SceneObject:
    return SceneObject(size=_pick(rng, SIZES), colour=_pick(rng, COLOURS), shape=_pick(rng, SHAPES))


def random_scene(rng: np.random.Generator) -> Scene:
    """A uniform draw: one object in a third of the scenes, otherwise two that differ in colour or shape."""
    background = _pick(rng, BACKGROUNDS)
    first = _random_object(rng)
    if rng.integers(3) == 0:
        return Scene(objects=(first,), background=background, position=_pick(rng, POSITIONS))
    second = _random_object(rng)
    while (second.colour, second.shape) == (first.colour, first.shape):
        second = _random_object(rng)
    return Scene(objects=(first, second), background=background, relation=_pick(rng, RELATIONS))


# --- The held-out split ---------------------------------------------------------------------------


def combination(scene: Scene) -> str:
    """What is held out as one: a lone object's words, or the unordered colours and shapes of two."""
    if len(scene.objects) == 1:
        return str(scene.objects[0])
    return " + ".join(sorted(f"{thing.colour} {thing.shape}" for thing in scene.objects))


def is_held_out(scene: Scene) -> bool:
    """Whether training must never see the scene's combination: one in five, the same on every machine."""
    digest = hashlib.sha256(combination(scene).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 5 == 0


@dataclass(frozen=True, kw_only=True)
class SceneSequence(Sequence):
    """Scenes and their pictures, made when asked for: item i is a pure function of i and all but `num`."""

    num: int
    seed: int
    held_out: bool
    image_size: int = 64

    def __post_init__(self) -> None:
        if self.num < 0 or self.seed < 0:
            raise ValueError(f"num is {self.num} and seed is {self.seed}; neither may be negative.")

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index) -> tuple[Scene, np.ndarray]:
        if not -self.num <= index < self.num:
            raise IndexError(f"scene {index} of {self.num}")
        rng = np.random.default_rng([self.seed, index % self.num])
        scene = random_scene(rng)
        while is_held_out(scene) != self.held_out:
            scene = random_scene(rng)
        return scene, render(scene, rng, self.image_size)


def scenes(num: int, seed: int, held_out: bool, image_size: int = 64) -> SceneSequence:
    """`num` pairs of (Scene, uint8 image (H, W, 3)) of the held-out or of the training part."""
    return SceneSequence(num=num, seed=seed, held_out=held_out, image_size=image_size)


# --- Drawing --------------------------------------------------------------------------------------

# Each shape on the square u, v in [-1, 1] (v downwards), which it touches on all four sides.
_INSIDE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda u, v: u**2 + v**2 <= 1,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 1,
    "triangle": lambda u, v: (abs(u) <= (v + 1) / 2) & (v <= 1),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) <= 1 / 3) & (np.maximum(abs(u), abs(v)) <= 1),
}


def coverage(shape: str, centre: tuple[float, float], extent: tuple[float, float], canvas: tuple[int, int]) -> np.ndarray:
    """How much of each pixel the shape covers: float (H, W) in [0, 1]; pairs are (x, y), canvas is (W, H)."""
    u, v = (
        ((np.arange(side * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - middle) * 2 / length
        for side, middle, length in zip(canvas, centre, extent, strict=True)
    )
    fine = _INSIDE[shape](u[None, :], v[:, None])  # (4H, 4W)
    return fine.reshape(canvas[1], SUPERSAMPLING, canvas[0], SUPERSAMPLING).mean(axis=(1, 3))


def _place_one(position: str, rng: np.random.Generator) -> np.ndarray:
    """A centre (x, y) for a lone object."""
    row, column = divmod(POSITIONS.index(position), 3)
    return np.array([CELL_CENTRES[column], CELL_CENTRES[row]]) + rng.integers(-CELL_JITTER, CELL_JITTER + 1, size=2)


def _place_two(relation: str, extents: Sequence[int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Centres (x, y) of the first and second object, both wholly inside the picture."""
    direction = np.array(RELATIONS[relation])
    distance = rng.integers(PAIR_DISTANCES[0], PAIR_DISTANCES[1] + 1)
    off_axis = rng.integers(-PAIR_OFF_AXIS, PAIR_OFF_AXIS + 1)
    offset = direction * distance + direction[::-1] * off_axis  # of the first from the second
    half_first, half_second = ((extent + 1) // 2 + MARGIN for extent in extents)
    low = np.maximum(half_second, half_first - offset)
    high = np.minimum(64 - half_second, 64 - half_first - offset)
    second = rng.integers(low, high + 1)
    return second + offset, second


def render(scene: Scene, rng: np.random.Generator, image_size: int = 64) -> np.ndarray:
    """Draw the scene, places and extents jittered by `rng`: uint8 (image_size, image_size, 3)."""
    if image_size < 32:
        raise ValueError(f"image_size is {image_size}; scenes need at least 32 pixels to be readable.")
    extents = [_pick(rng, SIZES[thing.size]) for thing in scene.objects]
    centres: tuple[np.ndarray, ...]
    if scene.position is not None:
        centres = (_place_one(scene.position, rng),)
    else:
        assert scene.relation is not None
        centres = _place_two(scene.relation, extents, rng)
    scale = image_size / 64
    image = np.full((image_size, image_size, 3), BACKGROUNDS[scene.background], dtype=np.float64)
    for thing, (x, y), extent in zip(scene.objects, centres, extents, strict=True):
        box = (extent * scale, extent * scale)
        alpha = coverage(thing.shape, (x * scale, y * scale), box, (image_size, image_size))[..., None]  # (H, W, 1)
        image = image * (1 - alpha) + alpha * np.array(COLOURS[thing.colour])
    return image.round().astype(np.uint8)
