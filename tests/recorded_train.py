"""pipelines/train.py, which also writes down which samples each step sees: run by test_train_resume as a program.

python tests/recorded_train.py RECORD tiny --data … (the arguments of train.py)
"""

import functools
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from paella import command_line
from pipelines import loop, train
from pipelines.train_config import presets


def recording_worker(directory: str, poisoned_step: int | None, arguments: dict) -> None:
    """In a worker: every step's ids are on disk before its optimizer moves; once, one step gets a gradient that is no number."""
    file, plain = Path(directory) / f"{os.getpid()}.jsonl", loop.Training.steps

    def steps(self, batches_from):
        for step, batch in plain(self, batches_from):
            with file.open("a") as lines:
                lines.write(json.dumps({"step": step, "rank": dist.get_rank(), "ids": batch.ids}) + "\n")
            if step == poisoned_step and self.offset == 0 and not self.guard.total:
                parameter = next(p for p in self.state.model.parameters() if p.requires_grad)
                parameter.grad = torch.full_like(parameter, float("nan"))
            yield step, batch

    loop.Training.steps = steps
    try:
        train.train_worker(arguments)  # the program's own: only the driver has another
    finally:
        loop.Training.steps = plain


def recorded(directory: Path, poisoned_step: int | None = None):
    """What train.run is to start in place of its worker."""
    directory.mkdir(parents=True, exist_ok=True)
    return functools.partial(recording_worker, str(directory), poisoned_step)


if __name__ == "__main__":
    train.train_worker = recorded(Path(sys.argv.pop(1)))
    command_line.main(train.run, presets(), __doc__)
