"""One task vector in place of demonstrations: what is it worth? After arXiv 2506.09048.

There an injected vector acts as *one* demonstration, distilled from those it was taken from, and
implies a map of rank one. Asked here in two places:

* ``query_is``: as the paper injects: the last token's state, taken behind another query, into a
  prompt without demonstrations.
* ``answer``: the mean of the answers' states (Pos Avg), put at the answer of a prompt with one
  demonstration whose own answer is random. Models that keep the task at answers take it there.

The layer is chosen on one half of the prompts and everything is reported on the other, beside a
vector from prompts with random answers at the same layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from ..display import Block, Shown, as_text
from ..errors import TvInterpError, unknown
from ..interventions.recording import batches, check_memory, last_logits
from ..models.adapter import Adapter, Edit, HookName
from ..prompts import Prompts, Task, get_task
from ..prompts.tasks.base import PairTask, RuledSample
from ..prompts.tasks.bijection import Bijection, Union
from ..prompts.tasks.registry import answers_without
from ..scores import Scores, get_metric
from ..scores.metrics import Targets
from .common import label_scores, provenance
from .find import split_prompts
from .vectors import Vectors, extract_vectors, inject_vectors

Place = Literal["query_is", "answer"]
PLACES: tuple[Place, ...] = ("query_is", "answer")


@dataclass(frozen=True, eq=False)
class Donors:
    """Prompts with the vectors that stand for them, row by row.

    Attributes:
        clean: The few-shot prompts.
        recipients: What a vector is put into.
        vector: One vector a prompt, ``(prompt, layer, d_model)``.
        control: The same from prompts whose answers are random.
    """

    clean: Prompts
    recipients: Prompts
    vector: Vectors
    control: Vectors

    def select(self, rows: Sequence[int]) -> Donors:
        """Keep some rows."""
        parts = (self.clean, self.recipients, self.vector, self.control)
        return Donors(*(part.select(rows) for part in parts))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False, repr=False)
class OneVector(Shown):
    """What `inject_one_vector` measured.

    Attributes:
        scores: Metric values over ``(prompt, part)``, on test prompts: ``nothing`` (the recipients
            as they are), ``one vector``, ``random answers`` (the control at the same layer), and
            ``1 demonstration`` to all of them, the last ones of each prompt.
        layer: Where the vector is put: best on dev.
        dev: Mean of the vector on dev, by layer.
        at: Where it is put.
        donors: The test prompts and their vectors.
    """

    scores: Scores
    layer: int
    dev: xr.DataArray
    at: Place
    donors: Donors

    def _blocks(self) -> Iterator[Block]:
        yield f"One vector at {self.at}, put into layer {self.layer} (best on dev), test prompts:"
        yield from self.scores._blocks()

    def __str__(self) -> str:
        """Where it is put, and what it does."""
        return as_text(self._blocks())

    def effect(self, part: str, base: str, over: str | None = None) -> Scores:
        """Subtract a part from another, ``[prompt]``; the total is that of ``over`` minus base."""
        data = self.scores.data
        ours, theirs = (data.sel(part=name, drop=True) for name in (part, base))
        total = None if over is None else data.sel(part=over, drop=True) - theirs
        return replace(self.scores, data=ours - theirs, total=total)

    def select(self, rows: Sequence[int]) -> Scores:
        """Keep the scores of some prompts."""
        data = self.scores.data.isel(prompt=list(rows))
        clusters = tuple(self.scores.clusters[i] for i in rows)
        return replace(self.scores, data=data, clusters=clusters)


def inject_one_vector(
    model: Any,
    task: str | Task,
    *,
    at: Place = "query_is",
    n_demos: int = 8,
    shots: Sequence[int] = (1, 2, 4),
    n_prompts: int = 64,
    seed: int = 0,
    pool: Sequence[str] = (),
    template: str | None = None,
) -> OneVector:
    """Put one vector where demonstrations were, and count demonstrations against it.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        task: A task or the name of a shipped one.
        at: ``"query_is"`` or ``"answer"``; see the module.
        n_demos: Demonstrations that the vector is taken from.
        shots: Numbers of demonstrations to compare with.
        n_prompts: Prompts in each half.
        seed: Decides prompts, halves, queries and random answers.
        pool: Where random answers come from; empty for those of `Prompts.dummies`.
        template: As in `make_prompts`.

    Returns:
        Accuracy; choice for categorization, whose labels a vector cannot name.

    Raises:
        UnknownName: for an unknown task or place.
        TvInterpError: if ``shots`` are not between 1 and ``n_demos``.
        PromptError: if the prompts cannot be built.
        ModelError: if the model cannot be measured exactly.
    """
    if at not in PLACES:
        raise unknown("place", at, PLACES)
    for k in shots:
        if not 1 <= k <= n_demos:
            raise TvInterpError(
                f"expected shots between 1 and n_demos ({n_demos}), got {k}: the last k of each "
                "prompt's demonstrations are kept"
            )
    task, adapter = get_task(task), Adapter.of(model)
    halves = split_prompts(
        model, task, n_demos=n_demos, n_prompts=n_prompts, seed=seed, template=template
    )
    dev, test = (
        take_vectors(model, half, at=at, seed=seed + 10 * i, pool=pool)
        for i, half in enumerate(halves)
    )
    metric = metric_of(task)
    swept = inject_vectors(model, dev.recipients, dev.vector, at=at, metric=metric).mean()
    layer = int(swept.argmax("layer"))

    def injected(vector: Vectors) -> np.ndarray:
        found = inject_vectors(model, test.recipients, vector, at=at, layers=layer, metric=metric)
        return found.data.values[:, 0]

    parts = {
        "nothing": plain_values(adapter, test.recipients, metric),
        "one vector": injected(test.vector),
        "random answers": injected(test.control),
    }
    for k in sorted({*shots, n_demos}):
        kept = test.clean.keep_demos(range(n_demos - k, n_demos))
        parts[demonstrations(k)] = plain_values(adapter, kept, metric)
    attrs = provenance(adapter) | test.clean.provenance
    attrs |= {"metric": metric, "at": at, "layer": layer, "n_dev": len(dev.clean)}
    scores = label_scores(
        np.stack(list(parts.values()), 1), ("part",), {"part": list(parts)},
        unit=get_metric(metric).unit, total=None, prompts=test.clean, attrs=attrs,
    )  # fmt: skip
    return OneVector(scores, layer, swept, at, test)


def take_vectors(
    model: Any, prompts: Prompts, *, at: Place, seed: int, pool: Sequence[str] = ()
) -> Donors:
    """Take one vector a prompt, and one from its twin with random answers; see the module."""
    contrast = prompts.dummies(seed=seed + 1, pool=pool)
    clean = contrast.clean
    dummy = contrast.corrupted.with_samples(
        [
            RuledSample(twin.demos, own.query, own.answer, own.foil, rule=own.rule, rule_name="")  # type: ignore[attr-defined]
            for twin, own in zip(contrast.corrupted.samples, clean.samples, strict=True)
        ]
    )
    last = [dummy.n_demos - 1]
    recipients = dummy.keep_demos(last) if at == "answer" else clean.zero_shot()
    ours, theirs = (take_vector(model, p, at=at, seed=seed + 2) for p in (clean, dummy))
    return Donors(clean, recipients, ours, theirs)


def take_vector(model: Any, prompts: Prompts, *, at: Place, seed: int) -> Vectors:
    """Take one vector a prompt: Pos Avg of its answers, or that at the end of another query."""
    if at == "answer":
        return extract_vectors(model, prompts).pos_avg()
    return extract_vectors(model, prompts.other_query(seed=seed), at="query_is")


def demonstrations(k: int) -> str:
    """Name the part with k demonstrations."""
    return f"{k} demonstration" + "s" * (k != 1)


def metric_of(task: Task) -> str:
    """Choose what counts as right: a zero-shot prompt cannot know a categorization's labels."""
    return "choice" if task.family == "categorization" else "accuracy"


