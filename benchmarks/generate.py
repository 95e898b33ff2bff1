"""How fast prompts become pictures: the program's workers against a bare loop of the library's sampler and decoder.

    python benchmarks/generate.py                        # about four minutes on 2 cores
    python benchmarks/generate.py --memory 2000 20000    # instead: peak memory of jobs of so many pictures

`tiny` with random weights; mixed settings: three sizes and four numbers of steps, four pictures of each prompt. The bare loop
makes one picture after the other in as many processes as the program, one a core, and writes nothing. Beside it stands a
loop that sorts pictures by size and steps and samples each kind in batches. Rates are of wall time and of CPU time; the second is
what counts where other programs run. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from paella import edits
from paella.bundle import Bundle, load_bundle, save_bundle
from paella.conditioning import TextEncoders
from paella.config import PRESETS
from paella.sampler import Canvas, SamplingConfig, sample
from paella.unet import Paella
from paella.vqgan import VQModel
from pipelines import cli

PROGRAM = Path(__file__).parents[1] / "pipelines" / "generate.py"
SIZES = ((64, 64), (96, 64), (32, 64))
STEPS = (4, 8, 12, 16)
PER_PROMPT = 4
UNIT = 24
BATCH = 32


def build_bundle(path: Path) -> None:
    torch.manual_seed(0)
    config = PRESETS["tiny"]
    unet = Paella(config.unet)
    torch.nn.init.normal_(unet.clf[1].weight)
    weights = {"unet": unet.state_dict(), "vqgan": VQModel(config.vqgan).state_dict()}
    save_bundle(path, config, weights, "random weights", TextEncoders.create(config.text))


def rows(num: int) -> list[dict]:
    """Pictures whose size and steps change from one to the next."""
    return [
        {
            "prompt": f"a small red circle left of a large blue square, number {number // PER_PROMPT}",
            "seed": number,
            "size": "x".join(map(str, SIZES[number % 3])),
            "steps": STEPS[number // 3 % 4],
        }
        for number in range(num)
    ]


def canvas(bundle: Bundle, row: dict) -> Canvas:
    size = tuple(int(side) for side in row["size"].split("x"))
    config = SamplingConfig(num_inference_steps=row["steps"])
    return edits.text_to_image(bundle, row["prompt"], seed=row["seed"], size=size, config=config)


@torch.inference_mode()
def one_by_one(bundle: Bundle, some: list[dict]) -> None:
    for row in some:
        bundle.decode(sample(bundle.unet, [canvas(bundle, row)], codebook=bundle.vqgan.vquantizer))


@torch.inference_mode()
def by_settings(bundle: Bundle, some: list[dict]) -> None:
    kinds: dict[tuple, list[dict]] = {}
    for row in some:
        kinds.setdefault((row["size"], row["steps"]), []).append(row)
    for of_kind in kinds.values():
        for start in range(0, len(of_kind), BATCH):
            batch = [canvas(bundle, row) for row in of_kind[start : start + BATCH]]
            bundle.decode(sample(bundle.unet, batch, codebook=bundle.vqgan.vquantizer))


LOOPS = {"one by one": one_by_one, "by settings": by_settings}


def bare(root: Path, name: str, rank: int, workers: int) -> None:
    """One process of a bare loop: ready, then at a line on stdin its share of the pictures."""
    some = pq.read_table(root / "prompts.parquet").to_pylist()[rank::workers]
    bundle = load_bundle(str(root / "bundle"))
    one_by_one(bundle, some[:3])
    bundle.prompts.kept.clear()
    bundle.prompts.bytes = 0
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.process_time()
    LOOPS[name](bundle, some)
    print(time.process_time() - began, flush=True)


def bare_rates(root: Path, name: str, num: int, workers: int) -> tuple[float, float]:
    """Images per second, and per second of CPU, of a bare loop."""
    environment = os.environ | cli.WORKER_ENVIRONMENT | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parents[1])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    commands = [[sys.executable, __file__, "bare", str(root), name, str(rank), str(workers)] for rank in range(workers)]
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
    return num / seconds, num / cpu


def command(root: Path, prompts: str, output: Path, *flags: str) -> list[str]:
    places = ["--model", str(root / "bundle"), "--prompts", str(root / prompts), "--output", str(output)]
    return [sys.executable, str(PROGRAM), *places, "--unit-size", str(UNIT), *flags]


def program_rates(root: Path, output: Path) -> tuple[float, float, float]:
    """Images per second of the program behind its first finished unit, per second of its workers' CPU, and with its start."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    began = time.time()
    process = subprocess.Popen(command(root, "prompts.parquet", output), **quiet)
    at: list[tuple[int, float]] = []  # units that are there, CPU used
    used: dict[int, float] = {}
    while process.poll() is None:
        for member in family(process.pid):
            with contextlib.suppress(psutil.Error):
                if "MapWorker" in " ".join(member.cmdline()):
                    used[member.pid] = sum(member.cpu_times()[:2])
        at.append((len(list(output.glob("manifest/part-*.parquet"))), sum(used.values())))
        time.sleep(1)  # to look costs milliseconds that the program would have
    assert process.returncode == 0
    parts = sorted(output.glob("manifest/part-*.parquet"), key=lambda file: file.stat().st_mtime)
    numbers = [pq.read_metadata(file).num_rows for file in parts]
    first, last = parts[0].stat().st_mtime, parts[-1].stat().st_mtime
    later = sum(numbers[1:])
    (units_then, cpu_then), (units, cpu) = next(each for each in at if each[0]), [each for each in at if each[0] < len(parts)][-1]
    return later / (last - first), sum(numbers[units_then:units]) / (cpu - cpu_then), sum(numbers) / (last - began)


