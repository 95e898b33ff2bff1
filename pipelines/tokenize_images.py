"""Turn captioned images into a token dataset: Ray Data decodes on CPUs and encodes with the VQGAN, each image once.

    python pipelines/tokenize_images.py --input runs/demo/images --vqgan runs/demo/vqgan/model --output runs/x --resolution 64
    python pipelines/tokenize_images.py --input s3://laion/shards --vqgan bundle/ --output s3://me/tokens --min-aesthetic 6.0 \
        --clip-image --clip-text --estimate

The same command again continues with the units that are not finished; a finished job says so and does nothing. Shards that
the input has got since are added. `--estimate` writes nothing and says what the whole input would take.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import ray
from ray.data import ActorPoolStrategy
from tqdm import tqdm

from paella import command_line
from paella.bundle import load_vqgan
from paella.conditioning import load_clip
from paella.vqgan import VQModel
from pipelines import cli, tracking
from pipelines.byt5_columns import warning
from pipelines.duplicates import STAGED, forget, verdicts
from pipelines.estimate import estimate
from pipelines.gauges import TokenizedSamples
from pipelines.output_store import Output
from pipelines.source_contract import Unit
from pipelines.sources import by_shard, find_units
from pipelines.token_format import FORMAT_VERSION, shard_name, unit_name
from pipelines.token_shards import Counts, count
from pipelines.token_sheet import beside_originals
from pipelines.token_stages import Decode, DecodeAndEncode, Encode, MoveIntoPlace, packed
from pipelines.tokenize_config import TokenizeConfig

LOG_EVERY_S = 30.0


def run(config: TokenizeConfig) -> str:
    """Tokenize; returns the output's URI. Raises ValueError for the user's mistakes, before Ray starts."""
    config = config.absolute()
    for job in config.buckets():
        _make_dataset(job)
    return config.output


def _make_dataset(config: TokenizeConfig) -> None:
    model, digest = load_vqgan(config.vqgan)
    _require_models(config, model)
    units = find_units(config.input, config.rows_per_unit, config.source)
    if config.text is not None:
        print(warning(config.text, _num_samples(units)))
    if config.estimate:
        print(estimate(config, units))
        return
    output = Output(config.output)
    output.require_writable()
    output.require_same_config(config.binding(digest))
    finished = _finished(config, output, units)
    missing = [unit for unit in units if unit.name not in finished]
    if not missing and _listed(output) == len(units):
        print(f"tokenizing is finished: {config.output}")
        return
    tracked = tracking.open_run(output, "tokens", cli.config_values(config))
    rate = _tokenize(config, output, missing, _num_samples(units), tracked) if missing else {}
    counts = count(output, [unit.name for unit in units])
    if counts.written == 0:
        _refuse_nothing(config, output, units, counts)
    _log_result(config, model, output, units, tracked, counts)
    info = _info(config, model, digest, counts) | rate
    output.write("dataset.json", (json.dumps(info, indent=1) + "\n").encode())  # last: it says that the dataset is complete
    print(f"{counts}: {config.output}")


def _require_models(config: TokenizeConfig, model: VQModel) -> None:
    """Says here, and not in a worker, what is wrong with the models."""
    factor = model.config.downsampling
    if config.cropping.height % factor or config.cropping.width % factor:
        raise ValueError(f"resolution={config.resolution} is not allowed: the VQGAN needs a multiple of {factor}")
    if config.clip is not None:
        load_clip(config.clip)


def _num_samples(units: Sequence[Unit]) -> int:
    return sum(unit.num_samples for unit in units)


def _listed(output: Output) -> int:
    """How many shards the finished dataset has; 0 where there is none yet."""
    info = output.read("dataset.json")
    return 0 if info is None else len(json.loads(info)["shards"])


def _finished(config: TokenizeConfig, output: Output, units: Sequence[Unit]) -> set[str]:
    """Names of the units whose shards are there, by one listing; clears away what killed jobs left half written.

    Raises ValueError where shards hold samples that the input lists otherwise now: some would be there twice.
    """
    output.remove_leftovers()
    there = {name for name in output.names() if name.startswith("part-")}
    finished = {unit.name for unit in units if shard_name(unit.name) in there}
    if len(there) > len(finished):
        raise ValueError(
            f"files were added to or removed from {config.input} since {len(there) - len(finished)} of the shards in {output} "
            "were written; choose another --output"
        )
    if config.deduplicate != "no":
        for name in (output / STAGED).names() & there:  # a killed job's, in their place already
            forget(output, unit_name(name))
    return finished


def _tokenize(config: TokenizeConfig, output: Output, missing: list[Unit], total: int, tracked: tracking.Run) -> dict[str, float]:
    """Put the missing units' shards in place; returns how fast that was."""
    staged = (output / STAGED).names() if config.deduplicate != "no" else set()
    unread = [unit for unit in missing if shard_name(unit.name) not in staged]
    began, todo = time.monotonic(), _num_samples(unread)
    if unread:
        cli.start_ray()
        _follow(_encoded(config, unread), "tokens", total, total - todo, tracked)
    seconds = time.monotonic() - began
    if config.deduplicate != "no":
        _deduplicate(config, output, missing, tracked)
    return {"seconds": round(seconds, 2), "images_per_s": round(todo / seconds, 1) if todo else 0.0}


