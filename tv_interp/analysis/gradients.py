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
        swaps: Activations that were put in the place of the model's own.
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
        outer: Mapping[HookName, HookName] = MappingProxyType({}),
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
            outer: Further activations, each with the leaf whose gradients `pull_back` takes back to
                it.

        Raises:
            ScoreError: if the metric cannot be differentiated.
            ModelError: if the model discards edits of a leaf, or gradients are NaN or infinite.
        """
        names = list(leaves)
        self.swaps, self._calls = swaps, tape.calls
        planted = [*names, *outer]
        made: dict[HookName, Tensor] = {}
        whole: dict[HookName, Tensor] = {}
        self.resid: list[Tensor] = []
        self.seen: dict[HookName, Tensor] = {}

        def plant(name: HookName) -> Edit:
            def edit(activation: Tensor) -> Tensor:
                activation = swaps.get(name, activation)
                self.seen[name] = activation.detach()
                leaf = torch.zeros_like(self.seen[name], requires_grad=True)
                made[name], whole[name] = leaf, activation + leaf
                return whole[name]

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
        at, kept = [made[name] for name in names], bool(outer)
        found = torch.autograd.grad(values.sum(), at, allow_unused=True, retain_graph=kept)
        self._ends = {name: (whole[end], made[name]) for name, end in outer.items()}
        missing = [n for n, g in zip(names, found, strict=True) if g is None]
        if missing:
            raise ModelError(
                f"{adapter.name} discards edits of {missing[0][0]} in layer {missing[0][1]}, so "
                'its gradient cannot be taken: load it with backend="hooked"'
            )
        for name, gradient in zip(names, found, strict=True):
            if not gradient.sum().isfinite() and not gradient.isfinite().all():
                raise not_finite(adapter, f"gradients at {name[0]} of layer {name[1]}")
        self.gradients = dict(zip(names, found, strict=True))

    @property
    def tape(self) -> Tape:
        """This run as if it had been recorded, where all z are leaves; without keys and values."""
        layers = range(len(self.resid) - 1)
        return Tape(self.resid, self._calls, z=[self.seen["z", layer] for layer in layers])

    def pull_back(
        self, name: HookName, cotangents: Float[Tensor, "each ..."]
    ) -> Float[Tensor, "each ..."]:
        """Take gradients at the leaf behind an activation back to it, several at once.

        Each activation once, from the last layer down: what is not needed any more is let go.
        """
        outer, inner = self._ends.pop(name)
        kept = bool(self._ends)
        return torch.autograd.grad(
            outer, inner, cotangents, is_grads_batched=True, retain_graph=kept
        )[0]


def few_rows(adapter: Adapter, tape: Tape, budget: float, copies: int = 1) -> Sequence[Tensor]:
    """Split the rows of a tape into as many at a time as can be differentiated in so much memory.

    Args:
        adapter: The model.
        tape: A recorded run.
        budget: Bytes.
        copies: How many of each row one step holds.
    """
    each = call_bytes(adapter, tape.n_pos, tape.n_pos) * (adapter.n_layers + copies)
    n_steps = -(-tape.n_rows // max(1, int(budget / each)))
    return torch.arange(tape.n_rows).chunk(n_steps)  # steps of equal size need the least memory


def some_rows(tape: Tape, rows: Tensor) -> Tape:
    """Take some rows of a tape, without its keys and values."""
    where = rows.to(tape.resid[0].device)
    return Tape([r[where] for r in tape.resid], tape.calls, z=[z[where] for z in tape.z])
