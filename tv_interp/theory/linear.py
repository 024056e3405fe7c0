"""The linear-attention transformer of arXiv 2506.09048 (equations 1 to 12).

1. A prompt is a matrix of columns, one a token: the upper half of a column holds x, the lower y.
2. A layer adds (1/n) V Z M (Z^T Q Z + D) to the columns Z. M keeps the last token from being read;
   Q scores contents, D scores positions, V writes. No softmax, no causal mask.
3. The prediction is the lower half of the last column. It approaches *minus* W x: the risk is
   E |prediction + W x|^2, and this package reports it divided by d.

Where V and Q treat all coordinates of y alike, the prediction is W f(X), so W can be taken as the
identity: risk/d = E |f(X) + x|^2, with the same expectation and less noise (``tasks="identity"``).
Where they only leave the prediction linear in Y, W can be sqrt(d) times a random rotation, which
has the second moments of a Gaussian W (``tasks="orthogonal"``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import TvInterpError, unknown

Format = Literal["single", "pair", "triplet", "inseparable"]
Tasks = Literal["identity", "gaussian", "orthogonal"]
Where = Literal["pre", "post"]
FORMATS: tuple[Format, ...] = ("single", "pair", "triplet", "inseparable")
ALL, LAST = slice(None), slice(-1, None)
_STRIDE = {"single": 1, "pair": 2, "triplet": 3, "inseparable": 2}


@dataclass(frozen=True)
class Layout:
    """Which token stands where in a prompt.

    A demonstration is one token (x over y), two (x, y) or three (x, arrow, y); the query is laid
    out in the same way and its last token is empty: the end token, where the prediction appears.

    Attributes:
        kind: Format. In ``"inseparable"`` prompts x stands in the lower half, like y.
        n: Demonstrations.
    """

    kind: Format
    n: int

    def __post_init__(self) -> None:
        """Refuse unknown formats and prompts without demonstrations."""
        if self.kind not in FORMATS:
            raise unknown("prompt format", self.kind, FORMATS)
        if self.n < 1:
            raise TvInterpError(f"expected n of 1 demonstration or more, got {self.n}")

    @property
    def stride(self) -> int:
        """Tokens of a demonstration."""
        return _STRIDE[self.kind]

    @property
    def width(self) -> int:
        """Tokens of the prompt."""
        return self.stride * (self.n + 1)

    @property
    def x(self) -> Int[Tensor, " demo"]:
        """Positions of the demonstrations' x."""
        return torch.arange(self.n) * self.stride

    @property
    def y(self) -> Int[Tensor, " demo"]:
        """Positions of the demonstrations' y."""
        return self.x + self.stride - 1

    @property
    def arrow(self) -> Int[Tensor, " arrow"]:
        """Positions of the arrows, the query's last; empty where the format has none."""
        if self.kind != "triplet":
            return torch.arange(0)
        return torch.arange(self.n + 1) * 3 + 1

    @property
    def query(self) -> int:
        """Position of the query's x."""
        return self.stride * self.n

    @property
    def end(self) -> int:
        """Position of the end token; in a single prompt the query itself."""
        return self.width - 1

    @property
    def slots(self) -> Int[Tensor, " slot"]:
        """Positions of all tokens that a first layer may fill with mixtures of demonstrations.

        All but the query's x and the end token; these are also the tokens that dropout may take.
        """
        keep = torch.ones(self.width, dtype=torch.bool)
        keep[self.query] = keep[self.end] = False
        return keep.nonzero().squeeze(-1)

    @property
    def names(self) -> tuple[str, ...]:
        """Name every token, demonstrations from 1."""
        parts = {"single": ("xy",), "triplet": ("x", "→", "y")}.get(self.kind, ("x", "y"))
        last = {"single": ("x?",), "triplet": ("x?", "→?", "end")}.get(self.kind, ("x?", "end"))
        return (*(f"{part}{i + 1}" for i in range(self.n) for part in parts), *last)


@dataclass(frozen=True)
class Layer:
    """Weights of a layer; None stands for zero and costs nothing.

    Attributes:
        v: Writes, ``[2d 2d]``: diag(A, B).
        q: Scores of contents, ``[2d 2d]``: diag(C, 0).
        d: Scores of positions, ``[source destination]``.
    """

    v: Float[Tensor, "rows rows"]
    q: Float[Tensor, "rows rows"] | None = None
    d: Float[Tensor, "source destination"] | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Layer:
        """Make a layer of what a function makes of v, then q, then d."""
        v, q, d = (None if t is None else function(t) for t in (self.v, self.q, self.d))
        assert v is not None
        return Layer(v, q, d)


