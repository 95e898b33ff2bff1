"""A sheet of every mode of a model: what each starts from, and what it makes of it.

    python pipelines/modes.py --model runs/demo/train/model --output runs/modes

The prompts fit the demo's scenes; `--prompt` and `--other` take your own. The sheets are one PNG a mode. Modes that look at
images through CLIP are left out, with a word, for a model that has no CLIP.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paella import command_line, edits
from paella.bundle import Bundle, load_bundle
from paella.images import contact_sheet, to_uint8
from paella.sampler import Canvas, SamplingConfig, sample
from pipelines import cli

Sheet = list[tuple[str, Tensor]]  # captions and images (3,H,W)


@dataclass(frozen=True, kw_only=True)
class ModesConfig:
    """Sheets of the modes."""

    model: str
    """Bundle: directory, URI or models:/name@alias."""
    output: str
    """Directory of the sheets."""
    prompt: str = "a large red square at the left on a black background"
    """What the first picture shows."""
    other: str = "a large blue circle at the right on a black background"
    """What the others turn to."""
    seed: int = 0
    """Seed of the first picture."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=(1.0, 0.3), cfg=(1.5,)))
    """Settings of the sampler."""


def run(config: ModesConfig) -> None:
    """Make the sheets."""
    bundle = load_bundle(config.model, "cuda" if torch.cuda.is_available() else "cpu")
    output = cli.require_writable(config.output)
    maker = Maker(bundle, config)
    for mode in MODES:
        name = mode.__name__
        try:
            cells = mode(maker)
        except ValueError as error:
            if bundle.text.clip is not None:
                raise
            print(f"{name}: left out, {error}")
            continue
        images = [array for _, image in cells for array in to_uint8(image[None])]
        contact_sheet(images, [caption for caption, _ in cells], columns=len(cells)).save(output / f"{name}.png")
        print(f"{name}: {output / name}.png")


class Maker:
    """Makes the pictures of one bundle; the first one is the source of the edits."""

    def __init__(self, bundle: Bundle, config: ModesConfig) -> None:
        self.bundle, self.config = bundle, config
        self.prompt, self.other = config.prompt, config.other
        self.source = self(edits.text_to_image, self.prompt, seed=config.seed)
        self.target = self(edits.text_to_image, self.other, seed=config.seed)

    def __call__(self, mode: Callable[..., Canvas], *arguments: object, **settings: Any) -> Tensor:
        """The picture (3,H,W) that a mode's canvas becomes."""
        canvas = mode(self.bundle, *arguments, **{"seed": self.config.seed + 1, "config": self.config.sampling} | settings)
        tokens = sample(self.bundle.unet, [canvas], codebook=self.bundle.vqgan.vquantizer)
        return self.bundle.decode(tokens)[0].cpu()

    def half(self) -> Tensor:
        """A mask (H,W) of the right half."""
        mask = torch.zeros(self.source.shape[1:], dtype=torch.bool)
        mask[:, mask.shape[1] // 2 :] = True
        return mask


def text_to_image(make: Maker) -> Sheet:
    return [(make.prompt, make.source), (make.other, make.target)]


def unconditional(make: Maker) -> Sheet:
    plain = dataclasses.replace(make.config.sampling, cfg=(1.0,))
    return [(f"no prompt, seed {seed}", make(edits.text_to_image, "", seed=seed, config=plain)) for seed in range(4)]


def inpainting(make: Maker) -> Sheet:
    mask = make.half()
    made = make(edits.inpaint, make.source, mask, make.other)
    hidden = torch.where(mask, 0.5, make.source)
    pasted = edits.paste(make.source, made, mask, feather=4)
    return [("source", make.source), ("mask", hidden), ("made anew", made), ("pasted into the source", pasted)]


def outpainting(make: Maker) -> Sheet:
    width = make.source.shape[2]
    wide = make(edits.outpaint, make.source, (0, width, 0, 0), make.other)
    return [("source", wide[..., :width]), ("continued", wide[..., width:])]


def structural_edit(make: Maker) -> Sheet:
    made = [(f"strength {s}: {make.other}", make(edits.restyle, make.source, make.other, strength=s)) for s in (0.4, 0.7, 0.9)]
    return [("source", make.source), *made]


def inverted_edit(make: Maker) -> Sheet:
    made = [(f"keep {k}: {make.other}", make(edits.edit, make.source, make.prompt, make.other, keep=k)) for k in (1.0, 0.5, 0.2)]
    return [("source", make.source), *made]


def regions(make: Maker) -> Sheet:
    right = make.half()
    caption = f"left: {make.prompt}; right: {make.other}"
    return [(caption, make(edits.regions, [make.prompt, make.other], [~right, right]))]


def interpolation(make: Maker) -> Sheet:
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    return [(f"share {share}", make(edits.interpolate, make.prompt, make.other, share)) for share in shares]


def other_sizes(make: Maker) -> Sheet:
    side, multiple = make.bundle.config.image_size, make.bundle.config.size_multiple
    low = max(multiple, side // 2 // multiple * multiple)
    cells = []
    for width, height in ((2 * side, side), (side, low), (low, side)):
        made = make(edits.text_to_image, make.other, size=(width, height))
        cells.append((f"{width}x{height}", F.pad(made, (0, 2 * side - width, 0, side - height), value=1.0)))  # cells are alike
    return cells


def negative_prompt(make: Maker) -> Sheet:
    made = make(edits.text_to_image, make.prompt, negative_prompt=make.other, seed=make.config.seed)
    return [("plain", make.source), (f"not: {make.other}", made)]


def variation(make: Maker) -> Sheet:
    made = [(f"variation, seed {seed}", make(edits.variation, make.source, seed=seed)) for seed in (1, 2, 3)]
    return [("source", make.source), *made]


def blend(make: Maker) -> Sheet:
    made = make(edits.blend, [make.source, make.target], [1.0, 1.0])
    return [("first", make.source), ("second", make.target), ("blend", made)]


def image_interpolation(make: Maker) -> Sheet:
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    return [(f"share {share}", make(edits.interpolate_images, make.source, make.target, share)) for share in shares]


MODES = (
    text_to_image,
    unconditional,
    inpainting,
    outpainting,
    structural_edit,
    inverted_edit,
    regions,
    interpolation,
    other_sizes,
    negative_prompt,
    variation,
    blend,
    image_interpolation,
)


if __name__ == "__main__":
    command_line.main(run, ModesConfig, __doc__)
