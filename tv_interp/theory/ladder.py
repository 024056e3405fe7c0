"""From linear attention to a transformer, one step at a time: does the story survive?

Every rung keeps the two layers, the triplet prompts and the scalar A, B and C of the theory, and
adds one thing to the rung before: a causal mask, softmax, LayerNorm, two heads. The same three
predictions are measured on each:

1. *combination*: the last arrow is a fixed linear combination of the demonstrations. The weights
   are fitted on half of the prompts and judged on the other half, against demonstrations of another
   prompt; within one prompt alone any vector is a combination, which shows nothing.
2. *rank one*: the map implied by one injected vector has rank one, and misses half of a map of
   rank two.
3. *redundancy*: arrows lower the risk only of models trained with dropout.

Without LayerNorm the first two are identities in part. Arrows start empty, so positions alone
decide what they hold, and an injected vector is the only column with a y half. What training has to
bring is that x and y have the *same* weights (``cosine``) and that the error is no more than the
floor (``fit``); under softmax an untrained mean of the demonstrations has both already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..analysis.one_vector import effective_rank
from ..errors import unknown
from .closed_forms import one_step_rate
from .injection import fit_error, implied_map
from .linear import (
    Layout,
    draw_masks,
    make_columns,
    orthonormalise,
    sample_inputs,
    sample_tasks,
)
from .training import Schedule, minimise


@dataclass(frozen=True)
class Rung:
    """A kind of attention.

    Attributes:
        name: What is shown.
        attention: How scores become weights: over n, or by softmax over the sources.
        mask: Whether a token may read later ones.
        norm: Whether attention reads columns as they are, or layer-normalised without gains.
        heads: Heads of a layer.
    """

    name: str
    attention: Literal["linear", "softmax"] = "linear"
    mask: Literal["none", "causal"] = "none"
    norm: Literal["none", "layer"] = "none"
    heads: int = 1


LADDER = (
    Rung("linear"),
    Rung("+ causal", mask="causal"),
    Rung("+ softmax", "softmax", "causal"),
    Rung("+ LayerNorm", "softmax", "causal", "layer"),
    Rung("+ 2 heads", "softmax", "causal", "layer", 2),
)


@dataclass(frozen=True)
class Climber:
    """A trained two-layer model of a rung; see `run`.

    Attributes:
        rung: Its kind of attention.
        layout: Of its prompts: triplets.
        d: Dimension of x.
        a: Writes x, ``[layer head]``.
        b: Writes y.
        c: Scores contents.
        positions: D / n.
    """

    rung: Rung
    layout: Layout
    d: int
    a: Float[Tensor, "layer head"]
    b: Float[Tensor, "layer head"]
    c: Float[Tensor, "layer head"]
    positions: Float[Tensor, "layer head source destination"]


def attend(
    model: Climber,
    columns: Float[Tensor, "prompt rows token"],
    layer: int,
    tokens: Tensor | None = None,
    *,
    only: Literal["all", "last"] = "all",
) -> Float[Tensor, "prompt rows destination"]:
    """Apply one layer.

    Args:
        model: The model.
        columns: Of a prompt, or of some of its tokens.
        layer: Which layer.
        tokens: Positions of the columns, where they are not all.
        only: Whether to compute all columns, or the last alone.
    """
    d, n = model.d, model.layout.n
    tokens = torch.arange(model.layout.width) if tokens is None else tokens
    to = slice(-1, None) if only == "last" else slice(None)
    read = columns
    if model.rung.norm == "layer":
        read = torch.nn.functional.layer_norm(columns.mT, (2 * d,)).mT
    x, y = read[:, None, :d], read[:, None, d:]
    positions = n * model.positions[layer][:, tokens[:, None], tokens[to]]
    scores = model.c[layer][:, None, None] * (x.mT @ x[..., to]) + positions
    allowed = (tokens != model.layout.end)[:, None].expand(-1, scores.shape[-1])
    if model.rung.mask == "causal":
        allowed = allowed & (tokens[:, None] <= tokens[to])
    if model.rung.attention == "softmax":
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-2)
    else:
        weights = scores * allowed / n
    a, b = (each[layer][:, None, None] for each in (model.a, model.b))
    written = torch.cat([((a * x) @ weights).sum(1), ((b * y) @ weights).sum(1)], 1)
    return columns[..., to] + written


def run(
    model: Climber,
    columns: Float[Tensor, "prompt rows token"],
    mask: Float[Tensor, "prompt 1 token"] | None = None,
) -> Float[Tensor, "prompt d"]:
    """Run both layers; the mask drops columns between them.

    Returns:
        The prediction, which approaches minus W x.
    """
    columns = attend(model, columns, 0)
    if mask is not None:
        columns = columns * mask
    return attend(model, columns, 1, only="last")[:, model.d :, 0]


def train_rung(
    rung: Rung,
    n: int,
    d: int,
    schedule: Schedule,
    *,
    keep: float,
    seed: int,
    progress: Callable[[int], object] | None = None,
) -> Climber:
    """Train a rung on sampled linear tasks.

    Args:
        rung: Kind of attention.
        n: Demonstrations.
        d: Dimension of x.
        schedule: How; its penalty falls on D / n.
        keep: Probability that a token stays between the layers; 1 drops nothing.
        seed: Decides initial weights and prompts.
        progress: See `training.minimise`.

    Raises:
        TrainingError: if training diverges.
    """
    layout = Layout("triplet", n)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (2, rung.heads)
    parameters = {
        "a": 1 + 0.1 * draw(*shape),
        "b": torch.stack([torch.ones(rung.heads), one_step_rate(n, d) * torch.ones(rung.heads)])
        + 0.1 * draw(*shape),
        "c": torch.tensor([[0.0], [1.0]]) + 0.1 * draw(*shape),
        "positions": 0.02 * draw(*shape, layout.width, layout.width),
    }
    parameters["positions"][0, :, layout.query, layout.end] += 1
    for tensor in parameters.values():
        tensor.requires_grad_(True)
    model = Climber(rung, layout, d, **parameters)

    def loss() -> Tensor:
        return losses(model, schedule.batch, generator, keep=keep).mean()

    minimise(loss, parameters, schedule, penalised=("positions",), progress=progress)
    return Climber(rung, layout, d, **{k: v.detach() for k, v in parameters.items()})


def losses(
    model: Climber,
    n_prompts: int,
    generator: torch.Generator,
    *,
    keep: float = 1.0,
) -> Float[Tensor, " prompt"]:
    """Draw Gaussian tasks and compute |prediction + W x|^2 / d of each."""
    x, w, query = _draw(model, n_prompts, generator)
    mask = draw_masks(model.layout, n_prompts, keep, generator) if keep < 1 else None
    out = run(model, make_columns(model.layout, x, w @ x, query), mask)
    target = (w @ query[..., None])[..., 0]
    return (out + target).square().sum(-1) / model.d


@dataclass(frozen=True)
class RungResult:
    """What was measured on a rung; risks are risk/d.

    Attributes:
        risk: Without dropout.
        dropped: Under dropout.
        ablated: Under dropout with the arrows emptied before the second layer, at the best scale.
        combination: Held-out share of the last arrow's variance that fixed weights of the
            demonstrations explain (x and y together).
        shuffled: The same with demonstrations of another prompt.
        cosine: Of the weights for x and those for y.
        rank: Mean effective rank of the map implied by one vector.
        rank_in_context: The same for the demonstrations themselves.
        fit: Mean 1 - cos^2 of the map implied by one vector and a W of rank two, x in its support.
        fit_in_context: The same in context.
    """

    risk: float
    dropped: float
    ablated: float
    combination: float
    shuffled: float
    cosine: float
    rank: float
    rank_in_context: float
    fit: float
    fit_in_context: float

    @property
    def gain(self) -> float:
        """Share of the dropped risk that is added when arrows are emptied."""
        return self.ablated / self.dropped - 1


@torch.no_grad()
def measure_rung(model: Climber, *, n_prompts: int, keep: float, seed: int) -> RungResult:
    """Measure the three predictions on a trained rung.

    Args:
        model: The model.
        n_prompts: Prompts of each measurement.
        keep: Probability that a token stays, where dropout is measured.
        seed: Decides prompts and dropped tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    x, w, query = _draw(model, n_prompts, generator)
    columns = make_columns(model.layout, x, w @ x, query)
    target = (w @ query[..., None])[..., 0]
    mask = draw_masks(model.layout, n_prompts, keep, generator)
    emptied = mask.clone()
    emptied[..., model.layout.arrow] = 0
    combination = _combination(model, columns, x, w @ x)
    with torch.enable_grad():
        maps = _maps(model, x, w)
        basis = orthonormalise(x[..., :2])
        support = basis @ torch.randn(n_prompts, 2, x.shape[-1], generator=generator).double()
        w2 = orthonormalise(w[..., :2]) @ basis.mT
        narrow = _maps(model, support, w2)
    restrict = basis @ basis.mT
    fits = [float(fit_error(m @ restrict, w2).mean()) for m in narrow]
    return RungResult(
        risk=_risk(run(model, columns), target),
        dropped=_risk(run(model, columns, mask), target, scaled=True),
        ablated=_risk(run(model, columns, emptied), target, scaled=True),
        **combination,
        rank=float(effective_rank(maps[0]).mean()),
        rank_in_context=float(effective_rank(maps[1]).mean()),
        fit=fits[0],
        fit_in_context=fits[1],
    )


