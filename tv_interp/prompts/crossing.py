"""Two rules crossed with two queries: which of four answers comes out says what a state held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import PromptError, check_seed
from .build import Prompts, check_prompts
from .corruptions import check_corruption
from .tasks import Task, get_task
from .tasks.base import RuledSample


class Crossed(NamedTuple):
    """Four prompts of equal length and roles, row by row; each has its own answer.

    Attributes:
        plain: The prompts that were given, less those that cannot be crossed.
        rule: The same inputs and query under another rule.
        query: The same demonstrations, another query.
        both: The other rule and the other query.
    """

    plain: Prompts
    rule: Prompts
    query: Prompts
    both: Prompts

    @property
    def answers(self) -> Int[Tensor, "prompt 4"]:
        """First tokens of the four answers, all different."""
        return torch.stack([prompts.answer for prompts in self], 1)


def cross(prompts: Prompts, *, other: str | Task | None = None, seed: int = 1) -> Crossed:
    """Cross each prompt with another rule and another query.

    The other rule is another relation over the same inputs; for categorization, whose inputs have
    none, it gives the same classes two other label words.

    Args:
        prompts: Prompts whose task knows its rule.
        other: The other relation; None for the task's declared partner, and for categorization.
        seed: Decides labels and queries; each prompt has a generator of its own.

    Returns:
        The four; rows whose words cannot be aligned, or whose four answers do not differ in their
        first token, are left out of all and counted in ``plain.dropped``.

    Raises:
        UnknownName: if there is no such other task.
        PromptError: if the task has no other rule or does not know its own, or no row is left.
    """
    check_prompts(prompts)
    check_seed(seed)
    task = prompts.task
    labelled = task.family == "categorization"
    if other is None and not labelled:
        other = getattr(task, "partner", None)
    relation = get_task(other) if other is not None else None
    if not labelled or relation is not None:
        check_corruption("task", task, relation)
    dropped: Counter[str] = Counter()
    kept: list[int] = []
    samples: list[tuple[RuledSample, ...]] = []
    for row, sample in enumerate(prompts.samples):
        if not isinstance(sample, RuledSample) or not hasattr(task, "other_queries"):
            raise PromptError(
                f"the samples of task {task.name!r} carry no rule, so the answer to another query "
                "is not known: use a task made by Task.from_pairs"
            )
        rng = np.random.default_rng([seed, row, 3])
        rule = _relabelled(sample, task, rng) if labelled else relation.pairs.get  # type: ignore
        made = _four(prompts, row, sample, rule, rng)
        if isinstance(made, str):
            dropped[made] += 1
            continue
        kept.append(row)
        samples.append(made)
    if not kept:
        raise PromptError(f"none of {len(prompts)} prompts can be crossed: {_most(dropped)}")
    four = [prompts.with_samples([each[i] for each in samples]) for i in range(4)]
    answers = torch.stack([each.answer for each in four], 1)
    every = range(len(kept))
    aligned = torch.tensor(
        [all(each.roles_of(i) == four[0].roles_of(i) for each in four) for i in every]
    )
    distinct = torch.tensor([len(set(row)) == 4 for row in answers.tolist()])
    dropped["words split into other tokens"] += int((~aligned).sum())
    dropped["two of the four answers share their first token"] += int((aligned & ~distinct).sum())
    good = aligned & distinct
    if not good.any():
        raise PromptError(f"none of {len(prompts)} prompts can be crossed: {_most(dropped)}")
    counts = Counter(prompts.dropped) + dropped
    return Crossed(*(replace(each.select(good), dropped=dict(counts)) for each in four))


def _four(
    prompts: Prompts,
    row: int,
    sample: RuledSample,
    rule: Callable[[str], str | None],
    rng: np.random.Generator,
) -> tuple[RuledSample, ...] | str:
    """Write the four samples of a row, or say why that cannot be."""
    words = prompts._words(row)
    ours: Any = sample.rule
    shown = [(x, rule(x)) for x, _ in sample.demos]
    if any(y is None for _, y in shown) or rule(sample.query) is None:
        return "the other rule lacks an input of the prompt"
    lengths = [words.n_tokens(str(y), "answer") for _, y in shown]
    if lengths != list(words.y_lengths):
        return "no answer of equal token length"
    for x in prompts.task.other_queries(rng, sample):  # type: ignore[attr-defined]
        four = [ours(sample.query), rule(sample.query), ours(x), rule(x)]
        if (
            None not in four
            and len(set(four)) == 4
            and words.n_tokens(x, "query_x") == words.query_length
        ):
            break
    else:
        return "no other query of equal token length whose four answers differ"
    a, b, c, d = four
    about = {"rule_name": sample.rule_name}
    return (
        RuledSample(sample.demos, sample.query, a, b, rule=ours, **about),
        RuledSample(shown, sample.query, b, a, rule=rule, **about),
        RuledSample(sample.demos, x, c, d, rule=ours, **about),
        RuledSample(shown, x, d, c, rule=rule, **about),
    )


def _relabelled(sample: RuledSample, task: Any, rng: np.random.Generator) -> Callable[[str], str]:
    """Give a sample's two classes two other label words."""
    old = list(dict.fromkeys([sample.answer, sample.foil]))
    free = [word for word in task.labels if word not in old]
    if len(free) < 2:
        raise PromptError(
            f"task {task.name!r} has {len(task.labels)} label words, and crossing needs four: "
            "give it more with with_labels(...)"
        )
    new = [free[i] for i in rng.permutation(len(free))[:2]]
    other, rule = dict(zip(old, new, strict=True)), sample.rule
    return lambda x: other[rule(x)]


def _most(dropped: Counter[str]) -> str:
    reasons = [f"{reason} ({n})" for reason, n in dropped.most_common(3) if n]
    return ", ".join(reasons) + "; use another task or other="
