"""Training state on disk: every rank writes its shards (torch.distributed.checkpoint), any number of ranks reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from paella.ema import Ema


def save(directory: str | Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], ema: Ema, step: int) -> None:
    """Write the state after `step` optimizer steps. Every rank must call it."""
    dcp.save(_state(model, optimizers, ema, step), checkpoint_id=str(directory))


def load(directory: str | Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], ema: Ema) -> int:
    """Read a state in place; returns its step. Every rank must call it."""
    state = _state(model, optimizers, ema, 0)
    dcp.load(state, checkpoint_id=str(directory))
    set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(state["step"])


def _state(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], ema: Ema, step: int) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizers)
    return {"model": model_state, "optimizer": optimizer_state, "ema": ema.shadow, "step": torch.tensor(step)}
