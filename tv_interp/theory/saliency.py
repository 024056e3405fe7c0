"""Saliency of a linear transformer's scores: who is read by whom, by first-order effect."""

from __future__ import annotations

import torch
import xarray as xr

from .linear import (
    LinearTransformer,
    make_columns,
    sample_inputs,
    sample_tasks,
)


def token_saliency(model: LinearTransformer, *, n_prompts: int, seed: int) -> xr.DataArray:
    """Average |G * d loss / d G| over prompts, for the scores G of each layer.

    The absolute value is taken before the mean; the loss is |prediction + W x|^2 / d.

    Args:
        model: The model.
        n_prompts: Prompts of Gaussian tasks.
        seed: Decides them.

    Returns:
        Array over ``(layer, src, dest)`` with token names; the last token is never a source.
    """
    layout, d = model.layout, model.d
    generator = torch.Generator().manual_seed(seed)
    x, query = sample_inputs(n_prompts, d, layout.n, generator)
    w = sample_tasks(n_prompts, d, generator)
    columns = make_columns(layout, x, w @ x, query)
    target = (w @ query[..., None])[..., 0]
    gates = []
    for layer in model.layers:
        gate = torch.ones(n_prompts, layout.width, layout.width, dtype=torch.float64)
        gates.append(gate.requires_grad_(True))
        scores = torch.zeros_like(gate) if layer.d is None else layer.d.expand_as(gate)
        if layer.q is not None:
            scores = scores + columns.mT @ layer.q @ columns
        scores = (scores * gates[-1])[:, :-1]
        columns = columns + layer.v @ (columns[..., :-1] @ scores) / layout.n
    loss = (columns[:, d:, -1] + target).square().sum() / d
    by_gate = torch.autograd.grad(loss, gates)  # a gate of ones: its gradient is G * d loss / d G
    values = torch.stack([g.abs().mean(0) for g in by_gate])
    return xr.DataArray(
        values.numpy(),
        dims=("layer", "src", "dest"),
        coords={
            "layer": range(1, len(values) + 1),
            "src": list(layout.names),
            "dest": list(layout.names),
        },
        attrs={"unit": "mean |G dL/dG|"},
    )
