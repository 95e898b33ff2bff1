"""Text conditions by prompt: each distinct prompt is encoded once, and the most recently used ones are kept.

A prompt's conditions are the same whatever it is encoded with: padding is masked in the encoder and cut off behind it, and in
float32 on a CPU, where a batch of another size rounds otherwise, every prompt is encoded by itself.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from paella.conditioning import TextEncoders

BATCH_SIZE = 32
"""Prompts that are encoded together, of similar length."""


class PromptCache:
    """Conditions of prompts, at most `max_bytes` of them.

    Example:
        >>> cache = PromptCache(text_encoders)
        >>> first, second = cache(["a red circle", "a blue square"])  # each {"byt5": (1,S,D), "byt5_mask": (1,S), …}
    """

    def __init__(self, text: TextEncoders, max_bytes: int = 2**28) -> None:
        self.text, self.max_bytes = text, max_bytes
        self.kept: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self.bytes = self.hits = self.misses = 0

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Conditions of each prompt as a batch of one. Warns of prompts that are longer than the encoder takes."""
        found = {prompt: self.kept[prompt] for prompt in dict.fromkeys(prompts) if prompt in self.kept}
        missing = sorted((prompt for prompt in dict.fromkeys(prompts) if prompt not in found), key=len)
        self.hits, self.misses = self.hits + len(prompts) - len(missing), self.misses + len(missing)
        if missing:
            self.text.restore()
        weight = next(self.text.parameters())
        size = 1 if weight.device.type == "cpu" and weight.dtype == torch.float32 else BATCH_SIZE
        for start in range(0, len(missing), size):
            part = missing[start : start + size]
            found |= zip(part, self._encode(part), strict=True)
        if missing and self.text.free_after_use:
            self.text.free()
        for prompt, conditions in found.items():
            self._keep(prompt, conditions)
        return [found[prompt] for prompt in prompts]

    def _encode(self, prompts: list[str]) -> list[dict[str, Tensor]]:
        if cut := sum(self.text.tokenize(prompts).truncated):
            warnings.warn(
                f"{cut} prompt(s) are longer than {self.text.config.max_length} tokens; the rest is cut off", stacklevel=4
            )
        if cut := sum(self.text.clip_truncated(prompts)):
            warnings.warn(f"{cut} prompt(s) are longer than CLIP takes; its embedding is of their beginning", stacklevel=4)
        conditions = self.text(prompts)
        rows = []
        for index in range(len(prompts)):
            row = {name: value[index : index + 1] for name, value in conditions.items()}
            length = int(row["byt5_mask"].sum())
            rows.append(row | {name: row[name][:, :length].clone() for name in ("byt5", "byt5_mask")})
        return rows

    def _keep(self, prompt: str, conditions: dict[str, Tensor]) -> None:
        """As the most recently used; the least recently used ones go where there is no room."""
        if prompt not in self.kept:
            self.bytes += _bytes(conditions)
        self.kept[prompt] = conditions
        self.kept.move_to_end(prompt)
        while self.bytes > self.max_bytes:
            self.bytes -= _bytes(self.kept.popitem(last=False)[1])


def _bytes(conditions: dict[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in conditions.values())
