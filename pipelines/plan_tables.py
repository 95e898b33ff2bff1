"""The sizing tables of cluster/README.md, by `pipelines.plan`: run after a change of either, and put between the README's marks.

python -m pipelines.plan_tables
"""

from __future__ import annotations

import dataclasses

from pipelines import plan

MARKS = ("<!-- python -m pipelines.plan_tables -->", "<!-- end -->")
TRAINED_ON = (("small", "L4", 24, 1), ("small", "A100", 80, 1), ("paella-1b", "L40S", 48, 8), ("paella-1b", "A100", 40, 8),
              ("paella-1b", "A100", 80, 8), ("paella-1b", "H100", 80, 8), ("paella-1b", "A100", 80, 128))  # fmt: skip
"""Preset, GPU, its GB, how many."""
TOKENIZED_ON = (("small", "L4"), ("paella-1b", "L4"), ("paella-1b", "A10G"), ("paella-1b", "A100"), ("paella-1b", "H100"))


def tables() -> str:
    """Both tables, as Markdown."""
    return f"{training()}\n\n{tokenizing()}"


def training() -> str:
    lines = [
        "| model | GPUs | images at a time | memory of a GPU | flags | images/s | hours of the preset's steps | GPU-hours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, gpu, gigabytes, number in TRAINED_ON:
        config = dataclasses.replace(plan.presets()[name], gpu=gpu, gpu_memory_gb=gigabytes, num_gpus=number)
        numbers = plan.training(config)
        chosen = numbers["layout"]
        cells = [
            name,
            f"{number} × {gpu} {gigabytes} GB",
            str(chosen.images),
            f"{chosen.memory.total / 1e9:.0f} GB",
            f"`{chosen.flags}`",
            f"{numbers['images_per_s']:,.0f}",
            f"{numbers['train_hours']:,.0f}",
            f"{numbers['gpu_hours']:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tokenizing() -> str:
    """For a million images with and without CLIP embeddings."""
    lines = [
        "| model | GPU | images/s a GPU | with CLIP | CPUs for a GPU | with CLIP | object store a GPU | tokens of a million |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, gpu in TOKENIZED_ON:
        plain, clip = (_tokenizing(name, gpu, embedded) for embedded in (False, True))
        cells = [
            name,
            gpu,
            f"{plain['encoded_per_s_per_gpu']:,.0f}",
            f"{clip['encoded_per_s_per_gpu']:,.0f}",
            f"{plain['cpus_per_encoding_gpu']:.1f}",
            f"{clip['cpus_per_encoding_gpu']:.1f}",
            f"{plain['object_store_bytes'] / 1e9:.1f} GB",
            f"{plain['tokens_bytes'] / 1e9:.1f} GB, {clip['tokens_bytes'] / 1e9:.1f} with CLIP",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _tokenizing(name: str, gpu: str, clip: bool) -> dict:
    return plan.tokenizing(dataclasses.replace(plan.presets()[name], gpu=gpu, images=1_000_000, clip=clip))


if __name__ == "__main__":
    print(tables())
