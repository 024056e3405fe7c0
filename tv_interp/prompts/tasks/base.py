"""What a task is: a rule from x to y, sampled as demonstrations and a query."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...errors import FileError, PromptError

Pair = tuple[str, str]


class Sample(NamedTuple):
    """One prompt's words, before any tokenizer has seen them."""

    demos: list[Pair]
    query: str
    answer: str
    foil: str


class RuledSample(Sample):
    """A sample that also carries the rule behind it.

    Unpacks into the same four values as `Sample`. ``rule(x)`` is the answer to any input, which is
    what the corruption ``query`` needs; ``rule_name`` groups prompts that share a rule.
    """

    rule: Callable[[str], str]
    rule_name: str

    def __new__(cls, demos, query, answer, foil, *, rule, rule_name):
        """Make a sample of four values with two attributes."""
        self = super().__new__(cls, demos, query, answer, foil)
        self.rule = rule
        self.rule_name = rule_name
        return self


class Task(ABC):
    """A rule from inputs to answers.

    Attributes:
        name: Unique name, e.g. ``"country-capital"``.
        family: Any string; ``"knowledge"``, ``"categorization"`` and ``"bijection"`` have default
            corruptions of their own, every other family those of user pairs.
        partner: Name of another task over the same inputs, the default of the corruption ``task``.
    """

    name: str
    family: str
    partner: str | None = None

    @abstractmethod
    def sample(self, rng: np.random.Generator, n_demos: int) -> Sample:
        """Draw the words of one prompt.

        Args:
            rng: Source of randomness; the same state gives the same words.
            n_demos: Number of demonstrations, 0 or more.

        Raises:
            PromptError: if the task has too few inputs for that many demonstrations.
        """

    @property
    def answers(self) -> tuple[str, ...]:
        """All words that can be answers, for the corruption ``random_answers``."""
        return ()

    def other_queries(self, rng: np.random.Generator, sample: Sample) -> Iterator[str]:
        """Draw inputs that could replace the query of a sample, for the corruption ``query``.

        Raises:
            PromptError: if the task does not say which inputs it has.
        """
        raise PromptError(
            f"task {self.name!r} cannot have the corruption 'query': it does not know its other "
            "inputs; use a task made by Task.from_pairs or another corruption"
        )

    @staticmethod
    def from_pairs(
        pairs: Mapping[str, str] | Any,
        *,
        name: str = "user-pairs",
        family: str = "user",
    ) -> PairTask:
        """Make a task from a dict of input to answer, or from a DataFrame with columns x and y.

        Args:
            pairs: ``{"France": "Paris", ...}``, or a pandas DataFrame whose columns are named
                ``x`` and ``y`` (or that has exactly two columns: input, answer).
            name: Name that results carry.
            family: Any string.

        Raises:
            PromptError: if there are fewer than two pairs, a word is empty or not a string, or an
                input occurs twice with different answers.

        Example:
            >>> Task.from_pairs({"hot": "cold", "big": "small"}).name
            'user-pairs'
        """
        return PairTask(name, _as_pairs(pairs), family=family)

    @staticmethod
    def from_csv(path: str | os.PathLike, *, name: str | None = None) -> PairTask:
        """Read a task from a CSV file whose first line names the columns ``x`` and ``y``.

        Args:
            path: The file; other columns are left alone.
            name: Name that results carry; by default that of the file.

        Raises:
            FileError: if the file cannot be read or has no such columns.
            PromptError: as in `from_pairs`.
        """
        import pandas as pd

        try:
            table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
        except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
            raise FileError(f"cannot read pairs from {path}: {error}") from None
        columns = [str(column).strip() for column in table.columns]
        if not {"x", "y"} <= set(columns):
            raise FileError(
                f"expected a first line that names the columns x and y in {path}, got "
                f"{','.join(columns)!r}: write x,y above the pairs"
            )
        return Task.from_pairs(table.set_axis(columns, axis=1), name=name or Path(path).stem)


