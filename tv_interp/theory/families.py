"""The sets of weights that Theorems 1, 2 and 7 predict, and how far weights are from them.

Positions D are predicted to lie in S_P:

- pairs, separable or not: diag(I_n (x) L1, L2), every demonstration mixing its own x and y alike;
- triplets: diag(I_n (x) L1, L2) + I_(n+1) (x) L3 + L4 (x) L5, where L1 and L2 live on the corners
  of a 3 by 3 block, L3 on its centre, L5 on the first and last row of its middle column. L4 (x) L5
  makes the task vectors: arrow i becomes (alpha1 X beta_i ; alpha2 Y beta_i), beta_i the i-th
  column of L4.

Only rows of D that multiply something count: in a first layer arrows and the end token are empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import TvInterpError
from .linear import Layout


@dataclass(frozen=True)
class Arrows:
    """What a first layer's D writes into the arrows.

    Attributes:
        x: Coefficients of the demonstrations' x, ``[demo arrow]``: alpha1 L4 without its last row.
        y: Coefficients of their y: alpha2 L4.
        weights: L4 of the nearest L4 (x) L5, ``[demo+1 arrow]``; its last row, which only the
            query's x multiplies, is taken as it is.
        alpha: The two entries of L5, alpha1^2 + alpha2^2 = 1, alpha1 >= 0.
    """

    x: Float[Tensor, "demo arrow"]
    y: Float[Tensor, "demo arrow"]
    weights: Float[Tensor, "row arrow"]
    alpha: tuple[float, float]

    @property
    def cosine(self) -> float:
        """Cosine of the last arrow's coefficients of x and of y; 1 is one combination for both."""
        return float(torch.cosine_similarity(self.x[:, -1], self.y[:, -1], dim=0))

    @property
    def last_row(self) -> float:
        """Norm of the last row of L4 over the mean norm of the others; Proposition 3 says 0."""
        norms = self.weights.norm(dim=1)
        return float(norms[-1] / norms[:-1].mean())

    @property
    def gram(self) -> Float[Tensor, "row row"]:
        """L4 L4^T over its mean diagonal; Proposition 3 says diag(I_n, 0)."""
        gram = self.weights @ self.weights.T
        return gram / gram.diagonal()[:-1].mean()

    @property
    def gram_off_diagonal(self) -> float:
        """Root mean square off the diagonal of `gram`, demonstrations only."""
        gram = self.gram[:-1, :-1]
        off = gram[~torch.eye(len(gram), dtype=torch.bool)]
        return float(off.square().mean().sqrt())


def make_positions(
    layout: Layout,
    *,
    demo: Float[Tensor, "stride stride"],
    query: Float[Tensor, "stride stride"],
    centre: Tensor | float = 0.0,
    arrows: Float[Tensor, "row arrow"] | None = None,
    alpha: tuple[Tensor | float, Tensor | float] = (1.0, 1.0),
) -> Float[Tensor, "source destination"]:
    """Build a member of S_P.

    Args:
        layout: Of pairs or triplets.
        demo: L1. Of triplets only the corners are used.
        query: L2, likewise.
        centre: L3, triplets only: how an arrow magnifies itself.
        arrows: L4, ``[n+1 n+1]``, triplets only; None for no task vectors.
        alpha: The two entries of L5.

    Raises:
        TvInterpError: for a format the theorems say nothing about.
    """
    _check(layout)
    eye = torch.eye(layout.n, dtype=demo.dtype)
    if layout.kind != "triplet":
        return torch.block_diag(torch.kron(eye, demo), query)
    corners = torch.zeros(3, 3, dtype=demo.dtype)
    corners[::2, ::2] = 1
    middle = torch.zeros(3, 3, dtype=demo.dtype)
    middle[1, 1] = 1
    out = torch.block_diag(torch.kron(eye, demo * corners), query * corners)
    out = out + torch.kron(torch.eye(layout.n + 1, dtype=demo.dtype), centre * middle)
    if arrows is None:
        return out
    first, last = torch.zeros_like(middle), torch.zeros_like(middle)
    first[0, 1] = last[2, 1] = 1
    return out + torch.kron(arrows.contiguous(), alpha[0] * first + alpha[1] * last)


def effective_rows(layout: Layout) -> Bool[Tensor, " source"]:
    """Mark the tokens that are not empty before the first layer."""
    rows = torch.zeros(layout.width, dtype=torch.bool)
    rows[layout.x] = rows[layout.y] = True
    rows[layout.query] = True
    return rows


def project_positions(
    positions: Float[Tensor, "source destination"], layout: Layout
) -> Float[Tensor, "source destination"]:
    """Find the nearest member of S_P for a first layer, on effective rows.

    Raises:
        TvInterpError: for a format the theorems say nothing about.
    """
    _check(layout)
    k, n = layout.stride, layout.n
    blocks = positions.reshape(n + 1, k, n + 1, k).permute(0, 2, 1, 3)
    own = blocks[range(n), range(n)].mean(0)
    out = make_positions(layout, demo=own, query=blocks[n, n])
    if layout.kind == "triplet":
        arrows = read_arrows(positions, layout)
        out = make_positions(
            layout, demo=own, query=blocks[n, n], arrows=arrows.weights, alpha=arrows.alpha
        )
    return out * effective_rows(layout)[:, None]


def distance_to_family(positions: Float[Tensor, "source destination"], layout: Layout) -> float:
    """Measure the relative Frobenius distance of a first layer's D to S_P, on effective rows."""
    given = positions * effective_rows(layout)[:, None]
    return float((given - project_positions(positions, layout)).norm() / given.norm())


def distance_to_identity(weights: Float[Tensor, "d d"]) -> float:
    """Measure the relative Frobenius distance of A, B or C to the multiples of the identity."""
    nearest = weights.trace() / len(weights) * torch.eye(len(weights), dtype=weights.dtype)
    return float((weights - nearest).norm() / weights.norm())


def read_arrows(positions: Float[Tensor, "source destination"], layout: Layout) -> Arrows:
    """Read the task vectors' coefficients from a first layer's D.

    Raises:
        TvInterpError: if the prompt has no arrows.
    """
    if layout.kind != "triplet":
        raise TvInterpError(f"expected a triplet layout, got {layout.kind!r}: it has no arrows")
    x = positions[layout.x[:, None], layout.arrow]
    y = positions[layout.y[:, None], layout.arrow]
    pair = torch.stack([x.flatten(), y.flatten()])
    left, values, right = torch.linalg.svd(pair, full_matrices=False)
    sign = 1.0 if left[0, 0] >= 0 else -1.0
    alpha = (sign * float(left[0, 0]), sign * float(left[1, 0]))
    top = (sign * values[0] * right[0]).reshape(x.shape)
    last = positions[layout.query, layout.arrow] / (alpha[0] or 1.0)
    return Arrows(x, y, torch.cat([top, last[None]]), alpha)


def _check(layout: Layout) -> None:
    if layout.kind == "single":
        raise TvInterpError(
            "expected a layout of pairs or triplets, got 'single': Theorems 1, 2 and 7 predict "
            "positions for no other format"
        )
