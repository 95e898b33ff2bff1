"""Steps of a small model on a CPU in a process of their own: `python -m serve.lanes FD`, which a `StepProcess` starts.

Two threads of one process that step a small model hand Python's lock to each other some forty times a step, and one of them
sleeps each time: they make little more than half of what two processes do. What a step needs of a canvas goes over once; from
then on its tokens come back, a few kilobytes. A process that has answered takes the next step before it is asked to, as it will
be where nobody has gone: so it does not wait for the engine either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from paella.sampler import Canvas, step
from paella.unet import Paella
from paella.vqgan import Codebook


class StepProcess:
    """`step()` of one model on a CPU by one thread of another process, which ends with this one.

    Example:
        >>> take_step = StepProcess(bundle.unet, bundle.vqgan.vquantizer)  # returns once the process has the model
        >>> take_step(canvases)
        >>> take_step.close()
    """

    def __init__(self, unet: Paella, codebook: Codebook) -> None:
        self.pipe, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serve.lanes", str(theirs.fileno())],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,  # a Ctrl-C is for this process, which closes the other one when it is ready
            )
        self.there: list[tuple[Canvas, int]] = []  # those of the last call, which the other process has too, and their next step
        self._ask((unet, codebook))

    def __call__(self, canvases: Sequence[Canvas]) -> None:
        """Take each canvas one step further. Raises RuntimeError if the process has ended."""
        place_of = {id(canvas): place for place, (canvas, number) in enumerate(self.there) if canvas.step == number}
        places = [place_of.get(id(canvas)) for canvas in canvases]
        new = [dataclasses.replace(canvas) for canvas in canvases if id(canvas) not in place_of]
        for canvas, (tokens, prediction) in zip(canvases, self._ask((places, new)), strict=True):
            canvas.tokens, canvas.prediction, canvas.step = tokens, prediction, canvas.step + 1
        self.there = [(canvas, canvas.step) for canvas in canvases]

    def _ask(self, question: object) -> list:
        try:
            self.pipe.send_bytes(_pickled(question))
            return pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError) as error:
            raise RuntimeError(f"the process of a lane has ended with exit code {self.process.wait()}") from error

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.wait()


class _Pickler(pickle.Pickler):
    """Writes tensors as numpy's arrays: torch makes an archive of each, which takes longer than a step."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor or value.dtype == torch.bfloat16:  # which numpy does not have
            return NotImplemented
        return torch.from_numpy, (value.numpy(),)


def _pickled(value: object) -> memoryview:
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getbuffer()


@torch.inference_mode()
def main(descriptor: int) -> None:
    """Step what comes, until the other end closes or its process dies."""
    torch.set_num_threads(1)  # as in the engine: in float32 another number rounds otherwise
    with Connection(descriptor) as pipe, contextlib.suppress(EOFError, OSError):
        unet, codebook = pickle.loads(pipe.recv_bytes())
        pipe.send_bytes(_pickled([]))
        canvases: list[Canvas] = []
        while True:
            ahead = [] if pipe.poll() else [place for place, canvas in enumerate(canvases) if not canvas.done]
            if ahead:  # those that go instead are sent anew if they come back, as they were before this step
                step(unet, [canvases[place] for place in ahead], codebook=codebook)
            places, new = pickle.loads(pipe.recv_bytes())
            arrivals = iter(new)
            canvases = [next(arrivals) if place is None else canvases[place] for place in places]
            behind = [canvas for canvas, place in zip(canvases, places, strict=True) if place not in ahead]
            if behind:
                step(unet, behind, codebook=codebook)
            pipe.send_bytes(_pickled([(canvas.tokens, canvas.prediction) for canvas in canvases]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
