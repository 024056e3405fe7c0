"""Gradients of a metric with respect to activations, with frozen parameters too.

Each activation gets a leaf of zeros added, and the metric is differentiated with respect to the
leaves: hooks of a bridge see views, so the gradient of what they see would be empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ModelError, ScoreError
from ..interventions.recording import call_bytes
from ..models.adapter import Adapter, Edit, HookName
from ..models.finite import not_finite
from ..models.replay import Layout, Tape
from ..scores.metrics import Readout


class Walk:
    """A forward pass block by block from given inputs, that can be differentiated.

    Attributes:
        resid: Input of each block, and the output of the last one, ``[row, pos, d_model]``.
        seen: Activations at the leaves, as they were.
        values: The metric, ``[row]``.
        gradients: By leaf, of the metric of the same row.
    """

    def __init__(
        self,
        adapter: Adapter,
        tape: Tape,
        x: Float[Tensor, "row pos d_model"],
        readout: Readout,
        rows: Tensor,
        leaves: Iterable[HookName],
        swaps: Mapping[HookName, Tensor] = MappingProxyType({}),
        inner: Mapping[HookName, Sequence[HookName]] = MappingProxyType({}),
    ) -> None:
        """Walk through all blocks.

        Args:
            adapter: The model.
            tape: A recorded run of the same tokens; what its blocks are called with besides ``x``.
            x: Input of the first block.
            readout: The metric.
            rows: Which prompts the rows are.
            leaves: Activations with respect to which the metric is differentiated;
                ``("resid_pre", l)`` up to the number of layers is the residual stream.
            swaps: Activations that are put in the place of the model's own.
            inner: Activations with respect to which leaves are differentiated, by leaf; see
                `pull_back`.

        Raises:
            ScoreError: if the metric cannot be differentiated.
            ModelError: if the model discards edits of a leaf, or gradients are NaN or infinite.
        """
        names = list(leaves)
        planted = [*names, *(name for some in inner.values() for name in some)]
        made: dict[HookName, Tensor] = {}
        self._inner: dict[HookName, tuple[Tensor, list[Tensor]]] = {}
        self.resid: list[Tensor] = []
        self.seen: dict[HookName, Tensor] = {}

        def plant(name: HookName) -> Edit:
            def edit(activation: Tensor) -> Tensor:
                activation = swaps.get(name, activation)
                self.seen[name] = activation.detach()
                leaf = torch.zeros_like(self.seen[name], requires_grad=True)
                made[name], whole = leaf, activation + leaf
                if name in inner:
                    self._inner[name] = whole, [made[n] for n in inner[name]]
                return whole

            return edit

        layout = Layout.suffix(0, tape.n_pos)
        for layer in range(adapter.n_layers + 1):
            if ("resid_pre", layer) in names:
                x = plant(("resid_pre", layer))(x)
            self.resid.append(x.detach())
            if layer < adapter.n_layers:
                edits = {n: plant(n) for n in planted if n[1] == layer and n[0] != "resid_pre"}
                x = adapter.block(tape, layer, x, layout, edits=edits, gradients="on")
        logits = adapter.logits(x[:, -1:], gradients="on")[:, 0]
        with torch.enable_grad():
            values = readout(logits, rows)
        if not values.requires_grad:
            raise ScoreError(
                f"metric {readout.metric.name!r} is not differentiable: use logit_diff, prob, "
                'log_prob or kl, or method="exact"'
            )
        self.values = values.detach()
        at, kept = [made[name] for name in names], bool(inner)
        found = torch.autograd.grad(values.sum(), at, allow_unused=True, retain_graph=kept)
        missing = [n for n, g in zip(names, found, strict=True) if g is None]
        if missing:
            raise ModelError(
                f"{adapter.name} discards edits of {missing[0][0]} in layer {missing[0][1]}, so "
                'its gradient cannot be taken: load it with backend="hooked"'
            )
        for name, gradient in zip(names, found, strict=True):
            if not gradient.isfinite().all():
                raise not_finite(adapter, f"gradients at {name[0]} of layer {name[1]}")
        self.gradients = dict(zip(names, found, strict=True))

    def pull_back(
        self, name: HookName, cotangents: Float[Tensor, "each ..."]
    ) -> tuple[Float[Tensor, "each ..."], ...]:
        """Take gradients at a leaf back to those before it, several at once.

        Each leaf once, from the last layer down: what is not needed any more is let go.
        """
        whole, inner = self._inner.pop(name)
        kept = bool(self._inner)
        return torch.autograd.grad(
            whole, inner, cotangents, is_grads_batched=True, retain_graph=kept
        )


def few_rows(adapter: Adapter, tape: Tape, budget: float, copies: int = 1) -> Sequence[Tensor]:
    """Split the rows of a tape into as many at a time as can be differentiated in so much memory.

    Args:
        adapter: The model.
        tape: A recorded run.
        budget: Bytes.
        copies: How many of each row one step holds.
    """
    each = call_bytes(adapter, tape.n_pos, tape.n_pos) * (adapter.n_layers + copies)
    return torch.arange(tape.n_rows).split(max(1, int(budget / each)))


def some_rows(tape: Tape, rows: Tensor) -> Tape:
    """Take some rows of a tape, without its keys and values."""
    where = rows.to(tape.resid[0].device)
    return Tape([r[where] for r in tape.resid], tape.calls, z=[z[where] for z in tape.z])
