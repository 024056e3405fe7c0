"""Several task vectors, and what one is made of. After arXiv 2506.09048.

* `inject_many_vectors`: TaskV, TaskV-M and TaskV-MS in few-shot prompts.
* `combine_demonstrations`: is the global vector a fixed linear combination of the local ones?
* `leave_one_out`: how far does the global vector move when a demonstration is missing?

The paper takes vectors at the arrow, here ``is`` and ``query_is``, and reports the best layer on
the prompts that choose it. Here the layer is chosen on dev and reported on test; ``attrs["best"]``
has what the paper reports.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from ..display import Block, Shown, as_text
from ..errors import ModelError, PromptError, TvInterpError, unknown
from ..interventions.engine import run_variants
from ..interventions.recording import last_logits
from ..interventions.sites import Patch, Site
from ..models.adapter import Adapter
from ..prompts import Prompts, Task, check_prompts, get_task
from ..scores import Scores, get_metric
from ..scores.metrics import Targets
from .common import label_scores, provenance
from .comparison import other_inputs
from .find import split_prompts
from .one_vector import PLACES, Place, metric_of, plain_values, take_vector, take_vectors
from .vectors import Vectors, extract_vectors, inject_vectors, residual_at

MANY = ("TaskV", "TaskV-M", "TaskV-MS", "random answers")
"""``TaskV``: a vector in the last place alone; ``TaskV-M``: one of another prompt in each place;
``TaskV-MS``: all of them from one prompt; ``random answers``: the vector of a prompt with random
answers in every place."""


def inject_many_vectors(
    model: Any,
    task: str | Task,
    *,
    at: Place = "query_is",
    shots: int = 2,
    n_demos: int = 8,
    n_prompts: int = 64,
    seed: int = 0,
    template: str | None = None,
) -> Scores:
    """Put vectors into every place of a few-shot prompt, beside one in the last place alone.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        task: A task or the name of a shipped one.
        at: ``"query_is"``: the places are every ``is`` and ``query_is``, as in the paper;
            ``"answer"``: every answer, where a vector is a prompt's Pos Avg.
        shots: Demonstrations of the recipients.
        n_demos: Demonstrations of each donor.
        n_prompts: Prompts in each half, dev and test.
        seed: Decides prompts, halves, and the demonstrations of the donors.
        template: As in `make_prompts`.

    Returns:
        The metric of test prompts over ``(prompt, part)``: ``baseline`` (the recipients as they
        are) and `MANY`, each at its best layer on dev. ``attrs``: ``layers``, and ``best`` (the
        dev value at that layer, which is biased upwards), by part.

    Raises:
        UnknownName: for an unknown task or place.
        TvInterpError: if ``shots`` are not between 1 and ``n_demos``.
        PromptError: if the prompts cannot be built, or the task has too few other inputs.
        ModelError: if the model cannot be measured exactly.
    """
    if at not in PLACES:
        raise unknown("place", at, PLACES)
    if not 1 <= shots <= n_demos:
        raise TvInterpError(
            f"expected shots between 1 and n_demos ({n_demos}), got {shots}: TaskV-MS takes one "
            "vector for each of them from a prompt of n_demos"
        )
    task, adapter = get_task(task), Adapter.of(model)
    metric = metric_of(task)
    halves = split_prompts(
        model, task, n_demos=n_demos, n_prompts=n_prompts, seed=seed, template=template
    )
    swept = [
        _sweep_many(model, half, at, shots, metric, seed + 10 * i) for i, half in enumerate(halves)
    ]
    (_, dev), (few, test) = swept
    layers, best = dev.mean(0).argmax(0), dev.mean(0).max(0)
    found = np.stack([test[:, layer, i] for i, layer in enumerate(layers)], 1)
    baseline = plain_values(adapter, few, metric)[:, None]
    attrs = provenance(adapter) | few.provenance
    attrs |= {
        "metric": metric, "at": at, "n_donor_demos": n_demos,
        "layers": dict(zip(MANY, layers.tolist(), strict=True)),
        "best": dict(zip(MANY, best.tolist(), strict=True)),
    }  # fmt: skip
    return label_scores(
        np.concatenate([baseline, found], 1), ("part",), {"part": ["baseline", *MANY]},
        unit=get_metric(metric).unit, total=None, prompts=few, attrs=attrs,
    )  # fmt: skip


def _sweep_many(
    model: Any, half: Prompts, at: Place, shots: int, metric: str, seed: int
) -> tuple[Prompts, Float[np.ndarray, "prompt layer part"]]:
    """Make the recipients of one half, and put vectors in at one layer after the other."""
    donors = take_vectors(model, half, at=at, seed=seed)
    n_others = shots if at == "query_is" else shots - 1
    redrawn = [other_inputs(donors.clean, seed + 31 * (j + 1)) for j in range(n_others)]
    kept = sorted(set(range(len(donors.clean))).intersection(*(rows for rows, _ in redrawn)))
    if not kept:
        raise PromptError(f"no prompt of {half.task.name!r} has enough other inputs for its donors")
    others = [
        take_vector(model, prompts.select([rows.index(i) for i in kept]), at=at, seed=seed)
        for rows, prompts in redrawn
    ]
    donors = donors.select(kept)
    one, control = _tensor(donors.vector), _tensor(donors.control)
    many = torch.stack([*map(_tensor, others), one], 2)  # [prompt, layer, place, d_model]
    role = "is" if at == "query_is" else "answer"
    own = _tensor(extract_vectors(model, donors.clean, at=role))[:, :, -shots:]
    if at == "query_is":
        own = torch.cat([own, one[:, :, None]], 2)
    values = {
        "TaskV": one[:, :, None],
        "TaskV-M": many,
        "TaskV-MS": own,
        "random answers": control[:, :, None].expand_as(many),
    }
    n = donors.clean.n_demos
    few = donors.clean.keep_demos(range(n - shots, n))
    places = few.positions(role)
    if at == "query_is":
        places = torch.cat([places, few.positions("query_is")[:, None]], 1)
    adapter = Adapter.of(model)
    readout = get_metric(metric).readout(Targets.of(few))
    variants = [
        (
            Patch(
                Site(layer, None, "resid_post", role),
                values[name][:, layer],
                positions=places[:, -values[name].shape[2] :],
            ),
        )
        for layer in adapter.layers
        for name in MANY
    ]
    found = run_variants(model, few, variants, readout).T.double().numpy()
    return few, found.reshape(len(few), adapter.n_layers, len(MANY))


def _tensor(vectors: Vectors) -> Tensor:
    return torch.from_numpy(vectors.data.values)


# ----------------------------------------------------------------- a combination of demonstrations


@dataclass(frozen=True, eq=False, repr=False)
class Combination(Shown):
    """What `combine_demonstrations` found.

    Attributes:
        weights: Of each demonstration's local vector in the global one, ``(layer, demo)``.
        explained: Share of the global vectors' variance on test prompts, ``(prompt, layer, part)``:
            the mean over prompts is R², negative where the mean vector of dev does better. Parts:
            ``own`` demonstrations, those of another prompt of the ``same task``, or of ``another
            task``.
        injected: Accuracy of zero-shot prompts, ``(prompt, part)``: ``nothing``, the ``vector``
            itself, the ``mean`` of all vectors, and the three reconstructions.
        layer: Where they are put: best for the vectors themselves on dev.
    """

    weights: xr.DataArray
    explained: Scores
    injected: Scores
    layer: int

    def _blocks(self) -> Iterator[Block]:
        yield f"Put into layer {self.layer}, best for the vectors themselves on dev:"
        yield from self.injected._blocks()

    def __str__(self) -> str:
        """What the reconstructions do where they are put."""
        return as_text(self._blocks())


def combine_demonstrations(
    model: Any,
    tasks: Sequence[str | Task],
    *,
    n_demos: int = 8,
    n_prompts: int = 32,
    seed: int = 0,
    template: str | None = None,
) -> Combination:
    """Rebuild global vectors as one fixed linear combination of their demonstrations' vectors.

    One weight a demonstration and a mean vector, the same for all prompts of all tasks, fitted on
    dev by least squares. With one task alone the mean does nearly all, so R² would show nothing.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        tasks: At least two, no categorization: its zero-shot prompts cannot name a label.
        n_demos: Demonstrations.
        n_prompts: Prompts of each task in each half.
        seed: Decides prompts, halves and queries.
        template: As in `make_prompts`.

    Raises:
        UnknownName: for an unknown task.
        TvInterpError: for fewer than two tasks.
        PromptError: if the prompts cannot be built.
        ModelError: if the model cannot be measured exactly.
    """
    if len(tasks) < 2:
        raise TvInterpError(
            f"expected at least two tasks, got {len(tasks)}: within one, the mean vector alone "
            "explains nearly everything"
        )
    settings: dict[str, Any] = {"n_demos": n_demos, "n_prompts": n_prompts, "seed": seed}
    sides = [
        _pair(model, half, seed + 10 * i)
        for each in tasks
        for i, half in enumerate(
            split_prompts(model, get_task(each), template=template, **settings)
        )
    ]
    dev, test = _pool(sides[::2]), _pool(sides[1::2])
    weights, mean, centre = fit_weights(dev.local, dev.vector)
    rebuilt = {
        name: mean + np.einsum("ln,plnd->pld", weights, dev_local - centre)
        for name, dev_local in (
            ("own", test.local),
            ("same task", test.local[test.neighbour]),
            ("another task", test.local[np.roll(np.arange(len(test.local)), test.sizes[0])]),
        )
    }
    whole = ((test.vector - mean) ** 2).sum(-1)
    left = {k: ((test.vector - v) ** 2).sum(-1) for k, v in rebuilt.items()}
    r2 = np.stack([(whole - each) / whole.mean(0) for each in left.values()], -1)
    candidates = {"vector": test.vector, "mean": 0 * test.vector + mean, **rebuilt}
    on_dev = np.concatenate([side.accuracy(model, side.vector) for side in sides[::2]])
    layer = int(on_dev.mean(0).argmax())
    parts = {"nothing": np.concatenate([side.accuracy(model, None)[:, 0] for side in sides[1::2]])}
    for name, vectors in candidates.items():
        cut = np.split(vectors, np.cumsum(test.sizes)[:-1])
        parts[name] = np.concatenate(
            [s.accuracy(model, v, layer)[:, 0] for s, v in zip(sides[1::2], cut, strict=True)]
        )
    adapter = Adapter.of(model)
    clusters = tuple(f"{s.prompts.task.name}: {q}" for s in sides[1::2] for q in s.prompts.query)
    attrs = provenance(adapter) | settings
    attrs |= {"tasks": [s.prompts.task.name for s in sides[::2]], "layer": layer}
    layers, rows = np.arange(adapter.n_layers), np.arange(len(clusters))
    coords = {"prompt": rows, "layer": layers, "part": list(rebuilt)}
    explained = xr.DataArray(r2, dims=("prompt", "layer", "part"), coords=coords)
    injected = xr.DataArray(
        np.stack(list(parts.values()), 1), dims=("prompt", "part"),
        coords={"prompt": rows, "part": list(parts)},
    )  # fmt: skip
    return Combination(
        xr.DataArray(
            weights, dims=("layer", "demo"), coords={"layer": layers, "demo": range(1, n_demos + 1)}
        ),
        Scores(explained, "share of variance", None, clusters, attrs),
        Scores(injected, "fraction", None, clusters, attrs | {"metric": "accuracy"}),
        layer,
    )


def fit_weights(
    local: Float[np.ndarray, "prompt layer demo d"], vector: Float[np.ndarray, "prompt layer d"]
) -> tuple[
    Float[np.ndarray, "layer demo"],
    Float[np.ndarray, "layer d"],
    Float[np.ndarray, "layer demo d"],
]:
    """Fit vectors as one weight a demonstration, after taking means over prompts away.

    Returns:
        Weights (the smallest, where several fit), the vectors' mean, and the local vectors' means.
    """
    mean, centre = vector.mean(0), local.mean(0)
    ours, theirs = local - centre, vector - mean
    gram = np.einsum("plnd,plmd->lnm", ours, ours)
    inner = np.einsum("plnd,pld->ln", ours, theirs)
    weights = np.einsum("lnm,lm->ln", np.linalg.pinv(gram, rcond=1e-10, hermitian=True), inner)
    return weights, mean, centre


@dataclass(frozen=True, eq=False)
class _Pair:
    """Prompts of one task, their local vectors, and the global ones from behind another query."""

    prompts: Prompts
    local: Float[np.ndarray, "prompt layer demo d"]
    like: Vectors

    @property
    def vector(self) -> Float[np.ndarray, "prompt layer d"]:
        return self.like.data.values.astype(float)

    def accuracy(
        self, model: Any, vector: np.ndarray | None, layer: int | None = None
    ) -> Float[np.ndarray, "prompt layer"]:
        """Put vectors into the zero-shot prompts, or nothing."""
        zero = self.prompts.zero_shot()
        if vector is None:
            return plain_values(Adapter.of(model), zero, "accuracy")[:, None]
        data = self.like.data.copy(data=vector.astype(self.like.data.dtype))
        where = "all" if layer is None else layer
        return inject_vectors(model, zero, replace(self.like, data=data), layers=where).data.values


@dataclass(frozen=True, eq=False)
class _Pool:
    """Vectors of all tasks, one task below the other."""

    local: Float[np.ndarray, "prompt layer demo d"]
    vector: Float[np.ndarray, "prompt layer d"]
    sizes: list[int]

    @property
    def neighbour(self) -> Int[np.ndarray, " prompt"]:
        """The next prompt of the same task."""
        starts = np.cumsum([0, *self.sizes[:-1]])
        return np.concatenate(
            [s + np.roll(np.arange(n), -1) for s, n in zip(starts, self.sizes, strict=True)]
        )


def _pair(model: Any, prompts: Prompts, seed: int) -> _Pair:
    local = extract_vectors(model, prompts).data.values.astype(float)
    asked = prompts.other_query(seed=seed + 2)
    return _Pair(prompts, local, extract_vectors(model, asked, at="query_is"))


def _pool(sides: Sequence[_Pair]) -> _Pool:
    sizes = [len(side.prompts) for side in sides]
    return _Pool(
        np.concatenate([s.local for s in sides]), np.concatenate([s.vector for s in sides]), sizes
    )


# ------------------------------------------------------------------------------ leaving one out


def leave_one_out(model: Any, prompts: Prompts) -> Scores:
    """Measure how far the global vector moves when one demonstration is taken away.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        prompts: Few-shot prompts with two demonstrations or more.

    Returns:
        The distance over that when all are taken away, ``(prompt, layer, demo)``: 0 where the
        vector does not depend on that demonstration, 1 where it goes as far as without any.

    Raises:
        PromptError: for fewer than two demonstrations.
        ModelError: if the model cannot be measured exactly, or a vector does not depend on the
            demonstrations at all.
    """
    check_prompts(prompts)
    n = prompts.n_demos
    if n < 2:
        raise PromptError(f"expected two demonstrations or more, got {n}")
    adapter = Adapter.of(model)
    last_logits(adapter, prompts)  # refuses what the model cannot read

    def vectors(kept: Prompts) -> Tensor:
        return residual_at(adapter, kept, "query_is", "resid_post")[0].double()

    whole = vectors(prompts)
    none = (vectors(prompts.zero_shot()) - whole).norm(dim=-1)
    if not (none > 0).all():
        raise ModelError(
            f"the vector of {adapter.name} does not depend on the demonstrations in some layer: "
            "there is nothing to leave out"
        )
    moved = [
        (vectors(prompts.keep_demos([i for i in range(n) if i != j])) - whole).norm(dim=-1) / none
        for j in range(n)
    ]
    return label_scores(
        torch.stack(moved, -1).numpy(), ("layer", "demo"),
        {"layer": np.arange(adapter.n_layers), "demo": np.arange(n)},
        unit="share of the change without demonstrations", total=None, prompts=prompts,
        attrs=provenance(adapter) | prompts.provenance | {"at": "query_is"},
    )  # fmt: skip
