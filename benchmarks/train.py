"""What the training program costs beside the arithmetic, and what reading tokens saves; `--one-billion`: that `paella-1b` steps.

    python benchmarks/train.py [--rounds 3]                       # `small` on 2 workers: about ten minutes on 2 cores
    python benchmarks/train.py --one-billion [--image-size 64]    # `paella-1b`: needs 24 GB of memory

The whole program (Ray Train, Parquet, noise, metrics, MLflow, checkpoints) is timed by what it logs of itself, against plain
PyTorch loops of as many processes with the same sharded model, optimizer and averages: one over tokens and text states in memory,
one that decodes and encodes the same images in the loop, and one that encodes the captions too, which is what the published code
does. The text encoder has ByT5-small's size and random weights (`--one-billion`: one layer). The table gives ratios; the last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from paella.bundle import load_vqgan, save_vqgan
from paella.config import PRESETS, ModelConfig
from paella.ema import Ema
from paella.images import to_tensor
from paella.parallel import compute_dtype, shard
from paella.training import NoiseConfig, OptimConfig, TextToTokens, draw_noise, loss_and_metrics
from paella.vqgan import VQModel
from pipelines import tracking
from pipelines.byt5_columns import Byt5Columns
from pipelines.clip_columns import clip_digest
from pipelines.token_format import TokenFormat

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2
BATCH_SIZE = 4
PHOTOGRAPH = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
CAPTION = "a small red circle left of a large blue square on a black background"


BYT5_SMALL = {"d_ff": 3584, "num_layers": 12, "num_heads": 6}


def make_text_encoder(path: Path, width: int, d_ff: int = 256, num_layers: int = 1, num_heads: int = 4) -> Path:
    """A T5 encoder with random weights."""
    torch.manual_seed(0)
    size = {"d_model": width, "d_kv": 64, "d_ff": d_ff, "num_layers": num_layers, "num_heads": num_heads}
    T5EncoderModel(T5Config(vocab_size=384, feed_forward_proj="gated-gelu", **size)).save_pretrained(path)
    ByT5Tokenizer().save_pretrained(path)
    return path


def make_images(num: int, side: int) -> list[bytes]:
    """Random crops of a photograph, as JPEG."""
    rng, photograph, files = np.random.default_rng(0), Image.open(PHOTOGRAPH).convert("RGB"), []
    for _ in range(num):
        left, top = (int(rng.integers(edge - side + 1)) for edge in photograph.size)
        buffer = io.BytesIO()
        photograph.crop((left, top, left + side, top + side)).save(buffer, format="JPEG", quality=95)
        files.append(buffer.getvalue())
    return files


def make_data(root: Path, config: ModelConfig, num: int) -> None:
    """Images, a VQGAN with random weights, the images' tokens and their captions' states, as the programs have them."""
    torch.manual_seed(0)
    model = VQModel(config.vqgan).eval()
    digest = save_vqgan(root / "vqgan", model)
    images = root / "images"
    images.mkdir()
    grid, rows = config.image_size // config.vqgan.downsampling, []
    for number, file in enumerate(make_images(num, config.image_size)):
        (images / f"{number:05d}.jpg").write_bytes(file)
        tokens = encode(model, [file])[0].flatten().tolist()
        size = {"width": config.image_size, "height": config.image_size}
        rows.append({"id": f"{number:05d}", "tokens": tokens, "caption": CAPTION, "sha256": "", **size})
    column, length = Byt5Columns(config.text, "cpu")([CAPTION])
    states = {"byt5": column[0].as_py(), "byt5_length": length[0].as_py()}
    form = TokenFormat(
        grid_height=grid,
        grid_width=grid,
        codebook_size=config.vqgan.codebook_size,
        vqgan_digest=digest,
        byt5_embd=config.unet.byt5_embd,
        byt5=clip_digest(config.text.byt5),
    )
    (root / "tokens").mkdir()
    pq.write_table(pa.Table.from_pylist([row | states for row in rows], schema=form.schema()), root / "tokens" / "part-0.parquet")
    (root / "tokens" / "dataset.json").write_text(json.dumps({"shards": [{"file": "part-0.parquet", "rows": num}]}))


@torch.no_grad()  # no inference mode: what comes out is trained with
def encode(model: VQModel, files: list[bytes]) -> torch.Tensor:
    """Tokens (B,H,W) of JPEG files."""
    return model.encode(to_tensor(np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])))


def plain_loop(rank: int, root: Path, steps: int, encoding: str) -> None:
    """One of the processes of a plain loop; rank 0 leaves the mean seconds of a step in `root`/seconds."""
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=WORKERS)
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // WORKERS))
    torch.manual_seed(0)
    config = small_model(root)
    model = TextToTokens(config).train()
    dtype = compute_dtype("auto", torch.device("cpu"))
    vqgan, _ = load_vqgan(str(root / "vqgan"))
    files = [file.read_bytes() for file in sorted((root / "images").iterdir())]
    in_memory = torch.cat([encode(vqgan, files[i : i + 8]) for i in range(0, len(files), 8)])
    size = BATCH_SIZE // WORKERS
    text = model.text.tokenize([CAPTION] * size)
    with torch.no_grad():
        stored = model.text.states(text.ids, text.mask)
    if "text" not in encoding:
        model.text.free()
    shard(model, dtype)
    (optimizer,), ema = OptimConfig().optimizers(model), Ema(model, 0.999)
    clean = torch.zeros(size, *config.grid(config.image_size, config.image_size), dtype=torch.long)
    draws = draw_noise(clean, config.unet.num_labels, 0, range(size), NoiseConfig())
    seconds = []
    for step in range(steps):
        began = time.perf_counter()
        chosen = [(step * BATCH_SIZE + rank * size + i) % len(files) for i in range(size)]
        tokens = encode(vqgan, [files[i] for i in chosen]) if "images" in encoding else in_memory[chosen]
        with torch.no_grad():
            states = model.text.states(text.ids, text.mask) if "text" in encoding else stored
        losses = model.losses(tokens, draws.noised, draws.t, states, text.mask, draws.keep, label_smoothing=0.1)
        loss_and_metrics(*losses, draws)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, step)
        seconds.append(time.perf_counter() - began)
    if rank == 0:
        (root / "seconds").write_text(str(statistics.mean(seconds[steps // 3 :])))
    dist.destroy_process_group()


def small_model(root: Path) -> ModelConfig:
    """`small`, with the stand-in for its text encoder."""
    small = PRESETS["small"]
    return dataclasses.replace(small, text=dataclasses.replace(small.text, byt5=str(root / "byt5")))


def time_plain_loop(root: Path, steps: int, encoding: str) -> float:
    """Images a second of a plain loop that encodes "nothing", "images" or "images and text"."""
    (root / "store").unlink(missing_ok=True)  # of the loop before, whose processes are gone
    mp.spawn(plain_loop, (root, steps, encoding), nprocs=WORKERS)
    return BATCH_SIZE / float((root / "seconds").read_text())


def run_program(
    root: Path, arguments: list[object], until: Callable[[], bool] = lambda: False, allocator: dict[str, str] | None = None
) -> tracking.Run:
    """Run train.py on the data in `root`, to its end or until something has happened; returns its MLflow run."""
    places = ["--data", root / "tokens", "--vqgan", root / "vqgan", "--output", root / "run", "--model.text.byt5", root / "byt5"]
    command = [sys.executable, ROOT / "pipelines" / "train.py", *arguments, *places, "--num-workers", WORKERS]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db"}
    environment |= allocator or {}
    program = psutil.Popen([str(part) for part in command], env=environment, stdout=sys.stderr)
    while program.poll() is None and not until():
        time.sleep(1)
    if program.poll() is None:
        for process in [*program.children(recursive=True), program]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    elif program.returncode != 0:
        raise SystemExit(f"train.py ended with {program.returncode}")
    return tracking.run_of(root / "run")


def time_program(root: Path, steps: int) -> dict[str, float]:
    """What the program logs of itself every 20 steps, the first left out; in the third and the fifth a checkpoint begins."""
    every = ["--checkpoint-every", 45, "--sample-every", 0, "--validation-images", 0]
    shutil.rmtree(root / "run", ignore_errors=True)
    others: list[tuple[float, float]] = []

    def watch() -> bool:
        others.append((time.monotonic(), seconds_beside_the_workers()))
        return False

    run = run_program(root, ["small", "--stored-text", "--steps", steps, "--global-batch-size", BATCH_SIZE, *every], watch)
    (began, before), (ended, after) = others[len(others) // 2], others[-len(others) // 10]  # training: no start, no bundle

    def values(name: str) -> list[float]:
        return [value for step, value in tracking.metric_history(run, name) if step > 20]

    step_s, slowest = statistics.median(values("step_s")), values("slowest_step_s")
    return {
        "images_per_s": statistics.median(values("images_per_s")),
        "data_wait": max(values("data_wait")),
        "first_checkpoint_step": slowest[1] / step_s,
        "next_checkpoint_step": slowest[3] / step_s,
        "slowest_other_step": max(slowest[0], slowest[2]) / step_s,
        "mfu": statistics.median(values("mfu")),
        "others_cores": (after - before) / (ended - began),
    }


def seconds_beside_the_workers() -> float:
    """CPU time of this process's descendants that do not train: Ray's, MLflow's, the driver."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            times = process.cpu_times()
            total += (times.user + times.system) * ("RayTrainWorker" not in " ".join(process.cmdline()))
    return total


