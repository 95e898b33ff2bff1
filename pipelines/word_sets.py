"""Which words of captions replace each other: those that stand between the same neighbours. Nothing is known of what they mean.

    found = WordSets(["a red circle left of a blue square", "a blue circle right of a red square"])
    found.sets                                                          # (('red', 'blue'), ('left', 'right'))
    found.replaced("a red circle", "red", np.random.default_rng(0))     # 'a blue circle'
    exchanged("a red circle left of a blue square", ("red", "blue"))    # 'a blue circle left of a red square'

Words of one set say the same kind of thing, so that a caption with another of them is a caption still, and a wrong one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence

import numpy as np
from scipy.sparse.csgraph import connected_components

Context = tuple[str, str]
"""The words to the left and right of a word."""
EDGE = ""
"""What stands beside the first and the last word."""
MIN_SHARED = 0.25
"""Two words are of one set where this share of the occurrences of each has a context of the other's. A single shared context is
not enough: in captions of all kinds chance would then join nearly all words."""


class WordSets:
    """Words that stand in the same contexts, and the sets that they make.

    Args:
        captions: words are what white space parts.
        num_words: the most frequent words that are looked at, counted where another word stands in the same context.
    """

    def __init__(self, captions: Iterable[str], num_words: int = 40) -> None:
        self._words_in: dict[Context, Counter[str]] = defaultdict(Counter)
        for caption in captions:
            words = caption.split()
            for context, word in zip(contexts(words), words, strict=True):
                self._words_in[context][word] += 1
        replaceable: Counter[str] = Counter()
        for found in self._words_in.values():
            if len(found) > 1:
                replaceable.update(found)
        self.words = tuple(word for word, _ in replaceable.most_common(num_words))
        """The words, most frequent first."""
        self.sets = self._sets()
        """Each word is in one set; a set may be one word. Most frequent first, in and among sets."""

    def _sets(self) -> tuple[tuple[str, ...], ...]:
        if not self.words:
            return ()
        column = {word: index for index, word in enumerate(self.words)}
        rows = [found for found in self._words_in.values() if not column.keys().isdisjoint(found)]
        counts = np.zeros((len(rows), len(column)), dtype=np.float32)  # contexts × words
        for row, found in enumerate(rows):
            for word in found.keys() & column.keys():
                counts[row, column[word]] = found[word]
        shared = counts.T @ (counts > 0) / counts.sum(0)[:, None]  # (word, other): share of the word's occurrences
        _, labels = connected_components(np.minimum(shared, shared.T) >= MIN_SHARED, directed=False)
        made: dict[int, list[str]] = defaultdict(list)
        for word, label in zip(self.words, labels.tolist(), strict=True):
            made[label].append(word)
        return tuple(map(tuple, made.values()))

    def replaced(self, caption: str, word: str, rng: np.random.Generator) -> str | None:
        """Return the caption with other words in place of `word`, each drawn by how often it stands in that context.

        None where nothing else stands in any of its contexts.
        """
        words = caption.split()
        made = list(words)
        for place, context in enumerate(contexts(words)):
            if words[place] == word:
                others = {other: count for other, count in self._words_in[context].items() if other != word}
                if others:
                    share = np.fromiter(others.values(), dtype=float)
                    made[place] = list(others)[rng.choice(len(others), p=share / share.sum())]
        return " ".join(made) if made != words else None


def contexts(words: Sequence[str]) -> list[Context]:
    """Return the context of each word."""
    return list(zip([EDGE, *words[:-1]], [*words[1:], EDGE], strict=True)) if words else []


def exchanged(caption: str, words: Collection[str]) -> str | None:
    """Return the caption with its two words of a set in each other's place; None unless there are just two, and not the same."""
    made = caption.split()
    places = [place for place, word in enumerate(made) if word in words]
    if len(places) != 2 or made[places[0]] == made[places[1]]:
        return None
    first, second = places
    made[first], made[second] = made[second], made[first]
    return " ".join(made)
