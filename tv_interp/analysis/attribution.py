"""Attribution of edges: what each edge carries to first order, all at once.

The score of an edge from sender u at place s to receiver r is

    sum over tokens t of s of (u_clean - u_corrupted)[t] . dm/d(input of r)[t]

EAP (Syed et al. 2023, arXiv 2310.10348) takes the gradient in the run that is patched: the clean
one for ``direction="noise"``, the corrupted one for ``"denoise"``. EAP-IG (Hanna et al. 2024, arXiv
2403.17806) averages it over runs between the two: with the embeddings interpolated (inputs), or
with the output of the sender's own attention layer or MLP interpolated in the clean or corrupted
run (activations). Positive: the edge carries the task, as with exact patching of it.

No input is split. What reaches an input of a head is what senders change, taken through the norm
and the linear map to q, k or v, times the gradient there; at an MLP's input the gradient is what is
left of the residual stream's when all else that reads there is taken away. Keys and values are read
by heads at several places: the gradient through those at one place is taken back from their rows of
attention scores and z alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from ..models.adapter import HookName
from ..models.finite import not_finite
from ..models.parts import Parts, Via
from ..models.replay import Tape
from ..scores.metrics import Readout
from .common import Experiment
from .gradients import Walk, few_rows, some_rows
from .graph import RoleGraph

Gradient = Literal["eap", "eap-ig", "eap-ig-activations"]


@dataclass(frozen=True, eq=False)
class Outputs:
    """What all senders write in one run, for some rows of equal length.

    Attributes:
        parts: The model.
        tape: The run.
        heads: What attention adds as a whole, layer by layer.
        mlps: What MLPs add.
    """

    parts: Parts
    tape: Tape
    heads: list[Float[Tensor, "row pos d_model"]]
    mlps: list[Float[Tensor, "row pos d_model"]]

    @classmethod
    def of(cls, parts: Parts, tape: Tape) -> Outputs:
        """Look at a recorded run.

        What an MLP adds is what the residual stream changes by, attention's part apart; in half
        precision, where little would be left of it, its block runs again.
        """
        adapter, resid = parts.adapter, tape.resid
        heads = [parts.adds(layer, tape.z[layer]) for layer in adapter.layers]
        mlps: list[Tensor] = []
        is_half = resid[0].dtype in (torch.bfloat16, torch.float16)
        for layer in adapter.layers if parts.has_mlp else ():
            name: HookName = ("mlp_out", layer)
            if is_half:
                mlps.append(adapter.read_block(tape, layer, [name])[name])
            else:
                mlps.append(resid[layer + 1] - resid[layer] - heads[layer])
        return cls(parts, tape, heads, mlps)

    @property
    def constant(self) -> Float[Tensor, "layer d_model"]:
        """What each layer adds besides: attention's bias."""
        return torch.stack([self.parts.bias(layer) for layer in self.parts.adapter.layers])

    def senders(self) -> Float[Tensor, "row pos sender d_model"]:
        """Compute what each sender writes, in the graph's order."""
        each = [self.parts.writes(layer, z) for layer, z in enumerate(self.tape.z)]
        return self._in_order(self.tape.resid[0], each, self.mlps)

    def minus(self, other: Outputs, start: int = 0) -> Float[Tensor, "row token sender d_model"]:
        """Compute by how much senders differ from those of another run, from some token on."""
        mlps = [(a - b)[:, start:] for a, b in zip(self.mlps, other.mlps, strict=True)]
        pairs = zip(self.tape.z, other.tape.z, strict=True)
        heads = [
            self.parts.writes_minus(layer, a[:, start:], b[:, start:])
            for layer, (a, b) in enumerate(pairs)
        ]
        return self._in_order((self.tape.resid[0] - other.tape.resid[0])[:, start:], heads, mlps)

    def _in_order(
        self, embedding: Tensor, heads: list[Tensor], mlps: list[Tensor]
    ) -> Float[Tensor, "row pos sender d_model"]:
        senders = [embedding[:, :, None]]
        for layer, each in enumerate(heads):
            senders.append(each)
            if self.parts.has_mlp:
                senders.append(mlps[layer][:, :, None])
        return torch.cat(senders, 2)


