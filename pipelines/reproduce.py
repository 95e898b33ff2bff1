"""A picture of a finished or unfinished generating job again, from its row of the manifest: is it the same, bit for bit?"""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

import numpy as np
import torch
from PIL import Image

from paella.bundle import load_bundle
from paella.requests import plan
from paella.sampler import sample
from pipelines import layouts, manifest
from pipelines.generate_config import GenerateConfig
from pipelines.output_store import Output
from pipelines.picture_units import with_inputs

DIRECTORY = "reproduced"


def reproduce(config: GenerateConfig, identity: str) -> bool:
    """Make a picture again, put it beside the output, and say whether it is the same; returns that.

    Raises ValueError where the manifest has no such picture, or the model is another one.
    """
    output = Output(config.output)
    row = manifest.find(output, identity)
    if row is None:
        raise ValueError(f"{output} has no picture {identity}")
    if row["status"] != "made":
        raise ValueError(f"the picture {identity} was not made: {row['error']}")
    settings = _job(config, output)
    bundle = load_bundle(str(settings.model), "cuda" if torch.cuda.is_available() else "cpu")
    if bundle.digest != row["bundle_digest"]:
        raise ValueError(f"{settings.model} is the model {bundle.digest}, but {identity} was made by {row['bundle_digest']}")
    if row["device"].startswith("cpu, "):
        torch.set_num_threads(int(row["device"].split()[1]))  # another number rounds otherwise
    planned = plan(bundle, with_inputs(manifest.request_of(row), settings))
    tokens = sample(bundle.unet, [planned.canvas(bundle, seed=row["seed"], index=row["index"])], codebook=bundle.vqgan.vquantizer)
    data = planned.file(bundle, bundle.decode(tokens)[0].cpu(), seed=row["seed"], index=row["index"])
    name = f"{DIRECTORY}/{row['sha256'][:16]}.{layouts.SUFFIXES[row['output_format']]}"
    output.write(name, data)
    same = hashlib.sha256(data).hexdigest() == row["sha256"]
    print(f"{output / name}: {'bit-equal' if same else _difference(output, row, data)}")
    return same


def _job(config: GenerateConfig, output: Output) -> GenerateConfig:
    """The job's model and prompts, where they are not given."""
    info = output.read("job.json")
    job = json.loads(info)["config"] if info is not None else {}
    model, prompts = config.model or job.get("model"), config.prompts or job.get("prompts")
    if model is None:
        raise ValueError(f"{output} is not finished, so --model has to be given")
    return GenerateConfig(output=config.output, model=model, prompts=prompts, reproduce=config.reproduce)


def _difference(output: Output, row: dict[str, Any], data: bytes) -> str:
    before, after = (np.asarray(Image.open(io.BytesIO(each)), int) for each in (layouts.picture(output, row), data))
    if before.shape != after.shape:
        return "not equal: another size"
    differ = np.abs(before - after)
    return (
        f"not equal: {(differ > 0).any(-1).mean():.2%} of the pixels differ, by {differ.max()} at most (made on {row['device']})"
    )
