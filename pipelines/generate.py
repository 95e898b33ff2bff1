"""Generate pictures for a file of prompts: PNG files, a Parquet manifest, a contact sheet and a gallery page.

    python pipelines/generate.py --model runs/demo/train/model --prompts prompts.txt --output runs/pictures

Prompts come from .txt (one a line), .jsonl, .csv, .tsv or .parquet (column `prompt` or `caption`). The same command again
continues with the pictures that are missing; a finished job says so and does nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import html
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from PIL import Image
from ray.data import ActorPoolStrategy, DataContext
from tqdm import tqdm

from paella import command_line
from paella.bundle import load_bundle
from paella.images import contact_sheet, save_png, to_uint8
from paella.sampler import MAX_SEED, SamplingConfig
from paella.storage import new_file
from pipelines import cli

MANIFEST = pa.schema(
    [
        ("order", pa.int64()),
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("seed", pa.int64()),
        ("settings", pa.string()),
        ("bundle_digest", pa.string()),
        ("file", pa.string()),
        ("sha256", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """One batch generation job."""

    model: str
    """Bundle: directory, URI or models:/name@alias."""
    prompts: str
    """File of prompts: .txt, .jsonl, .csv, .tsv or .parquet."""
    output: str
    """Directory of the pictures; the same command with the same output continues it."""
    images_per_prompt: int = 1
    """Pictures of each prompt."""
    seed: int = 0
    """Seed of the first picture; the i-th picture of the job has seed + i."""
    batch_size: int = 32
    """Pictures per U-Net pass."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Settings of the sampler."""

    def __post_init__(self) -> None:
        for name in ("images_per_prompt", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: an integer of at least 1")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed={self.seed} is not allowed: 0 to {MAX_SEED}")


def run(config: GenerateConfig) -> Path:
    """Generate; returns the manifest's directory. Raises ValueError for the user's mistakes, before Ray starts."""
    config = dataclasses.replace(
        config,
        model=cli.absolute(config.model),
        prompts=cli.absolute(config.prompts),
        output=cli.absolute(config.output),
    )
    digest = load_bundle(config.model).digest
    jobs = make_jobs(read_prompts(config.prompts), config, digest)
    output = cli.require_writable(config.output)
    (output / "images").mkdir(exist_ok=True)
    (output / "manifest").mkdir(exist_ok=True)
    cli.require_same_config(output, cli.config_values(config) | {"model": digest})
    done = set(_manifest(output)["id"].to_pylist())
    missing = [job for job in jobs if job["id"] not in done]
    if not missing and (output / "index.html").exists():
        print(f"generation is finished: {output}")
        return output / "manifest"
    if missing:  # a job killed after its last picture lacks only the gallery
        _generate(config, missing, len(jobs))
    _write_gallery(output)
    print(f"{len(jobs)} pictures: {output / 'index.html'}")
    return output / "manifest"


def read_table(path: str) -> pd.DataFrame:
    """The rows of a file of prompts, with a column `prompt`.

    Raises ValueError for an unknown format, a missing column or no prompts.
    """
    readers = {
        ".txt": lambda file: pd.DataFrame({"prompt": Path(file).read_text().splitlines()}),
        ".jsonl": lambda file: pd.read_json(file, lines=True),
        ".csv": pd.read_csv,
        ".tsv": lambda file: pd.read_csv(file, sep="\t"),
        ".parquet": pd.read_parquet,
    }
    suffix = Path(path).suffix.lower()
    if suffix not in readers:
        raise ValueError(f"the prompts {path} have an unknown format; known are {', '.join(readers)}")
    if not Path(path).is_file():
        raise ValueError(f"there is no file of prompts {path}")
    table = readers[suffix](path).rename(columns=str.lower)
    column = next((name for name in ("prompt", "caption") if name in table.columns), None)
    if column is None:
        raise ValueError(f"the prompts {path} have no column prompt or caption, but {', '.join(table.columns)}")
    table = table.rename(columns={column: "prompt"}).dropna(subset=["prompt"])
    table["prompt"] = table["prompt"].astype(str).str.strip()
    table = table[table["prompt"] != ""]
    if table.empty:
        raise ValueError(f"there are no prompts in {path}")
    return table


def read_prompts(path: str) -> list[str]:
    """Prompts of a file; see `read_table`."""
    return read_table(path)["prompt"].tolist()


