"""What each edge carries, by patching it or by attribution: scores of all edges of a graph.

Exact patching of an edge, as in path patching (Goldowsky-Dill et al. 2023, arXiv 2304.05969) and
ACDC (Conmy et al. 2023, arXiv 2304.14997): the receiver's input gets what the sender writes in the
other run (or its mean there, or nothing) in place of what it writes in this one; the receiver is
computed anew, and all that follows responds. No other receiver sees the change. Each is one run of
the engine, with the receiver's new output as its patch.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from ..errors import TvInterpError, unknown
from ..files import make_directory, write_bytes
from ..interventions.engine import check_layers
from ..interventions.recording import Recorded
from ..interventions.sites import Patch, Site, Variant
from ..models.adapter import Edit, HookName
from ..models.parts import VIA, Parts
from ..models.replay import Layout, Tape
from ..prompts import Contrast
from ..scores import Metric, Scores
from .ablation import Ablated, Ablation, EdgeRunner, check_ablation
from .attribution import Outputs, attribute
from .common import Direction, Experiment
from .graph import END, Demos, RoleGraph, place_masks, places_of

Method = Literal["exact", "eap", "eap-ig", "eap-ig-activations"]
METHODS: tuple[Method, ...] = ("exact", "eap", "eap-ig", "eap-ig-activations")
Quadrature = Literal["midpoint", "left"]
QUADRATURES: tuple[Quadrature, ...] = ("midpoint", "left")


def score_edges(
    model: Any,
    contrast: Contrast,
    *,
    method: Method = "eap-ig",
    edges: Iterable[str] | None = None,
    direction: Direction = "noise",
    ablation: Ablation = "corrupted",
    metric: str | Metric = "logit_diff",
    demos: Demos = "joint",
    n_steps: int = 5,
    quadrature: Quadrature = "midpoint",
    recorded: Recorded | None = None,
    cache: str | os.PathLike | None = None,
    progress: bool = False,
) -> Scores:
    """Score all edges of the graph of roles, or some.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        contrast: Clean and corrupted prompts.
        method: ``"exact"`` patches each edge. ``"eap"``, ``"eap-ig"`` (embeddings interpolated) and
            ``"eap-ig-activations"`` (the sender's layer interpolated) are first-order estimates of
            all edges at once; see `tv_interp.analysis.attribution`.
        edges: Names of edges (``"L0H1@answer->L2H1.v@query_is"``; `RoleGraph.between` lists those
            between some nodes); None for all.
        direction: ``"noise"`` patches corrupted into clean: what is needed. ``"denoise"`` patches
            clean into corrupted: what suffices. ``"eap-ig"`` gives the same for both.
        ablation: What an edge carries instead: what its sender writes in the ``"corrupted"`` run,
            its ``"mean"`` there over prompts (by role, demonstration and place in the word), or
            nothing (``"zero"``). The last two know the direction ``"noise"`` alone. An edge may
            matter under one and not under another: a circuit is one for its ablation.
        metric: A metric; a differentiable one for all methods but ``"exact"``.
        demos: ``"joint"``: a role's tokens in all demonstrations are one place; ``"each"``: one for
            each demonstration.
        n_steps: Runs between corrupted and clean for ``"eap-ig"``.
        quadrature: ``"midpoint"`` of equal steps, or their ``"left"`` ends from the corrupted run
            on, as in the authors' code, which never reaches the clean run.
        recorded: The two runs, where they have been recorded.
        cache: Directory where ``"exact"`` keeps what is finished, sender by sender, so that a run
            that was killed goes on where it was; None to keep nothing.
        progress: Whether to show a bar.

    Returns:
        Scores over ``(prompt, edge)`` in the metric's unit. Positive: the edge carries the task.

    Raises:
        UnknownName: for an unknown method, edge, direction, ablation, metric, ``demos`` or
            quadrature.
        ScoreError: if the metric cannot be differentiated and the method needs it.
        ModelError: if the model's blocks are not put together as edges need it.
        TvInterpError: if ``n_steps`` is not positive, a cache is given to another method, or the
            direction is not one of the ablation's.
        FileError: if the cache cannot be written.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if quadrature not in QUADRATURES:
        raise unknown("quadrature", quadrature, QUADRATURES)
    if n_steps < 1:
        raise TvInterpError(f"expected n_steps of 1 or more, got {n_steps}")
    if cache is not None and method != "exact":
        raise TvInterpError(
            f"cache keeps pieces of method='exact', got method={method!r}: leave it out, or keep "
            "the scores with save()"
        )
    check_ablation(ablation)
    if ablation != "corrupted" and direction != "noise":
        raise TvInterpError(
            f"ablation={ablation!r} takes what edges carry out of the clean run, so direction must "
            f'be "noise", got {direction!r}'
        )
    run = Experiment(model, contrast, recorded, direction, metric, END)
    parts, graph, masks = survey(run, demos)
    wanted = graph.select(graph.edges if edges is None else edges)
    attrs: dict[str, Any] = {"method": method, "demos": demos, "ablation": ablation}
    prompts, donor = getattr(contrast, run.sides[0]), run.donor
    ablated = Ablated(parts, prompts, donor, ablation)
    if method == "exact":
        effects = _Exact(run, graph, parts, masks, wanted, ablated).effects(
            _Cache.of(cache, run, graph, wanted, ablation), progress
        )
    else:
        shift = 0.5 if quadrature == "midpoint" else 0.0
        points = [(k + shift) / n_steps for k in range(n_steps)]  # from corrupted to clean
        if direction == "noise":
            points = [1 - at for at in points]
        if method != "eap":
            attrs |= {"n_steps": n_steps, "quadrature": quadrature}
        effects = attribute(
            graph,
            parts,
            run,
            masks,
            ablated.change,
            method=method,
            points=points,
            progress=progress,
        )
        effects = effects if direction == "denoise" else -effects
    names = [name for name, want in zip(graph.edges, wanted, strict=True) if want]
    if ablation != "corrupted":
        none = np.zeros(len(graph.edges), dtype=bool)
        runner = EdgeRunner(graph, parts, (run.base, donor), masks, run.readout, ablation)
        run.total = run.base_value - runner.run(none)
    return run.scores(effects[:, wanted], ("edge",), {"edge": names}, **attrs)


def survey(
    run: Experiment, demos: Demos = "joint"
) -> tuple[Parts, RoleGraph, Bool[Tensor, "prompt pos place"]]:
    """Take a model apart over the prompts of an experiment: parts, graph, and places of tokens."""
    check_layers(run.donor)
    prompts = run.contrast.clean
    places = places_of(prompts, demos)
    parts = Parts.of(run.adapter, next(iter(run.donor.tapes()))[1])
    return parts, RoleGraph.over(parts, prompts, places), place_masks(prompts, places)


class _Exact:
    """Patches edges one by one, those of one sender into one layer at a time."""

    def __init__(
        self,
        run: Experiment,
        graph: RoleGraph,
        parts: Parts,
        masks: Bool[Tensor, "prompt pos place"],
        wanted: Bool[np.ndarray, " edge"],
        ablated: Ablated,
    ) -> None:
        """Compute what every sender writes in the base run, and instead."""
        self.run, self.graph, self.parts, self.wanted = run, graph, parts, wanted
        self.masks = masks
        self.batches: list[tuple[Tensor, Tape, Tensor, Tensor]] = []
        live = np.zeros((len(graph.places), graph.n_senders), dtype=bool)
        for (rows, tape), (_, donor) in zip(run.base.tapes(), run.donor.tapes(), strict=True):
            ours = Outputs.of(parts, tape)
            change = ablated.senders(rows, ours, donor) - ours.senders()
            at = masks[rows, : tape.n_pos].to(change)
            self.batches.append((rows, tape, change, at))
            moved = change.abs().amax(-1)[:, :, :, None] * at[:, :, None]
            live |= moved.amax((0, 1)).T.cpu().numpy() > 0
        self.live = live
        self.tokens = [_tokens(masks[:, :, place]) for place in range(len(graph.places))]

    def effects(self, cache: _Cache, progress: bool) -> Float[np.ndarray, "prompt edge"]:
        """Patch all wanted edges whose sender writes something else when ablated."""
        graph = self.graph
        out = np.zeros((len(self.run.contrast), len(graph.edges)))
        jobs = [(la, s) for la in range(graph.n_layers + 1) for s in range(graph.below(la, "mlp"))]
        jobs = [(la, s) for la, s in jobs if s < graph.n_senders]
        for layer, sender in tqdm(jobs, "edges", disable=not progress, leave=False):
            name = f"L{layer}-{sender}"
            piece = cache.read(name, len(out))
            if piece is None:
                found = self._variants(layer, sender)
                effects = self.run.effects(list(found.values())) if found else out[:, :0]
                piece = np.array(list(found), dtype=int), effects
                cache.write(name, *piece)
            numbers, effects = piece
            out[:, numbers] = effects
        return out

    def _variants(self, layer: int, sender: int) -> dict[int, Variant]:
        """Make the patches of a sender's edges into a layer, by the edge's number."""
        if layer == self.graph.n_layers:
            return self._into_logits(sender)
        found: dict[int, Variant] = {}
        if sender < self.graph.below(layer):
            found |= self._into_heads(layer, sender)
        if self.graph.has_mlp:
            found |= self._into_mlp(layer, sender)
        return found

    def _places(self, numbers: Int[np.ndarray, "place ..."], sender: int) -> list[int]:
        """List the places from which a sender has wanted edges, and something to send."""
        there = (numbers >= 0) & self.wanted[numbers]
        any_edge = there.reshape(len(there), -1).any(1)
        return [p for p in np.flatnonzero(any_edge).tolist() if self.live[p, sender]]

    def _into_heads(self, layer: int, sender: int) -> dict[int, Variant]:
        """Change one input of a layer's heads at a time."""
        graph, adapter = self.graph, self.run.adapter
        numbers = {via: graph.numbers[via, layer][:, sender] for via in VIA}
        copies = [(src, via) for via in VIA for src in self._places(numbers[via], sender)]
        if not copies:
            return {}
        z: dict[int, Tensor] = {}
        for rows, tape, change, at in self.batches:
            names: list[HookName] = [(via, layer) for via in VIA]
            plain = adapter.read_block(tape, layer, [*names, ("z", layer)])
            sent = [change[:, :, sender] * at[:, :, src, None] for src, _ in copies]
            x = torch.cat([tape.resid[layer] + one for one in sent])
            edits: dict[HookName, Edit] = {
                (via, layer): _hold(plain[via, layer], [via != own for _, own in copies])
                for via in VIA
            }
            layout = Layout.suffix(0, tape.n_pos)
            new = adapter.block(tape, layer, x, layout, edits=edits, until="z")
            new = new.unflatten(0, (len(copies), len(rows)))
            for dest in range(len(graph.places)):
                if graph.is_live(layer, dest):
                    self._gather(z, dest, rows, new, plain["z", layer])
        found: dict[int, Variant] = {}
        for i, (src, via) in enumerate(copies):
            for dest, values in z.items():
                for head in range(graph.n_heads):
                    number = int(numbers[via][src, dest, head])
                    if number >= 0 and self.wanted[number]:
                        value = values[i, :, :, head]
                        found[number] = (self._patch(layer, head, "z", dest, value),)
        return found

    def _into_mlp(self, layer: int, sender: int) -> dict[int, Variant]:
        """Change the input of an MLP at one place at a time."""
        if sender >= self.graph.below(layer, "mlp"):
            return {}
        numbers = self.graph.numbers["mlp", layer][:, sender]
        sources = self._places(numbers, sender)
        if not sources:
            return {}
        out: dict[int, Tensor] = {}
        for rows, tape, change, at in self.batches:
            names: list[HookName] = [("attn_out", layer), ("mlp_out", layer)]
            plain = self.run.adapter.read_block(tape, layer, names)
            x = tape.resid[layer]
            if self.graph.order == "serial":
                x = x + plain["attn_out", layer]
            copies = torch.cat([x + change[:, :, sender] * at[:, :, s, None] for s in sources])
            new = self.parts.mlp(tape, layer, copies).unflatten(0, (len(sources), len(rows)))
            for i, src in enumerate(sources):
                self._gather(out, src, rows, new[i : i + 1], plain["mlp_out", layer])
        return {
            int(numbers[src]): (self._patch(layer, None, "mlp_out", src, out[src][0]),)
            for src in sources
        }

    def _into_logits(self, sender: int) -> dict[int, Variant]:
        """Change what is unembedded at the last token."""
        graph = self.graph
        number = int(graph.numbers["logits", graph.n_layers][graph.end, sender])
        if not (self.wanted[number] and self.live[graph.end, sender]):
            return {}
        value = torch.zeros(len(self.run.contrast), self.run.adapter.d_model)
        value = value.to(self.run.adapter.dtype)
        for rows, _, change, _ in self.batches:
            value[rows] = change[:, -1, sender].cpu()
        site = Site(graph.n_layers - 1, None, "resid_post", END)
        return {number: (Patch(site, value, "add"),)}

    def _gather(
        self, into: dict[int, Tensor], place: int, rows: Tensor, new: Tensor, plain: Tensor
    ) -> None:
        """Keep the tokens of a place of new activations ``[copy, row, pos, ...]``, by prompt."""
        tokens, has = self.tokens[place]
        tokens, has = tokens[rows].to(new.device), has[rows].to(new.device)
        row = torch.arange(len(rows), device=new.device)[:, None]
        kept = new[:, row, tokens]
        has = has.view(1, -1, *[1] * (kept.ndim - 2))
        kept = torch.where(has, kept, plain[row, tokens]).cpu()
        if place not in into:
            shape = (len(new), len(self.run.contrast), *kept.shape[2:])
            into[place] = torch.zeros(shape, dtype=kept.dtype)
        into[place][:, rows] = kept

    def _patch(
        self, layer: int, head: int | None, component: str, place: int, value: Tensor
    ) -> Patch:
        role = self.graph.places[place].split("[")[0]
        tokens, _ = self.tokens[place]
        return Patch(Site(layer, head, component, role), value, positions=tokens)


@dataclass(frozen=True)
class _Cache:
    """Finished pieces of one experiment, a file each; none where there is no directory."""

    directory: Path | None

    @classmethod
    def of(
        cls,
        directory: str | os.PathLike | None,
        run: Experiment,
        graph: RoleGraph,
        wanted: Bool[np.ndarray, " edge"],
        ablation: Ablation,
    ) -> _Cache:
        """Name a directory after all that the effects depend on: weights, prompts, metric, edges.

        Raises:
            FileError: if it cannot be made.
        """
        if directory is None:
            return cls(None)
        digest = hashlib.sha256()
        for name, weight in run.adapter.model.state_dict().items():
            digest.update(f"{name}{tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().float().numpy().tobytes())
        clean, corrupted = run.contrast.clean, run.contrast.corrupted
        for tensor in (clean.tokens, corrupted.tokens, clean.lengths, clean.answer, clean.foil):
            digest.update(tensor.numpy().tobytes())
        about = (run.adapter.name, run.metric.name, run.direction, ablation)
        about += graph.places, graph.edges
        digest.update(repr(about).encode() + wanted.tobytes())
        return cls(make_directory(Path(directory) / digest.hexdigest()[:16]))

    def read(self, name: str, n_prompts: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Get the numbers of edges and their effects; None where they are not there, or spoilt."""
        if self.directory is None:
            return None
        try:
            with np.load(self.directory / f"{name}.npz") as kept:
                numbers, effects = kept["numbers"], kept["effects"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return (numbers, effects) if effects.shape == (n_prompts, len(numbers)) else None

    def write(self, name: str, numbers: np.ndarray, effects: np.ndarray) -> None:
        """Keep a piece, whole or not at all."""
        if self.directory is not None:
            buffer = io.BytesIO()
            np.savez(buffer, numbers=numbers, effects=effects)
            write_bytes(self.directory / f"{name}.npz", buffer.getvalue())


def _tokens(
    mask: Bool[Tensor, "prompt pos"],
) -> tuple[Int[Tensor, "prompt token"], Bool[Tensor, " prompt"]]:
    """List the marked tokens of each prompt, and whether it has any.

    Where a prompt has fewer than others its last one is repeated: to patch it twice is to patch it.
    """
    n = mask.sum(1)
    order = (~mask).int().argsort(dim=1, stable=True)
    column = torch.minimum(torch.arange(int(n.max())), (n - 1).clamp(min=0)[:, None])
    return order.gather(1, column), n > 0


def _hold(plain: Tensor, held: list[bool]) -> Edit:
    """Make an edit that puts what was there back in some copies."""
    mask = torch.tensor(held, device=plain.device)

    def edit(activation: Tensor) -> Tensor:
        each = activation.unflatten(0, (len(held), -1))
        return torch.where(mask[:, None, None, None, None], plain, each).flatten(0, 1)

    return edit
