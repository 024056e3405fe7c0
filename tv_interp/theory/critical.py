"""Are the predicted weights critical points? The test of Theorems 1 and 2.

The gradient of the risk by *all* of A, B, C and D is taken at weights that were trained inside the
predicted sets only. Its square is estimated without bias from independent batches of prompts: the
mean inner product of the gradients of two different batches, which may come out below 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from .linear import Layer, LinearTransformer, prompt_losses


@dataclass(frozen=True)
class SquaredGradient:
    """The squared norm of a gradient of risk/d.

    Attributes:
        value: Estimate without bias.
        error: Its standard error (jackknife over batches).
    """

    value: float
    error: float


def squared_gradient(
    model: LinearTransformer, n_prompts: int, *, seed: int, batches: int = 16
) -> SquaredGradient:
    """Estimate the squared gradient by A, B, C and D of every layer.

    Args:
        model: Where to take it.
        n_prompts: In all batches together.
        seed: Decides the prompts; W is Gaussian, since B is not held to multiples of I here.
        batches: Independent batches.
    """
    generator = torch.Generator().manual_seed(seed)
    leaves = [_open(layer) for layer in model.layers]
    opened = replace(model, layers=tuple(leaves))
    tensors = [t for layer in leaves for t in (layer.v, layer.q, layer.d) if t is not None]
    gradients = []
    for _ in range(batches):
        loss = prompt_losses(opened, n_prompts // batches, generator, tasks="gaussian").mean()
        parts = torch.autograd.grad(loss, tensors)
        gradients.append(torch.cat([_counted(part, model.d) for part in parts]))
    return _cross(torch.stack(gradients))


def perturb(model: LinearTransformer, size: float, *, seed: int) -> LinearTransformer:
    """Add Gaussian noise of a relative norm to each of A, B, C and D.

    Args:
        model: The model.
        size: Norm of the noise over the norm of the matrix it is added to.
        seed: Decides the noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def moved(matrix: Tensor | None) -> Tensor | None:
        if matrix is None:
            return None
        out = matrix.clone()
        for block in _blocks(out, model.d):
            noise = torch.randn(block.shape, generator=generator, dtype=block.dtype)
            block += size * block.norm() * noise / noise.norm()
        return out

    layers = [Layer(*(moved(m) for m in (each.v, each.q, each.d))) for each in model.layers]  # type: ignore[arg-type]
    return replace(model, layers=tuple(layers))


def _blocks(matrix: Tensor, d: int) -> list[Tensor]:
    """Give views of A and B, or of C, or D whole: the zeros of V and Q are no weights."""
    if len(matrix) != 2 * d:
        return [matrix]
    return [matrix[:d, :d], matrix[d:, d:]]


def _counted(gradient: Tensor, d: int) -> Tensor:
    return torch.cat([block.flatten() for block in _blocks(gradient, d)])


def _open(layer: Layer) -> Layer:
    return Layer(
        *(None if t is None else t.clone().requires_grad_() for t in (layer.v, layer.q, layer.d))  # type: ignore[arg-type]
    )


def _cross(gradients: Float[Tensor, "batch weight"]) -> SquaredGradient:
    def estimate(rows: Tensor) -> Tensor:
        m = len(rows)
        return (rows.sum(0).square().sum() - rows.square().sum()) / (m * (m - 1))

    m = len(gradients)
    left_out = torch.stack(
        [estimate(gradients[torch.arange(m) != i]) for i in range(m)]
    )
    error = ((m - 1) * left_out.var(correction=0)).sqrt()
    return SquaredGradient(float(estimate(gradients)), float(error))
