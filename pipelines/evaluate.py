"""Numbers on a model: how good its pictures are and how well they fit their prompts, with how sure that is.

    python pipelines/evaluate.py --model runs/demo/train/model --reference runs/demo/held-out --output runs/evaluated
    python pipelines/evaluate.py --model bundle --reference s3://me/tokens-val --steps 4 8 12 --cfg 2 4 8 --output runs/sweep
    python pipelines/evaluate.py --compare runs/sweep runs/other --output runs/compared

The reference is a token dataset or images with captions; its captions are the prompts, unless --prompts names a file
(PartiPrompts' columns included, whose categories then have numbers of their own). Every pair of --steps and --cfg gets its
pictures, all by one job. The output holds index.html, report.json, curves.png, the best and the worst pictures, and all in
`pictures`; features are kept beside it in `features`. The same command again continues; a finished evaluation says so.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from paella import command_line
from paella.bundle import load_vqgan
from paella.distances import Moments, clip_scores, cmmd, frechet_distance, interval, jackknife, prdc, radii
from paella.sampler import MAX_SEED
from paella.storage import new_file
from paella.weights import read_config
from pipelines import (
    cli,
    evaluate_vqgan,
    evaluation_report,
    features,
    generate,
    manifest,
    prompts,
    scene_checker,
    scenes,
    tracking,
)
from pipelines.evaluate_config import METRICS, EvaluateConfig
from pipelines.features import Networks
from pipelines.generate_config import GenerateConfig
from pipelines.image_sets import decode_captioned
from pipelines.output_store import Output

PICTURES = "pictures"
"""Where they lie below the output."""
BLOCKS = 20
"""Parts of the pictures that are left out in turn, for confidence intervals."""


def run(config: EvaluateConfig) -> Path:
    """Evaluate or compare; returns the output. Raises ValueError for the user's mistakes, before Ray starts."""
    if config.compare:
        return evaluation_report.compare(config.compare, cli.require_writable(config.output))
    places = {
        name: cli.absolute(value) for name in ("model", "reference", "prompts", "output") if (value := getattr(config, name))
    }
    config = dataclasses.replace(config, **places)  # type: ignore[arg-type]
    networks = networks_of(config)
    table = prompt_table(config)
    output = cli.require_writable(config.output)
    values = cli.config_values(config)
    cli.require_same_config(output, values)
    if (output / "report.json").exists():
        print(f"evaluation is finished: {output / 'index.html'}")
        return output
    pictures = make_pictures(config, table)
    sets = (
        {name: features.files(name, output / PICTURES, rows) for name, rows in pictures.items()} if networks != Networks() else {}
    )
    cache, reference = output.parent / "features", None
    if any("reference" in METRICS[name] for name in config.metric_names if name != "reconstruction"):
        real = _reference(config, config.num_reference)
        features.prepare([real, *sets.values()], networks, cache)
        reference = Reference(features.embed(real, networks, cache))
    features.prepare([*sets.values()], networks, cache)
    report: dict[str, Any] = {"model": config.model, "reference": config.reference, "prompts": len(table), "cells": {}}
    for name, rows in pictures.items():
        made = features.embed(sets[name], networks, cache) if name in sets else {}
        report["cells"][name] = evaluate_cell(config, rows, made, reference)
    if "reconstruction" in config.metric_names:
        report["reconstruction"] = reconstruction(config)
    finish(output, report, values)
    return output


def networks_of(config: EvaluateConfig) -> Networks:
    """The networks that the metrics need. Raises ValueError where the model brings no CLIP and none is named."""
    needed = {need for name in config.metric_names for need in METRICS[name]}
    assert config.model is not None
    root, values = read_config(config.model)
    clip = cli.absolute_if_directory(config.clip)
    if "clip" in needed and clip is None:
        own = values.get("text", {}).get("clip")
        if own is None:
            raise ValueError(f"{config.model} has no CLIP of its own: name one with --clip, or choose --metrics without it")
        clip = str(root / own) if (root / own).is_dir() else own
    return Networks(clip if "clip" in needed else None, config.inception if "inception" in needed else None)