def _as_pairs(pairs: Any) -> dict[str, str]:
    if hasattr(pairs, "columns") and hasattr(pairs, "itertuples"):
        columns = [str(c) for c in pairs.columns]
        if "x" in columns and "y" in columns:
            pairs = list(zip(pairs["x"], pairs["y"], strict=True))
        elif len(columns) == 2:
            pairs = list(pairs.itertuples(index=False, name=None))
        else:
            raise PromptError(
                f"expected a DataFrame with columns x and y, got columns {columns}: "
                "rename the two columns or pass a dict"
            )
    elif isinstance(pairs, Mapping):
        pairs = list(pairs.items())
    else:
        raise PromptError(
            f"expected a dict or a DataFrame of pairs, got {type(pairs).__name__}: "
            "pass {input: answer, ...}"
        )
    out: dict[str, str] = {}
    for x, y in pairs:
        if not (isinstance(x, str) and isinstance(y, str) and x.strip() and y.strip()):
            raise PromptError(
                f"expected pairs of non-empty strings, got ({x!r}, {y!r}): "
                "convert numbers with str() and drop empty rows"
            )
        x, y = x.strip(), y.strip()  # the template says which space stands around a word
        if out.setdefault(x, y) != y:
            raise PromptError(
                f"input {x!r} has two answers, {out[x]!r} and {y!r}: keep one answer per input"
            )
    if len(out) < 2:
        raise PromptError(f"expected at least 2 pairs, got {len(out)}: add more pairs")
    return out


class PairTask(Task):
    """A fixed map from inputs to answers: knowledge relations and users' own pairs.

    Demonstrations and the query are different inputs, drawn without replacement. The foil is the
    answer to another input of the prompt where one differs, else to any other input.
    """

    def __init__(
        self,
        name: str,
        pairs: Mapping[str, str],
        *,
        family: str = "knowledge",
        partner: str | None = None,
    ) -> None:
        """Keep the pairs."""
        self.name = name
        self.family = family
        self.partner = partner
        self.pairs = dict(pairs)
        self._inputs = tuple(self.pairs)

    @property
    def answers(self) -> tuple[str, ...]:
        """The distinct answers, in the order of the pairs."""
        return tuple(dict.fromkeys(self.pairs.values()))

    def sample(self, rng: np.random.Generator, n_demos: int) -> RuledSample:
        """Draw n_demos pairs and one more input as the query; see `Task.sample`."""
        check_size(self.name, n_demos, len(self._inputs) - 1)
        chosen = [self._inputs[i] for i in rng.permutation(len(self._inputs))[: n_demos + 1]]
        query, answer = chosen[-1], self.pairs[chosen[-1]]
        demos = [(x, self.pairs[x]) for x in chosen[:-1]]
        return RuledSample(
            demos,
            query,
            answer,
            pick_foil(rng, answer, [y for _, y in demos], self.answers),
            rule=self.pairs.__getitem__,
            rule_name=self.name,
        )

    def other_queries(self, rng: np.random.Generator, sample: Sample) -> Iterator[str]:
        """Draw the inputs that the sample does not show, in random order."""
        used = {sample.query, *(x for x, _ in sample.demos)}
        return (x for x in rng.permutation(self._inputs).tolist() if x not in used)

    def __repr__(self) -> str:
        """Name, family and size."""
        return f"PairTask({self.name!r}, family={self.family!r}, {len(self.pairs)} pairs)"


def check_size(name: str, n_demos: int, most: int) -> None:
    """Refuse a number of demonstrations that the task cannot fill.

    Raises:
        PromptError: if n_demos is negative or above ``most``.
    """
    if n_demos < 0:
        raise PromptError(f"expected n_demos of 0 or more, got {n_demos}")
    if n_demos > most:
        raise PromptError(
            f"task {name!r} has inputs for at most {most} demonstrations and a query, "
            f"got n_demos={n_demos}: ask for fewer"
        )


def pick_foil(
    rng: np.random.Generator, answer: str, near: Sequence[str], far: Sequence[str]
) -> str:
    """Draw a wrong answer: one of ``near`` where one differs from the answer, else of ``far``.

    Raises:
        PromptError: if every word equals the answer.
    """
    for words in (near, far):
        wrong = [w for w in dict.fromkeys(words) if w != answer]
        if wrong:
            return wrong[int(rng.integers(len(wrong)))]
    raise PromptError(f"no answer differs from {answer!r}: the task needs two different answers")