def plain_values(adapter: Adapter, prompts: Prompts, metric: str) -> Float[np.ndarray, " prompt"]:
    """Measure prompts as they are."""
    readout = get_metric(metric).readout(Targets.of(prompts))
    return readout(last_logits(adapter, prompts), torch.arange(len(prompts))).double().numpy()


def difference(ours: Scores, theirs: Scores) -> Scores:
    """Subtract the mean of some prompts from that of others, as scores over both.

    Each prompt holds the difference plus its own deviation from its mean, so that mean and interval
    are those of two independent means; prompts with one query stay one cluster.

    Args:
        ours: Over ``prompt`` alone.
        theirs: Over ``prompt`` alone.
    """
    n, m = len(ours.clusters), len(theirs.clusters)
    a, b = ours.data.values.astype(float), theirs.data.values.astype(float)
    change = [(a - a.mean()) / n, -(b - b.mean()) / m]
    values = a.mean() - b.mean() + (n + m) * np.concatenate(change)
    data = xr.DataArray(values, dims=("prompt",), coords={"prompt": np.arange(n + m)})
    return Scores(data, ours.unit, None, ours.clusters + theirs.clusters, ours.attrs)


# ------------------------------------------------------------------------------------- bijections


def compare_bijection(
    model: Any, task: str, other: str, *, seed: int = 0, **settings: Any
) -> dict[str, OneVector]:
    """Ask one vector of a bijection, of its directions, and of what else is as large or as mixed.

    Half of the relation's pairs, drawn by the seed, make the first four kinds.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        task: Name of a one-to-one relation.
        other: Name of a relation without a common word.
        seed: Decides the half; see `inject_one_vector` for the rest.
        settings: ``at``, ``n_demos``, ``shots``, ``n_prompts`` and ``template``.

    Returns:
        By kind: ``x to y`` and ``y to x``; ``both ways`` mixed in a prompt; ``union`` with as many
        pairs of the other relation (as mixed and as large, without a conflict); and ``one way, all
        pairs`` (as large, not mixed).

    Raises:
        TvInterpError: if the relation is not one to one, or one of them is no relation of pairs.
        PromptError: if they share a word, or have too few pairs.
    """
    first, second = _pairs_of(task), _pairs_of(other)
    if len(set(first.values())) < len(first) or set(first) & set(first.values()):
        raise TvInterpError(
            f"expected a relation that is one to one, {task!r} is not: its inverse has no one "
            "answer; see list_tasks('bijection')"
        )
    rng = np.random.default_rng([seed, 7])
    half = len(first) // 2
    ours = dict(_some(first, half, rng))
    kinds: dict[str, Task] = {
        "x to y": PairTask(task, ours),
        "y to x": PairTask(f"{task}, inverse", {y: x for x, y in ours.items()}),
        "both ways": Bijection(f"{task}, both ways", ours),
        "union": Union(f"{task} + {other}", ours, dict(_some(second, half, rng))),
        "one way, all pairs": PairTask(f"{task}, all pairs", first),
    }
    pool = answers_without(_words(first, second))
    return {
        kind: inject_one_vector(model, each, seed=seed, pool=pool, **settings)
        for kind, each in kinds.items()
    }


