"""Run a model with its edges set one by one: each carries what its sender writes, or not.

Every input of every receiver is put together from all senders below it: from those whose edge is
kept what they write in this run, from the others what they write when ablated. Layer by layer the
inputs of all heads, by place of the head, are normed, mapped to q, k and v, and attended with.
Keeping all edges is the model; keeping none is the ablated run.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from ..errors import unknown
from ..interventions.recording import Run
from ..models.adapter import Edit, HookName
from ..models.parts import VIA, Parts, Via
from ..models.replay import Layout, Tape
from ..scores.metrics import Readout
from .attribution import Outputs
from .gradients import few_rows, some_rows
from .graph import RoleGraph

Ablation = Literal["corrupted", "mean", "zero"]
ABLATIONS: tuple[Ablation, ...] = ("corrupted", "mean", "zero")


class EdgeRunner:
    """Prompts whose run can be made with any set of edges.

    The ablated output of a sender at a token is what it writes there in the corrupted run
    (``"corrupted"``), the mean of that over the same tokens (role, demonstration, and place in its
    span) of all prompts (``"mean"``), or nothing (``"zero"``).
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
        if ablation not in ABLATIONS:
            raise unknown("ablation", ablation, ABLATIONS)
        self.graph, self.parts, self.readout = graph, parts, readout
        clean, corrupted = runs
        self.batches: list[tuple[Tensor, Tape, Tensor, Tensor, Tensor]] = []
        mean = _means(parts, corrupted) if ablation == "mean" else None
        for (rows, tape), (_, other) in zip(clean.tapes(), corrupted.tapes(), strict=True):
            for some in few_rows(parts.adapter, tape, clean.max_memory, 4 * graph.n_senders):
                here = some_rows(tape, some)
                constant = Outputs.of(parts, here).constant
                off = Outputs.of(parts, some_rows(other, some)).senders
                if ablation == "zero":
                    off = torch.zeros_like(off)
                elif mean is not None:
                    off = mean.at(clean.prompts, rows[some], tape.n_pos).to(off)
                at = masks[rows[some], : tape.n_pos].to(off)
                self.batches.append((rows[some], here, constant, off, at))

    def run(self, kept: Bool[ndarray, " edge"]) -> Float[Tensor, " prompt"]:
        """Run all prompts with some edges kept and read the metric."""
        n = sum(len(rows) for rows, *_ in self.batches)
        values: Tensor | None = None
        keep = {k: torch.from_numpy((v >= 0) & kept[v]) for k, v in self.graph.numbers.items()}
        for rows, tape, constant, off, at in self.batches:
            logits = self._logits(keep, tape, constant, off, at)
            found = self.readout(logits, rows)
            values = torch.zeros(n, dtype=found.dtype) if values is None else values
            values[rows] = found
        assert values is not None
        return values

    def _logits(
        self,
        keep: dict[tuple[str, int], Tensor],
        tape: Tape,
        constant: Tensor,
        off: Tensor,
        at: Tensor,
    ) -> Float[Tensor, "row vocab"]:
        """Put one batch through the layers."""
        graph, parts = self.graph, self.parts
        x = tape.resid[0]
        extra = x.new_zeros(x.shape)  # what no sender wrote
        change = x[:, :, None] - off[:, :, :1]  # of each sender so far from its ablated output
        for layer in range(graph.n_layers):
            n = graph.below(layer)
            plain = off[:, :, :n].sum(2) + extra
            z = self._attend(keep, tape, layer, plain, change, at)
            heads = parts.writes(layer, z)
            change = torch.cat([change, heads - off[:, :, n : n + graph.n_heads]], 2)
            if graph.has_mlp:
                n_read = graph.below(layer, "mlp")
                added = constant[:, :, layer] if graph.order == "serial" else 0
                plain = off[:, :, :n_read].sum(2) + extra + added
                chosen = keep["mlp", layer].to(at)  # [place, sender]
                x = plain + self._kept(chosen[..., None], change[:, :, :n_read], at)[:, :, 0]
                out = parts.mlp(tape, layer, x)
                number = graph.below(layer + 1) - 1
                change = torch.cat([change, (out - off[:, :, number])[:, :, None]], 2)
            extra = extra + constant[:, :, layer]
        chosen = keep["logits", graph.n_layers].to(at)
        x = off.sum(2) + extra + self._kept(chosen[..., None], change, at)[:, :, 0]
        return parts.adapter.logits(x[:, -1:])[:, 0]

    def _kept(
        self,
        chosen: Float[Tensor, "place sender receiver"],
        change: Float[Tensor, "row pos sender d_model"],
        at: Float[Tensor, "row pos place"],
    ) -> Float[Tensor, "row pos receiver d_model"]:
        """Sum the changes of kept senders, for each receiver, by the place of the token."""
        weight = torch.einsum("btp,psr->btrs", at, chosen)
        return weight @ change

    def _attend(
        self,
        keep: dict[tuple[str, int], Tensor],
        tape: Tape,
        layer: int,
        plain: Float[Tensor, "row pos d_model"],
        change: Float[Tensor, "row pos sender d_model"],
        at: Float[Tensor, "row pos place"],
    ) -> Float[Tensor, "row pos head d_head"]:
        """Run a layer's attention with an input of its own for each head, via and place of it."""
        graph = self.graph
        heads: list[Tensor] = []
        for dest in range(len(graph.places)):
            if not graph.is_live(layer, dest):
                continue
            inputs: dict[Via, Tensor] = {
                via: self._input(keep[via, layer][:, :, dest].to(at), layer, via, plain, change, at)
                for via in VIA
            }
            heads.append(self._z(tape, layer, plain, inputs) * at[:, :, dest, None, None])
        return torch.stack(heads).sum(0)

    def _input(
        self,
        chosen: Float[Tensor, "place sender head"],
        layer: int,
        via: Via,
        plain: Tensor,
        change: Tensor,
        at: Tensor,
    ) -> Float[Tensor, "row pos head d_head"]:
        """Compute each head's q, k or v from its own input."""
        x = plain[:, :, None] + self._kept(chosen, change, at)
        weight, bias = self.parts.weights(layer, via)
        normed = self.parts.norm(layer, x.permute(2, 0, 1, 3))
        return torch.einsum("hbtd,hde->bthe", normed, weight) + bias

    def _z(
        self, tape: Tape, layer: int, x: Tensor, inputs: dict[Via, Tensor]
    ) -> Float[Tensor, "row pos head d_head"]:
        """Attend with given q, k and v of each query head; heads that share keys take turns."""
        adapter, n_rows = self.parts.adapter, len(x)
        n_turns = adapter.n_heads // adapter.n_kv_heads

        def put(via: Via) -> Edit:
            new = inputs[via]
            if via == "q":
                new = new.repeat(n_turns, 1, 1, 1)
            else:  # turn i has the keys that the i-th head of each group reads
                new = new.unflatten(2, (adapter.n_kv_heads, n_turns)).permute(3, 0, 1, 2, 4)
                new = new.flatten(0, 1)
            return lambda activation: new.to(activation.dtype)

        edits: dict[HookName, Edit] = {(via, layer): put(via) for via in VIA}
        layout = Layout.suffix(0, tape.n_pos)
        copies = x.repeat(n_turns, 1, 1)
        z = adapter.block(tape, layer, copies, layout, edits=edits, until="z")
        turns = z.unflatten(0, (n_turns, n_rows))
        each = [turns[h % n_turns, :, :, h] for h in range(adapter.n_heads)]
        return torch.stack(each, 2)


class _means:
    """Mean outputs of all senders over prompts, for tokens of one role, demonstration and place."""

    def __init__(self, parts: Parts, run: Run) -> None:
        """Average over the tokens of a run."""
        self.sums: dict[tuple[int, int, int], tuple[Tensor, int]] = {}
        for rows, tape in run.tapes():
            senders = Outputs.of(parts, tape).senders
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
