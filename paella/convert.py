"""Released weights → a bundle.

    python -m paella.convert --unet paella_v3.pt --vqgan vqgan_f4.pt --prior prior_v1.pt \\
        --byt5 google/byt5-xl --clip ViT-H-14/laion2b_s32b_b79k --out bundle/

Reads the published state dicts and the checkpoints of the published training loop (`{"state_dict": …}`), as .pt or .safetensors,
compares keys and shapes with the model, looks for numbers that are none, and writes a bundle that everything else loads. Pickles
are read as tensors only; code in them is refused. Other sizes than the published ones come from --config, a JSON file of
{"unet": {…}, "vqgan": {…}, "prior": {…}} with the constructors' arguments.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from paella.bundle import save_bundle
from paella.config import PRESETS, ModelConfig, PaellaConfig, PriorConfig, TextConfig, VQConfig
from paella.prior import Prior
from paella.unet import Paella
from paella.vqgan import VQModel
from paella.weights import read_config

NAMED = 3
"""So many keys or shapes that do not fit are named; the rest are counted."""
CARD = """# {name}

A Paella text-to-image model (arXiv 2211.07292), converted from released weights.

{sources}

Text encoder: {byt5}. CLIP: {clip}. The weights are under the licence of whoever released them.
"""


def convert(files: Mapping[str, str], config: ModelConfig, out: Path, dtype: torch.dtype | None = None) -> dict[str, int]:
    """Write a bundle of the files of `unet`, `vqgan` and, by config, `prior`; returns the parameters of each.

    Raises ValueError for a file that cannot be read or does not fit, before anything is written.
    """
    makers: dict[str, Callable[[], nn.Module]] = {"unet": lambda: Paella(config.unet), "vqgan": lambda: VQModel(config.vqgan)}
    if (prior := config.prior) is not None:
        makers["prior"] = lambda: Prior(prior)
    states = {}
    for name, make in makers.items():
        states[name] = read_state(files[name])
        require_fit(files[name], states[name], make)
    sources = "\n".join(f"- {name}: {Path(file).name}" for name, file in files.items())
    card = CARD.format(name=out.name, sources=sources, byt5=config.text.byt5, clip=config.text.clip or "none")
    save_bundle(out, config, states, card, dtype=dtype)
    return {name: sum(value.numel() for value in state.values()) for name, state in states.items()}


def read_state(file: str) -> dict[str, Tensor]:
    """The state dict in a file, memory-mapped. Raises ValueError for a file that is none, or that holds more than tensors."""
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file}")
    try:
        state: Any = (
            load_file(file)
            if file.endswith(".safetensors")
            else torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        )
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} holds more than tensors, or is damaged; code in it has not been run") from error
    except Exception as error:  # the unpickler fails on damaged bytes with whatever they lead it to: KeyError, struct.error, …
        raise ValueError(f"{file} cannot be read as weights: {' '.join(str(error).split())[:200]}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state or not all(map(_named_tensor, state, state.values())):
        raise ValueError(f"{file} holds no state dict: names with tensors are expected, or these under 'state_dict'")
    return state


def _named_tensor(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and value.layout is torch.strided


def require_fit(file: str, state: Mapping[str, Tensor], make: Callable[[], nn.Module]) -> None:
    """Raises ValueError that says which keys are missing or unknown, which shapes differ, or where numbers are not finite."""
    with torch.device("meta"):
        model = make().state_dict()
    expected = {name: tuple(value.shape) for name, value in model.items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    problems = [
        _listed("missing", [name for name in expected if name not in found]),
        _listed("unknown", [name for name in found if name not in expected]),
        _listed(
            "of another shape",
            [
                f"{name} {shape} where {expected[name]} is expected"
                for name, shape in found.items()
                if shape != expected.get(name, shape)
            ],
        ),
    ]
    if not any(problems):
        others = [name for name, value in state.items() if value.is_floating_point() != model[name].is_floating_point()]
        problems = [_listed("of another type", [f"{name} {state[name].dtype}" for name in others])]
    if not any(problems):
        problems = [_listed("with NaN or infinity", [name for name, value in state.items() if not _finite(value)])]
    if any(problems):
        raise ValueError(f"{file} does not fit: {'; '.join(problem for problem in problems if problem)}")


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(value.isfinite().all())


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{what}: {', '.join(names[:NAMED])}{more}"


def config_of(arguments: argparse.Namespace) -> ModelConfig:
    """The configuration that the command line asks for. Raises ValueError for a file that is none."""
    published = PRESETS["paella-1b"]
    values = {"unet": published.unet.to_dict(), "vqgan": published.vqgan.to_dict(), "prior": PriorConfig().to_dict()}
    if arguments.config:
        try:
            values |= json.loads(Path(arguments.config).read_text())
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"the config {arguments.config} cannot be read: {error}") from error
    try:
        unet, vqgan = PaellaConfig.from_dict(values["unet"]), VQConfig.from_dict(values["vqgan"])
        prior = PriorConfig.from_dict(values["prior"]) if arguments.prior else None
    except TypeError as error:  # "a" where a number is wanted, say
        raise ValueError(f"the config {arguments.config} is of another form: {error}") from error
    text = TextConfig(byt5=arguments.byt5, clip=arguments.clip or None)
    size = arguments.image_size or published.image_size
    return ModelConfig(unet=unet, vqgan=vqgan, text=text, image_size=size, prior=prior)


def main() -> None:
    description, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        "python -m paella.convert", description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--unet", required=True, help="weights of the U-Net")
    parser.add_argument("--vqgan", required=True, help="weights of the VQGAN")
    parser.add_argument("--prior", help="weights of the prior (CLIP text → CLIP image embedding)")
    parser.add_argument("--byt5", default="google/byt5-xl", help="T5 encoder: hub name or directory (default: %(default)s)")
    parser.add_argument(
        "--clip",
        default="ViT-H-14/laion2b_s32b_b79k",
        help="CLIP: architecture/pretrained of open_clip, a directory, or '' for none (default: %(default)s)",
    )
    parser.add_argument("--out", required=True, help="directory of the bundle")
    parser.add_argument("--config", help="JSON of other sizes than the published")
    parser.add_argument("--image-size", type=int, help="side of the training images in pixels (default: 256)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights written (default: as they come)")
    arguments = parser.parse_args()
    files = {name: getattr(arguments, name) for name in ("unet", "vqgan", "prior") if getattr(arguments, name)}
    out = Path(arguments.out)
    try:
        if out.exists():
            raise ValueError(f"{out} exists already; choose another --out")
        dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
        sizes = convert(files, config_of(arguments), out, dtype)
        _, values = read_config(str(out))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    for name, number in sizes.items():
        print(f"{name}: {number:,} numbers from {files[name]}, SHA-256 {values['digests'][name]}")
    total = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"bundle: {out} ({total / 1e9:.2f} GB)")
    print(f"next: python pipelines/generate.py --model {out} --prompts prompts.txt --output pictures")


if __name__ == "__main__":
    main()
