"""How good VQGANs are on your images: numbers at several sizes, a table that compares them, worst cases, an answer in words.

    python pipelines/evaluate_vqgan.py --vqgans runs/a/model runs/b/model --data my/photos --output runs/compared --sizes 128 256

The output holds `report.md`, `report.json` and `worst-*.png`. rFID and the perceptual distance need a network to compare with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from paella import command_line, metrics
from paella.bundle import load_vqgan
from paella.distances import frechet_distance
from paella.images import center_crop, to_tensor, to_uint8
from paella.storage import new_file
from paella.vq_losses import ClipDistance, perceptual_distance
from paella.vqgan import VQModel
from pipelines import cli
from pipelines.image_sets import decode_captioned
from pipelines.train_vqgan import reconstruction_sheet

GROUPS = {
    "pictures with text": r"texts?|words?|letters?|signs?|logos?|posters?|labels?|captions?|writing",
    "pictures of people": r"faces?|portraits?|persons?|people|man|men|woman|women|girls?|boys?|child|children",
}
"""Groups of images by words of their captions."""
MIN_GROUP = 5
GOOD_DB, FAIR_DB, GAP_DB = 30.0, 24.0, 3.0


@dataclass(frozen=True, kw_only=True)
class EvaluateVQConfig:
    """A comparison of VQGANs."""

    vqgans: tuple[str, ...]
    """Bundles, each with a VQGAN."""
    data: str
    """Images with captions: a folder, or img2dataset's shards; best those that no VQGAN was trained on."""
    output: str
    """Directory of the report."""
    sizes: tuple[int, ...] = (256,)
    """Sides of the images in pixels."""
    max_images: int = 1000
    """Images that are looked at; an evenly spaced selection of a larger set."""
    features: str | None = None
    """open_clip ARCHITECTURE/PRETRAINED or directory, whose image embeddings rFID compares; no rFID without."""
    perceptual: str | None = None
    """Network of the perceptual distance: lpips, or an open_clip model; none without."""
    batch_size: int = 16
    """Images at once."""

    def __post_init__(self) -> None:
        if not self.vqgans:
            raise ValueError("vqgans is empty: at least one bundle is needed")
        for size in self.sizes:
            if size < 16 or size % metrics.PATCH:
                raise ValueError(f"sizes={size} is not allowed: multiples of {metrics.PATCH}, at least 16")
        for name in ("max_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: an integer of at least 1")