Change = Callable[[Tensor, Outputs, Tape], Float[Tensor, "row token sender d_model"]]
"""What senders write instead, less what they write, given rows, that, and the other run: of the
last so many tokens. Those before them do not change."""


def attribute(
    graph: RoleGraph,
    parts: Parts,
    run: Experiment,
    masks: Bool[Tensor, "prompt pos place"],
    changes: Change,
    *,
    method: Gradient,
    points: Sequence[float],
    progress: bool = False,
) -> Float[np.ndarray, "prompt edge"]:
    """Attribute the metric to all edges.

    Args:
        graph: Whose edges.
        parts: The model.
        run: The run whose gradient EAP takes, the other, and the metric. EAP makes do without a
            recording of the first: its own pass gives all that it needs.
        masks: The graph's places.
        changes: By how much what senders write is another when ablated.
        method: ``"eap"``, ``"eap-ig"`` (inputs) or ``"eap-ig-activations"``.
        points: Where runs lie between the two, 0 at the first; EAP takes none.
        progress: Whether to show a bar.

    Returns:
        Scores of the change from the first run to the other, ``[prompt, edge]``.

    Raises:
        ModelError: if a score is NaN or infinite.
    """
    adapter = parts.adapter
    out = np.zeros((len(run.contrast), len(graph.edges)))
    values = torch.zeros(len(run.contrast))
    pairs = _only_embedded(run) if method == "eap" else _recorded(run)
    copies = graph.n_heads + graph.n_senders
    bar = tqdm(pairs, "edges", len(run.donor.kept), disable=not progress, leave=False)
    for rows, tape, donor in bar:
        for some in few_rows(adapter, tape, run.donor.max_memory, copies):
            here, there = some_rows(tape, some), some_rows(donor, some)
            which = rows[some]
            at = masks[which, : tape.n_pos].to(adapter.device)
            step = _Step(graph, parts, here, at, run.readout, which)
            walk = step.walk(here.resid[0]) if method == "eap" else None
            ours = Outputs.of(parts, here if walk is None else walk.tape)
            change = changes(which, ours, there)
            found = np.zeros((len(which), len(graph.edges)))
            if walk is not None:
                step.add(found, walk, change, 1.0)
                values = values.to(walk.values)
                values[which] = walk.values
            elif method == "eap-ig":
                for a in points:
                    x = _shift(here.resid[0], a * change[:, :, 0])
                    step.add(found, step.walk(x), change, 1 / len(points))
            else:
                for senders, swap in _groups(graph, here, ours, change):
                    part = torch.zeros_like(change)
                    part[:, :, senders] = change[:, :, senders]
                    for a in points:
                        step.add(found, step.walk(*swap(a)), part, 1 / len(points))
            out[which.numpy()] = found
    if not np.isfinite(out).all():
        raise not_finite(adapter, "scores")
    if method == "eap" and not run.has_base:
        run.base_value = values
    return out


def _shift(
    x: Float[Tensor, "row pos d_model"], change: Float[Tensor, "row token d_model"]
) -> Float[Tensor, "row pos d_model"]:
    """Add changes of the last so many tokens."""
    return torch.cat([x[:, : -change.shape[1]], x[:, -change.shape[1] :] + change], 1)


Pair = tuple[Tensor, Tape, Tape]
"""Rows of equal length, the first run of them, and the other."""


def _recorded(run: Experiment) -> Iterator[Pair]:
    for (rows, tape), (_, donor) in zip(run.base.tapes(), run.donor.tapes(), strict=True):
        yield rows, tape, donor


