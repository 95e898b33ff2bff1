"""What a model hears of a caption: how much worse it predicts the true tokens where words are others, or in each other's place.

V variants of captions, N images, L noise levels, B images of a pass, H W token grid, K codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from paella.bundle import Bundle
from paella.objective import add_noise
from pipelines.progress import Progress
from pipelines.word_sets import WordSets, exchanged

Model = Callable[[Sequence[str]], Callable[[Tensor, Tensor], Tensor]]
"""Takes captions, and gives what predicts: noised tokens (B,H,W) at t (B,) → logits (B,K,H,W)."""
FREQUENT = 0.7
"""The most frequent codes that together are this share of all tokens are plain surfaces; what is left, outlines for example, is
rare."""


def model_of(bundle: Bundle) -> Model:
    """Return a bundle's model: its captions are encoded once for all noise levels, and heard by CLIP too where it has one."""
    device = next(bundle.unet.parameters()).device

    def given(captions: Sequence[str]) -> Callable[[Tensor, Tensor], Tensor]:
        conditions = {name: value.to(device) for name, value in bundle.text(captions).items()}
        return lambda tokens, t: bundle.unet(tokens.to(device), t.to(device), **conditions)

    return given


@dataclass(frozen=True)
class NoisyImages:
    """tokens (N,H,W) and what noises them, always the same: uniform (N,H,W) and replacements (N,H,W); rare (N,H,W) bool."""

    tokens: Tensor
    uniform: Tensor
    replacements: Tensor
    rare: Tensor

    @classmethod
    def of(cls, tokens: np.ndarray, num_labels: int, seed: int = 0) -> NoisyImages:
        """Draw the noise of tokens (N,H,W), each image's from (seed, its number)."""
        rngs = [np.random.Generator(np.random.Philox(key=[seed, number])) for number in range(len(tokens))]
        uniform = np.stack([rng.random(tokens.shape[1:], dtype=np.float32) for rng in rngs])
        replacements = np.stack([rng.integers(num_labels, size=tokens.shape[1:]) for rng in rngs])
        counts = np.bincount(tokens.ravel(), minlength=num_labels)
        order = np.argsort(-counts, kind="stable")
        frequent = order[: np.searchsorted(counts[order].cumsum(), FREQUENT * tokens.size) + 1]
        return cls(*map(torch.from_numpy, (tokens, uniform, replacements, ~np.isin(tokens, frequent))))

    def noised(self, level: float, images: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return some images' tokens (B,H,W) at a noise level, and which are noised: (B,2,H,W), all of them and the rare ones."""
        chosen, t = list(images), torch.full((len(images),), level)
        mask = self.uniform[chosen] <= level
        noised, _ = add_noise(self.tokens[chosen], t, mask=mask, random_tokens=self.replacements[chosen])
        return noised, torch.stack([mask, mask & self.rare[chosen]], dim=1)

    def counts(self, levels: Sequence[float], images: Sequence[int]) -> Tensor:
        """Return the number of noised tokens of images: (V,L,2), of all of them and of the rare ones."""
        return torch.stack([self.noised(level, images)[1].sum((2, 3)) for level in levels], dim=1)


@dataclass(frozen=True)
class Heard:
    """What replacing words of `words` costs: nats a token at each level, over noised tokens and over those with rare codes."""

    words: tuple[str, ...]
    captions: int
    nats: tuple[float, ...]
    nats_rare: tuple[float, ...]


@dataclass(frozen=True)
class Bound:
    """What it costs that two words of `words` change places: nats a noised token at each level, and the share of images that are
    more probable under their own caption. To a bag of words it costs nothing, and its share is 0.5."""

    words: tuple[str, ...]
    captions: int
    nats: tuple[float, ...]
    share: tuple[float, ...]


@dataclass(frozen=True)
class Listener:
    """A model and the images, with their captions (N,), that it is asked about."""

    model: Model
    images: NoisyImages
    captions: Sequence[str]
    sets: WordSets
    batch_size: int = 64
    seed: int = 0
    """Of the words that take a word's place."""

    @torch.inference_mode()
    def nats(self, variants: Sequence[tuple[int, str]], levels: Sequence[float], what: str) -> Tensor:
        """Return how improbable the true tokens are: cross-entropies summed over noised tokens, (V,L,2) float64, all and rare.

        Args:
            variants: images by number, and the captions that the model is given.
            what: those are, for the line of progress.
        """
        progress, sums = Progress(what, len(variants)), torch.empty(len(variants), len(levels), 2, dtype=torch.float64)
        for start in range(0, len(variants), self.batch_size):
            part = variants[start : start + self.batch_size]
            numbers, captions = [number for number, _ in part], [caption for _, caption in part]
            predict, targets = self.model(captions), self.images.tokens[numbers]
            for index, level in enumerate(levels):
                tokens, counted = self.images.noised(level, numbers)
                logits = predict(tokens, torch.full((len(part),), level))
                rows = logits.permute(0, 2, 3, 1).flatten(0, 2).float()  # softmax is fast over the last axis
                losses = F.cross_entropy(rows, targets.flatten().to(rows.device), reduction="none").cpu().view_as(targets)
                sums[start : start + len(part), index] = (losses.double()[:, None] * counted).sum((2, 3))
            progress.update(start + len(part))
        return sums

    def hears(self, levels: Sequence[float], captions_per_word: int = 64) -> tuple[list[Heard], list[Heard]]:
        """Replace each word, in no more than so many captions; return what that costs, by set and by word."""
        variants = [(word, *other) for word in self.sets.words for other in self._replaced(word)[:captions_per_word]]
        numbers = [number for _, number, _ in variants]
        own = self.nats(list(enumerate(self.captions)), levels, "true captions")
        excess = self.nats([variant[1:] for variant in variants], levels, "other words") - own[numbers]
        counts = self.images.counts(levels, numbers)

        def of(words: tuple[str, ...]) -> Heard:
            chosen = [index for index, (word, *_) in enumerate(variants) if word in words]
            means = excess[chosen].sum(0) / counts[chosen].sum(0).clamp(min=1)  # (L,2)
            return Heard(words, len(chosen), *(tuple(column) for column in means.T.tolist()))

        found = [of(words) for words in self.sets.sets], [of((word,)) for word in self.sets.words]
        by_set, by_word = ([heard for heard in some if heard.captions] for some in found)
        return by_set, by_word

    def _replaced(self, word: str) -> list[tuple[int, str]]:
        """The captions with other words in place of one, each by its image's number."""
        rngs = (np.random.Generator(np.random.Philox(key=[self.seed, number])) for number in range(len(self.captions)))
        made = [self.sets.replaced(caption, word, rng) for caption, rng in zip(self.captions, rngs, strict=True)]
        return [(number, caption) for number, caption in enumerate(made) if caption is not None]

    def binds(self, levels: Sequence[float]) -> list[Bound]:
        """Exchange the words of each caption that has just two of a set; return what that costs, by set."""
        pairs = [(words, number, exchanged(own, words)) for words in self.sets.sets for number, own in enumerate(self.captions)]
        variants = [(words, number, caption) for words, number, caption in pairs if caption is not None]
        numbers = [number for _, number, _ in variants]
        # in the same company, so that they round alike
        own = self.nats([(number, self.captions[number]) for number in numbers], levels, "true captions of pairs")
        excess = self.nats([(number, caption) for _, number, caption in variants], levels, "words exchanged") - own
        counts = self.images.counts(levels, numbers)

        def of(words: tuple[str, ...]) -> Bound:
            chosen = [index for index, (others, *_) in enumerate(variants) if others == words]
            costs = excess[chosen, :, 0]  # (captions,L)
            means = costs.sum(0) / counts[chosen, :, 0].sum(0).clamp(min=1)
            share = ((costs > 0) + 0.5 * (costs == 0)).mean(0)  # equal ones are for neither
            return Bound(words, len(chosen), tuple(means.tolist()), tuple(share.tolist()))

        return [of(words) for words in dict.fromkeys(words for words, *_ in variants)]
