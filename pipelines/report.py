"""The demo's results: numbers (report.json), a captioned contact sheet, and a page that shows how it went."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image

from paella.bundle import Bundle, load_bundle
from paella.images import contact_sheet, to_uint8
from paella.metrics import codebook_use
from paella.storage import new_file
from pipelines import manifest, probe, pulse, scene_binding, scene_checker, scenes, tracking
from pipelines.image_sets import captions as source_captions
from pipelines.image_sets import decode_all
from pipelines.output_store import Output
from pipelines.progress import duration
from pipelines.stages import Stages
from pipelines.train_config import presets
from pipelines.train_vqgan import reconstruct, reconstruction_sheet

matplotlib.use("Agg")


def write(
    root: Path, model: Path, prompts: list[str], stages: Stages, flops: Mapping[str, float], *, generated_scenes: bool
) -> None:
    """Write everything the demo shows into `root`.

    Args:
        flops: of each training stage.
    """
    bundle = load_bundle(str(model))
    images = pictures(root / "pictures")
    values: dict[str, Any] = {"prompts": len(images)}
    if generated_scenes:
        values |= of_scenes(images) | reconstruction(root, bundle) | {"binding": scene_binding.binding(bundle)}
    else:
        values |= {key: json.loads((root / "vqgan/report.json").read_text())[key] for key in ("psnr", "codebook_use")}
        Image.open(root / "vqgan/reconstructions.png").save(root / "reconstructions.png")
    values["probe"] = probed(root, model)
    seconds = {name: spent for name, spent in stages.seconds.items() if name != "report"}  # as in a first run, where none is over
    values |= {
        "pulse": pulse.pulse(flops, sum(seconds.values()), values.get("accuracy", {})),
        "seconds": {name: round(spent, 1) for name, spent in seconds.items()},
        "seconds_total": round(sum(seconds.values()), 1),
        "peak_memory_gb": round(stages.peak_bytes / 1e9, 2),
        "model_digest": bundle.digest,
    }
    contact_sheet([image for _, image in images[:64]], [prompt for prompt, _ in images[:64]]).save(root / "contact_sheet.png")
    emergence(bundle, prompts[:4]).save(root / "emergence.png")
    training_curve(root)
    _write_text(root / "report.json", json.dumps(values, indent=1) + "\n")
    _write_text(root / "index.html", page(values, root))


def of_scenes(images: list[tuple[str, np.ndarray]]) -> dict[str, dict[str, float]]:
    """What the checker reads from pictures of scenes: accuracy by attribute of all, and of those of one and of two objects."""
    objects = [len(scenes.parse_caption(caption).objects) for caption, _ in images]
    values = {"accuracy": caption_accuracy(images)}
    for num, name in ((1, "accuracy_one_object"), (2, "accuracy_two_objects")):
        values[name] = caption_accuracy([image for image, count in zip(images, objects, strict=True) if count == num])
    return values


def probed(root: Path, model: Path) -> dict[str, Any]:
    """What the model hears and binds, on the rows that training has held out; a quarter of a minute of one core with `tiny`."""
    tokens = str(root / "tokens")
    values = probe.measure(
        probe.ProbeConfig(model=str(model), data=tokens, images=128, levels=(0.3, 0.8, 1.0), captions_per_word=32)
    )
    probe.write(values, root)
    return values


def pictures(directory: Path) -> list[tuple[str, np.ndarray]]:
    """(prompt, image) of every generated picture, in order."""
    rows = manifest.made(Output(str(directory)))
    return [(row["prompt"], np.asarray(Image.open(directory / row["file"]).convert("RGB"))) for row in rows]


def caption_accuracy(images: list[tuple[str, np.ndarray]]) -> dict[str, float]:
    """Share of pictures whose pixels show what the caption says, by attribute and all together; {} for no pictures."""
    checks = [scene_checker.check(image, scenes.parse_caption(caption)) for caption, image in images]
    return {name: float(np.mean([check[name] for check in checks])) for name in (checks[0] if checks else ())}


def reconstruction(root: Path, bundle: Bundle) -> dict:
    """PSNR, codebook use and what the checker still reads on held-out images after the VQGAN, and a sheet of them."""
    originals = decode_all(str(root / "held-out"), bundle.config.image_size, 10_000)
    outputs, values, indices = reconstruct(bundle.vqgan, originals)
    use, perplexity = codebook_use(indices, bundle.config.vqgan.codebook_size)
    reconstruction_sheet(originals[:16], outputs[:16], values[:16]).save(root / "reconstructions.png")
    captions = source_captions(str(root / "held-out"), len(originals))
    return {
        "psnr": values.mean().item(),
        "codebook_use": use,
        "perplexity": perplexity,
        "accuracy_of_reconstructions": caption_accuracy(list(zip(captions, outputs, strict=True))),
    }


@torch.inference_mode()
def emergence(bundle: Bundle, prompts: list[str]) -> Image.Image:
    """One row per prompt: the prediction after each step."""
    rows: list[torch.Tensor] = []
    config = presets()["tiny"].sampling
    bundle.generate_tokens(
        prompts,
        list(range(len(prompts))),
        sampling=config,
        on_step=lambda canvases: rows.append(torch.stack([canvas.prediction for canvas in canvases])),
    )
    images = [to_uint8(bundle.decode(tokens)) for tokens in rows]  # steps × (B,H,W,3)
    cells = [images[step][row] for row in range(len(prompts)) for step in range(len(images))]
    captions = [f"step {step + 1}" for _ in prompts for step in range(len(images))]
    return contact_sheet(cells, captions, columns=len(images), scale=1)


def training_curve(root: Path) -> None:
    """Loss by noise level over the steps, from MLflow."""
    from matplotlib import pyplot

    run = tracking.Run(**json.loads((root / "train/mlflow_run.json").read_text()))
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 3.6))
    for low in (0.0, 0.25, 0.5, 0.75):
        history = tracking.metric_history(run, f"loss_t_{low:.2f}_{low + 0.25:.2f}")
        axes[0].plot(*zip(*history, strict=True), label=f"t in {low:.2f}–{low + 0.25:.2f}")
    axes[0].set(title="loss by noise level", xlabel="step")
    axes[0].legend()
    axes[1].plot(*zip(*tracking.metric_history(run, "accuracy"), strict=True))
    axes[1].set(title="token accuracy", xlabel="step")
    figure.tight_layout()
    figure.savefig(root / "training.png", dpi=100)
    pyplot.close(figure)


def summary(root: Path) -> str:
    """What the demo prints at the end."""
    values = json.loads((root / "report.json").read_text())
    lines = [f"\nDone in {duration(values['seconds_total'])}, at most {values['peak_memory_gb']} GB of memory."]
    if "accuracy" in values:
        accuracy = "  ".join(f"{name} {share:.2f}" for name, share in values["accuracy"].items())
        lines.append(f"Caption accuracy on {values['prompts']} held-out captions: {accuracy}")
    if "binding" in values:
        shares = "  ".join(f"{name} {share:.2f}" for name, share in values["binding"].items())
        lines.append(f"Colours where their relation puts them (0.50: by chance): {shares}")
    lines.append(f"VQGAN: PSNR {values['psnr']:.1f} dB, {values['codebook_use']:.0%} of the codebook in use")
    lines.append(f"Its line for docs/pulse.md:\n{values['pulse']['row']}")
    lines += [f"Look:  {root / 'index.html'}", "Next:"]
    return "\n".join([*lines, *(f"  {command}" for command in next_commands(root))])


def next_commands(root: Path) -> list[str]:
    return [
        "make serve    # type prompts in a browser",
        "make mlflow   # curves, samples and the registered model",
        f".venv/bin/python pipelines/generate.py --model {_shown(root)}/train/model --prompts my-prompts.txt --output runs/mine",
        "make demo DATA=folder/of/images/with/captions ARGS='--output runs/my-demo'",
    ]


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _write_text(path: Path, text: str) -> None:
    with new_file(path) as file:
        file.write_text(text)


def page(values: dict, root: Path) -> str:
    """The page: static, no script, readable from disk."""
    rows = {
        "VQGAN reconstruction": f"{values['psnr']:.1f} dB PSNR",
        "codebook in use": f"{values['codebook_use']:.0%}",
        "time": ", ".join(f"{name} {duration(seconds)}" for name, seconds in values["seconds"].items()),
        "peak memory": f"{values['peak_memory_gb']} GB",
        "arithmetic of all training": f"{values['pulse']['tflop']} TFLOP",
    }
    for name, share in values.get("accuracy", {}).items():
        ceiling = values["accuracy_of_reconstructions"][name]
        rows[f"caption accuracy: {name}"] = (
            f"{share:.1%} of {values['prompts']} held-out captions ({ceiling:.1%} of real images after the VQGAN)"
        )
    for name, share in values.get("binding", {}).items():
        rows[f"binding: {name}"] = f"{share:.2f} of the colours are where the caption puts them (0.5: by chance)"
    table = "".join(f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>" for key, value in rows.items())
    is_held_out = "accuracy" in values  # captions of the user's own images were in training
    first = "Each made from its caption" + ("; none of the combinations was in training." if is_held_out else ".")
    sections = "".join(
        f'<h2>{html.escape(title)}</h2><p>{html.escape(text)}</p><img src="{file}" alt="{html.escape(title)}">'
        for title, file, text in [("Generated pictures", "contact_sheet.png", first), *SECTIONS]
    )
    commands = html.escape("\n".join(next_commands(root)))
    return PAGE.format(table=table, sections=sections, commands=commands)


SECTIONS = [
    ("How a picture emerges", "emergence.png", "The prediction after each step: from random tokens to a picture."),
    (
        "Training",
        "training.png",
        "Cross-entropy by the share of noise in the tokens, and the share of tokens predicted.",
    ),
    (
        "What the model hears",
        "probe.png",
        "Left: how much worse the tokens of held-out images are predicted with another word of the same kind in a word’s place, "
        "by the share of noise; at 0 the word is not heard. Right: how often an image fits its own caption better than one in "
        "which two words have changed places; at 0.5 the model knows which words there are, but not what belongs to what.",
    ),
    ("Reconstructions", "reconstructions.png", "Held-out images above what the VQGAN makes of their tokens."),
]

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>paella-ray demo</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 2em auto; padding: 0 1em; }}
img {{ max-width: 100%; background: white; }}
th {{ text-align: left; padding-right: 1.5em; font-weight: 500; }}
pre {{ padding: 1em; overflow-x: auto; border: 1px solid #8888; border-radius: 6px; }}
</style></head><body>
<h1>paella-ray: the demo's results</h1>
<table>{table}</table>
{sections}
<h2>Next</h2><pre>{commands}</pre>
</body></html>
"""