def _encoded(config: TokenizeConfig, units: Sequence[Unit], separate: bool | None = None) -> ray.data.Dataset:
    """A row with counts for each unit whose shard is in place. Stages are separate where there are GPUs."""
    gpus, cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
    separate = gpus > 0 if separate is None else separate
    tasks = _tasks(units, max(1, gpus, cpus))
    dataset = cli.dataset_of(packed(tasks))
    if separate:
        dataset = dataset.map_batches(Decode(config), batch_size=1, batch_format="pyarrow", zero_copy_batch=True, num_cpus=1)
    return dataset.map_batches(
        Encode if separate else DecodeAndEncode,
        fn_constructor_args=(config,),
        batch_size=1,
        batch_format="pyarrow",
        zero_copy_batch=True,
        # starts with what there is now, and grows and shrinks with the cluster
        compute=ActorPoolStrategy(min_size=1, initial_size=min(max(1, gpus or cpus), len(tasks)), max_size=len(tasks)),
        num_cpus=1,
        num_gpus=1 if gpus else 0,
    )


def _tasks(units: Sequence[Unit], workers: int) -> list[list[Unit]]:
    """Units that one task reads: of one shard, and few enough that all workers have some until the end."""
    most = max(1, len(units) // (8 * workers))
    return [shard[i : i + most] for shard in by_shard(units) for i in range(0, len(shard), most)]


def _follow(dataset: ray.data.Dataset, name: str, total: int, initial: int, tracked: tracking.Run) -> None:
    """Run a dataset of counts to its end, with a bar and, now and then, a point on MLflow's curves."""
    counts: Counter[str] = Counter()
    seen = TokenizedSamples(name)
    began = logged = time.monotonic()
    with tqdm(total=total, initial=initial, unit="images", desc=name, mininterval=2) as bar:
        for row in dataset.iter_rows():
            counts.update(row)
            seen.add(row)
            bar.set_postfix(counts, refresh=False)
            bar.update(sum(row.values()))
            if time.monotonic() - logged > LOG_EVERY_S:
                logged = time.monotonic()
                rate = {f"{name}_images_per_s": counts.total() / (logged - began)}
                tracking.log_metrics(tracked, rate | dict(counts), step=initial + counts.total())


def _deduplicate(config: TokenizeConfig, output: Output, missing: Sequence[Unit], tracked: tracking.Run) -> None:
    """Move staged units to their places without their duplicates."""
    finished = sorted(unit_name(name) for name in output.names() if name.startswith("part-"))
    staged = [unit.name for unit in missing]
    rows = [
        {"unit": unit, "verdict": verdict}
        for unit, verdict in verdicts(output, finished, staged, config.deduplicate == "perceptual")
    ]
    cli.start_ray()
    moved = cli.dataset_of(rows).map_batches(MoveIntoPlace(config.output), batch_size=1, batch_format="pyarrow", num_cpus=1)
    _follow(moved, "unique", sum(len(row["verdict"]) for row in rows), 0, tracked)


def _refuse_nothing(config: TokenizeConfig, output: Output, units: Sequence[Unit], counts: Counts) -> None:
    """Raises ValueError: there is nothing to train on."""
    for unit in units:  # or the same command would call the job finished once the images are repaired
        output.delete(shard_name(unit.name))
    key, number = counts.left_out.most_common(1)[0]
    raise ValueError(
        f"none of the {counts.rows_in} samples in {config.input} can be used; {number} of them: {key.split('/', 1)[1]} "
        f"(details in {output / 'rejects'})"
    )


def _log_result(
    config: TokenizeConfig, model: VQModel, output: Output, units: Sequence[Unit], tracked: tracking.Run, counts: Counts
) -> None:
    """Totals, and a sheet of what the tokens look like, to MLflow."""
    totals = {"written": counts.written, "filtered": sum(counts.filtered.values()), "rejected": sum(counts.rejected.values())}
    reasons = {f"left_out/{key}": number for key, number in counts.left_out.items()}
    tracking.log_metrics(tracked, totals | reasons, step=counts.rows_in)
    if (made := beside_originals(config, model, output, units)) is not None:
        sheet, psnr = made
        tracking.log_image(tracked, sheet, "originals_and_reconstructions", counts.rows_in)
        tracking.log_metrics(tracked, {"psnr_db": psnr}, step=counts.rows_in)
    tracking.finish_run(tracked)


def _info(config: TokenizeConfig, model: VQModel, digest: str, counts: Counts) -> dict[str, Any]:
    """dataset.json."""
    binding = config.binding(digest)
    return {
        "format_version": FORMAT_VERSION,
        "rows": counts.written,
        "rows_in": counts.rows_in,
        "filtered": sum(counts.filtered.values()),
        "filters": counts.filtered,
        "rejected": sum(counts.rejected.values()),
        "rejects": counts.rejected,
        "shards": counts.shards,
        "resolution": config.resolution,
        "grid": [side // model.config.downsampling for side in (config.cropping.height, config.cropping.width)],
        "codebook_size": model.config.codebook_size,
        "vqgan_digest": digest,
        "clip": binding["clip"],
        "byt5": binding["byt5"],
        "decoder": binding["decoder"],
        "config": cli.config_values(config),
    }


if __name__ == "__main__":
    from pipelines.tokenize_images import TokenizeConfig as _Config
    from pipelines.tokenize_images import run as _run

    command_line.main(_run, _Config, __doc__)
