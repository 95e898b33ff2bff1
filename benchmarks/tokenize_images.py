"""How fast images become tokens: decoding against plain Pillow, the pipeline against a bare loop without Ray, the f4 encoder.

    python benchmarks/tokenize_images.py                     # about five minutes on 2 cores
    python benchmarks/tokenize_images.py --memory            # instead: memory at 5,000 and at 50,000 images
    python benchmarks/tokenize_images.py --vqgan bundle      # tokens of a trained VQGAN in the comparison of decoders

Photographs (scikit-image's, cropped at random) as JPEGs of 0.3 and of 1 megapixel, in webdataset tars. VQGANs have random
weights, and codes that are latents of these photographs. The bare loop makes the same calls as the pipeline's workers, one
process for each CPU, without writing anything. Single steps are measured in seconds of CPU, so that other programs on the
machine matter little. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image, ImageOps
from skimage import data

from paella.bundle import load_vqgan, save_vqgan
from paella.config import PRESETS, VQConfig
from paella.images import to_tensor
from paella.vqgan import VQModel
from pipelines import cli
from pipelines.image_decoding import Crop
from pipelines.sources import find_units
from pipelines.token_stages import Decode, Encode
from pipelines.tokenize_config import TokenizeConfig

SIDE = 256
CPUS = 2
PROGRAM = Path(__file__).parents[1] / "pipelines" / "tokenize_images.py"
FAST = VQConfig(bottleneck_blocks=1, c_hidden=16, codebook_size=256)
LAION_AESTHETIC = 12_000_000


def photographs(num: int, width: int, height: int, quality: int = 85) -> list[bytes]:
    """JPEGs of random parts of photographs."""
    rng = np.random.default_rng(0)
    sources = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    jpegs = []
    for number in range(num):
        photo = sources[number % len(sources)]
        share = rng.uniform(0.5, 0.95)
        part_height, part_width = (int(side * share) for side in photo.shape[:2])
        top, left = rng.integers(photo.shape[0] - part_height), rng.integers(photo.shape[1] - part_width)
        part = Image.fromarray(photo[top : top + part_height, left : left + part_width])
        file = io.BytesIO()
        ImageOps.fit(part, (width, height), Image.Resampling.LANCZOS).save(file, "JPEG", quality=quality)
        jpegs.append(file.getvalue())
    return jpegs


def write_tars(folder: Path, jpegs: Sequence[bytes], num: int, shard_size: int) -> None:
    """`num` samples in webdataset tars, the same images again and again."""
    folder.mkdir()
    for first in range(0, num, shard_size):
        with tarfile.open(folder / f"{first:08d}.tar", "w") as tar:
            for number in range(first, min(num, first + shard_size)):
                for suffix, content in (("jpg", jpegs[number % len(jpegs)]), ("txt", b"a photograph")):
                    entry = tarfile.TarInfo(f"{number:08d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


def vqgan(config: VQConfig, jpegs: Sequence[bytes]) -> VQModel:
    """Random weights, and codes that are latents of these images."""
    torch.manual_seed(0)
    model = VQModel(config).eval().requires_grad_(False)
    images = np.stack([Crop(SIDE, SIDE).decode(jpeg, "").pixels for jpeg in jpegs])
    with torch.inference_mode():
        latents = torch.cat([model.encode_latents(to_tensor(image[None])) for image in images])
    latents = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
    model.vquantizer.codebook.weight.copy_(latents[torch.randperm(len(latents))[: config.codebook_size]])
    return model


def pillow(resample: Image.Resampling, draft: bool = False) -> Callable[[bytes], np.ndarray]:
    def decode(jpeg: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(jpeg))
        if draft:
            image.draft("RGB", (SIDE, SIDE))
        return np.asarray(ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), resample))

    return decode


def ours(jpeg: bytes) -> np.ndarray:
    return Crop(SIDE, SIDE).decode(jpeg, "").pixels


DECODERS: dict[str, Callable[[bytes], np.ndarray]] = {
    "plain Pillow, bicubic": pillow(Image.Resampling.BICUBIC),
    "plain Pillow, bilinear": pillow(Image.Resampling.BILINEAR),
    "Pillow draft, bicubic": pillow(Image.Resampling.BICUBIC, draft=True),
    "ours": ours,
}


def decoding(jpegs: Sequence[bytes], rounds: int = 7) -> dict[str, float]:
    """Milliseconds of CPU for an image of each decoder: for each image the median of rounds in turn; their mean.

    In a round a decoder takes all images one after the other, as a worker does: behind another decoder's image, its own code and
    buffers would have left the caches.
    """
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in jpegs] for name in DECODERS}
    for _ in range(rounds):
        for name, decode in DECODERS.items():
            for own, jpeg in zip(seconds[name], jpegs, strict=True):
                began = time.thread_time()
                decode(jpeg)
                own.append(time.thread_time() - began)
    return {name: 1000 * statistics.mean(map(statistics.median, values)) for name, values in seconds.items()}


@torch.inference_mode()
def tokens_kept(model: VQModel, jpegs: Sequence[bytes]) -> dict[str, tuple[float, float]]:
    """Of each decoder: PSNR against plain Pillow's bicubic in dB, and the share of tokens that are the same."""
    reference = [DECODERS["plain Pillow, bicubic"](jpeg) for jpeg in jpegs]
    expected = [model.encode(to_tensor(image[None])) for image in reference]
    found = {}
    for name, decode in list(DECODERS.items())[1:]:
        images = [decode(jpeg) for jpeg in jpegs]
        errors = [np.square(a.astype(float) - b).mean() for a, b in zip(images, reference, strict=True)]
        same = [(model.encode(to_tensor(a[None])) == b).float().mean().item() for a, b in zip(images, expected, strict=True)]
        found[name] = (10 * np.log10(255**2 / max(1e-9, np.mean(errors))), statistics.mean(same))
    return found


