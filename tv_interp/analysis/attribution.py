"""Attribution of edges: what each edge carries to first order, all at once.

The score of an edge from sender u at place s to receiver r is

    sum over tokens t of s of (u_clean - u_corrupted)[t] . dm/d(input of r)[t]

EAP (Syed et al. 2023, arXiv 2310.10348) takes the gradient in the run that is patched: the clean
one for ``direction="noise"``, the corrupted one for ``"denoise"``. EAP-IG (Hanna et al. 2024, arXiv
2403.17806) averages it over runs between the two: with the embeddings interpolated (inputs), or
with the output of the sender's own attention layer or MLP interpolated in the clean or corrupted
run (activations). Positive: the edge carries the task, as with exact patching of it.

No input is split. The gradient at an input of a head is that at its q, k or v, mapped back through
the linear map and the norm's Jacobian; at an MLP's input it is what is left of the residual
stream's gradient when all else that reads there is taken away. Keys and values are read by heads at
several places: the gradient through those at one place is a backward pass of attention alone from
z at that place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from ..interventions.recording import Run
from ..models.adapter import HookName
from ..models.finite import not_finite
from ..models.parts import VIA, Parts, Via
from ..models.replay import Layout, Tape
from ..scores.metrics import Readout
from .gradients import Walk, few_rows, some_rows
from .graph import RoleGraph

Gradient = Literal["eap", "eap-ig", "eap-ig-activations"]


@dataclass(frozen=True, eq=False)
class Outputs:
    """What all senders write in one run, for some rows of equal length.

    Attributes:
        senders: ``[row, pos, sender, d_model]`` in the graph's order.
        constant: What each layer adds besides, attention's bias, ``[layer, d_model]``.
        heads: What attention adds as a whole, layer by layer.
        mlps: What MLPs add.
    """

    senders: Float[Tensor, "row pos sender d_model"]
    constant: Float[Tensor, "layer d_model"]
    heads: list[Float[Tensor, "row pos d_model"]]
    mlps: list[Float[Tensor, "row pos d_model"]]

    @classmethod
    def of(cls, parts: Parts, tape: Tape) -> Outputs:
        """Compute them from a recorded run.

        What an MLP adds is what the residual stream changes by, attention's part apart; in half
        precision, where little would be left of it, its block runs again.
        """
        adapter, resid = parts.adapter, tape.resid
        senders, heads, mlps = [resid[0][:, :, None]], [], []
        biases = [parts.bias(layer) for layer in adapter.layers]
        is_half = resid[0].dtype in (torch.bfloat16, torch.float16)
        for layer in adapter.layers:
            senders.append(parts.writes(layer, tape.z[layer]))
            heads.append(senders[-1].sum(2) + biases[layer])
            if parts.has_mlp:
                name: HookName = ("mlp_out", layer)
                if is_half:
                    mlps.append(adapter.read_block(tape, layer, [name])[name])
                else:
                    mlps.append(resid[layer + 1] - resid[layer] - heads[-1])
                senders.append(mlps[-1][:, :, None])
        return cls(torch.cat(senders, 2), torch.stack(biases), heads, mlps)


Written = Callable[[Tensor, Outputs, Tape], Float[Tensor, "row pos sender d_model"]]


def attribute(
    graph: RoleGraph,
    parts: Parts,
    runs: tuple[Run, Run],
    masks: Bool[Tensor, "prompt pos place"],
    readout: Readout,
    ablated: Written,
    *,
    method: Gradient,
    points: Sequence[float],
    progress: bool = False,
) -> Float[np.ndarray, "prompt edge"]:
    """Attribute the metric to all edges.

    Args:
        graph: Whose edges.
        parts: The model.
        runs: The run whose gradient EAP takes, and the other.
        masks: The graph's places.
        readout: The metric.
        ablated: What senders write instead, ``[row, pos, sender, d_model]``, given rows, what they
            write in the first run, and the other run.
        method: ``"eap"``, ``"eap-ig"`` (inputs) or ``"eap-ig-activations"``.
        points: Where runs lie between the two, 0 at the first; EAP takes none.
        progress: Whether to show a bar.

    Returns:
        Scores of the change from the first run to the other, ``[prompt, edge]``.

    Raises:
        ModelError: if a score is NaN or infinite.
    """
    base, other = runs
    adapter = parts.adapter
    out = np.zeros((len(base.prompts), len(graph.edges)))
    pairs = list(zip(base.tapes(), other.tapes(), strict=True))
    copies = graph.n_heads + graph.n_senders
    for (rows, tape), (_, donor) in tqdm(pairs, "edges", disable=not progress, leave=False):
        for some in few_rows(adapter, tape, base.max_memory, copies):
            here, there = some_rows(tape, some), some_rows(donor, some)
            which = rows[some]
            at = masks[which, : tape.n_pos].to(adapter.device)
            step = _Step(graph, parts, here, at, readout, which)
            ours = Outputs.of(parts, here)
            change = ablated(which, ours, there) - ours.senders
            found = np.zeros((len(which), len(graph.edges)))
            if method == "eap":
                step.add(found, change, here.resid[0], 1.0)
            elif method == "eap-ig":
                for a in points:
                    between = here.resid[0] + a * change[:, :, 0]
                    step.add(found, change, between, 1 / len(points))
            else:
                for senders, swap in _groups(graph, here, ours, change):
                    part = torch.zeros_like(change)
                    part[:, :, senders] = change[:, :, senders]
                    for a in points:
                        x, swaps = swap(a)
                        step.add(found, part, x, 1 / len(points), swaps)
            out[which.numpy()] = found
    if not np.isfinite(out).all():
        raise not_finite(adapter, "scores")
    return out


def _groups(
    graph: RoleGraph, here: Tape, ours: Outputs, change: Float[Tensor, "row pos sender d_model"]
) -> Iterator[tuple[slice, Callable[[float], tuple[Tensor, dict[HookName, Tensor]]]]]:
    """Go through what is interpolated by itself: the embedding, each layer's heads, each MLP."""
    x = here.resid[0]
    yield slice(0, 1), lambda a: (x + a * change[:, :, 0], {})

    def swap(
        name: HookName, old: Tensor, senders: slice
    ) -> Callable[[float], tuple[Tensor, dict[HookName, Tensor]]]:
        return lambda a: (x, {name: old + a * change[:, :, senders].sum(2)})

    for layer in range(graph.n_layers):
        first = graph.below(layer)
        heads = slice(first, first + graph.n_heads)
        yield heads, swap(("attn_out", layer), ours.heads[layer], heads)
        if graph.has_mlp:
            mlp = slice(heads.stop, heads.stop + 1)
            yield mlp, swap(("mlp_out", layer), ours.mlps[layer], mlp)


