"""The demo's recipe on another kind of picture: symbols with names on coloured backgrounds.

    python benchmarks/icons.py --output runs/icons

Draws symbols of DejaVu Sans, which matplotlib brings, in white or black on twelve backgrounds, holds one pair of name and
background in five back, runs `make demo` on the rest without a change, and generates a picture for captions of held-out pairs.
A picture is right if the nearest template has its caption's name and its border has its caption's background. The same checker
reads the held-out pictures themselves first: what it misses there is its own doing.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from paella import command_line
from paella.images import contact_sheet
from pipelines import demo, generate, report, train
from pipelines.generate_config import GenerateConfig

SYMBOLS = {
    "star": "★", "sun": "☀", "cloud": "☁", "umbrella": "☂", "telephone": "☎", "skull": "☠", "anchor": "⚓", "heart": "♥",
    "spade": "♠", "club": "♣", "diamond": "♦", "king": "♚", "queen": "♛", "rook": "♜", "bishop": "♝", "knight": "♞", "pawn": "♟",
    "note": "♪", "flag": "⚑", "swords": "⚔", "scissors": "✂", "aeroplane": "✈", "envelope": "✉", "pencil": "✎",
}  # fmt: skip
BACKGROUNDS = {
    "red": (200, 30, 40), "green": (20, 130, 60), "blue": (40, 70, 200), "yellow": (245, 215, 40), "purple": (115, 40, 150),
    "cyan": (60, 200, 215), "orange": (240, 130, 20), "pink": (250, 160, 195), "brown": (105, 65, 35), "grey": (125, 125, 125),
    "lime": (150, 225, 60), "navy": (15, 25, 80),
}  # fmt: skip
SIDE, HEIGHTS, JITTER = 64, (38, 46), 4
"""Pixels: of a picture, of the smallest and largest symbol, and how far its centre may lie from the picture's."""


@dataclass(frozen=True, kw_only=True)
class IconsConfig:
    """What is drawn, trained and measured."""

    output: str = "runs/icons"
    """Directory of everything."""
    num_images: int = 10_000
    """Training pictures."""
    num_prompts: int = 192
    """Pictures generated for captions of held-out pairs."""
    seed: int = 0
    """Of pictures, training and sampling."""


@dataclass(frozen=True)
class Icon:
    """One caption's name and background."""

    name: str
    background: str

    @property
    def caption(self) -> str:
        article = "an" if self.name[0] in "aeiou" else "a"
        return f"{article} {self.name} on a {self.background} background"

    @property
    def held_out(self) -> bool:
        """One pair in five, the same on every machine."""
        return hashlib.sha256(self.caption.encode()).digest()[0] % 5 == 0

    @property
    def ink(self) -> tuple[int, int, int]:
        """White on dark backgrounds, black on light ones."""
        return (255, 255, 255) if sum(BACKGROUNDS[self.background]) < 380 else (0, 0, 0)


