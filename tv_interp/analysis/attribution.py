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
        leaves: list[HookName] = [("z", layer) for layer in attends]
        leaves += [("resid_pre", la) for la in range(attends.start, graph.n_layers + 1)]
        leaves += [("attn_out", la) for la in range(first, graph.n_layers) if serial]
        leaves = list(dict.fromkeys([*leaves, *swaps]))
        inner = {("z", layer): [(via, layer) for via in VIA] for layer in attends}
        run = self.parts.adapter, self.tape, x, self.readout, self.rows
        walk = Walk(*run, leaves, swaps, inner)
        at = walk.gradients
        for layer in reversed(range(first, graph.n_layers)):
            if layer in attends:
                self._add_heads(found, walk, layer, change[:, :, : graph.below(layer)], weight)
            if serial:
                at_mlp = at["attn_out", layer] - at["resid_pre", layer + 1]
            elif graph.has_mlp and layer in attends:
                by_heads = self._onto_stream(layer, walk.resid[layer], at["z", layer])
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
        walk: Walk,
        layer: int,
        change: Float[Tensor, "row pos sender d_model"],
        weight: float,
    ) -> None:
        """Add the scores of the edges into a layer's heads, at all places where these are.

        Senders are fewer than heads at places, three ways in: what they change is taken through the
        norm, rather than the gradients back through it. A query is of its own place, so those of
        all places are one gradient.
        """
        graph, changed = self.graph, self._through_norm(layer, walk.resid[layer], change)
        dests = [d for d in range(len(graph.places)) if graph.is_live(layer, d)]
        q, k, v = self._at_qkv(walk, layer, dests)
        products = self._into(layer, "q", changed, q.sum(0, keepdim=True))[:, :, :, 0]
        where = np.arange(len(graph.places))
        numbers = graph.numbers["q", layer][where, :, where]
        _add(found, numbers, products, weight)
        for via, gradient in zip(VIA[1:], (k, v), strict=True):
            numbers = graph.numbers[via, layer][:, :, dests]
            _add(found, numbers, self._into(layer, via, changed, gradient), weight)

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
        at_z: Float[Tensor, "row pos head d_head"],
    ) -> Float[Tensor, "row pos d_model"]:
        """Get the gradient that reaches the residual stream through a layer's heads."""
        x, layout = x.clone().requires_grad_(True), Layout.suffix(0, x.shape[1])
        adapter = self.parts.adapter
        z = adapter.block(self.tape, layer, x, layout, until="z", gradients="on")
        return torch.autograd.grad(z, x, at_z)[0]

    def _through_norm(
        self, layer: int, x: Float[Tensor, "row pos d_model"], change: Tensor
    ) -> Float[Tensor, "row pos sender d_model"]:
        """Apply the Jacobian of the norm in front of attention.

        Its transpose is linear in the gradient that it is given, so its derivative by that is the
        Jacobian.
        """
        inputs, given = x.clone().requires_grad_(True), torch.zeros_like(x, requires_grad=True)
        out = self.parts.norm(layer, inputs, gradients="on")
        with torch.enable_grad():
            (back,) = torch.autograd.grad(out, inputs, given, create_graph=True)
        batch = change.movedim(2, 0)
        (changed,) = torch.autograd.grad(back, given, batch, is_grads_batched=True)
        return changed.movedim(0, 2)

    def _at_qkv(
        self, walk: Walk, layer: int, dests: Sequence[int]
    ) -> list[Float[Tensor, "dest row pos head d_head"]]:
        """Get the gradients at each query head's own q, k and v, through its z at some places.

        Heads that share keys and values take turns, as the places do.
        """
        at_z = walk.gradients["z", layer]
        from_dests = at_z * self.masks[:, :, dests].movedim(2, 0)[..., None, None]
        adapter = self.parts.adapter
        n_turns = adapter.n_heads // adapter.n_kv_heads
        turn = torch.arange(adapter.n_heads, device=at_z.device) % n_turns
        turns = torch.arange(n_turns, device=at_z.device)[:, None] == turn  # [turn, head]
        wanted = torch.where(turns[:, None, None, None, :, None], from_dests, 0)
        found = walk.pull_back(("z", layer), wanted.flatten(0, 1))
        q, k, v = (gradient.unflatten(0, wanted.shape[:2]) for gradient in found)
        own = [g.permute(1, 2, 3, 4, 0, 5).flatten(3, 4) for g in (k, v)]
        return [q.sum(0), *own]


def _add(
    found: np.ndarray, numbers: np.ndarray, values: Float[Tensor, "row ..."], weight: float
) -> None:
    """Add values to the edges with these numbers."""
    there = numbers >= 0
    found[:, numbers[there]] += weight * values.detach().cpu().numpy()[:, there]