def _only_embedded(run: Experiment) -> Iterator[Pair]:
    """Go through pairs whose first run is what enters the first block, and no more.

    What blocks are called with besides is the same in both runs, as it is for all rows.
    """
    if run.has_base or not _can_embed(run):
        yield from _recorded(run)
        return
    prompts = getattr(run.contrast, run.sides[0])
    for rows, donor in run.donor.tapes():
        resid = run.adapter.embed(prompts.tokens[rows, : donor.n_pos])
        yield rows, Tape([resid], donor.calls), donor


def _can_embed(run: Experiment) -> bool:
    """Test on one prompt whether a model stops where its blocks begin."""
    rows, tape = next(iter(run.donor.tapes()))
    tokens = run.donor.prompts.tokens[rows[:1], : tape.n_pos]
    try:
        return torch.equal(run.adapter.embed(tokens), tape.resid[0][:1])
    except Exception:  # any failure means another way: the first run is recorded too
        return False


def _groups(
    graph: RoleGraph, here: Tape, ours: Outputs, change: Float[Tensor, "row token sender d_model"]
) -> Iterator[tuple[slice, Callable[[float], tuple[Tensor, dict[HookName, Tensor]]]]]:
    """Go through what is interpolated by itself: the embedding, each layer's heads, each MLP."""
    x = here.resid[0]
    yield slice(0, 1), lambda a: (_shift(x, a * change[:, :, 0]), {})

    def swap(
        name: HookName, old: Tensor, senders: slice
    ) -> Callable[[float], tuple[Tensor, dict[HookName, Tensor]]]:
        return lambda a: (x, {name: _shift(old, a * change[:, :, senders].sum(2))})

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

    def walk(
        self,
        x: Float[Tensor, "row pos d_model"],
        swaps: Mapping[HookName, Tensor] = MappingProxyType({}),
    ) -> Walk:
        """Make one run, from ``x`` and with some activations swapped, and differentiate it.

        Where a layer's output is swapped, what comes before it is the same whatever it is, so only
        edges from there on are meant.
        """
        graph = self.graph
        first, attends = self._from(swaps)
        by_scores = ("attn_scores",) * self.parts.takes_scores
        leaves: list[HookName] = [(w, la) for w in ("z", "q", *by_scores) for la in attends]
        reads = range(first + 1 if self._is_serial else attends.start, graph.n_layers + 1)
        leaves += [("resid_pre", layer) for layer in reads]
        leaves += [("attn_out", la) for la in range(first, graph.n_layers) if self._is_serial]
        leaves = list(dict.fromkeys([*leaves, *swaps]))
        outer: dict[HookName, HookName] = {("v", layer): ("z", layer) for layer in attends}
        # from scores it is a shorter way to keys than from z
        outer |= {("k", layer): ((*by_scores, "z")[0], layer) for layer in attends}
        run = self.parts.adapter, self.tape, x, self.readout, self.rows
        return Walk(*run, leaves, swaps, outer)

    def add(
        self,
        found: Float[np.ndarray, "row edge"],
        walk: Walk,
        change: Float[Tensor, "row token sender d_model"],
        weight: float,
    ) -> None:
        """Add the scores of one run; once for each, since its graph is let go on the way.

        Tokens in front, that do not change, are left out. A place that has no others, as that of
        the first token often, is no destination.
        """
        graph, at = self.graph, walk.gradients
        first, attends = self._from(walk.swaps)
        since = slice(walk.resid[0].shape[1] - change.shape[1], None)
        for layer in reversed(range(first, graph.n_layers)):
            if layer in attends:
                dests = self._dests(layer, since)
                by_via = self._at_qkv(walk, layer, dests)
                self._add_heads(found, walk, layer, change, by_via, dests, weight)
            if self._is_serial:
                at_mlp = at["attn_out", layer] - at["resid_pre", layer + 1]
            elif graph.has_mlp and layer in attends:
                by_heads = self._onto_stream(layer, walk.resid[layer], by_via)
                at_mlp = at["resid_pre", layer] - at["resid_pre", layer + 1] - by_heads
            else:
                continue
            some = change[:, :, : graph.below(layer, "mlp")]
            products = self._products(some, at_mlp[:, since], since)
            _add(found, graph.numbers["mlp", layer], products, weight)
        products = self._products(change, at["resid_pre", graph.n_layers][:, since], since)
        _add(found, graph.numbers["logits", graph.n_layers], products, weight)

    @property
    def _is_serial(self) -> bool:
        return self.graph.has_mlp and self.graph.order == "serial"

    def _from(self, swaps: Collection[HookName]) -> tuple[int, range]:
        """Get the first layer whose MLP is meant, and the layers whose heads are."""
        first = min((layer for _, layer in swaps), default=0)
        return first, range(first + bool(swaps), self.graph.n_layers)

    def _products(
        self,
        change: Float[Tensor, "row pos sender d_model"],
        gradient: Float[Tensor, "row pos d_model"],
        since: slice,
    ) -> Float[Tensor, "row place sender"]:
        """Multiply changes with a gradient and sum over the tokens of the sender's place."""
        products = (change @ gradient[..., None])[..., 0]
        return torch.einsum("bts,btp->bps", products, self.masks[:, since])

    def _add_heads(
        self,
        found: Float[np.ndarray, "row edge"],
        walk: Walk,
        layer: int,
        change: Float[Tensor, "row pos sender d_model"],
        gradients: Mapping[Via, Float[Tensor, "dest row pos head d_head"]],
        dests: list[int],
        weight: float,
    ) -> None:
        """Add the scores of the edges into a layer's heads, at all places where these are.

        Senders are fewer than heads at places, three ways in: what they change is taken through the
        norm, rather than the gradients back through it. A query is of its own place, so those of
        all places are one gradient.
        """
        graph, where = self.graph, np.arange(len(self.graph.places))
        since = slice(walk.resid[0].shape[1] - change.shape[1], None)
        some = change[:, :, : graph.below(layer)]
        changed = self.parts.through_norm(layer, walk.resid[layer][:, since], some)
        for via, gradient in gradients.items():
            products = self._into(layer, via, changed, gradient[:, :, since])
            if via == "q":
                _add(
                    found, graph.numbers["q", layer][where, :, where], products[:, :, :, 0], weight
                )
            else:
                _add(found, graph.numbers[via, layer][:, :, dests], products, weight)

    def _dests(self, layer: int, since: slice) -> list[int]:
        """List the places where a layer's heads reach the logits and see what changes."""
        some = self.masks[:, since].any(1).any(0).tolist()
        return [d for d, sees in enumerate(some) if sees and self.graph.is_live(layer, d)]

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
        masks = self.masks[:, -changed.shape[1] :]
        return torch.einsum("btsph,btq->bqsph", products, masks)

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
        self, walk: Walk, layer: int, dests: list[int]
    ) -> dict[Via, Float[Tensor, "dest row pos head d_head"]]:
        """Get the gradients at each query head's own q, k and v, for keys and values by place.

        Heads at a place read through their own rows of attention, so it is those alone that are
        taken back. Heads that share keys and values take turns, as the places do.
        """
        adapter, at = self.parts.adapter, walk.gradients
        by_dest = self.masks[:, :, dests].movedim(2, 0)[:, None, :, :, None]
        n_turns = adapter.n_heads // adapter.n_kv_heads
        turn = torch.arange(adapter.n_heads, device=by_dest.device) % n_turns
        turns = torch.arange(n_turns, device=turn.device)[:, None] == turn
        taken = by_dest * turns[:, None, None]  # [dest, turn, row, pos, head]
        ends: dict[Via, Tensor] = {"v": at["z", layer] * taken[..., None]}
        if self.parts.takes_scores:
            ends["k"] = at["attn_scores", layer] * taken.mT[..., None]
        else:
            ends["k"] = ends["v"]
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