@functools.cache
def silhouette(name: str, height: int) -> np.ndarray:
    """A symbol cut to its own box, scaled to a height in pixels: float (H,W) in [0, 1]."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    image = Image.new("L", (400, 400))
    ImageDraw.Draw(image).text((200, 200), SYMBOLS[name], font=ImageFont.truetype(path, 240), fill=255, anchor="mm")
    image = image.crop(image.getbbox())
    width = min(SIDE - 10, round(image.width * height / image.height))
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32) / 255


def draw(icon: Icon, rng: np.random.Generator) -> np.ndarray:
    """The picture (64,64,3) uint8 of an icon, its size and place drawn by rng."""
    cover = np.zeros((SIDE, SIDE), np.float32)
    shape = silhouette(icon.name, int(rng.integers(HEIGHTS[0], HEIGHTS[1] + 1)))
    top, left = ((SIDE - side) // 2 + int(rng.integers(-JITTER, JITTER + 1)) for side in shape.shape)
    cover[top : top + shape.shape[0], left : left + shape.shape[1]] = shape
    ground, ink = np.array(BACKGROUNDS[icon.background]), np.array(icon.ink)
    return (ground + cover[..., None] * (ink - ground)).round().astype(np.uint8)


def icons(num: int, seed: int, *, held_out: bool) -> list[Icon]:
    """A number of icons, drawn evenly from the held-out pairs or from the others."""
    pairs = [icon for name in SYMBOLS for ground in BACKGROUNDS if (icon := Icon(name, ground)).held_out == held_out]
    return [pairs[index] for index in np.random.default_rng([seed, held_out]).integers(len(pairs), size=num)]


def read(image: np.ndarray) -> Icon:
    """The icon that a picture (64,64,3) uint8 shows: the background nearest to its border, the name of the nearest template."""
    pixels = image.astype(np.float32)
    border = np.median(np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)]), axis=0)
    background = min(BACKGROUNDS, key=lambda name: float(np.square(border - BACKGROUNDS[name]).sum()))
    ground, ink = np.array(BACKGROUNDS[background]), np.array(Icon("star", background).ink)
    axis = (ink - ground).astype(np.float32)
    cover = ((pixels - ground) @ axis / (axis @ axis)).clip(0, 1)
    return Icon(_nearest(cover), background)


def _nearest(cover: np.ndarray) -> str:
    """The symbol whose silhouette, at the cover's own centre and area, overlaps it most."""
    if cover.sum() < 20:
        return "nothing"
    centre = np.array(ndimage.center_of_mass(cover))
    overlaps = {}
    for name in SYMBOLS:
        for height in range(HEIGHTS[0] - 2, HEIGHTS[1] + 3, 2):
            shape = silhouette(name, height)
            top, left = (centre - ndimage.center_of_mass(shape)).round().astype(int)
            template = np.zeros((3 * SIDE, 3 * SIDE), np.float32)
            template[SIDE + top : SIDE + top + shape.shape[0], SIDE + left : SIDE + left + shape.shape[1]] = shape
            template = template[SIDE : 2 * SIDE, SIDE : 2 * SIDE]
            overlap = np.minimum(cover, template).sum() / np.maximum(cover, template).sum()
            overlaps[name] = max(overlap, overlaps.get(name, 0.0))
    return max(overlaps, key=lambda name: overlaps[name])


def accuracy(pictures: list[np.ndarray], wanted: list[Icon]) -> dict[str, float]:
    """Shares of pictures whose name, background and both are those wanted."""
    found = [read(picture) for picture in pictures]
    pairs = list(zip(found, wanted, strict=True))
    return {
        "name": sum(a.name == b.name for a, b in pairs) / len(pairs),
        "background": sum(a.background == b.background for a, b in pairs) / len(pairs),
        "both": sum(a == b for a, b in pairs) / len(pairs),
    }


def write_images(root: Path, config: IconsConfig) -> Path:
    """A folder of training pictures, each with its caption beside it."""
    folder = root / "images"
    if not (root / "images.done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(config.seed)
        for number, icon in enumerate(icons(config.num_images, config.seed, held_out=False)):
            Image.fromarray(draw(icon, rng)).save(folder / f"{number:05d}.png")
            (folder / f"{number:05d}.txt").write_text(icon.caption)
        (root / "images.done").touch()
    return folder


def run(config: IconsConfig) -> None:
    """Run or continue the benchmark; prints one JSON line."""
    root = Path(config.output).absolute()
    images = write_images(root, config)
    wanted = icons(config.num_prompts, config.seed + 1, held_out=True)
    rng = np.random.default_rng(config.seed + 1)
    originals = accuracy([draw(icon, rng) for icon in wanted], wanted)
    demo.run(demo.DemoConfig(data=str(images), output=str(root / "demo"), seed=config.seed, num_prompts=64))
    prompts = root / "held-out.txt"
    prompts.write_text("".join(f"{icon.caption}\n" for icon in wanted))
    generate.run(
        GenerateConfig(
            model=str(root / "demo" / "train" / "model"),
            prompts=str(prompts),
            output=str(root / "held-out"),
            sampling=train.presets()["tiny"].sampling,
            seed=config.seed,
        )
    )
    made = [image for _, image in report.pictures(root / "held-out")]
    contact_sheet(made[:64], [icon.caption for icon in wanted[:64]]).save(root / "held-out.png")
    print(json.dumps({"prompts": len(made), "accuracy": accuracy(made, wanted), "accuracy_of_originals": originals}))


if __name__ == "__main__":
    from benchmarks.icons import IconsConfig as _Config
    from benchmarks.icons import run as _run

    command_line.main(_run, _Config, __doc__)
