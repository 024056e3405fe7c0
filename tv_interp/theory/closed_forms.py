"""Risks and limits that can be written down, for x ~ N(0, I), W with rows ~ N(0, I).

Every one-step predictor of two-layer models without content scores in the first layer is
s Y K X^T x for a mixing matrix K of the demonstrations, and for a fixed K

    E |s X K X^T x + x|^2 = s^2 d (tr(K)^2 + tr(K K) + d |K|_F^2) + 2 s d tr(K) + d        (risk/d)

because E[X A X^T X B X^T] = (tr A tr B + tr(A B^T) + d tr(A B)) I for a d by n standard normal X.
Dropout makes K random, so its risk is the mean of the above over masks; for two layers that needs
only the first two moments of K. Each formula here is held against exact enumeration of all masks
or against the model itself by the tests.

Proposition 5 of arXiv 2506.09048 prints constants for its term of order four that do not agree with
enumeration. `redundancy_coefficients` has both sets; the proposition's statement survives, since
all constants are non-negative in either.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import TvInterpError, unknown
from .linear import Dropout, check_keep


def one_step_rate(n: int, d: int) -> float:
    """Best b c of one layer over n demonstrations: -n / (n + d + 1)."""
    return -n / (n + d + 1)


def one_step_risk(n: int, d: int) -> float:
    """Least risk/d of one layer, and of two on pairs or triplets without C in the first.

    d (d + 1) / (n + d + 1).
    """
    return d * (d + 1) / (n + d + 1)


def mixing_risk(k: Float[Tensor, "demo demo"], scale: float | Tensor, d: int) -> Tensor:
    """Compute risk/d of the predictor scale Y K X^T x; see the module's text."""
    trace = k.trace()
    square = trace**2 + (k * k.T).sum() + d * k.square().sum()
    return scale**2 * d * square + 2 * scale * d * trace + d


class Moments(NamedTuple):
    """Moments of a random mixing matrix K.

    Attributes:
        trace: E tr K.
        square: E [tr(K)^2 + tr(K K) + d |K|_F^2].
    """

    trace: Tensor
    square: Tensor


def mixing_moments(
    u: Float[Tensor, "demo token"],
    v: Float[Tensor, "demo token"],
    d: int,
    dropout: Dropout,
) -> Moments:
    """Average K = U diag(o) V^T over dropped tokens, exactly.

    Token j of the second layer holds X v_j over Y u_j, and stays with probability p (o_j = 1).
    With dropout of inputs, demonstrations' x and y tokens are dropped before the first layer too:
    row i of U by the mask of y_i, row i of V by that of x_i.

    Args:
        u: Coefficients of y, a column for each token that can be dropped.
        v: Coefficients of x.
        d: Dimension of x.
        dropout: Keep probability and place.
    """
    p = dropout.keep
    mean = p * u @ v.T
    spread = p * (1 - p)
    uu, vv, uv = u.square().sum(0), v.square().sum(0), (u * v).sum(0)
    trace_squared = mean.trace() ** 2 + spread * uv.square().sum()
    trace_of_square = (mean * mean.T).sum() + spread * uv.square().sum()
    norm = mean.square().sum() + spread * (uu * vv).sum()
    if dropout.where == "post":
        return Moments(mean.trace(), trace_squared + trace_of_square + d * norm)
    diagonal = mean.diagonal().square().sum() + spread * (u * v).square().sum()
    both = p**4 * (trace_squared + trace_of_square) + 2 * (p**2 - p**4) * diagonal
    return Moments(p**2 * mean.trace(), both + d * p**2 * norm)


def dropout_risk(moments: Moments, d: int, scale: float | Tensor | None = None) -> Tensor:
    """Compute risk/d under dropout; without a scale, of the best one."""
    if scale is None:
        return d - d * moments.trace**2 / moments.square
    return scale**2 * d * moments.square + 2 * scale * d * moments.trace + d


def best_dropout_risk(n: int, d: int, keep: float, tokens: int) -> float:
    """Least risk/d when each layer's output is dropped, over all ways to mix n demonstrations.

    Reached where K is a multiple of I and the tokens are a tight frame of equal norms: redundancy
    spread evenly. With the x? column of the first layer closed, tokens are 2n for pairs and 3n + 1
    for triplets. Between the two, arrows lower the risk; without dropout the number of tokens does
    not matter.

    Args:
        n: Demonstrations.
        d: Dimension of x.
        keep: Probability that a token stays.
        tokens: Tokens that hold a mixture of demonstrations before the second layer.
    """
    check_keep(keep)
    spread = keep * (1 - keep) * (d**2 + 2 * d) * n**2 / tokens
    whole = keep**2 * d * n * (d + n + 1) + spread
    return d - (keep * d * n) ** 2 / whole


