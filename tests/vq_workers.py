"""A few steps of VQGAN training on one or two workers without Ray: run by test_vq_step as a program of its own.

python tests/vq_workers.py OUTPUT NUM_WORKERS STEPS
"""

import dataclasses
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from conftest import SMALL_VQ

from paella.vq_losses import VQLossConfig
from pipelines import train_vqgan
from pipelines.vq_step import Step, Trained

LOSS = VQLossConfig(adversarial=0.1, adversarial_warmup=5, r1=0.1, lecam=0.01, discriminator_width=8)


def config(num_workers: int) -> train_vqgan.TrainVQConfig:
    return dataclasses.replace(
        train_vqgan.presets()["tiny"], data="", output="", model=SMALL_VQ, image_size=32, loss=LOSS, continuous_steps=5,
        batch_size=8, precision="float32", codebook_update="ema", num_workers=num_workers,
    )  # fmt: skip


def train(rank: int, num_workers: int, steps: int, output: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{output}.{num_workers}", rank=rank, world_size=num_workers)
    torch.manual_seed(0)
    settings = config(num_workers)
    trained = Trained(settings).train()
    optimizers = [settings.optim.optimizers(module) for module in (trained.vqgan, trained.discriminator)]
    step_of = Step(settings, trained, optimizers, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    part = slice(rank * 8 // num_workers, (rank + 1) * 8 // num_workers)
    for step in range(steps):
        settings.optim.set_lr([optimizer for some in optimizers for optimizer in some], step, steps)
        images = torch.rand(8, 3, 4, 4, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
        _, indices, latents = step_of(images[part], step)
        if indices is not None and step == 7:
            used = trained.health.counts > 0
            trained.health.revive(trained.vqgan.vquantizer, latents, used, torch.Generator().manual_seed(step))
            trained.health.counts.zero_()
    if rank == 0:
        torch.save(trained.state_dict(), output)
    dist.destroy_process_group()


if __name__ == "__main__":
    output, num_workers, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.multiprocessing.spawn(train, (num_workers, steps, output), nprocs=num_workers)
