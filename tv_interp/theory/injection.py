"""What injected vectors can carry: error against rank and number of vectors, and bijections.

A task vector is the last arrow's column after the first layer, scaled to length 1. It is put on the
arrow of a prompt without demonstrations, and the model continues from the second layer. What the
model then does to the query is read off as a matrix, the *implied map* W' (minus the Jacobian of
the prediction by the query, since models predict minus W x).

Inputs decide what "one vector" can show. With x in the row space of W (``"support"``) the error is
one of rank: 1 - 1/r at least. With isotropic x it is about the same for every rank, and only the
direction of the output shows the rank: both are offered, and named in the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from ..errors import TvInterpError, unknown
from ..scores import Scores
from .closed_forms import check_rank
from .linear import (
    LAST,
    Layer,
    LinearTransformer,
    apply_layer,
    make_columns,
    orthonormalise,
    predict,
)

Inputs = Literal["support", "isotropic"]
Source = Literal["prompts", "arrows"]
Measure = Literal["map", "readout", "columns"]
Bijection = Literal["x to y", "y to x", "both ways", "copy", "negate"]
BIJECTIONS: tuple[Bijection, ...] = ("x to y", "y to x", "both ways", "copy", "negate")
_MEASURES = {
    "map": "1 - cos^2 of the implied map and W: relative squared error at the best scale",
    "readout": "relative squared error of the least-squares map through the vectors",
    "columns": "part of W outside the span of the vectors' y",
}


def task_vectors(
    model: LinearTransformer, x: Float[Tensor, "prompt d demo"], y: Float[Tensor, "prompt d demo"]
) -> Float[Tensor, "prompt rows arrow"]:
    """Read all arrows after the first layer, each scaled to length 1; the query is empty.

    Raises:
        TvInterpError: if the model's prompts have no arrows, or there is no second layer.
    """
    if model.layout.kind != "triplet" or len(model.layers) < 2:
        raise TvInterpError(
            f"expected two or more layers on triplets, got {len(model.layers)} on "
            f"{model.layout.kind!r}: only arrows hold task vectors"
        )
    columns = make_columns(model.layout, x, y, torch.zeros_like(x[..., 0]))
    arrows = apply_layer(columns, model.layers[0], model.layout.n, model.layout.arrow)
    return arrows / arrows.norm(dim=1, keepdim=True)


def inject(
    model: LinearTransformer,
    vectors: Float[Tensor, "prompt rows vector"],
    query: Float[Tensor, "prompt d"],
) -> Float[Tensor, "prompt d"]:
    """Predict from vectors alone: [vector ..., x?, vector, end], continued from the second layer.

    Args:
        model: Of triplets.
        vectors: The last stands on the query's arrow, the others on the arrows before it; D is
            that of these tokens.
        query: The query's x.

    Raises:
        TvInterpError: for more vectors than arrows.
    """
    layout, k = model.layout, vectors.shape[-1]
    if not 1 <= k <= layout.n + 1:
        raise TvInterpError(
            f"expected 1 to {layout.n + 1} vectors, as many as the layout has arrows, got {k}"
        )
    tokens = torch.cat(
        [layout.arrow[-k:-1], torch.tensor([layout.query, layout.query + 1, layout.end])]
    )
    first, *between, last = (
        Layer(layer.v, layer.q, None if layer.d is None else layer.d[tokens[:, None], tokens])
        for layer in model.layers
    )
    upper = torch.cat([query, torch.zeros_like(query)], 1)[..., None]
    empty = torch.zeros_like(upper)
    columns = torch.cat([*[empty] * (k - 1), upper, empty, empty], -1)
    columns = apply_layer(columns, first, layout.n)
    columns = torch.cat(
        [vectors[..., :-1], columns[..., [k - 1]], vectors[..., -1:], columns[..., -1:]], -1
    )
    for layer in between:
        columns = apply_layer(columns, layer, layout.n)
    return apply_layer(columns, last, layout.n, LAST)[:, model.d :, 0]


def implied_map(
    predictor: Callable[[Tensor], Tensor], query: Float[Tensor, "prompt d"]
) -> Float[Tensor, "prompt d d"]:
    """Differentiate minus a prediction by the query: W' where the predictor is linear.

    Args:
        predictor: From queries to predictions, prompt by prompt.
        query: Where to differentiate.

    Returns:
        W' with outputs as rows.
    """
    at = query.detach().clone().requires_grad_(True)
    out = -predictor(at)
    rows = [
        torch.autograd.grad(out[:, i].sum(), at, retain_graph=True)[0] for i in range(out.shape[1])
    ]
    return torch.stack(rows, 1).detach()


def fit_error(
    maps: Float[Tensor, "prompt d d"], w: Float[Tensor, "prompt d d"]
) -> Float[Tensor, " prompt"]:
    """Compute 1 - cos^2 of two maps: the relative squared error left at the best scale."""
    inner = (maps * w).sum((1, 2))
    return 1 - inner.square() / (maps.square().sum((1, 2)) * w.square().sum((1, 2)))


def draw_maps(
    n_tasks: int, d: int, rank: int, generator: torch.Generator
) -> tuple[Float[Tensor, "task d d"], Float[Tensor, "task d rank"]]:
    """Draw W with `rank` singular values of 1, and an orthonormal basis of its row space.

    Raises:
        TvInterpError: for a rank below 1 or above the dimension.
    """
    check_rank(rank, d)
    bases = orthonormalise(
        torch.randn(2, n_tasks, d, rank, generator=generator, dtype=torch.float64)
    )
    return bases[0] @ bases[1].mT, bases[1]


def injected_vectors(
    model: LinearTransformer,
    w: Float[Tensor, "task d d"],
    draw: Callable[[], Float[Tensor, "task d demo"]],
    k: int,
    source: Source,
) -> Float[Tensor, "task rows vector"]:
    """Extract k vectors of each task: last arrows of k prompts, or the last k arrows of one."""
    if source == "arrows":
        x = draw()
        return task_vectors(model, x, w @ x)[..., -k:]
    prompts = [draw() for _ in range(k)]
    return torch.stack([task_vectors(model, x, w @ x)[..., -1] for x in prompts], -1)


def injection_errors(
    model: LinearTransformer,
    rank: int,
    *,
    vectors: Sequence[int] = (1, 2, 4, 8),
    n_tasks: int = 1000,
    inputs: Inputs = "support",
    source: Source = "prompts",
    measure: Measure = "map",
    seed: int = 0,
) -> Scores:
    """Measure how far the map implied by injected vectors is from the task's.

    Args:
        model: Two layers on triplets.
        rank: Of W, whose non-zero singular values are equal.
        vectors: Numbers of vectors.
        n_tasks: Tasks, one prompt each.
        inputs: x in the row space of W, or isotropic.
        source: Last arrows of several prompts (TaskV-M), or several arrows of one (TaskV-MS).
        measure: ``"map"``: 1 - cos^2 of implied map and W. ``"readout"``: relative squared error
            of the best map that takes the vectors' x to their y. ``"columns"``: part of W outside
            the span of the vectors' y.
        seed: Decides tasks and prompts.

    Returns:
        Scores over ``(prompt, part)``, 0 to 1, lower is closer: part ``"in context"`` (only of
        ``"map"``), then ``"1 vector"``, ``"2 vectors"`` and so on.

    Raises:
        TvInterpError: for a rank above the dimension, or more vectors than arrows.
        UnknownName: for an unknown option.
    """
    _check_options(inputs, source, measure)
    d, n = model.d, model.layout.n
    generator = torch.Generator().manual_seed(seed)
    w, basis = draw_maps(n_tasks, d, rank, generator)

    def draw() -> Tensor:
        width = rank if inputs == "support" else d
        x = torch.randn(n_tasks, width, n, generator=generator, dtype=torch.float64)
        return basis @ x if inputs == "support" else x

    parts: dict[str, Tensor] = {}
    query = torch.zeros(n_tasks, d, dtype=torch.float64)
    if measure == "map":
        parts["in context"] = fit_error(in_context_map(model, draw(), w, query), w)
    for k in vectors:
        z = injected_vectors(model, w, draw, k, source)
        parts[f"{k} vector" + "s" * (k > 1)] = _error(model, z, w, query, measure)
    attrs = {
        "task": f"linear map of rank {rank}", "rank": rank, "d": d, "n_demos": n,
        "inputs": inputs, "source": source, "metric": _MEASURES[measure], "seed": seed,
    }  # fmt: skip
    return _scores(parts, "fraction", attrs)


def in_context_map(
    model: LinearTransformer,
    x: Float[Tensor, "prompt d demo"],
    w: Float[Tensor, "prompt d d"],
    query: Float[Tensor, "prompt d"],
) -> Float[Tensor, "prompt d d"]:
    """Compute the map implied by demonstrations in the prompt."""
    return implied_map(lambda q: predict(model, make_columns(model.layout, x, w @ x, q)), query)


def bijection_accuracy(
    model: LinearTransformer,
    task: Bijection,
    *,
    vectors: Sequence[int] = (1, 2, 4, 8),
    n_tasks: int = 2000,
    scorer: Literal["absolute", "signed"] = "absolute",
    seed: int = 0,
) -> Scores:
    """Measure accuracy on maps between two orthonormal codes, in context and from vectors.

    A demonstration is p f -> p g for codes f, g and p ~ N(0, 1); a query is a code. ``"both
    ways"`` is a bijection: half of the demonstrations go f to g and half g to f, and W has rank 2.
    ``"copy"`` and ``"negate"`` are the bijections of rank one that Proposition 4 allows.

    Args:
        model: Two layers on triplets.
        task: Which map.
        vectors: Numbers of injected vectors, each from a prompt of its own.
        n_tasks: Pairs of codes, one prompt and one query each.
        scorer: The prediction is taken for the code with the larger ``"absolute"`` or ``"signed"``
            projection. One vector of a bijection is right half the time by the first; by the
            second three quarters, since a negative overlap hides the wrong code.
        seed: Decides codes, prompts and queries.

    Returns:
        Scores over ``(prompt, part)``, 1 where the answer's code wins; parts as in
        `injection_errors`.

    Raises:
        UnknownName: for an unknown task or scorer.
    """
    if task not in BIJECTIONS:
        raise unknown("bijection", task, BIJECTIONS)
    if scorer not in ("absolute", "signed"):
        raise unknown("scorer", scorer, ("absolute", "signed"))
    d, n = model.d, model.layout.n
    check_rank(2, d)
    generator = torch.Generator().manual_seed(seed)
    codes = orthonormalise(torch.randn(n_tasks, d, 2, generator=generator, dtype=torch.float64))
    f, g = codes[..., 0], codes[..., 1]
    sign = -1.0 if task == "negate" else 1.0
    source, target = {
        "x to y": (f, g), "y to x": (g, f), "both ways": (f, g), "copy": (f, f), "negate": (f, f)
    }[task]  # fmt: skip
    w = sign * target[:, :, None] * source[:, None, :]
    back = task == "both ways"
    if back:
        w = w + w.mT
    turned = back & (torch.rand(n_tasks, generator=generator) < 0.5)
    query = torch.where(turned[:, None], target, source)
    answer = (w @ query[..., None])[..., 0]
    foil = torch.where(turned[:, None], target, source if back else _other(target, f, g))
    foil = sign * foil

    def draw() -> Tensor:
        p = torch.randn(n_tasks, 1, n, generator=generator, dtype=torch.float64)
        if not back:
            return source[..., None] * p
        order = torch.rand(n_tasks, n, generator=generator).argsort(-1)
        first = (order < n // 2)[:, None]
        return torch.where(first, source[..., None], target[..., None]) * p

    def right(prediction: Tensor) -> Tensor:
        ours, theirs = (-(prediction * code).sum(-1) for code in (answer, foil))
        if scorer == "absolute":
            ours, theirs = ours.abs(), theirs.abs()
        return (ours > theirs).double()

    x = draw()
    parts = {"in context": right(predict(model, make_columns(model.layout, x, w @ x, query)))}
    for k in vectors:
        z = injected_vectors(model, w, draw, k, "prompts")
        parts[f"{k} vector" + "s" * (k > 1)] = right(inject(model, z, query))
    attrs = {
        "task": task, "d": d, "n_demos": n, "scorer": scorer, "metric": "accuracy", "seed": seed
    }  # fmt: skip
    return _scores(parts, "accuracy", attrs)


def _error(
    model: LinearTransformer, z: Tensor, w: Tensor, query: Tensor, measure: Measure
) -> Tensor:
    if measure == "map":
        return fit_error(implied_map(lambda q: inject(model, z, q), query), w)
    x, y = z[:, : model.d], z[:, model.d :]
    if measure == "readout":
        return _relative(y @ torch.linalg.pinv(x, rtol=1e-8) - w, w)
    return _relative(y @ (torch.linalg.pinv(y, rtol=1e-8) @ w) - w, w)


def _relative(difference: Tensor, w: Tensor) -> Tensor:
    return difference.square().sum((1, 2)) / w.square().sum((1, 2))


def _scores(parts: dict[str, Tensor], unit: str, attrs: dict) -> Scores:
    values = torch.stack(list(parts.values()), 1).detach().numpy()
    data = xr.DataArray(
        values,
        dims=("prompt", "part"),
        coords={"prompt": np.arange(len(values)), "part": list(parts)},
    )
    clusters = tuple(str(i) for i in range(len(values)))
    return Scores(data, unit, None, clusters, {"model": "linear transformer", **attrs})


def _other(code: Tensor, f: Tensor, g: Tensor) -> Tensor:
    return g if code is f else f


def _check_options(inputs: str, source: str, measure: str) -> None:
    for kind, name, known in (
        ("inputs", inputs, ("support", "isotropic")),
        ("source of vectors", source, ("prompts", "arrows")),
        ("measure", measure, tuple(_MEASURES)),
    ):
        if name not in known:
            raise unknown(kind, name, known)
