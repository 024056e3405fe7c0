"""Training sequences: ``<bos> x is y x is y ...``, one rule a sequence, loss on every answer.

A sequence is a list of items (the token ids of x, the id of y). Nothing but the next answer is ever
asked of the model: no loss or mask writes a mechanism in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ...prompts.tasks.bijection import BIJECTIVE
from ...prompts.tasks.categorization import Categorization, categorization_tasks
from ...prompts.tasks.knowledge import SHARED, relations
from ...prompts.tasks.words import held_out_label_words, label_words, unanswered_label_words
from .vocabulary import BOS, CONNECTIVE, PAD, word_ids

Item = tuple[list[int], int]
Maker = Callable[[np.random.Generator, int], list[Item]]


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids, and where to predict what.

    Attributes:
        tokens: Token ids ``[sequence, position]``.
        row: Sequence of each answer.
        position: Where it is predicted.
        target: Its token id.
        shown: Whether it is that of a look-up whose input came before. Who answers these with the
            last value of the sequence is right in .77 of ``recall`` sequences of 10 tokens, .59 of
            16, .46 of 32.
    """

    tokens: np.ndarray
    row: np.ndarray
    position: np.ndarray
    target: np.ndarray
    shown: np.ndarray


class Sequences:
    """Draws training batches from a mix of families; the same generator state, the same batch."""

    families = (
        "typed", "shared", "bijection", "lookup", "simple-string", "digit", "2d-data", "recall",
    )  # fmt: skip

    def __init__(
        self, length: int, separator: str = "", familiarity: Mapping[str, float] | None = None
    ) -> None:
        """Turn all words into ids once.

        Args:
            length: Tokens of a sequence.
            separator: Token after every answer; "" for none.
            familiarity: Weight of every relation among those of its family; None for equal ones.
        """
        self.length = length
        self.ids = word_ids()
        self.end = [self.ids[separator]] if separator else []
        known = {
            name: [([self.ids[x]], self.ids[y]) for x, y in pairs.items()]
            for name, pairs in relations().items()
        }
        self.typed = [items for name, items in known.items() if name not in SHARED]
        self.shared = [items for name, items in known.items() if name in SHARED]
        self.odds: dict[str, np.ndarray] = {}
        if familiarity is not None:
            for family in ("typed", "shared"):
                names = [name for name in known if (name in SHARED) == (family == "shared")]
                weights = np.array([familiarity[name] for name in names])
                self.odds[family] = weights / weights.sum()
        self.bijections = [known[name] for name in BIJECTIVE]
        self.labels = [self.ids[w] for w in label_words()]
        self.keys = self.labels + [self.ids[w] for w in held_out_label_words()]
        never = {self.ids[w] for w in unanswered_label_words()}
        self.values = [key for key in self.keys if key not in never]
        self.categories = {task.name: task for task in categorization_tasks()}
        self.inputs = {name: _seen_inputs(task) for name, task in self.categories.items()}

    def batch(
        self,
        rng: np.random.Generator,
        size: int,
        mix: dict[str, float],
        n_words: int | None = None,
    ) -> Batch:
        """Draw ``size`` sequences, families by the weights of ``mix``.

        Args:
            rng: Source of randomness.
            size: Number of sequences.
            mix: Weight of each family.
            n_words: How many of the label words occur; None for all.
        """
        weights = np.array([mix.get(f, 0.0) for f in self.families])
        drawn = rng.choice(len(self.families), size=size, p=weights / weights.sum())
        tokens = np.full((size, self.length), self.ids[PAD])
        row, position, target, shown = [], [], [], []
        for i, family in enumerate(drawn):
            line = [self.ids[BOS]]
            before: set[int] = set()
            for x, y in self.items(rng, self.families[family], n_words):
                if len(line) + len(x) + 2 + len(self.end) > self.length:
                    break
                line += [*x, self.ids[CONNECTIVE]]
                row.append(i)
                position.append(len(line) - 1)
                target.append(y)
                shown.append(x[0] in before)
                if self.families[family] in ("lookup", "recall"):
                    before.add(x[0])
                line += [y, *self.end]
            tokens[i, : len(line)] = line
        return Batch(tokens, *map(np.array, (row, position, target, shown)))

    def items(
        self, rng: np.random.Generator, family: str, n_words: int | None = None
    ) -> list[Item]:
        """Draw the items of one sequence, at least as many as fit.

        ``lookup`` draws among random pairs, more in longer sequences; ``recall`` among two to four.
        """
        most = self.length // 3
        if family in self.categories:
            return self._categorize(rng, family, most, self.labels[:n_words])
        if family in ("lookup", "recall"):
            n_keys = int(rng.integers(2, 5 if family == "recall" else 3 + most // 3))
            pairs = self._pairs(rng, n_keys, n_words)
            return [pairs[i] for i in rng.integers(n_keys, size=most)]
        if family == "bijection":
            pairs = self.bijections[rng.integers(len(self.bijections))]
            turned = rng.random(len(pairs)) < 0.5
            pairs = [([y], x[0]) if t else (x, y) for (x, y), t in zip(pairs, turned, strict=True)]
        else:
            pool = self.typed if family == "typed" else self.shared
            odds = self.odds.get(family)
            drawn = rng.integers(len(pool)) if odds is None else rng.choice(len(pool), p=odds)
            pairs = pool[drawn]
        order = np.concatenate([rng.permutation(len(pairs)) for _ in range(-(-most // len(pairs)))])
        return [pairs[i] for i in order[:most]]

    def _pairs(self, rng: np.random.Generator, n: int, n_words: int | None) -> list[Item]:
        keys, values = self.keys[:n_words], self.values[:n_words]
        drawn = rng.permutation(len(keys))[:n], rng.permutation(len(values))[:n]
        return [([keys[k]], values[v]) for k, v in zip(*drawn, strict=True)]

    def _categorize(
        self, rng: np.random.Generator, name: str, most: int, names: list[int]
    ) -> list[Item]:
        _, is_high = self.categories[name]._classifier(rng)
        labels = [names[i] for i in rng.permutation(len(names))[:2]]
        words, ids = self.inputs[name](rng, 4 * most)
        high = np.array([is_high(w) for w in words])
        by_class = [np.flatnonzero(~high), np.flatnonzero(high)]
        if not (len(by_class[0]) and len(by_class[1])):
            return self._categorize(rng, name, most, names)
        classes = rng.integers(2, size=most)
        taken = [0, 0]
        out = []
        for c in classes:
            pool = by_class[c]
            out.append((ids[pool[taken[c] % len(pool)]], labels[c]))
            taken[c] += 1
        return out


def _seen_inputs(task: Categorization):
    """Make a fast sampler of inputs that are not held out: n distinct words and their ids."""
    known = word_ids()
    if task.name == "simple-string":

        def strings(rng: np.random.Generator, n: int) -> tuple[list[str], list[list[int]]]:
            words = []
            while len(words) < n:
                word = task._inputs(rng)
                if not task.held_out(word):
                    words.append(word)
            return words, [[known[c] for c in w.split()] for w in words]

        return strings
    if task.name == "digit":
        pool = [str(i) for i in range(100)]
    else:
        pool = [f"{a} {b}" for a in range(10) for b in range(10)]
    pool = [w for w in pool if not task.held_out(w)]
    pool_ids = [[known[c] for c in w.split()] for w in pool]

    def points(rng: np.random.Generator, n: int) -> tuple[list[str], list[list[int]]]:
        order = rng.permutation(len(pool))[:n]
        return [pool[i] for i in order], [pool_ids[i] for i in order]

    return points