def make_jobs(prompts: list[str], config: GenerateConfig, digest: str) -> list[dict]:
    """One row per picture; its id is a digest of all that decides how it looks."""
    settings = json.dumps(cli.config_values(config.sampling), sort_keys=True)
    jobs = []
    for order in range(len(prompts) * config.images_per_prompt):
        prompt, seed = prompts[order // config.images_per_prompt], (config.seed + order) % (MAX_SEED + 1)
        identity = hashlib.sha256(json.dumps([prompt, seed, settings, digest]).encode()).hexdigest()[:16]
        jobs.append({"order": order, "id": identity, "prompt": prompt, "seed": seed, "settings": settings})
    return jobs


def _generate(config: GenerateConfig, jobs: list[dict], total: int) -> None:
    cli.start_ray()
    DataContext.get_current().enable_progress_bars = False
    workers = max(1, int(ray.cluster_resources().get("GPU", 0)) or int(ray.cluster_resources()["CPU"]) // 2)
    dataset = ray.data.from_items(jobs, override_num_blocks=-(-len(jobs) // config.batch_size)).map_batches(
        GenerateImages,
        fn_constructor_args=(config,),
        batch_size=config.batch_size,
        batch_format="pandas",
        compute=ActorPoolStrategy(min_size=1, max_size=workers),
        num_cpus=2 if ray.cluster_resources()["CPU"] >= 2 else 1,
        num_gpus=1 if ray.cluster_resources().get("GPU") else 0,
    )
    with tqdm(total=total, initial=total - len(jobs), unit="images", desc="pictures", mininterval=2) as bar:
        for _ in dataset.iter_rows():
            bar.update()


class GenerateImages:
    """Loads the bundle once; a batch of rows becomes PNG files, then their manifest rows.

    Always float32, so that a picture can be made again.
    """

    def __init__(self, config: GenerateConfig) -> None:
        self.config = config
        self.output = Path(config.output)
        self.bundle = load_bundle(config.model, "cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, batch: pd.DataFrame) -> pd.DataFrame:
        rows = batch.to_dict("records")
        tokens = self.bundle.generate_tokens(
            [row["prompt"] for row in rows], [int(row["seed"]) for row in rows], sampling=self.config.sampling
        )
        images = to_uint8(self.bundle.decode(tokens))
        entries = [self._write(row, image) for row, image in zip(rows, images, strict=True)]
        with new_file(self.output / "manifest" / f"part-{rows[0]['id']}.parquet") as file:
            pq.write_table(pa.Table.from_pylist(entries, schema=MANIFEST), file)
        return pd.DataFrame({"id": batch["id"]})

    def _write(self, row: dict, image: np.ndarray) -> dict:
        """Write a picture; returns its row of the manifest."""
        name = f"images/{row['id']}.png"
        text = {
            "prompt": row["prompt"],
            "seed": str(row["seed"]),
            "settings": row["settings"],
            "bundle": self.bundle.digest,
            "generator": "paella-ray: this picture was made by a model",
        }
        with new_file(self.output / name) as file:
            save_png(file, image, text)
        digest = hashlib.sha256((self.output / name).read_bytes()).hexdigest()
        return row | {"bundle_digest": self.bundle.digest, "file": name, "sha256": digest}


def _manifest(output: Path) -> pa.Table:
    files = sorted((output / "manifest").glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files]) if files else MANIFEST.empty_table()


def _write_gallery(output: Path) -> None:
    """A static page and a sheet of the first pictures, from the manifest."""
    rows = _manifest(output).sort_by("order").to_pylist()
    first = rows[:64]
    images = [np.asarray(Image.open(output / row["file"]).convert("RGB")) for row in first]
    with new_file(output / "contact_sheet.png") as file:
        contact_sheet(images, [row["prompt"] for row in first]).save(file, format="PNG")
    figures = "\n".join(
        f'<figure><img loading="lazy" src="{row["file"]}" alt="{html.escape(row["prompt"], quote=True)}">'
        f"<figcaption>{html.escape(row['prompt'])} <small>seed {row['seed']}</small></figcaption></figure>"
        for row in rows
    )
    with new_file(output / "index.html") as file:
        file.write_text(GALLERY.format(figures=figures, count=len(rows)))


GALLERY = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{count} pictures</title>
<style>:root {{ color-scheme: light dark; }} body {{ font: 15px/1.4 system-ui, sans-serif; margin: 1.5em; }}
main {{ display: grid; gap: 1em; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }}
figure {{ margin: 0; }} img {{ width: 100%; image-rendering: pixelated; }} small {{ opacity: .6; }}</style></head>
<body><h1>{count} pictures</h1><main>
{figures}
</main></body></html>
"""


if __name__ == "__main__":
    from pipelines.generate import GenerateConfig as _Config
    from pipelines.generate import run as _run

    command_line.main(_run, _Config, __doc__)