class _Step:
    """One run between two, and its gradients at all receivers."""

    def __init__(
        self,
        graph: RoleGraph,
        parts: Parts,
        tape: Tape,
        masks: Bool[Tensor, "row pos place"],
        readout: Readout,
        rows: Tensor,
    ) -> None:
        """Keep some rows of a recorded run."""
        self.graph, self.parts, self.tape = graph, parts, tape
        self.masks, self.readout, self.rows = masks.to(tape.resid[0].dtype), readout, rows

    def add(
        self,
        found: Float[np.ndarray, "row edge"],
        change: Float[Tensor, "row pos sender d_model"],
        x: Float[Tensor, "row pos d_model"],
        weight: float,
        swaps: Mapping[HookName, Tensor] = MappingProxyType({}),
    ) -> None:
        """Add the scores of one run, from ``x`` and with some activations swapped.

        Where a layer's output is swapped, what comes before it is the same whatever it is, so only
        edges from there on are meant.
        """
        graph, serial = self.graph, self.graph.has_mlp and self.graph.order == "serial"
        first = min((layer for _, layer in swaps), default=0)
        attends = range(first + bool(swaps), graph.n_layers)
        leaves: list[HookName] = [(w, la) for w in ("z", "attn_scores", "q") for la in attends]
        reads = range(first + 1 if serial else attends.start, graph.n_layers + 1)
        leaves += [("resid_pre", layer) for layer in reads]
        leaves += [("attn_out", la) for la in range(first, graph.n_layers) if serial]
        leaves = list(dict.fromkeys([*leaves, *swaps]))
        outer: dict[HookName, HookName] = {("v", layer): ("z", layer) for layer in attends}
        outer |= {("k", layer): ("attn_scores", layer) for layer in attends}
        run = self.parts.adapter, self.tape, x, self.readout, self.rows
        walk = Walk(*run, leaves, swaps, outer)
        at = walk.gradients
        for layer in reversed(range(first, graph.n_layers)):
            if layer in attends:
                by_via = self._at_qkv(walk, layer)
                some = change[:, :, : graph.below(layer)]
                self._add_heads(found, layer, walk.resid[layer], some, by_via, weight)
            if serial:
                at_mlp = at["attn_out", layer] - at["resid_pre", layer + 1]
            elif graph.has_mlp and layer in attends:
                by_heads = self._onto_stream(layer, walk.resid[layer], by_via)
                at_mlp = at["resid_pre", layer] - at["resid_pre", layer + 1] - by_heads
            else:
                continue
            some = change[:, :, : graph.below(layer, "mlp")]
            _add(found, graph.numbers["mlp", layer], self._products(some, at_mlp), weight)
        products = self._products(change, at["resid_pre", graph.n_layers])
        _add(found, graph.numbers["logits", graph.n_layers], products, weight)

    def _products(
        self,
        change: Float[Tensor, "row pos sender d_model"],
        gradient: Float[Tensor, "row pos d_model"],
    ) -> Float[Tensor, "row place sender"]:
        """Multiply changes with a gradient and sum over the tokens of the sender's place."""
        return torch.einsum("bts,btp->bps", (change @ gradient[..., None])[..., 0], self.masks)

    def _add_heads(
        self,
        found: Float[np.ndarray, "row edge"],
        layer: int,
        x: Float[Tensor, "row pos d_model"],
        change: Float[Tensor, "row pos sender d_model"],
        gradients: Mapping[Via, Float[Tensor, "dest row pos head d_head"]],
        weight: float,
    ) -> None:
        """Add the scores of the edges into a layer's heads, at all places where these are.

        Senders are fewer than heads at places, three ways in: what they change is taken through the
        norm, rather than the gradients back through it. A query is of its own place, so those of
        all places are one gradient.
        """
        graph, changed = self.graph, self.parts.through_norm(layer, x, change)
        where, dests = np.arange(len(graph.places)), self._dests(layer)
        for via, gradient in gradients.items():
            products = self._into(layer, via, changed, gradient)
            if via == "q":
                _add(found, graph.numbers["q", layer][where, :, where], products[:, :, :, 0], weight)
            else:
                _add(found, graph.numbers[via, layer][:, :, dests], products, weight)

    def _dests(self, layer: int) -> list[int]:
        """List the places where a layer's heads reach the logits."""
        return [d for d in range(len(self.graph.places)) if self.graph.is_live(layer, d)]

    def _into(
        self,
        layer: int,
        via: Via,
        changed: Float[Tensor, "row pos sender d_model"],
        gradient: Float[Tensor, "dest row pos head d_head"],
    ) -> Float[Tensor, "row place sender dest head"]:
        """Multiply changes, taken through the norm, with gradients at q, k or v.

        Whichever are fewer are mapped to where the others are.
        """
        maps, _ = self.parts.weights(layer, via)
        if changed.shape[2] < len(gradient):
            mapped = torch.einsum("btsd,hde->bthse", changed, maps)
            products = mapped @ gradient.permute(1, 2, 3, 4, 0)  # [row, pos, head, sender, dest]
            products = products.permute(0, 1, 3, 4, 2)
        else:
            gradient = gradient.movedim(0, 2)
            flat = gradient.flatten(0, 2)
            normed = flat.new_empty(*flat.shape[:2], changed.shape[-1])
            for head, to_normed in enumerate(maps.mT):  # each written where it belongs
                torch.mm(flat[:, head], to_normed, out=normed[:, head])
            shape = gradient.shape[:2], gradient.shape[2:4]
            products = changed @ normed.view(*shape[0], -1, changed.shape[-1]).mT
            products = products.unflatten(3, shape[1])
        return torch.einsum("btsph,btq->bqsph", products, self.masks)

    def _onto_stream(
        self,
        layer: int,
        x: Float[Tensor, "row pos d_model"],
        gradients: Mapping[Via, Float[Tensor, "dest row pos head d_head"]],
    ) -> Float[Tensor, "row pos d_model"]:
        """Get the gradient that reaches the residual stream through a layer's heads."""
        x = x.clone().requires_grad_(True)
        at_normed = torch.zeros_like(x)
        for via, gradient in gradients.items():
            maps, _ = self.parts.weights(layer, via)
            at_normed += torch.einsum("dbthe,hme->btm", gradient, maps)
        return torch.autograd.grad(self.parts.norm(layer, x, gradients="on"), x, at_normed)[0]

    def _at_qkv(
        self, walk: Walk, layer: int
    ) -> dict[Via, Float[Tensor, "dest row pos head d_head"]]:
        """Get the gradients at each query head's own q, k and v, for keys and values by place.

        Heads at a place read through their own rows of attention, so it is those alone that are
        taken back. Heads that share keys and values take turns, as the places do.
        """
        adapter, at = self.parts.adapter, walk.gradients
        by_dest = self.masks[:, :, self._dests(layer)].movedim(2, 0)  # [dest, row, pos]
        n_turns = adapter.n_heads // adapter.n_kv_heads
        turn = torch.arange(adapter.n_heads, device=by_dest.device) % n_turns
        turns = (torch.arange(n_turns, device=turn.device)[:, None] == turn).to(by_dest)
        ends: dict[Via, Tensor] = {
            "k": torch.einsum("bhij,dbi,gh->dgbhij", at["attn_scores", layer], by_dest, turns),
            "v": torch.einsum("bihe,dbi,gh->dgbihe", at["z", layer], by_dest, turns),
        }
        found: dict[Via, Tensor] = {"q": at["q", layer][None]}
        for via, wanted in ends.items():
            each = walk.pull_back((via, layer), wanted.flatten(0, 1)).unflatten(0, wanted.shape[:2])
            found[via] = each.permute(0, 2, 3, 4, 1, 5).flatten(3, 4)
        return found


def _add(
    found: np.ndarray, numbers: np.ndarray, values: Float[Tensor, "row ..."], weight: float
) -> None:
    """Add values to the edges with these numbers."""
    there = numbers >= 0
    found[:, numbers[there]] += weight * values.detach().cpu().numpy()[:, there]