def run(config: EvaluateVQConfig) -> list[dict[str, Any]]:
    """Evaluate; returns a row for each VQGAN and size. Raises ValueError for the user's mistakes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = [load_vqgan(cli.absolute(uri))[0].to(device) for uri in config.vqgans]
    for uri, model in zip(config.vqgans, models, strict=True):
        for size in config.sizes:
            if size % model.config.downsampling:
                raise ValueError(f"sizes={size} is not allowed for {uri}: a multiple of {model.config.downsampling} is needed")
    judges = Judges(config.features, config.perceptual, device)
    images, captions = decode_captioned(cli.absolute(config.data), max(config.sizes), config.max_images)
    output = cli.require_writable(config.output)
    rows: list[dict[str, Any]] = []
    for size in config.sizes:
        scaled = np.stack([center_crop(Image.fromarray(image), size) for image in images])
        for number, (uri, model) in enumerate(zip(config.vqgans, models, strict=True), 1):
            rows.append({"vqgan": uri, "size": size} | evaluate(model, scaled, captions, judges, config.batch_size))
            worst = rows[-1].pop("worst")
            reconstruction_sheet(*worst).save(output / f"worst-{number}-{size}.png")
            print(f"{uri} at {size} pixels: PSNR {rows[-1]['psnr']:.1f} dB", flush=True)
    text = report(rows)
    for name, content in (("report.md", text), ("report.json", json.dumps(rows, indent=1) + "\n")):
        with new_file(output / name) as file:
            file.write_text(content)
    print(text)
    return rows


class Judges:
    """The networks that compare images: of rFID, and of the perceptual distance."""

    def __init__(self, features: str | None, perceptual: str | None, device: torch.device) -> None:
        self.device = device
        self.features = ClipDistance(str(cli.absolute_if_directory(features))).to(device) if features else None
        name = cli.absolute_if_directory(perceptual)
        self.perceptual: nn.Module | None = perceptual_distance(name).to(device) if name is not None else None


@torch.inference_mode()
def evaluate(model: VQModel, images: np.ndarray, captions: Sequence[str], judges: Judges, batch_size: int) -> dict[str, Any]:
    """Numbers of one VQGAN on images (N,H,W,3) uint8, and the 16 worst as `worst`: originals, reconstructions, PSNR."""
    device = next(model.parameters()).device
    values: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "perceptual": []}
    indices, embeddings, outputs, errors, patches = [], [], [], torch.zeros(3).double(), torch.zeros(3)
    for start in range(0, len(images), batch_size):
        batch = to_tensor(images[start : start + batch_size]).to(device)
        indices.append(model.encode(batch).cpu())
        output = model.decode_indices(indices[-1].to(device)).float().clamp(0, 1)
        values["psnr"].append(metrics.psnr(output, batch).cpu())
        values["ssim"].append(metrics.ssim(output, batch).cpu())
        if judges.perceptual is not None:
            values["perceptual"].append(judges.perceptual(output, batch).cpu())
        if judges.features is not None:
            embeddings.append(torch.stack([judges.features.embed(part).cpu() for part in (output, batch)]))
        error, number = metrics.squared_error_by_region(output.cpu(), batch.cpu())
        errors, patches = errors + error, patches + number
        outputs.append(to_uint8(output))
    means = {name: torch.cat(parts) for name, parts in values.items() if parts}
    use, perplexity = metrics.codebook_use(torch.cat(indices), model.config.codebook_size)
    worst = means["psnr"].argsort()[:16]
    row: dict[str, Any] = {name: value.mean().item() for name, value in means.items()}
    if len(images) > 1 and embeddings:
        row["rfid"] = frechet_distance(*torch.cat(embeddings, dim=1))
    row |= {"codebook_use": use, "perplexity": perplexity, "codebook_size": model.config.codebook_size, "images": len(images)}
    row["regions"] = {
        name: -10 * (error / number).clamp(min=1e-10).log10().item()
        for name, error, number in zip(metrics.REGIONS, errors, patches, strict=True)
        if number > 0
    }
    row["groups"] = by_group(means["psnr"], captions)
    row["worst"] = (images[worst.numpy()], np.concatenate(outputs)[worst.numpy()], means["psnr"][worst])
    return row


def by_group(psnr: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Mean PSNR of the groups of images that captions speak of."""
    groups = {}
    for name, words in GROUPS.items():
        members = torch.tensor([bool(re.search(rf"\b({words})\b", caption, re.IGNORECASE)) for caption in captions])
        if members.sum() >= MIN_GROUP:
            groups[name] = psnr[members].mean().item()
    return groups


COLUMNS = {"psnr": "PSNR dB", "ssim": "SSIM", "perceptual": "perceptual", "rfid": "rFID", "codebook_use": "codes in use"}


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The table, and an answer in words for each VQGAN and size."""
    columns = [name for name in COLUMNS if name in rows[0]]
    titles = ["VQGAN", "size", *(COLUMNS[name] for name in columns), "perplexity"]
    lines = [_cells(titles), _cells(["---"] * len(titles))]
    for row in rows:
        values = [f"{row[name]:.0%}" if name == "codebook_use" else f"{row[name]:.4g}" for name in columns]
        lines.append(_cells([row["vqgan"], str(row["size"]), *values, f"{row['perplexity']:.0f} of {row['codebook_size']}"]))
    lines += ["", *(f"- {row['vqgan']} at {row['size']} pixels: {verdict(row)}" for row in rows)]
    for size in dict.fromkeys(row["size"] for row in rows):
        same = [row for row in rows if row["size"] == size]
        if len(same) > 1:
            lines.append(f"- Best at {size} pixels by PSNR: {max(same, key=lambda row: row['psnr'])['vqgan']}.")
    return "\n".join(lines) + "\n"


def _cells(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"


def verdict(row: dict[str, Any]) -> str:
    """Whether a tokenizer is good enough, and where it fails."""
    if row["psnr"] >= GOOD_DB and row["ssim"] >= 0.9:
        answer = "good enough: reconstruction is not what limits pictures."
    elif row["psnr"] >= FAIR_DB:
        answer = "fair: pictures will be recognisable, with visible losses."
    else:
        answer = "not good enough: reconstruction limits what any model trained on its tokens can draw."
    parts = sorted((row["regions"] | row["groups"]).items(), key=lambda part: part[1])
    weak = [f"{name} ({value:.1f} dB)" for name, value in parts if value < row["psnr"] - GAP_DB]
    where = f" It fails first on {', '.join(weak)}." if weak else " No kind of content is much worse than the rest."
    codes = " Much of the codebook is unused on these images." if row["codebook_use"] < 0.5 else ""
    return f"{answer}{where}{codes}"


if __name__ == "__main__":
    from pipelines.evaluate_vqgan import EvaluateVQConfig as _Config
    from pipelines.evaluate_vqgan import run as _run

    command_line.main(_run, _Config, __doc__)
