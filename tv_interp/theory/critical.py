"""Are the predicted weights critical points? The test of Theorems 1 and 2.

The gradient of the risk by *all* of A, B, C and D is taken at weights that were trained inside the
predicted sets only. Its square is estimated without bias from independent batches of prompts: the
mean inner product of the gradients of two different batches, which may come out below 0.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        seed: Decides the prompts; W is orthogonal, since B is not held to multiples of I here.
        batches: Independent batches.
    """
    generator = torch.Generator().manual_seed(seed)
    opened = model.map(lambda t: t.clone().requires_grad_())
    tensors: list[Tensor] = []
    opened.map(lambda t: tensors.append(t) or t)
    gradients = []
    for _ in range(batches):
        loss = prompt_losses(opened, n_prompts // batches, generator, tasks="orthogonal").mean()
        parts = iter(torch.autograd.grad(loss, tensors))
        by_layer = model.map(lambda _, parts=parts: next(parts)).layers
        weights = [w.flatten() for layer in by_layer for w in _weights(layer, model.d)]
        gradients.append(torch.cat(weights))
    return _cross(torch.stack(gradients))


def perturb(model: LinearTransformer, size: float, *, seed: int) -> LinearTransformer:
    """Add Gaussian noise of a relative norm to each of A, B, C and D.

    Args:
        model: The model.
        size: Norm of the noise over the norm of the matrix it is added to.
        seed: Decides the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    out = model.map(torch.clone)
    for layer in out.layers:
        for weight in _weights(layer, model.d):
            noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            weight += size * weight.norm() * noise / noise.norm()
    return out


def _weights(layer: Layer, d: int) -> list[Tensor]:
    """Give views of A, B, C and D; the zeros of V and Q are no weights."""
    out = [layer.v[:d, :d], layer.v[d:, d:]]
    if layer.q is not None:
        out.append(layer.q[:d, :d])
    return out if layer.d is None else [*out, layer.d]


def _cross(gradients: Float[Tensor, "batch weight"]) -> SquaredGradient:
    def estimate(rows: Tensor) -> Tensor:
        m = len(rows)
        return (rows.sum(0).square().sum() - rows.square().sum()) / (m * (m - 1))

    m = len(gradients)
    left_out = torch.stack([estimate(gradients[torch.arange(m) != i]) for i in range(m)])
    error = ((m - 1) * left_out.var(correction=0)).sqrt()
    return SquaredGradient(float(estimate(gradients)), float(error))