def inject_into_union(model: Any, task: str, other: str, **settings: Any) -> OneVector:
    """Ask one vector of a union of two relations, where one demonstration may tell nothing.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        task: Name of a relation.
        other: Name of another without a common word.
        settings: As in `inject_one_vector`, without ``pool``.

    Raises:
        TvInterpError: if one of them is no relation of pairs.
        PromptError: if they share a word, or have too few pairs.
    """
    first, second = _pairs_of(task), _pairs_of(other)
    union = Union(f"{task} + {other}", first, second)
    return inject_one_vector(model, union, pool=answers_without(_words(first, second)), **settings)


def _words(*relations: dict[str, str]) -> list[str]:
    return [word for pairs in relations for pair in pairs.items() for word in pair]


def _pairs_of(name: str) -> dict[str, str]:
    task = get_task(name)
    if not isinstance(task, PairTask):
        raise TvInterpError(
            f"expected a relation of pairs, got {name!r}: use a shipped relation or Task.from_pairs"
        )
    return task.pairs


def _some(pairs: dict[str, str], most: int, rng: np.random.Generator) -> Iterable[tuple[str, str]]:
    items = list(pairs.items())
    return [items[i] for i in rng.permutation(len(items))[:most]]


# ---------------------------------------------------------------------------------- implied maps