@dataclass(frozen=True)
class LinearTransformer:
    """Layers over prompts of one layout."""

    layout: Layout
    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        """Refuse a model without layers."""
        if not self.layers:
            raise TvInterpError("expected L of 1 layer or more, got 0")

    @property
    def d(self) -> int:
        """Dimension of x and y."""
        return self.layers[0].v.shape[0] // 2

    def map(self, function: Callable[[Tensor], Tensor]) -> LinearTransformer:
        """Make a model of what a function makes of each layer's weights, in order."""
        return replace(self, layers=tuple(layer.map(function) for layer in self.layers))


@dataclass(frozen=True)
class Dropout:
    """Tokens dropped independently; the query's x and the end token always stay.

    Attributes:
        keep: Probability that a token stays, in (0, 1]: p of Proposition 5.
        where: ``"post"`` drops columns of each layer's output, as the proposition is printed;
            ``"pre"`` drops columns of each layer's input, as its proof (equation 41) does. With
            two layers, ``"pre"`` drops the prompt's own tokens on top of what ``"post"`` drops.
    """

    keep: float
    where: Where = "post"

    def __post_init__(self) -> None:
        """Refuse what is no probability."""
        check_keep(self.keep)
        if self.where not in ("pre", "post"):
            raise unknown("place of dropout", self.where, ("pre", "post"))


def check_keep(keep: float) -> None:
    """Refuse a keep probability outside (0, 1].

    Raises:
        TvInterpError: if it is.
    """
    if not 0 < keep <= 1:
        raise TvInterpError(f"expected a keep probability in (0, 1], got {keep}")


