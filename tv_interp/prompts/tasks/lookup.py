"""Look-up: pairs that exist in the prompt alone; the query is one of the inputs shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .base import RuledSample, Sample, Task, check_size, pick_foil
from .words import label_words


class LookUp(Task):
    """Random pairs of arbitrary words; the query repeats one input."""

    family = "lookup"

    def __init__(self, name: str = "lookup", words: Sequence[str] | None = None) -> None:
        """Keep the words; None for the shipped label words."""
        self.name = name
        self.words = tuple(words) if words is not None else label_words()

    @property
    def answers(self) -> tuple[str, ...]:
        """All words."""
        return self.words

    def sample(self, rng: np.random.Generator, n_demos: int) -> RuledSample:
        """Draw n_demos pairs of distinct words and repeat one input; see `Task.sample`."""
        check_size(self.name, n_demos, len(self.words) // 2)
        if n_demos == 0:
            query, answer = (self.words[i] for i in rng.permutation(len(self.words))[:2])
            foil = pick_foil(rng, answer, [], self.words)
            return RuledSample(
                [], query, answer, foil, rule={query: answer}.__getitem__, rule_name=""
            )
        drawn = [self.words[i] for i in rng.permutation(len(self.words))[: 2 * n_demos]]
        demos = list(zip(drawn[:n_demos], drawn[n_demos:], strict=True))
        query, answer = demos[int(rng.integers(n_demos))]
        return RuledSample(
            demos,
            query,
            answer,
            pick_foil(rng, answer, drawn[n_demos:], self.words),
            rule=dict(demos).__getitem__,
            rule_name=" ".join(drawn),
        )

    def other_queries(self, rng: np.random.Generator, sample: Sample) -> Iterator[str]:
        """Draw the other inputs shown."""
        shown = [x for x, _ in sample.demos if x != sample.query]
        return iter(rng.permutation(shown).tolist() if shown else [])
