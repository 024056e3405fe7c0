"""Bijections: both directions of a one-to-one relation, mixed within a prompt.

The cases on which one injected vector must fail, since no rank-one map does both directions
(arXiv 2506.09048, Proposition 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from ...errors import PromptError
from .base import RuledSample, Sample, Task, check_size, pick_foil
from .knowledge import relations

BIJECTIVE = (
    "country-capital",
    "adjective-comparative",
    "adjective-superlative",
    "verb-past",
    "verb-gerund",
    "verb-third",
    "noun-plural",
    "letter-upper",
)


class Bijection(Task):
    """A relation and its inverse in one prompt: hot is hotter, colder is cold.

    Each demonstration draws a pair that the prompt has not used and one of its two directions, so
    the query's pair is never shown the other way round.
    """

    family = "bijection"

    def __init__(self, name: str, pairs: Mapping[str, str], *, partner: str | None = None) -> None:
        """Keep the union of the relation and its inverse."""
        self.name = name
        self.partner = partner
        self.forward = tuple(pairs.items())
        self.pairs = dict(pairs) | {y: x for x, y in pairs.items()}
        assert len(self.pairs) in (2 * len(pairs), len(pairs)), f"{name} is not one to one"

    @property
    def answers(self) -> tuple[str, ...]:
        """Every word of both sides."""
        return tuple(dict.fromkeys(self.pairs.values()))

    def sample(self, rng: np.random.Generator, n_demos: int) -> RuledSample:
        """Draw n_demos + 1 pairs and a direction for each; see `Task.sample`."""
        check_size(self.name, n_demos, len(self.forward) - 1)
        chosen = [self.forward[i] for i in rng.permutation(len(self.forward))[: n_demos + 1]]
        turned = rng.random(n_demos + 1) < 0.5
        words = [(y, x) if t else (x, y) for (x, y), t in zip(chosen, turned, strict=True)]
        *demos, (query, answer) = words
        return RuledSample(
            demos,
            query,
            answer,
            pick_foil(rng, answer, [y for _, y in demos], self.answers),
            rule=self.pairs.__getitem__,
            rule_name=self.name,
        )

    def other_queries(self, rng: np.random.Generator, sample: Sample) -> Iterator[str]:
        """Draw words of either side whose pair the sample does not show."""
        used = {sample.query, sample.answer, *(w for pair in sample.demos for w in pair)}
        return (x for x in rng.permutation(list(self.pairs)).tolist() if x not in used)

    def __repr__(self) -> str:
        """Name and size."""
        return f"Bijection({self.name!r}, {len(self.forward)} pairs)"


class Union(Task):
    """Two unrelated one-way relations in one prompt: France is Paris, run is ran.

    The control of a bijection: as much is mixed and as many pairs are mapped, but no word is both
    input and answer. Each demonstration and the query draw one of the two relations.
    """

    family = "union"

    def __init__(self, name: str, first: Mapping[str, str], second: Mapping[str, str]) -> None:
        """Keep both relations.

        Raises:
            PromptError: if they share a word.
        """
        shared = {*first, *first.values()} & {*second, *second.values()}
        if shared:
            raise PromptError(
                f"expected two relations without a common word, both have {sorted(shared)[0]!r}: "
                "choose another relation"
            )
        self.name = name
        self.parts = tuple(first.items()), tuple(second.items())
        self.pairs = {**first, **second}

    @property
    def answers(self) -> tuple[str, ...]:
        """Every answer of both relations."""
        return tuple(dict.fromkeys(self.pairs.values()))

    def sample(self, rng: np.random.Generator, n_demos: int) -> RuledSample:
        """Draw a relation for each demonstration and the query; see `Task.sample`."""
        check_size(self.name, n_demos, min(map(len, self.parts)) - 1)
        which = rng.integers(2, size=n_demos + 1)
        drawn = [iter(rng.permutation(len(part)).tolist()) for part in self.parts]
        *demos, (query, answer) = [self.parts[w][next(drawn[w])] for w in which]
        foil = pick_foil(rng, answer, [y for _, y in demos], self.answers)
        rule = self.pairs.__getitem__
        return RuledSample(demos, query, answer, foil, rule=rule, rule_name=self.name)

    def other_queries(self, rng: np.random.Generator, sample: Sample) -> Iterator[str]:
        """Draw inputs of either relation that the sample does not show."""
        used = {sample.query, *(x for x, _ in sample.demos)}
        return (x for x in rng.permutation(list(self.pairs)).tolist() if x not in used)


def bijection_tasks() -> list[Task]:
    """Build each bijection and, as its partner, the identity over the same words."""
    known = relations()
    out: list[Task] = []
    for base in BIJECTIVE:
        name, identity = f"{base}-bijection", f"{base}-identity"
        both = [w for pair in known[base].items() for w in pair]
        out.append(Bijection(name, known[base], partner=identity))
        out.append(Bijection(identity, {w: w for w in both}, partner=name))
    return out