def effective_rank(maps: Float[Tensor, "prompt out d"]) -> Float[Tensor, " prompt"]:
    """Compute the exponential of the entropy of the singular values' shares; 0 for a map of 0."""
    values = torch.linalg.svdvals(maps)
    total = values.sum(-1, keepdim=True)
    shares = values / total.clamp_min(torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum(-1).exp() * (total[..., 0] > 0)


def implied_maps(model: Any, one: OneVector) -> dict[str, Float[Tensor, "prompt answer d_model"]]:
    """Differentiate the answers' logits by the embedding of the query's last token.

    Logits of all answers that occur in the prompts, less their mean, which no choice depends on.

    Args:
        model: The model of `inject_one_vector`.
        one: What it measured: layer, recipients and vectors.

    Returns:
        By part: ``in context``, ``one vector``, ``random answers`` and ``nothing``.
    """
    adapter, donors = Adapter.of(model), one.donors
    outputs = donors.clean.answer.unique()

    def maps(prompts: Prompts, vector: Vectors | None) -> Tensor:
        places, parts, order = prompts.positions("query_x"), [], []
        into = prompts.positions(one.at).reshape(len(prompts), -1)[:, 0]
        for rows, tokens in batches(adapter, prompts, check_memory(None)):
            edits: dict[HookName, Edit] = {}
            if vector is not None:
                value = torch.from_numpy(vector.data.values[rows.numpy(), one.layer])
                edits["resid_post", one.layer] = _put(value, into[rows])
            found = adapter.jacobian(tokens, places[rows], outputs, edits).double().cpu()
            parts.append(found - found.mean(1, keepdim=True))
            order.append(rows)
        return torch.cat(parts)[torch.cat(order).argsort()]

    return {
        "in context": maps(donors.clean, None),
        "one vector": maps(donors.recipients, donors.vector),
        "random answers": maps(donors.recipients, donors.control),
        "nothing": maps(donors.recipients, None),
    }


def _put(value: Float[Tensor, "row d_model"], where: Tensor) -> Edit:
    def edit(x: Tensor) -> Tensor:
        out = x.clone()
        out[torch.arange(len(x)), where] = value.to(x)
        return out

    return edit


def implied_ranks(model: Any, one: OneVector) -> Scores:
    """Measure the effective rank of the map from the query's embedding to the answers' logits.

    A transformer has such a map without any vector, through the query alone. So the ranks of what
    is *added* to that map are measured too.

    Args:
        model: The model of `inject_one_vector`.
        one: What it measured.

    Returns:
        Effective ranks over ``(prompt, part)``, parts as in `implied_maps`, and ``added in
        context``, ``added by one vector`` and ``added by random answers``: of the maps less that of
        ``nothing``. ``attrs`` has the mean ``singular_values`` over the first, by part.

    Raises:
        ModelError: if the model has no such hook points.
    """
    maps = implied_maps(model, one)
    nothing = maps["nothing"]
    maps |= {
        "added in context": maps["in context"] - nothing,
        "added by one vector": maps["one vector"] - nothing,
        "added by random answers": maps["random answers"] - nothing,
    }
    values = {name: torch.linalg.svdvals(found) for name, found in maps.items()}
    shares = {name: (v / v[:, :1].clamp_min(1e-30)).mean(0).tolist() for name, v in values.items()}
    return label_scores(
        np.stack([effective_rank(found).numpy() for found in maps.values()], 1), ("part",),
        {"part": list(maps)}, unit="effective rank", total=None, prompts=one.donors.clean,
        attrs={**one.scores.attrs, "metric": "effective rank", "singular_values": shares},
    )  # fmt: skip