def _draw(
    model: Climber, n_prompts: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    x, query = sample_inputs(n_prompts, model.d, model.layout.n, generator)
    return x, sample_tasks(n_prompts, model.d, generator), query


def _risk(out: Tensor, target: Tensor, *, scaled: bool = False) -> float:
    """Compute risk/d, at the output's best scale if asked."""
    if scaled:
        out = out * (-(out * target).sum() / out.square().sum())
    return float((out + target).square().sum(-1).mean() / out.shape[1])


def _combination(model: Climber, columns: Tensor, x: Tensor, y: Tensor) -> dict[str, float]:
    """Fit the last arrow's halves by fixed weights on half of the prompts; judge on the others."""
    arrow = attend(model, columns, 0)[..., model.layout.arrow[-1]]
    half, d = len(x) // 2, model.d
    weights, left, whole, wrong = [], 0.0, 0.0, 0.0
    for demos, vector in ((x, arrow[:, :d]), (y, arrow[:, d:])):
        features, values = demos[:half].reshape(-1, demos.shape[-1]), vector[:half].reshape(-1, 1)
        beta = torch.linalg.lstsq(features, values).solution[:, 0]
        weights.append(beta)
        test = vector[half:]
        left += float((demos[half:] @ beta - test).square().sum())
        wrong += float((demos[half:].roll(1, 0) @ beta - test).square().sum())
        whole += float((test - test.mean(0)).square().sum())
    return {
        "combination": 1 - left / whole,
        "shuffled": 1 - wrong / whole,
        "cosine": float(torch.cosine_similarity(*weights, dim=0)),
    }


def _maps(model: Climber, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Differentiate the prediction from one vector, and that from the prompt it came from.

    At query 0: elsewhere softmax weighs the query's score with itself, which turns the derivative
    towards that query and says nothing about the vector.
    """
    layout = model.layout
    query = torch.zeros(len(x), model.d, dtype=x.dtype)
    columns = make_columns(layout, x, w @ x, query)
    vector = attend(model, columns, 0)[..., layout.arrow[-1]].detach()
    tokens = torch.tensor([layout.query, layout.query + 1, layout.end])

    def from_vector(q: Tensor) -> Tensor:
        upper = torch.cat([q, torch.zeros_like(q)], 1)
        empty = torch.zeros_like(upper)
        short = attend(model, torch.stack([upper, empty, empty], -1), 0, tokens)
        short = torch.stack([short[..., 0], vector, short[..., 2]], -1)
        return attend(model, short, 1, tokens, only="last")[:, model.d :, 0]

    def from_prompt(q: Tensor) -> Tensor:
        return run(model, make_columns(layout, x, w @ x, q))

    return implied_map(from_vector, query), implied_map(from_prompt, query)


def find_rung(name: str) -> Rung:
    """Look a rung up by name.

    Raises:
        UnknownName: if there is none.
    """
    known = {rung.name: rung for rung in LADDER}
    if name not in known:
        raise unknown("rung", name, known)
    return known[name]
