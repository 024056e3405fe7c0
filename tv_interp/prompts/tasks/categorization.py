"""Categorization: the rule must be inferred from several demonstrations.

Two label words are drawn for every prompt, so they mean nothing by themselves, and so is the rule:
one demonstration cannot tell it. The task names follow arXiv 2406.16007 (Simple String, Digit, 2-D
Data); its exact rules are not published, so those here are our choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

from ...errors import PromptError, unknown
from .base import RuledSample, Sample, Task, check_size
from .knowledge import relations
from .words import LETTERS, NUMBERS, label_words

Queries = Literal["any", "held_out", "seen"]
Classifier = tuple[str, Callable[[str], bool]]


class Categorization(Task):
    """Two classes cut by a rule, named by two arbitrary words.

    Demonstrations alternate between the classes at random but in equal number (one more of either
    where n_demos is odd), all inputs of a prompt differ, and the query falls in either class with
    equal chance. Some inputs were kept out of the reference models' categorization prompts: they
    are never demonstrations, and ``queries="held_out"`` takes the queries from them alone.
    """

    family = "categorization"

    def __init__(
        self,
        name: str,
        inputs: Callable[[np.random.Generator], str],
        held_out: Callable[[str], bool],
        classifier: Callable[[np.random.Generator], Classifier],
        *,
        labels: Sequence[str] | None = None,
        queries: Queries = "any",
    ) -> None:
        """Keep how to draw an input and a rule.

        Args:
            name: Task name.
            inputs: Draws one input.
            held_out: Whether an input is kept out of training.
            classifier: Draws a rule: its name, and the class of an input.
            labels: Label words; None for the shipped ones.
            queries: Which inputs may be queries.
        """
        self.name = name
        self.labels = tuple(labels) if labels is not None else label_words()
        self.held_out = held_out
        self._inputs = inputs
        self._classifier = classifier
        self._queries: Queries = queries
        self._parts = (name, inputs, held_out, classifier)
        if len(set(self.labels)) < 2:
            raise PromptError(f"expected at least 2 label words, got {self.labels}: add labels")

    @property
    def answers(self) -> tuple[str, ...]:
        """All label words."""
        return self.labels

    def with_labels(self, labels: Sequence[str]) -> Categorization:
        """Make the same task with other label words."""
        return Categorization(*self._parts, labels=labels, queries=self._queries)

    def with_queries(self, queries: Queries) -> Categorization:
        """Make the same task with queries from all, from held-out or from seen inputs."""
        if queries not in ("any", "held_out", "seen"):
            raise unknown("queries", queries, ("any", "held_out", "seen"))
        return Categorization(*self._parts, labels=self.labels, queries=queries)

    def sample(self, rng: np.random.Generator, n_demos: int) -> RuledSample:
        """Draw a rule, two labels, n_demos inputs and a query; see `Task.sample`."""
        check_size(self.name, n_demos, 40)
        first, second = rng.permutation(len(self.labels))[:2]
        names = self.labels[first], self.labels[second]
        rule_name, is_high = self._classifier(rng)
        used: set[str] = set()

        def draw(high: bool, wanted: Queries) -> str:
            for _ in range(10_000):
                x = self._inputs(rng)
                if is_high(x) == high and self._allows(x, wanted) and x not in used:
                    used.add(x)
                    return x
            raise PromptError(
                f"task {self.name!r} ran out of inputs at n_demos={n_demos}: ask for fewer"
            )

        classes = np.arange(n_demos) % 2 == int(rng.integers(2))
        demos = [(draw(bool(c), "seen"), names[int(c)]) for c in rng.permutation(classes)]
        high = bool(rng.integers(2))
        query = draw(high, self._queries)
        return RuledSample(
            demos,
            query,
            names[int(high)],
            names[int(not high)],
            rule=lambda x: names[int(is_high(x))],
            rule_name=rule_name,
        )

    def _allows(self, x: str, queries: Queries) -> bool:
        return queries == "any" or self.held_out(x) == (queries == "held_out")

    def other_queries(self, rng: np.random.Generator, sample: Sample) -> Iterator[str]:
        """Draw inputs that the sample does not show, from those that may be queries."""
        used = {sample.query, *(x for x, _ in sample.demos)}
        for _ in range(1_000):
            x = self._inputs(rng)
            if x not in used and self._allows(x, self._queries):
                used.add(x)
                yield x

    def __repr__(self) -> str:
        """Name and number of label words."""
        return f"Categorization({self.name!r}, {len(self.labels)} label words)"


MAX_STRING = 5


def _string(rng: np.random.Generator) -> str:
    return " ".join(LETTERS[i] for i in rng.integers(26, size=rng.integers(1, MAX_STRING + 1)))


def _string_held_out(x: str) -> bool:
    return sum(map(ord, x.replace(" ", ""))) % 5 == 0


def _string_rule(rng: np.random.Generator) -> Classifier:
    at_least = int(rng.integers(2, MAX_STRING + 1))
    return f"length>={at_least}", lambda x: len(x.split()) >= at_least


def _digit(rng: np.random.Generator) -> str:
    return NUMBERS[rng.integers(100)]


def _digit_held_out(x: str) -> bool:
    return (37 * int(x) + 11) % 100 < 16


def _digit_rule(rng: np.random.Generator) -> Classifier:
    at_least = int(rng.integers(25, 76))
    return f"x>={at_least}", lambda x: int(x) >= at_least


def _point(rng: np.random.Generator) -> str:
    return " ".join(NUMBERS[i] for i in rng.integers(10, size=2))


def _point_held_out(x: str) -> bool:
    a, b = map(int, x.split())
    return (3 * a + 7 * b) % 5 == 0


_ORIENTATIONS = {"a": (1, 0, 4, 6), "b": (0, 1, 4, 6), "a+b": (1, 1, 8, 11), "a-b": (1, -1, -1, 2)}


def _point_rule(rng: np.random.Generator) -> Classifier:
    name = list(_ORIENTATIONS)[rng.integers(4)]
    weight_a, weight_b, low, high = _ORIENTATIONS[name]
    at_least = int(rng.integers(low, high + 1))

    def is_high(x: str) -> bool:
        a, b = map(int, x.split())
        return weight_a * a + weight_b * b >= at_least

    return f"{name}>={at_least}", is_high


def categorization_tasks() -> list[Categorization]:
    """Build Simple String, Digit and 2-D Data."""
    return [
        Categorization("simple-string", _string, _string_held_out, _string_rule),
        Categorization("digit", _digit, _digit_held_out, _digit_rule),
        Categorization("2d-data", _point, _point_held_out, _point_rule),
    ]


def hybrid_task(relation: str = "country-continent") -> Categorization:
    """Build a task that needs both: a label for inputs whose *known* answer is one of two kinds.

    For example, countries of one continent have one label and all others the other. Which answer of
    the relation counts is drawn for every prompt, so it takes knowledge to tell the class of an
    input, and several demonstrations to tell the rule.

    Args:
        relation: Name of a shipped relation; answers that a fifth of its inputs share can count.

    Raises:
        PromptError: if there is no such relation, or none of its answers is so frequent.
    """
    pairs = relations().get(relation)
    if pairs is None:
        raise PromptError(f"expected the name of a shipped relation, got {relation!r}")
    inputs = tuple(pairs)
    counts = Counter(pairs.values())
    kinds = [y for y, n in counts.items() if len(inputs) / 5 <= n <= len(inputs) * 4 / 5]
    if not kinds:
        raise PromptError(f"relation {relation!r} has no answer that a fifth of its inputs share")

    def classify(rng: np.random.Generator) -> Classifier:
        kind = kinds[int(rng.integers(len(kinds)))]
        return kind, lambda x: pairs[x] == kind

    return Categorization(
        f"hybrid-{relation}",
        lambda rng: inputs[int(rng.integers(len(inputs)))],
        lambda x: False,
        classify,
    )