def compare(steps: int, rounds: int) -> None:
    """The table and its JSON line; program and plain loop in turn, as a machine's speed changes."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        make_text_encoder(root / "byt5", PRESETS["small"].unet.byt5_embd, **BYT5_SMALL)
        make_data(root, small_model(root), 512)  # 128 steps: at an epoch's end one takes longer
        plain, programs = [time_plain_loop(root, steps // 5, "nothing")], []
        for _ in range(rounds):
            programs.append(time_program(root, steps))
            plain.append(time_plain_loop(root, steps // 5, "nothing"))
            before, after, rate = plain[-2], plain[-1], programs[-1]["images_per_s"]
            print(
                f"plain {before:.2f}, {after:.2f} images/s; train.py {rate:.2f}, {2 * rate / (before + after):.2f}×", flush=True
            )
        images, both = (time_plain_loop(root, steps // 5, encoding) for encoding in ("images", "images and text"))
    program = {name: statistics.median(each[name] for each in programs) for name in programs[0]}
    rate = statistics.mean(plain)
    rows = {
        "plain loop, all in memory": rate,
        "train.py, tokens and states read": program["images_per_s"],
        "plain loop, encoding images": images,
        "plain loop, encoding both": both,
    }
    print(f"\n{'':34} {'images/s':>9} {'ratio':>7} {'train.py against it':>20}")
    for name, value in rows.items():
        print(f"{name:34} {value:9.2f} {value / rate:7.2f} {program['images_per_s'] / value:19.2f}×")
    print(
        f"waiting for data: {program['data_wait']:.2%} of the time; slowest step after the first checkpoint began: "
        f"{program['first_checkpoint_step']:.2f} of the median, after the next {program['next_checkpoint_step']:.2f}, "
        f"of all others {program['slowest_other_step']:.2f}; processes beside the workers: {program['others_cores']:.2f} cores"
    )
    rates = {"plain": plain, "programs": programs, "images": images, "both": both}
    print(json.dumps({"benchmark": "train", "batch_size": BATCH_SIZE, **rates}))


@contextlib.contextmanager
def watched_memory(peak: list[float]) -> Iterator[None]:
    """Keeps the most bytes that this process's descendants hold together inside the block, shared pages counted once."""
    stop = threading.Event()

    def held(process: psutil.Process) -> int:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            return process.memory_full_info().pss
        return 0

    def look() -> None:
        while not stop.wait(0.5):
            peak[0] = max(peak[0], sum(map(held, psutil.Process().children(recursive=True))))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def one_billion(image_size: int) -> None:
    """`paella-1b` on two CPU workers: three optimizer steps and a checkpoint after the second; the bundle is not waited for."""
    if (free := psutil.virtual_memory().available) < NEEDED_BYTES:
        raise SystemExit(f"error: {free / 1e9:.1f} GB of memory are free, {NEEDED_BYTES / 1e9:.0f} are needed")
    peak, began = [0.0], time.monotonic()
    config = dataclasses.replace(PRESETS["paella-1b"], image_size=image_size)
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_DIRECTORY")) as directory:
        root = Path(directory)
        text = make_text_encoder(root / "byt5", config.unet.byt5_embd)
        make_data(root, dataclasses.replace(config, text=dataclasses.replace(config.text, byt5=str(text), clip=None)), 8)

        def done() -> bool:
            saved = list((root / "run" / "checkpoints").glob("*/manifest.json"))
            return bool(saved) and tracking.last_step(tracking.run_of(root / "run"), "loss") == 3

        with watched_memory(peak):
            run = run_program(root, [*ONE_BILLION, "--model.image-size", image_size], done, FRUGAL)
        checkpoints = sum(file.stat().st_size for file in (root / "run" / "checkpoints").rglob("*") if file.is_file())
        history = {name: tracking.metric_history(run, name) for name in ("loss", "grad_norm", "step_s", "memory_gb")}
    print(f"three steps and a checkpoint in {time.monotonic() - began:.0f} s, at most {peak[0] / 1e9:.1f} GB of memory")
    print(json.dumps({"benchmark": "paella-1b", "peak_bytes": peak[0], "checkpoint_bytes": checkpoints, "metrics": history}))