def prompt_table(config: EvaluateConfig) -> pd.DataFrame:
    """Columns prompt and, where the file of prompts has it, category; at most num_images rows."""
    if config.prompts is None:
        assert config.reference is not None
        table = pd.DataFrame({"prompt": features.captions(config.reference, config.num_images)})
    else:
        table = pd.DataFrame(itertools.islice(_prompts(config.prompts), config.num_images))
        if table.empty:
            raise ValueError(f"there are no prompts in {config.prompts}")
    if "scenes" in config.metric_names:
        for prompt in table["prompt"]:
            scenes.parse_caption(prompt)
    return table


def _prompts(uri: str) -> Iterator[dict[str, str]]:
    """The prompts of a file, with their category if they have one."""
    for row in prompts.read(uri):
        prompt = str(row.values.get("prompt", row.values.get("caption", ""))).strip()
        if prompt:
            yield {"prompt": prompt} | {name: str(row.values[name]) for name in ("category",) if name in row.values}


def make_pictures(config: EvaluateConfig, table: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """A picture of each prompt with each setting, all by one job; their rows of its manifest, by setting.

    Raises ValueError for prompts that no picture can be made of.
    """
    output = Path(config.output)
    rows = [
        {"id": f"{name}-{number:06d}", "cell": name, "seed": (config.seed + number) % (MAX_SEED + 1)}
        | {"num_inference_steps": sampling.num_inference_steps, "cfg": list(sampling.cfg)}
        | {key: value for key, value in row.items() if isinstance(value, str)}
        for name, sampling in config.cells.items()
        for number, row in enumerate(table.to_dict("records"))
    ]
    with new_file(output / "prompts.parquet") as file:
        pq.write_table(pa.Table.from_pylist(rows), file)
    generate.run(
        GenerateConfig(
            model=config.model,
            prompts=str(output / "prompts.parquet"),
            output=str(output / PICTURES),
            batch_size=config.batch_size,
            sampling=config.sampling,
        )
    )
    by_cell: dict[str, list[dict[str, Any]]] = {name: [] for name in config.cells}
    for row in manifest.rows(Output(str(output / PICTURES))):
        if row["status"] != "made":
            raise ValueError(f"no picture can be made of the prompt {row['prompt']!r}: {row['error']}")
        extra = json.loads(row["extra"])
        by_cell[extra["cell"]].append(row | {"category": extra.get("category")})
    return by_cell


def _reference(config: EvaluateConfig, num: int) -> features.ImageSet:
    assert config.model is not None and config.reference is not None
    return features.reference(config.reference, config.model, _side(config), num)


def _side(config: EvaluateConfig) -> int:
    assert config.model is not None
    return int(read_config(config.model)[1]["image_size"])


class Reference:
    """Features of the reference, and what distances to it need of them, computed once."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = values
        self.moments = {name: Moments.of(part) for name, part in values.items() if name != "clip_text"}

    @functools.cached_property
    def radii(self) -> Tensor:
        return radii(self.values["clip"])


def evaluate_cell(
    config: EvaluateConfig, rows: list[dict[str, Any]], made: dict[str, Tensor], reference: Reference | None
) -> dict[str, Any]:
    """Measure the pictures of one setting, by their rows of the manifest and their features.

    Returns `metrics` (value and half the width of its interval), `categories` (the same of each) and `images`.
    """
    pictures = Path(config.output) / PICTURES
    per_picture: dict[str, Tensor] = {}
    metrics: dict[str, Tensor] = {}
    if "clip-score" in config.metric_names:
        per_picture["clip_score"] = clip_scores(made["clip"], made["clip_text"])
    if reference is not None:
        metrics |= distances_to(reference, made, config.metric_names)
    if "scenes" in config.metric_names:
        per_picture |= scene_checks(pictures, rows)
    metrics |= {key: _mean(values) for key, values in per_picture.items()}
    categories = pd.Series([row["category"] for row in rows]).dropna()
    return {
        "metrics": {key: _json(value) for key, value in metrics.items()},
        "categories": {
            category: {key: _json(_mean(values[torch.tensor(numbers.to_numpy())])) for key, values in per_picture.items()}
            for category, numbers in sorted(categories.groupby(categories).groups.items())
        },
        "images": [
            {"prompt": row["prompt"], "seed": row["seed"], "file": f"{PICTURES}/{row['file']}"}
            | {key: round(values[number].item(), 4) for key, values in per_picture.items()}
            for number, row in enumerate(rows)
        ],
    }


def distances_to(reference: Reference, made: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Distances between all pictures and the reference: each with half the width of its interval, (2,)."""
    found: dict[str, Tensor] = {}
    num = len(next(iter(made.values())))
    for name, kind in (("fid", "inception"), ("clip-fid", "clip")):
        if name in names:
            statistic = functools.partial(_fid, made[kind], reference.moments[kind])
            found[name.replace("-", "_")] = _with_interval(statistic, num)
    if "cmmd" in names:
        values = made["clip"], reference.values["clip"]
        found["cmmd"] = torch.stack([cmmd(*values), interval(cmmd(*values, blocks=min(BLOCKS, num)))])
    if "prdc" in names:
        both = _with_interval(functools.partial(_prdc, made["clip"], reference), num)
        found |= dict(zip(("precision", "recall", "density", "coverage"), both.T, strict=True))
    return found


def _with_interval(statistic: Callable[[Tensor], Tensor], num: int) -> Tensor:
    return torch.stack([statistic(torch.arange(num)), jackknife(statistic, num, BLOCKS)])


def _fid(made: Tensor, reference: Moments, rows: Tensor) -> Tensor:
    return torch.tensor(frechet_distance(made[rows], reference), dtype=torch.float64)


def _prdc(made: Tensor, reference: Reference, rows: Tensor) -> Tensor:
    values = prdc(made[rows], reference.values["clip"], reference_radii=reference.radii)
    return torch.tensor(list(values.values()), dtype=torch.float64)


def _json(values: Tensor) -> list[float | None]:
    """JSON has no NaN."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _mean(values: Tensor) -> Tensor:
    """The mean, and half the width of its 95 % confidence interval: NaN for one value."""
    values = values.double()
    half = 1.96 * values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(torch.nan)
    return torch.stack([values.mean(), half])


def scene_checks(directory: Path, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Of each picture of a scene, which words of its caption came true."""
    checks = [
        scene_checker.check(np.asarray(Image.open(directory / row["file"]).convert("RGB")), scenes.parse_caption(row["prompt"]))
        for row in rows
    ]
    return {f"scene_{name}": torch.tensor([float(check[name]) for check in checks]) for name in checks[0]}


def reconstruction(config: EvaluateConfig) -> dict[str, Any]:
    """What the VQGAN alone loses of the reference's images."""
    assert config.model is not None and config.reference is not None
    images, captions = decode_captioned(config.reference, _side(config), config.num_images)
    judges = evaluate_vqgan.Judges(networks_of(config).clip, None, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    row = evaluate_vqgan.evaluate(load_vqgan(config.model)[0].to(judges.device), images, captions, judges, config.batch_size)
    return {name: value for name, value in row.items() if name != "worst"}


def finish(output: Path, report: dict[str, Any], values: dict[str, Any]) -> None:
    """Write the results, log them to MLflow, and last of all the file that says that the evaluation is finished."""
    evaluation_report.write(output, report)
    run = tracking.open_run(output, f"evaluate {output.name}", values)
    for cell, content in report["cells"].items():
        suffix = f".{cell}" if len(report["cells"]) > 1 else ""
        for name, (value, half) in content["metrics"].items():
            both = {f"{name}{suffix}": value, f"{name}_plus_minus{suffix}": half}
            tracking.log_metrics(run, {key: number for key, number in both.items() if number is not None}, step=0)
    for file in sorted([*output.glob("*.png"), output / "report.md"]):
        tracking.log_file(run, file)
    tracking.finish_run(run)
    with new_file(output / "report.json") as file:
        file.write_text(json.dumps(report, indent=1) + "\n")
    print((output / "report.md").read_text())
    print(f"look: {output / 'index.html'}")


if __name__ == "__main__":
    from pipelines.evaluate import run as _run
    from pipelines.evaluate_config import EvaluateConfig as _Config

    command_line.main(_run, _Config, __doc__)
