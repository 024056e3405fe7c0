"""Run a model with its edges set one by one: each carries what its sender writes, or not.

Every input of every receiver is put together from all senders below it: from those whose edge is
kept what they write in this run, from the others what they write when ablated. Layer by layer the
inputs of all heads, by place of the head, are normed, mapped to q, k and v, and attended with.
Keeping all edges is the model; keeping none is the ablated run.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from ..errors import unknown
from ..interventions.recording import Run
from ..models.adapter import Edit, HookName
from ..models.parts import VIA, Parts, Via
from ..models.replay import Layout, Tape
from ..prompts import Prompts
from ..scores.metrics import Readout
from .attribution import Outputs
from .gradients import few_rows, some_rows
from .graph import RoleGraph

Ablation = Literal["corrupted", "mean", "zero"]
ABLATIONS: tuple[Ablation, ...] = ("corrupted", "mean", "zero")


def check_ablation(ablation: str) -> None:
    """Refuse an unknown ablation.

    Raises:
        UnknownName: if it is none of `ABLATIONS`.
    """
    if ablation not in ABLATIONS:
        raise unknown("ablation", ablation, ABLATIONS)


class Ablated:
    """What senders write when they are ablated.

    At a token: what the sender writes there in the corrupted run (``"corrupted"``), the mean of
    that over the same tokens (role, demonstration, and place in its span) of all prompts
    (``"mean"``), or nothing (``"zero"``).
    """

    def __init__(self, parts: Parts, prompts: Prompts, corrupted: Run, ablation: Ablation) -> None:
        """Average over the tokens of the corrupted run, where means are asked for.

        Args:
            parts: The model.
            prompts: The prompts whose run is ablated.
            corrupted: The corrupted run of them.
            ablation: Which of the three.

        Raises:
            UnknownName: for an unknown ablation.
        """
        check_ablation(ablation)
        self.parts, self.ablation = parts, ablation
        self.prompts = prompts
        self.mean = _means(parts, corrupted) if ablation == "mean" else None

    def senders(
        self, rows: Tensor, outputs: Outputs, other: Tape
    ) -> Float[Tensor, "row pos sender d_model"]:
        """Get it for some prompts.

        Args:
            rows: Which prompts.
            outputs: What senders write in the run that is ablated.
            other: The corrupted run of the same prompts.
        """
        if self.ablation == "corrupted":
            return Outputs.of(self.parts, other).senders()
        return self._fixed(rows, outputs.senders())

    def change(
        self, rows: Tensor, outputs: Outputs, other: Tape
    ) -> Float[Tensor, "row token sender d_model"]:
        """Get it less what senders write: of the last so many tokens; those before do not change.

        In front of the first token that differs the corrupted run is the same.
        """
        if self.ablation == "corrupted":
            differ = (other.resid[0] != outputs.tape.resid[0]).any(2).any(0)
            return Outputs.of(self.parts, other).minus(outputs, int(differ.int().argmax()))
        senders = outputs.senders()
        return self._fixed(rows, senders) - senders

    def _fixed(self, rows: Tensor, senders: Tensor) -> Float[Tensor, "row pos sender d_model"]:
        """Get what is written whatever the corrupted run of these prompts is."""
        if self.mean is None:
            return torch.zeros_like(senders)
        return self.mean.at(self.prompts, rows, senders.shape[1]).to(senders)


class EdgeRunner:
    """Prompts whose run can be made with any set of edges.

    What edges carry that are not kept is `Ablated`.
    """

    def __init__(
        self,
        graph: RoleGraph,
        parts: Parts,
        runs: tuple[Run, Run],
        masks: Bool[Tensor, "prompt pos place"],
        readout: Readout,
        ablation: Ablation = "corrupted",
    ) -> None:
        """Compute what is ablated.

        Args:
            graph: The graph.
            parts: The model.
            runs: The clean and the corrupted run.
            masks: The graph's places.
            readout: The metric.
            ablation: What edges carry that are not kept.

        Raises:
            UnknownName: for an unknown ablation.
        """
        self.graph, self.parts, self.readout = graph, parts, readout
        clean, corrupted = runs
        self.batches: list[_Batch] = []
        ablated = Ablated(parts, clean.prompts, corrupted, ablation)
        for (rows, tape), (_, other) in zip(clean.tapes(), corrupted.tapes(), strict=True):
            for some in few_rows(parts.adapter, tape, clean.max_memory, 4 * graph.n_senders):
                here = some_rows(tape, some)
                outputs = Outputs.of(parts, here)
                off = ablated.senders(rows[some], outputs, some_rows(other, some))
                at = masks[rows[some], : tape.n_pos].to(off)
                change = outputs.senders() - off
                self.batches.append(_Batch(rows[some], here, outputs.constant, off, change, at))

    def sends(self) -> Bool[ndarray, "place sender"]:
        """Mark senders whose output at a place is another one when ablated."""
        found = torch.zeros(len(self.graph.places), self.graph.n_senders, dtype=torch.bool)
        for batch in self.batches:
            size = batch.change.abs().amax(-1)
            found |= (torch.einsum("btp,bts->ps", batch.at, size) > 0).cpu()
        return found.numpy()

    def run(
        self, kept: Bool[ndarray, "*variant edge"], *, first: int = 0
    ) -> Float[Tensor, "*variant prompt"]:
        """Run all prompts with some edges kept and read the metric.

        Args:
            kept: The edges: one set, or one for each variant of several that are run side by side.
            first: A layer such that all edges into layers below it are kept, in all variants: what
                is below is as it was.
        """
        sets = np.atleast_2d(kept)
        n = sum(len(batch.rows) for batch in self.batches)
        values: Tensor | None = None
        keep = {
            key: torch.from_numpy((table >= 0) & sets[:, table])
            for key, table in self.graph.numbers.items()
        }
        used = self._used(keep)
        for batch in self.batches:
            logits = self._logits(keep, used, batch, first).flatten(0, 1)
            found = self.readout(logits, batch.rows.repeat(len(sets)))
            found = found.view(len(sets), len(batch.rows))
            values = torch.zeros(len(sets), n, dtype=found.dtype) if values is None else values
            values[:, batch.rows] = found
        assert values is not None
        return values if kept.ndim == 2 else values[0]

    def _used(self, keep: dict[tuple[str, int], Tensor]) -> Bool[Tensor, "place sender"]:
        """Mark senders that some edge is kept of, in any variant."""
        used = torch.zeros(len(self.graph.places), self.graph.n_senders, dtype=torch.bool)
        for table in keep.values():  # [variant, source place, sender, ...]
            some = table.any(0).flatten(2).any(-1) if table.ndim > 3 else table.any(0)
            used[:, : some.shape[1]] |= some
        return used

    def _logits(
        self, keep: dict[tuple[str, int], Tensor], used: Tensor, batch: _Batch, first: int
    ) -> Float[Tensor, "variant row vocab"]:
        """Put one batch through the layers, from one on, in all variants.

        The axis of variants is of length 1 as long as they do not differ.
        """
        graph, parts, tape = self.graph, self.parts, batch.tape
        off, constant, at = batch.off, batch.constant, batch.at
        change = batch.change[None, :, :, : graph.below(first)]
        extra = constant[:first].sum(0)  # what no sender wrote
        for layer in range(first, graph.n_layers):
            n = graph.below(layer)
            plain = off[:, :, :n].sum(2) + extra
            z = self._attend(keep, used, tape, layer, plain, change, at)
            heads = parts.writes(layer, z.flatten(0, 1)).unflatten(0, z.shape[:2])
            change = _join(change, heads - off[:, :, n : n + graph.n_heads])
            if graph.has_mlp:
                n_read = graph.below(layer, "mlp")
                added = constant[layer] if graph.order == "serial" else 0
                plain = off[:, :, :n_read].sum(2) + extra + added
                x = plain + self._kept(keep["mlp", layer], change[..., :n_read, :], at)
                out = parts.mlp(tape, layer, x.flatten(0, 1)).view(x.shape)
                number = graph.below(layer + 1) - 1
                change = _join(change, (out - off[:, :, number])[..., None, :])
            extra = extra + constant[layer]
        x = off.sum(2) + extra + self._kept(keep["logits", graph.n_layers], change, at)
        x = x.expand(len(keep["logits", graph.n_layers]), *x.shape[1:])
        logits = parts.adapter.logits(x[:, :, -1:].flatten(0, 1))
        return logits[:, 0].unflatten(0, x.shape[:2])

    def _kept(
        self,
        chosen: Bool[Tensor, "variant place sender *receiver"],
        change: Float[Tensor, "variant row pos sender d_model"],
        at: Float[Tensor, "row pos place"],
    ) -> Float[Tensor, "variant row pos *receiver d_model"]:
        """Sum the changes of kept senders, for each receiver, by the place of the token."""
        if (chosen == chosen[:1]).all():
            chosen = chosen[:1]
        some = chosen.to(at)
        if chosen.ndim == 3:
            return self._kept(chosen[..., None], change, at)[..., 0, :]
        return torch.einsum("btp,vpsr->vbtrs", at, some) @ change

    def _attend(
        self,
        keep: dict[tuple[str, int], Tensor],
        used: Bool[Tensor, "place sender"],
        tape: Tape,
        layer: int,
        plain: Float[Tensor, "row pos d_model"],
        change: Float[Tensor, "variant row pos sender d_model"],
        at: Float[Tensor, "row pos place"],
    ) -> Float[Tensor, "variant row pos head d_head"]:
        """Run a layer's attention with an input of its own for each head, via and place of it.

        Heads of which no edge is kept are not run: what they write goes nowhere.
        """
        graph, adapter = self.graph, self.parts.adapter
        own = used[:, graph.below(layer) : graph.below(layer) + graph.n_heads].any(1)
        z = plain.new_zeros(1, *plain.shape[:2], adapter.n_heads, adapter.d_head)
        for dest in range(len(graph.places)):
            if not (graph.is_live(layer, dest) and own[dest]):
                continue
            inputs: dict[Via, Tensor] = {
                via: self._input(keep[via, layer][:, :, :, dest], layer, via, plain, change, at)
                for via in VIA
            }
            z = z + self._z(tape, layer, plain, inputs) * at[:, :, dest, None, None]
        return z

    def _input(
        self,
        chosen: Bool[Tensor, "variant place sender head"],
        layer: int,
        via: Via,
        plain: Tensor,
        change: Tensor,
        at: Tensor,
    ) -> Float[Tensor, "variant row pos head d_head"]:
        """Compute each head's q, k or v from its own input."""
        x = plain[:, :, None] + self._kept(chosen, change, at)
        weight, bias = self.parts.weights(layer, via)
        normed = self.parts.norm(layer, x.permute(0, 3, 1, 2, 4))
        return torch.einsum("vhbtd,hde->vbthe", normed, weight) + bias

    def _z(
        self, tape: Tape, layer: int, x: Tensor, inputs: dict[Via, Tensor]
    ) -> Float[Tensor, "variant row pos head d_head"]:
        """Attend with given q, k and v of each query head; heads that share keys take turns."""
        adapter = self.parts.adapter
        n_turns = adapter.n_heads // adapter.n_kv_heads
        shape = max(len(each) for each in inputs.values()), len(x)

        def put(via: Via) -> Edit:
            new = inputs[via].expand(shape[0], *inputs[via].shape[1:]).flatten(0, 1)
            if via == "q":
                new = new.repeat(n_turns, 1, 1, 1)
            else:  # turn i has the keys that the i-th head of each group reads
                new = new.unflatten(2, (adapter.n_kv_heads, n_turns)).permute(3, 0, 1, 2, 4)
                new = new.flatten(0, 1)
            return lambda activation: new.to(activation.dtype)

        edits: dict[HookName, Edit] = {(via, layer): put(via) for via in VIA}
        layout = Layout.suffix(0, tape.n_pos)
        copies = x.repeat(n_turns * shape[0], 1, 1)
        z = adapter.block(tape, layer, copies, layout, edits=edits, until="z")
        turns = z.unflatten(0, (n_turns, *shape))
        each = [turns[h % n_turns, :, :, :, h] for h in range(adapter.n_heads)]
        return torch.stack(each, 3)


