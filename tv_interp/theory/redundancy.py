"""Proposition 5 by direct minimisation: how dropout spreads task vectors over demonstrations."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import TvInterpError, unknown
from .closed_forms import redundancy_objective


def minimise_redundancy(
    n: int,
    keep: float,
    d: int,
    *,
    mask: Literal["none", "causal"] = "none",
    constants: Literal["corrected", "printed"] = "corrected",
    seed: int = 0,
) -> Float[Tensor, "demo arrow"]:
    """Minimise the objective of Proposition 5 over the unit sphere.

    The problem is not convex: another seed may end elsewhere.

    Args:
        n: Demonstrations.
        keep: Probability p that a token stays.
        d: Dimension of x.
        mask: ``"causal"``: arrow j holds only demonstrations 1 to j.
        constants: See `closed_forms.redundancy_coefficients`.
        seed: Decides the start.

    Returns:
        Weights of the demonstrations in each arrow, of Frobenius norm 1.

    Raises:
        TvInterpError: for a keep probability outside (0, 1], or n below 1.
        UnknownName: for an unknown mask or set of constants.
    """
    from scipy.optimize import minimize

    if n < 1:
        raise TvInterpError(f"expected n of 1 demonstration or more, got {n}")
    if mask not in ("none", "causal"):
        raise unknown("mask", mask, ("none", "causal"))
    allowed = torch.ones(n, n, dtype=torch.float64)
    if mask == "causal":
        allowed = allowed.triu()

    def on_sphere(flat: Tensor) -> Tensor:
        m = flat.reshape(n, n) * allowed
        return m / m.norm()

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        at = torch.tensor(flat, requires_grad=True)
        value = redundancy_objective(on_sphere(at), keep, d, constants=constants)
        value.backward()
        assert at.grad is not None
        return float(value.detach()), at.grad.numpy()

    start = np.random.default_rng(seed).normal(size=n * n)
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 3000})
    return on_sphere(torch.tensor(found.x))


def participation(m: Float[Tensor, "demo arrow"]) -> float:
    """Compute the mean participation of the columns: 1 where all demonstrations weigh the same.

    (sum beta^2)^2 / (n sum beta^4), 1/n where one demonstration has all the weight.
    """
    square = m.square()
    columns = square.sum(0).square() / (len(m) * square.square().sum(0))
    return float(columns.mean())


def rank_one_residual_found(x: np.ndarray, y: np.ndarray, *, seed: int = 0) -> float:
    """Minimise |u (v . x) - y|^2 + |u (v . y) - x|^2 over vectors u, v, from three starts.

    The numerical side of Proposition 4; `closed_forms.rank_one_residual` is the formula.

    Args:
        x: A unit vector.
        y: Another.
        seed: Decides the starts.
    """
    from scipy.optimize import minimize

    d = len(x)

    def residual(uv: np.ndarray) -> tuple[float, np.ndarray]:
        u, v = uv[:d], uv[d:]
        to_y, to_x = u * (v @ x) - y, u * (v @ y) - x
        by_u = 2 * (to_y * (v @ x) + to_x * (v @ y))
        by_v = 2 * ((to_y @ u) * x + (to_x @ u) * y)
        return float(to_y @ to_y + to_x @ to_x), np.concatenate([by_u, by_v])

    rng = np.random.default_rng(seed)
    starts = rng.normal(size=(3, 2 * d))
    return min(float(minimize(residual, s, jac=True, method="L-BFGS-B").fun) for s in starts)