@torch.inference_mode()
def encoding(model: VQModel, jpegs: Sequence[bytes]) -> float:
    """Images per second of CPU of the encoder in one thread."""
    images = to_tensor(np.stack([ours(jpeg) for jpeg in jpegs]))
    model.encode(images[:1])
    began = time.thread_time()
    model.encode(images)
    return len(images) / (time.thread_time() - began)


def job(root: Path, images: str, output: str, resolution: int, rows_per_unit: int) -> TokenizeConfig:
    places = {"input": str(root / images), "vqgan": str(root / "vqgan"), "output": str(root / output)}
    return TokenizeConfig(**places, resolution=resolution, rows_per_unit=rows_per_unit)


def flags(config: TokenizeConfig) -> list[str]:
    names = ("input", "vqgan", "output", "resolution", "rows_per_unit")
    return [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(config, name)))]


def bare(root: Path, rank: int, rows_per_unit: int) -> None:
    """One process of the bare loop: ready, then at a line on stdin its share of the units."""
    config = job(root, "images", "none", SIDE, rows_per_unit)
    decode, encode = Decode(config), Encode(config)
    units = find_units(config.input, config.rows_per_unit, config.source)[rank::CPUS]
    encode.table(decode.beginning(units[0], 8))
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.process_time()
    for decoded in decode.units(units):
        encode.table(decoded)
    print(time.process_time() - began, flush=True)


def bare_rates(root: Path, num_images: int, rows_per_unit: int) -> tuple[float, float]:
    """Images per second, and per second of CPU, of the bare loop in one process for each CPU."""
    environment = os.environ | cli.WORKER_ENVIRONMENT | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parents[1])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    commands = [[sys.executable, __file__, "bare", str(root), str(rank), str(rows_per_unit)] for rank in range(CPUS)]
    processes = [subprocess.Popen(command, env=environment, text=True, **pipes) for command in commands]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    began = time.perf_counter()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    cpu = sum(float(process.stdout.readline()) for process in processes)
    seconds = time.perf_counter() - began
    for process in processes:
        process.communicate()
    return num_images / seconds, num_images / cpu


def ray_rates(config: TokenizeConfig) -> tuple[float, float, float]:
    """Images per second of the program once each worker has finished a shard, the same per second of CPU of all its processes,
    and images per second with its start."""
    output, began = Path(config.output), time.time()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, PROGRAM, *flags(config)], env=environment(config), **quiet)
    used: dict[int, float] = {}
    at: list[tuple[int, float]] = []  # shards there, CPU used
    while process.poll() is None:
        for member in family(process.pid):
            with contextlib.suppress(psutil.Error):
                used[member.pid] = sum(member.cpu_times()[:2])
        at.append((len(list(output.glob("part-*.parquet"))), sum(used.values())))
        time.sleep(2)  # to look costs milliseconds that the program would have
    assert process.returncode == 0
    rows = {output / shard["file"]: shard["rows"] for shard in json.loads((output / "dataset.json").read_text())["shards"]}
    ended = sorted((file.stat().st_mtime, number) for file, number in rows.items())
    later = sum(number for _, number in ended[CPUS:])
    (first, cpu_then), (last, cpu) = (
        next(each for each in at if each[0] >= CPUS),
        [each for each in at if each[0] < len(rows)][-1],
    )
    between = sum(number for _, number in ended[first:last])
    return later / (ended[-1][0] - ended[CPUS - 1][0]), between / (cpu - cpu_then), sum(rows.values()) / (ended[-1][0] - began)