def frame_rate(n: int, d: int, keep: float, tokens: int) -> float:
    """Best b c where K is a tight frame of unit tokens, (tokens / n) I.

    The scale of D and this rate stand for each other. At this rate the optimum of
    `best_dropout_risk` has D / n = 1 between the x and y of a demonstration; for tokens = n and
    nothing dropped it is `one_step_rate`.
    """
    check_keep(keep)
    whole = keep * tokens * (1 + (1 + d) / n) + (1 - keep) * (2 + d)
    return -n / whole


def arrow_share(n: int) -> float:
    """Arrows' share of tr K at the optimum of `best_dropout_risk`: (n + 1) / (3n + 1)."""
    return (n + 1) / (3 * n + 1)


def redundancy_coefficients(
    keep: float, d: int, *, constants: Literal["corrected", "printed"] = "corrected"
) -> tuple[float, float, float, float]:
    """Give c1 to c4 of Proposition 5.

    The arrows' part of the risk under dropout of inputs is, up to a factor, p^6 |M|_F^4 plus
    c1 sum M_ij^4 + c2 sum |row_i|^4 + c3 sum |column_j|^4 + c4 |M M^T|_F^2.

    Args:
        keep: Probability p that a token stays.
        d: Dimension of x.
        constants: ``"corrected"`` agrees with enumeration of all masks; ``"printed"`` is
            Appendix D.6 of the paper, which does not.

    Raises:
        TvInterpError: for a keep probability outside (0, 1].
        UnknownName: for other constants.
    """
    check_keep(keep)
    if constants not in ("corrected", "printed"):
        raise unknown("set of constants", constants, ("corrected", "printed"))
    p3, p4, p5, p6 = (keep**i for i in (3, 4, 5, 6))
    if constants == "printed":
        return (
            (1 + d) * (p3 - p4 - p5 + p6),
            (1 + d) * (p4 - p6) + p3 - p4,
            (1 + d) * (p5 - p6),
            p4 + d * p6,
        )
    return (
        2 * (p3 - p4 - p5 + p6),
        2 * (p4 - p6),
        2 * (p5 - p6) + d * (p3 - p4),
        p6 + d * p4,
    )


def redundancy_objective(
    m: Float[Tensor, "demo arrow"], keep: float, d: int, *, constants: str = "corrected"
) -> Tensor:
    """Compute what Proposition 5 says weights of arrows minimise on the unit sphere."""
    c1, c2, c3, c4 = redundancy_coefficients(keep, d, constants=constants)  # type: ignore[arg-type]
    square = m.square()
    return (
        c1 * square.square().sum()
        + c2 * square.sum(1).square().sum()
        + c3 * square.sum(0).square().sum()
        + c4 * (m @ m.T).square().sum()
    )


def rank_floor(rank: int, d: int) -> float:
    """Least relative squared error of any rank-one map to one of `rank` equal singular values.

    1 - 1/rank (Eckart and Young): what one injected vector can reach.
    """
    return 1 - 1 / check_rank(rank, d)


def residual_floor(vectors: int, rank: int, d: int) -> float:
    """Part of a map of `rank` equal singular values outside the span of so many outputs.

    max(0, 1 - vectors/rank).
    """
    return max(0.0, 1 - vectors / check_rank(rank, d))


def one_step_error(vectors: int, rank: int, d: int) -> float:
    """Approximate relative error of one gradient step on so many vectors: (r - 1) / (r + k - 1).

    Exact in expectation where overlaps of unit vectors are replaced by their mean square 1/r; it
    falls smoothly with k and does not reach 0 at k = r.
    """
    check_rank(rank, d)
    return (rank - 1) / (rank + vectors - 1)


def check_rank(rank: int, d: int) -> int:
    """Refuse a rank below 1 or above the dimension.

    Raises:
        TvInterpError: if it is.
    """
    if not 1 <= rank <= d:
        raise TvInterpError(f"expected a rank from 1 to the dimension {d}, got {rank}")
    return rank


def rank_one_residual(x: Float[Tensor, " d"], y: Float[Tensor, " d"]) -> float:
    """Least |W x - y|^2 + |W y - x|^2 over rank-one W, for unit x and y: 1 - |cos(x, y)|.

    Proposition 4 is the case 0: y = x or y = -x.
    """
    return 1 - abs(float(x @ y) / float(x.norm() * y.norm()))


def one_step_risk_of_arrows(m: Float[Tensor, "demo arrow"], a: float, b: float, d: int) -> float:
    """Compute risk/d of the two-layer triplet model of Appendix D.5: a X X^T + b X M M^T X^T."""
    k = a * torch.eye(len(m), dtype=m.dtype) + b * m @ m.T
    return float(mixing_risk(k, 1.0, d))
