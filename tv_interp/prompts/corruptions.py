"""The six ways to corrupt a prompt, on words; aligning them with tokens happens in `build`.

The corruption decides which head is visible: with the answers permuted, a head that carries inputs
to the answer positions shows no effect; with the inputs permuted it shows its full effect. So a
corruption is part of every result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import PromptError, unknown
from .roles import Misaligned
from .tasks.base import Sample, Task, pick_foil

CORRUPTIONS = ("task", "random_answers", "labels", "answers", "inputs", "query")


@dataclass(frozen=True)
class Words:
    """A sample with the token length of its words, and a way to measure others.

    Attributes:
        sample: The clean words.
        x_lengths: Tokens of each demonstration's input, at the start of a prompt and elsewhere:
            many tokenizers see no space in front of the first word.
        y_lengths: Tokens of each demonstration's answer.
        query_length: Tokens of the query.
        n_tokens: Token length of any word at a role, ``"answer"`` or ``"query_x"``.
    """

    sample: Sample
    x_lengths: tuple[tuple[int, int], ...]
    y_lengths: tuple[int, ...]
    query_length: int
    n_tokens: Callable[[str, str], int]


def default_corruptions(task: Task) -> tuple[str, ...]:
    """Name the corruptions that `find_heads` uses for a task, by its family.

    ``"inputs"`` is always among them: a head that writes what it read at the input has the same
    output in both runs of any other.
    """
    if task.family in ("knowledge", "bijection"):
        return ("task" if task.partner else "answers", "random_answers", "inputs")
    if task.family == "categorization":
        return ("labels", "answers", "inputs")
    return ("answers", "inputs")


def check_corruption(kind: str, task: Task, other: Task | None) -> None:
    """Refuse a corruption that a task cannot have.

    Raises:
        UnknownName: if there is no such corruption.
        PromptError: if the task cannot have it.
    """
    if kind not in CORRUPTIONS:
        raise unknown("corruption", kind, CORRUPTIONS)
    categorization = task.family == "categorization"
    if kind == "labels" and not categorization:
        raise PromptError(
            f"corruption 'labels' exchanges the two labels of a categorization task, and "
            f"{task.name!r} is of family {task.family!r}: use 'answers' or 'random_answers'"
        )
    if kind == "task" and categorization:
        raise PromptError(
            f"corruption 'task' needs another relation over the same inputs, and the inputs of "
            f"{task.name!r} have none: use 'labels' or 'answers'"
        )
    if kind == "task" and other is None:
        raise PromptError(
            f"corruption 'task' needs another relation over the inputs of {task.name!r}, which "
            "declares no partner: pass other=, or use 'random_answers'"
        )
    if kind == "task" and not hasattr(other, "pairs"):
        raise PromptError(
            f"corruption 'task' needs a relation of pairs, got {getattr(other, 'name', other)!r}: "
            "pass a task made by Task.from_pairs"
        )


def corrupt_words(
    kind: str, words: Words, rng: np.random.Generator, task: Task, other: Task | None
) -> Sample:
    """Corrupt one sample.

    Args:
        kind: One of `CORRUPTIONS`.
        words: The clean sample and its token lengths; words are exchanged only for words of equal
            token length.
        rng: Source of randomness.
        task: The sample's task.
        other: The other relation, for ``"task"``.

    Returns:
        The corrupted demonstrations and query, with the **clean** answer and the contrast's foil.

    Raises:
        Misaligned: if this sample cannot be corrupted at equal length.
    """
    clean = words.sample
    if kind == "task":
        pairs: dict[str, str] = other.pairs  # type: ignore[union-attr]
        lacking = next((x for x in (*_inputs(clean), clean.query) if x not in pairs), None)
        if lacking is not None:
            raise Misaligned("the other relation lacks an input of the prompt")
        demos = [(x, pairs[x]) for x, _ in clean.demos]
        _same_lengths([y for _, y in demos], words.y_lengths, "answer", words)
        return _with(clean, demos, clean.query, pairs[clean.query])
    if kind == "query":
        return _other_query(words, rng, task)
    if task.family == "categorization":
        make = {
            "random_answers": _random_labels,
            "labels": _exchange_labels,
            "answers": _half_the_labels,
            "inputs": _half_the_inputs,
        }[kind]
        demos = make(words, rng, _labels(clean))
        return _with(
            clean, demos, clean.query, next(w for w in _labels(clean) if w != clean.answer)
        )
    every = getattr(task, "answers", ()) or _answers(clean)
    if kind == "random_answers":
        answers = [_draw(rng, every, n, words) for n in words.y_lengths]
        demos = list(zip(_inputs(clean), answers, strict=True))
        return _with(
            clean, demos, clean.query, pick_foil(rng, clean.answer, _answers(clean), every)
        )
    if kind == "answers":
        answers = _derange(rng, _answers(clean), words.y_lengths)
        demos = list(zip(_inputs(clean), answers, strict=True))
    else:
        inputs = _derange(rng, _inputs(clean), words.x_lengths)
        demos = list(zip(inputs, _answers(clean), strict=True))
    suggested = [y for x, y in demos if x == clean.query and y != clean.answer]
    foil = pick_foil(rng, clean.answer, suggested[-1:] or _answers(clean), every)
    return _with(clean, demos, clean.query, foil)


def draw_answers(words: Words, rng: np.random.Generator, pool: Sequence[str]) -> Sample:
    """Draw the demonstrations' answers from a pool; query, answer and foil stay.

    Raises:
        Misaligned: if the pool has no answer of equal token length.
    """
    clean = words.sample
    answers = [_draw(rng, pool, n, words) for n in words.y_lengths]
    demos = list(zip(_inputs(clean), answers, strict=True))
    return _with(clean, demos, clean.query, clean.foil)


def _inputs(sample: Sample) -> list[str]:
    return [x for x, _ in sample.demos]


def _answers(sample: Sample) -> list[str]:
    return [y for _, y in sample.demos]


def _with(clean: Sample, demos: list[tuple[str, str]], query: str, foil: str) -> Sample:
    if foil == clean.answer:
        raise Misaligned("foil and answer are the same word")
    return Sample(demos, query, clean.answer, foil)


def _labels(sample: Sample) -> tuple[str, str]:
    """Get the two labels of a categorization prompt, in a fixed order."""
    labels = sorted({sample.answer, sample.foil, *_answers(sample)})
    if len(labels) != 2:
        raise PromptError(
            f"expected two labels in a categorization prompt, got {len(labels)}: {labels[:4]}"
        )
    return labels[0], labels[1]


def _same_lengths(new: Sequence[str], lengths: Sequence[int], role: str, words: Words) -> None:
    if any(words.n_tokens(w, role) != n for w, n in zip(new, lengths, strict=True)):
        raise Misaligned(f"no {role} of equal token length")


def _draw(rng: np.random.Generator, pool: Sequence[str], length: int, words: Words) -> str:
    for i in rng.permutation(len(pool)):
        if words.n_tokens(pool[int(i)], "answer") == length:
            return pool[int(i)]
    raise Misaligned("no answer of equal token length")


def _derange(rng: np.random.Generator, items: list[str], lengths: Sequence[Any]) -> list[str]:
    """Permute so that nothing stays in place, among items of equal token length."""
    out = list(items)
    for length in sorted(set(lengths)):
        places = np.flatnonzero([each == length for each in lengths])
        if len(places) < 2:
            raise Misaligned("a word has no other of equal token length to change places with")
        order = rng.permutation(len(places))
        while (order == np.arange(len(places))).any():
            order = rng.permutation(len(places))
        for place, source in zip(places, places[order], strict=True):
            out[place] = items[source]
    return out


def _random_labels(words: Words, rng, labels) -> list[tuple[str, str]]:
    _exchangeable(words, labels)
    return [(x, labels[int(rng.integers(2))]) for x in _inputs(words.sample)]


def _exchange_labels(words: Words, rng, labels) -> list[tuple[str, str]]:
    _exchangeable(words, labels)
    return [(x, labels[y == labels[0]]) for x, y in words.sample.demos]


def _half_the_labels(words: Words, rng, labels) -> list[tuple[str, str]]:
    _exchangeable(words, labels)
    demos = list(words.sample.demos)
    for members in _classes(words.sample, labels):
        for i in rng.permutation(members)[: len(members) // 2]:
            x, y = demos[i]
            demos[i] = (x, labels[y == labels[0]])
    return demos


def _half_the_inputs(words: Words, rng, labels) -> list[tuple[str, str]]:
    """Exchange inputs between the classes, so that half of each class has one of the other."""
    demos = list(words.sample.demos)
    ours, theirs = (list(rng.permutation(m)) for m in _classes(words.sample, labels))
    wanted = min(len(ours), len(theirs)) // 2
    for i in ours:
        match = next((j for j in theirs if words.x_lengths[i] == words.x_lengths[j]), None)
        if match is not None and wanted:
            theirs.remove(match)
            wanted -= 1
            (a, y), (b, z) = demos[i], demos[match]
            demos[i], demos[match] = (b, y), (a, z)
    if wanted:
        raise Misaligned("too few inputs of equal token length in the two classes")
    return demos


def _classes(sample: Sample, labels) -> list[np.ndarray]:
    classes = [np.flatnonzero([y == label for _, y in sample.demos]) for label in labels]
    if min(map(len, classes)) < 2:
        raise Misaligned("a class has fewer than two demonstrations, and half of it is none")
    return classes


def _exchangeable(words: Words, labels) -> None:
    if words.n_tokens(labels[0], "answer") != words.n_tokens(labels[1], "answer"):
        raise Misaligned("the two labels differ in token length")


def _other_query(words: Words, rng: np.random.Generator, task: Task) -> Sample:
    clean = words.sample
    rule = getattr(clean, "rule", None)
    if rule is None or not hasattr(task, "other_queries"):
        raise PromptError(
            f"task {task.name!r} cannot have the corruption 'query': its samples carry no rule, or "
            "it has no other_queries(); use another corruption, or a subclass of Task whose "
            "sample() returns a RuledSample"
        )
    for x in task.other_queries(rng, clean):
        if words.n_tokens(x, "query_x") == words.query_length and rule(x) != clean.answer:
            return _with(clean, list(clean.demos), x, rule(x))
    raise Misaligned("no other query of equal token length and another answer")