def family(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return []


def speed(root: Path, num: int) -> dict:
    pq.write_table(pa.Table.from_pylist(rows(num)), root / "prompts.parquet")
    workers = max(2, os.cpu_count() or 2)
    print(f"{num} pictures, {workers} processes of one thread", flush=True)
    loops = {name: [bare_rates(root, name, num, workers)] for name in LOOPS}
    program = program_rates(root, root / "output")
    for name, rates in loops.items():
        rates.append(bare_rates(root, name, num, workers))
        print(
            f"bare loop, {name:12} {rates[0][0]:.2f} and {rates[1][0]:.2f} images/s, "
            f"{max(rate[1] for rate in rates):.2f} per second of CPU"
        )
    print(
        f"program                 {program[0]:.2f} images/s ({program[2]:.2f} with its start), {program[1]:.2f} per second of CPU"
    )
    best, best_cpu = (max(rate[kind] for rate in loops["one by one"]) for kind in (0, 1))
    print(f"program of the better bare loop: {program[0] / best:.1%}, per second of CPU {program[1] / best_cpu:.1%}", flush=True)
    return {"bare": loops, "program": program, "share": program[0] / best, "cpu_share": program[1] / best_cpu}


def memory(root: Path, numbers: list[int]) -> dict:
    """Peak memory in MB (proportional share of pages) of jobs of so many pictures of one step."""
    peaks: dict[int, dict[str, float]] = {}
    for num in numbers:
        (root / "prompts.txt").write_text("".join(f"a red circle, number {number % 500}\n" for number in range(num)))
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        flags = ("--sampling.num-inference-steps", "1", "--sampling.cfg", "1")
        process = subprocess.Popen(command(root, "prompts.txt", root / str(num), *flags), **quiet)
        peak = {"driver": 0.0, "worker": 0.0, "all": 0.0}
        while process.poll() is None:
            now = {}
            for member in family(process.pid):
                with contextlib.suppress(psutil.Error):
                    now[member.pid] = (member.memory_full_info().pss / 2**20, "MapWorker" in " ".join(member.cmdline()))
            sizes = {"driver": now.get(process.pid, (0, False))[0], "all": sum(size for size, _ in now.values())}
            sizes["worker"] = max((size for size, worker in now.values() if worker), default=0)
            peak = {name: max(peak[name], size) for name, size in sizes.items()}
            time.sleep(0.5)
        assert process.returncode == 0
        peaks[num] = peak
        print(f"{num} pictures: " + ", ".join(f"{name} {size:.0f} MB" for name, size in peak.items()), flush=True)
    return {"memory_mb": peaks, "memory_growth": peaks[numbers[-1]]["all"] / peaks[numbers[0]]["all"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=480, help="pictures")
    parser.add_argument("--memory", type=int, nargs="+", help="measure memory of jobs of so many pictures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="paella-benchmark-") as temporary:
        root = Path(temporary)
        with contextlib.redirect_stderr(io.StringIO()):
            build_bundle(root / "bundle")
        print(json.dumps(memory(root, options.memory) if options.memory else speed(root, options.images)))


if __name__ == "__main__":
    bare(Path(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:])) if sys.argv[1:2] == ["bare"] else main()