class _Batch(NamedTuple):
    """Prompts of equal length: their rows, run, what is ablated and what that changes."""

    rows: Tensor
    tape: Tape
    constant: Float[Tensor, "layer d_model"]
    off: Float[Tensor, "row pos sender d_model"]
    change: Float[Tensor, "row pos sender d_model"]
    at: Float[Tensor, "row pos place"]


def _join(
    change: Float[Tensor, "variant row pos sender d_model"],
    more: Float[Tensor, "variant row pos sender d_model"],
) -> Float[Tensor, "variant row pos sender d_model"]:
    """Put more senders behind, in as many variants as either has."""
    n = max(len(change), len(more))
    return torch.cat([part.expand(n, *part.shape[1:]) for part in (change, more)], 3)


class _means:
    """Mean outputs of all senders over prompts, for tokens of one role, demonstration and place."""

    def __init__(self, parts: Parts, run: Run) -> None:
        """Average over the tokens of a run."""
        self.sums: dict[tuple[int, int, int], tuple[Tensor, int]] = {}
        for rows, tape in run.tapes():
            senders = Outputs.of(parts, tape).senders()
            for i, keys in enumerate(self._keys(run.prompts, rows, tape.n_pos)):
                for pos, key in enumerate(keys):
                    total, n = self.sums.get(key, (torch.zeros_like(senders[i, pos]), 0))
                    self.sums[key] = total + senders[i, pos], n + 1

    def at(self, prompts, rows: Tensor, n_pos: int) -> Float[Tensor, "row pos sender d_model"]:
        """Look up the tokens of some prompts."""
        return torch.stack(
            [
                torch.stack([self.sums[k][0] / self.sums[k][1] for k in keys])
                for keys in self._keys(prompts, rows, n_pos)
            ]
        )

    @staticmethod
    def _keys(prompts, rows: Tensor, n_pos: int) -> list[list[tuple[int, int, int]]]:
        """Name each token by role, demonstration and place within its span."""
        out = []
        for row in rows.tolist():
            roles, demos = prompts.role_ids[row, :n_pos], prompts.demo_ids[row, :n_pos]
            seen: dict[tuple[int, int], int] = {}
            keys = []
            for role, demo in zip(roles.tolist(), demos.tolist(), strict=True):
                place = seen.get((role, demo), 0)
                seen[role, demo] = place + 1
                keys.append((role, demo, place))
            out.append(keys)
        return out