def family(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return []


def environment(config: TokenizeConfig) -> dict[str, str]:
    return os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{Path(config.output).parent}/mlflow.db"}


def peak_memory(config: TokenizeConfig) -> dict[str, float]:
    """Most memory in MB (proportional share of pages) of the driver, of a worker and of all processes together."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, PROGRAM, *flags(config)], env=environment(config), **quiet)
    peak = {"driver": 0.0, "worker": 0.0, "all": 0.0}
    while process.poll() is None:
        now = {}
        for member in family(process.pid):
            try:
                now[member.pid] = (member.memory_full_info().pss / 2**20, "MapWorker" in " ".join(member.cmdline()))
            except psutil.Error:
                continue
        workers = [size for size, worker in now.values() if worker]
        for name, size in (
            ("driver", now.get(process.pid, (0, False))[0]),
            ("worker", max(workers, default=0)),
            ("all", sum(size for size, _ in now.values())),
        ):
            peak[name] = max(peak[name], size)
        time.sleep(0.5)
    assert process.returncode == 0
    return peak


def memory(root: Path, jpegs: Sequence[bytes]) -> dict:
    peaks = {}
    for num in (5_000, 50_000):
        write_tars(root / f"images-{num}", jpegs, num, shard_size=5_000)
        peaks[num] = peak_memory(job(root, f"images-{num}", f"tokens-{num}", 64, 250))
        print(f"{num} images: " + ", ".join(f"{name} {size:.0f} MB" for name, size in peaks[num].items()), flush=True)
    return {"memory_mb": peaks, "memory_growth": peaks[50_000]["all"] / peaks[5_000]["all"]}


def speed(root: Path, jpegs: Sequence[bytes], num_images: int, bundle: str | None) -> dict:
    large = photographs(16, 1024, 1024)
    found: dict = {"decode_ms": {}, "decode_speed": {}}
    for name, some in (("0.3 megapixel", jpegs[:48]), ("1 megapixel", large)):
        found["decode_ms"][name] = milliseconds = decoding(some)
        found["decode_speed"][name] = milliseconds["plain Pillow, bicubic"] / milliseconds["ours"]
        for decoder, value in milliseconds.items():
            print(f"{name:14} {decoder:24} {value:6.2f} ms {milliseconds['plain Pillow, bicubic'] / value:5.2f}x", flush=True)
    model = load_vqgan(bundle)[0] if bundle else vqgan(PRESETS["paella-1b"].vqgan, jpegs[:6])
    found["tokens"] = {size: tokens_kept(model, some) for size, some in (("0.3", jpegs[:6]), ("1", large[:6]))}
    for size, values in found["tokens"].items():
        for decoder, (psnr, same) in values.items():
            print(
                f"{size:>3} megapixel   {decoder:24} {psnr:5.1f} dB, {same:.2%} of the tokens as with plain Pillow, bicubic",
                flush=True,
            )
    found["f4_images_per_s"] = rate = encoding(model, jpegs[:16])
    decode_rate = 1000 / found["decode_ms"]["0.3 megapixel"]["ours"]
    core_hours = LAION_AESTHETIC / 3600 * np.array([1 / decode_rate, 1 / rate])
    print(f"per core: decode {decode_rate:.0f} images/s, f4 encoder {rate:.2f} images/s")
    print(f"12 million images: {core_hours[0]:.0f} core-hours of decoding, {core_hours[1]:.0f} of encoding", flush=True)
    write_tars(root / "images", jpegs, num_images, shard_size=1000)
    rows_per_unit = max(10, num_images // 20)
    before = bare_rates(root, num_images, rows_per_unit)
    pipeline = ray_rates(job(root, "images", "tokens", SIDE, rows_per_unit))
    after = bare_rates(root, num_images, rows_per_unit)
    best, best_cpu = map(max, zip(before, after, strict=True))
    print(f"bare loop {before[0]:.1f} and {after[0]:.1f} images/s, {best_cpu:.1f} per second of CPU")
    print(f"Ray       {pipeline[0]:.1f} images/s ({pipeline[2]:.1f} with its start), {pipeline[1]:.1f} per second of CPU")
    print(f"Ray of the better bare loop: {pipeline[0] / best:.1%}, per second of CPU {pipeline[1] / best_cpu:.1%}", flush=True)
    found |= {"bare": [before, after], "ray": pipeline, "ray_share": pipeline[0] / best, "ray_cpu_share": pipeline[1] / best_cpu}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="measure memory at 5,000 and 50,000 images")
    parser.add_argument("--images", type=int, default=5000, help="images for the pipeline")
    parser.add_argument("--vqgan", help="bundle of a trained VQGAN")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="paella-benchmark-") as temporary:
        root, jpegs = Path(temporary), photographs(240, 640, 480)
        print(f"JPEGs of 640x480 pixels, {statistics.mean(map(len, jpegs)) / 1000:.0f} KB on average", flush=True)
        save_vqgan(root / "vqgan", vqgan(FAST, jpegs[:2]))
        print(json.dumps(memory(root, jpegs) if options.memory else speed(root, jpegs, options.images, options.vqgan)))


if __name__ == "__main__":
    bare(Path(sys.argv[2]), *map(int, sys.argv[3:])) if sys.argv[1:2] == ["bare"] else main()