NEEDED_BYTES = 20e9
FRUGAL = {"MALLOC_MMAP_MAX_": "1000000", "MALLOC_TRIM_THRESHOLD_": str(2**17), "MALLOC_TOP_PAD_": str(2**17)}
"""What is freed goes back to the system at once: slower, and without it two workers of a billion parameters need 27 GB."""
ONE_BILLION: list[object] = [
    "paella-1b", "--steps", 3, "--global-batch-size", 2, "--checkpoint-every", 2, "--sample-every", 0, "--validation-images", 0,
    "--precision", "bf16", "--parallel.activation-checkpointing", "--parallel.no-compile", "--parallel.loss-chunk", 1024,
    "--model.text.clip", "None", "--ema-decay", 0, "--recovery.no-asynchronous",
]  # fmt: skip
"""No averages (4 GB), and checkpoints written in place, without a copy (12 GB)."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one-billion", action="store_true")
    parser.add_argument("--image-size", type=int, default=256, help="with --one-billion: CPUs without bfloat16 are slow")
    parser.add_argument("--steps", type=int, default=100, help="of the program, 100 at least: the first 20 are left out")
    parser.add_argument("--rounds", type=int, default=1, help="of program and plain loop in turn")
    chosen = parser.parse_args()
    if chosen.steps < 100:
        parser.error("--steps: at least 100")
    one_billion(chosen.image_size) if chosen.one_billion else compare(chosen.steps, chosen.rounds)
