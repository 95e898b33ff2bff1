"""Generate pictures for a file of prompts: files, a Parquet manifest that says how each was made, and a gallery to look at.

    python pipelines/generate.py --model runs/demo/train/model --prompts prompts.txt --output runs/pictures
    python pipelines/generate.py --model bundle --prompts s3://me/prompts.parquet --output s3://me/images --images-per-prompt 4
    python pipelines/generate.py --endpoint http://127.0.0.1:8000 --prompts prompts.txt --output runs/pictures
    python pipelines/generate.py --output runs/pictures --reproduce 3f2a…    # one of them again: is it the same?

A row's columns say what it wants: prompt (or caption), and mode, image, mask, seed, size, steps, cfg, temperature,
negative_prompt, n, id, …; what a row lacks, flags say. Rows that make no sense are in the manifest, with a reason. The same
command again continues with what is missing; a finished job says so and does nothing.
"""

from __future__ import annotations

import json
import math
import pickle
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import ray
import torch
from ray.data import ActorPoolStrategy
from tqdm import tqdm

from paella import command_line
from paella.bundle import model_config
from paella.weights import read_config
from pipelines import cli, endpoint, gallery, layouts, manifest, prompts
from pipelines.generate_config import GenerateConfig
from pipelines.output_store import Output
from pipelines.picture_jobs import Jobs, Unit, units
from pipelines.picture_stages import GeneratePictures
from pipelines.reproduce import reproduce


def run(config: GenerateConfig) -> str:
    """Generate; returns the output's URI. Raises ValueError for the user's mistakes, before Ray starts."""
    config = config.absolute()
    if config.reproduce is not None:
        if not reproduce(config, config.reproduce):
            raise SystemExit(1)
        return config.output
    digest = endpoint.digest_of(config) if config.endpoint else digest_of(str(config.model))
    output = Output(config.output)
    finished = manifest.parts(output)
    jobs = Jobs(prompts.read(str(config.prompts)), config.job_settings(digest))
    todo = list(units(jobs, config.unit_size, finished))
    if not todo:
        raise ValueError(f"there are no prompts in {config.prompts}")
    output.require_writable()
    output.require_same_config(config.binding(digest, jobs.rows_digest.hexdigest()))
    missing = [unit for unit in todo if unit.part not in finished]
    if not missing and output.has("job.json") and output.has("index.html"):
        print(f"generation is finished: {config.output}")
        return config.output
    output.remove_leftovers()
    rate = _generate(config, digest, missing, todo) if missing else {}
    _finish(config, digest, output, todo, rate)
    return config.output


def digest_of(model: str) -> str:
    """A bundle's digest, without its weights. Raises ValueError for what cannot generate."""
    _, values = read_config(model)
    if "unet" not in values:
        raise ValueError(f"{model} holds no U-Net, so it cannot generate")
    return model_config(model, values)[1]["unet"]


def _generate(config: GenerateConfig, digest: str, missing: Sequence[Unit], todo: Sequence[Unit]) -> dict[str, float]:
    """Put the missing units in place; returns how fast that was."""
    if not config.endpoint:
        cli.start_ray()
    began, number = time.monotonic(), sum(unit.num_jobs for unit in missing)
    counts: Counter[str] = Counter()
    total = sum(unit.num_jobs for unit in todo)
    with tqdm(total=total, initial=total - number, unit="images", desc="pictures", mininterval=2) as bar:
        made = endpoint.generated(config, digest, missing) if config.endpoint else generated(config, digest, missing).iter_rows()
        for row in made:
            counts.update(row)
            bar.set_postfix(counts, refresh=False)
            bar.update(sum(row.values()))
    seconds = time.monotonic() - began
    return {"seconds": round(seconds, 2), "images_per_s": round(number / seconds, 2)}


def generated(config: GenerateConfig, digest: str, missing: Sequence[Unit]) -> ray.data.Dataset:
    """A row with counts for each unit that is in place."""
    gpus, cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
    wanted, on_one_node = _threads(config), max(node["Resources"].get("CPU", 0) for node in ray.nodes())
    threads = min(wanted, int(on_one_node) or wanted)
    workers = max(1, gpus or cpus // threads)
    # enough units under way to fill the batch while the oldest ends, and no more
    calls = 1 + max(1, math.ceil(config.batch_size / config.unit_size))
    return cli.dataset_of([{"unit": pickle.dumps(unit)} for unit in missing]).map_batches(
        GeneratePictures,
        fn_constructor_args=(config, digest),
        batch_size=1,
        batch_format="pyarrow",
        zero_copy_batch=True,
        # starts with what there is now, and grows and shrinks with the cluster
        compute=ActorPoolStrategy(
            min_size=1,
            initial_size=min(workers, len(missing)),
            max_size=len(missing),
            max_concurrent_calls_per_actor=calls,
            max_tasks_in_flight_per_actor=2 * calls,  # those that wait say that more workers are wanted
            enable_true_multi_threading=True,
        ),
        num_cpus=1 if gpus else threads,
        num_gpus=1 if gpus else 0,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
    )


def _threads(config: GenerateConfig) -> int:
    """Of a worker on CPUs: one for a small model, else as many as the library would have here."""
    assert config.model is not None
    _, values = read_config(config.model)
    return 1 if model_config(config.model, values)[0].single_threaded else config.threads or torch.get_num_threads()


def _finish(config: GenerateConfig, digest: str, output: Output, todo: Sequence[Unit], rate: dict[str, float]) -> None:
    """What is made of the whole, and last of all the file that says that the job is finished."""
    counts = manifest.count(output, [unit.part for unit in todo])
    layouts.finish(output, config.layout)
    chunks = [(unit.name, unit.num_jobs) for unit in todo]
    output.write("index.html", gallery.page(config.output, chunks, counts["failed"]))
    info: dict[str, Any] = {"config": cli.config_values(config), "model_digest": digest} | counts | rate
    output.write("job.json", (json.dumps(info, indent=1) + "\n").encode())
    for error, number in list(counts["errors"].items())[:5]:
        print(f"failed: {number} of {error}")
    print(f"{counts['made']} pictures, {counts['failed']} failed: {output / 'index.html'}")


if __name__ == "__main__":
    from pipelines.generate import run as _run
    from pipelines.generate_config import GenerateConfig as _Config

    command_line.main(_run, _Config, __doc__)