def scalar_layer(
    d: int,
    *,
    a: Tensor | float,
    b: Tensor | float,
    c: Tensor | float | None = None,
    positions: Tensor | None = None,
) -> Layer:
    """Make a layer whose A, B and C are multiples of the identity (the sets S_I and S_Sigma).

    Args:
        d: Dimension of x.
        a: A = a I.
        b: B = b I.
        c: C = c I; None for no scores of contents.
        positions: D, ``[source destination]``; None for no scores of positions.
    """
    one, zero = torch.ones(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    v = torch.diag(torch.cat([a * one, b * one]))
    q = None if c is None else torch.diag(torch.cat([c * one, zero]))
    return Layer(v, q, positions)


def one_step_model(layout: Layout, d: int, rate: float) -> LinearTransformer:
    """Build one step of gradient descent on the demonstrations: the optimum of one layer.

    Args:
        layout: A single prompt's.
        d: Dimension of x.
        rate: b c; the best is `closed_forms.one_step_rate`.
    """
    return LinearTransformer(layout, (scalar_layer(d, a=0.0, b=rate, c=1.0),))


def sample_inputs(
    n_prompts: int, d: int, n: int, generator: torch.Generator
) -> tuple[Float[Tensor, "prompt d demo"], Float[Tensor, "prompt d"]]:
    """Draw x of the demonstrations and of the query from N(0, I)."""
    draws = torch.randn(n_prompts, d, n + 1, generator=generator, dtype=torch.float64)
    return draws[..., :-1], draws[..., -1]


def sample_tasks(
    n_prompts: int, d: int, generator: torch.Generator, tasks: Tasks = "gaussian"
) -> Float[Tensor, "prompt d d"]:
    """Draw W with rows from N(0, I), or one of its stand-ins; see the module's text."""
    if tasks == "identity":
        return torch.eye(d, dtype=torch.float64).expand(n_prompts, d, d)
    w = torch.randn(n_prompts, d, d, generator=generator, dtype=torch.float64)
    return w if tasks == "gaussian" else d**0.5 * orthonormalise(w)


def orthonormalise(columns: Float[Tensor, "*many d column"]) -> Float[Tensor, "*many d column"]:
    """Make Gaussian columns orthonormal, uniformly distributed."""
    q, r = torch.linalg.qr(columns)
    return q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


def make_columns(
    layout: Layout,
    x: Float[Tensor, "prompt d demo"],
    y: Float[Tensor, "prompt d demo"],
    query: Float[Tensor, "prompt d"],
) -> Float[Tensor, "prompt rows token"]:
    """Lay demonstrations and query out as a prompt's columns (equations 3, 7, 9 and 11)."""
    d = x.shape[1]
    columns = x.new_zeros(len(x), 2 * d, layout.width)
    upper = slice(d, None) if layout.kind == "inseparable" else slice(None, d)
    columns[:, upper, layout.x] = x
    columns[:, d:, layout.y] = y
    columns[:, upper, layout.query] = query
    return columns


def apply_layer(
    columns: Float[Tensor, "prompt rows token"],
    layer: Layer,
    n: int,
    to: Tensor | slice = ALL,
) -> Float[Tensor, "prompt rows destination"]:
    """Apply Z + (1/n) V Z M (Z^T Q Z + D).

    Args:
        columns: Z.
        layer: Its weights.
        n: Demonstrations.
        to: Which columns to compute.
    """
    sources = columns[..., :-1]
    scores = None if layer.d is None else layer.d[:-1, to]
    if layer.q is not None:
        contents = sources.mT @ (layer.q @ columns[..., to])
        scores = contents if scores is None else contents + scores
    if scores is None:
        return columns[..., to]
    return columns[..., to] + layer.v @ (sources @ scores) / n


def draw_masks(
    layout: Layout, n_prompts: int, keep: float, generator: torch.Generator
) -> Float[Tensor, "prompt 1 token"]:
    """Draw which tokens stay: 1 with probability keep, always for the query's x and the end."""
    masks = torch.ones(n_prompts, 1, layout.width, dtype=torch.float64)
    dropped = torch.rand(n_prompts, len(layout.slots), generator=generator) >= keep
    masks[:, 0, layout.slots] -= dropped.double()
    return masks


def predict(
    model: LinearTransformer,
    columns: Float[Tensor, "prompt rows token"],
    *,
    masks: Sequence[Float[Tensor, "prompt 1 token"] | None] = (),
) -> Float[Tensor, "prompt d"]:
    """Run a model and read the lower half of the last column.

    Args:
        model: The model.
        columns: From `make_columns`.
        masks: What stays of the columns before each layer, from `draw_masks`; None drops nothing.

    Returns:
        The prediction, which approaches minus W x.
    """
    n = model.layout.n
    *before, last = model.layers
    for i, layer in enumerate(before):
        columns = apply_layer(_masked(columns, masks, i), layer, n)
    columns = apply_layer(_masked(columns, masks, len(before)), last, n, LAST)
    return columns[:, model.d :, 0]


def _masked(columns: Tensor, masks: Sequence[Tensor | None], layer: int) -> Tensor:
    mask = masks[layer] if masks else None
    return columns if mask is None else columns * mask


def prompt_losses(
    model: LinearTransformer,
    n_prompts: int,
    generator: torch.Generator,
    *,
    tasks: Tasks = "identity",
    dropout: Dropout | None = None,
) -> Float[Tensor, " prompt"]:
    """Draw prompts and compute each one's loss, whose expectation is risk/d.

    Args:
        model: The model.
        n_prompts: How many.
        generator: Decides prompts and dropped tokens.
        tasks: Stand-ins for Gaussian W are exact for the weights that the module's text names.
        dropout: Tokens dropped while the loss is taken.

    Returns:
        |prediction + x|^2 for W = I, |prediction + W x|^2 / d for the others.
    """
    d, layout = model.d, model.layout
    x, query = sample_inputs(n_prompts, d, layout.n, generator)
    w = sample_tasks(n_prompts, d, generator, tasks)
    y = x if tasks == "identity" else w @ x
    target = query if tasks == "identity" else (w @ query.unsqueeze(-1)).squeeze(-1)
    masks = ()
    if dropout is not None and dropout.keep < 1:
        # The last layer's output is read at the end token, which always stays.
        first = 0 if dropout.where == "pre" else 1
        masks = [
            draw_masks(layout, n_prompts, dropout.keep, generator) if i >= first else None
            for i in range(len(model.layers))
        ]
    out = predict(model, make_columns(layout, x, y, query), masks=masks)
    losses = (out + target).square().sum(-1)
    return losses if tasks == "identity" else losses / d


@torch.no_grad()
def estimate_risk(
    model: LinearTransformer,
    n_prompts: int,
    *,
    seed: int,
    tasks: Tasks = "identity",
    dropout: Dropout | None = None,
) -> tuple[float, float]:
    """Estimate risk/d on fresh prompts.

    Args:
        model: The model.
        n_prompts: How many.
        seed: Decides prompts and dropped tokens; equal layouts get equal prompts.
        tasks: As `prompt_losses`.
        dropout: Tokens dropped while the risk is taken.

    Returns:
        The mean and its standard error.
    """
    parts = []
    for i, start in enumerate(range(0, n_prompts, CHUNK)):
        generator = torch.Generator().manual_seed(10_007 * seed + i)
        count = min(CHUNK, n_prompts - start)
        parts.append(prompt_losses(model, count, generator, tasks=tasks, dropout=dropout))
    losses = torch.cat(parts)
    return float(losses.mean()), float(losses.std() / len(losses) ** 0.5)


CHUNK = 8192
"""Prompts of one batch where only a mean is wanted."""
