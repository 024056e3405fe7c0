"""Take edges or nodes away one after the other, from the logits down, where nothing is lost.

ACDC (Conmy et al. 2023, arXiv 2304.14997): starting from the whole model, each edge in turn carries
what its sender writes when ablated. If the metric changes by less than a threshold it stays
ablated, else it is put back. So each effect is exact, and conditional on what is gone already: of
two parts of which one suffices, one is kept. Nodes are taken away in the same way, each with all
its edges.

Receivers come before what they read, so below the edge in question the run is as recorded and only
the layers above are run again. What reaches no kept edge, or sends nothing else when ablated, is
taken away without a run. Most edges go, so the next few are taken away together, one more in each
of several variants run side by side: the differences are the effects one by one, up to the first
edge that has to stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from ..errors import TvInterpError, unknown
from ..interventions.recording import Recorded
from ..prompts import Contrast
from ..scores import Metric, Scores
from .ablation import Ablation, EdgeRunner
from .common import Experiment
from .edges import survey
from .graph import END, Demos, RoleGraph, split_edge

Pruning = Literal["acdc", "nodes"]
PRUNINGS: tuple[Pruning, ...] = ("acdc", "nodes")
MOST = 16
"""Most variants side by side."""


def prune_edges(
    model: Any,
    contrast: Contrast,
    *,
    threshold: float,
    method: Pruning = "acdc",
    metric: str | Metric = "logit_diff",
    ablation: Ablation = "corrupted",
    demos: Demos = "joint",
    recorded: Recorded | None = None,
    progress: bool = False,
) -> Scores:
    """Score all edges by taking them away one after the other.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        contrast: Clean and corrupted prompts.
        threshold: Least absolute change of the mean metric for which an edge or node stays, in the
            metric's unit.
        method: ``"acdc"`` takes edges away, ``"nodes"`` heads, MLPs and the embedding at a place.
        metric: Any metric.
        ablation: What edges carry that are taken away; see `EdgeRunner`.
        demos: As in `score_edges`.
        recorded: As in `score_edges`.
        progress: Whether to show a bar.

    Returns:
        Scores over ``(prompt, edge)`` in the metric's unit: how far the metric falls as the edge is
        taken away, given what is gone before it. Positive: it carries the task. With ``"nodes"`` an
        edge has the smaller of the scores of its two ends. `choose_edges` with the same threshold
        gives the circuit.

    Raises:
        UnknownName: for an unknown method, metric, ablation or ``demos``.
        TvInterpError: if the threshold is not positive.
        ModelError: if the model's blocks are not put together as edges need it.
    """
    if method not in PRUNINGS:
        raise unknown("method", method, PRUNINGS)
    if not threshold > 0:
        raise TvInterpError(f"expected threshold of more than 0, got {threshold}")
    run = Experiment(model, contrast, recorded, "noise", metric, END)
    parts, graph, masks = survey(run, demos)
    runner = EdgeRunner(graph, parts, (run.base, run.donor), masks, run.readout, ablation)
    prune = _Prune(graph, runner, threshold)
    effects = prune.edges(progress) if method == "acdc" else prune.nodes(progress)
    attrs = {"method": method, "demos": demos, "ablation": ablation, "threshold": threshold}
    return run.scores(effects, ("edge",), {"edge": list(graph.edges)}, **attrs)


@dataclass(frozen=True)
class _Group:
    """Sets of edges that may go one after the other, and the lowest layer that they lead into."""

    layer: int
    sets: list[Int[np.ndarray, " edge"]]


class _Prune:
    """The edges that are left, and what the metric is with them."""

    def __init__(self, graph: RoleGraph, runner: EdgeRunner, threshold: float) -> None:
        """Start with all edges."""
        self.graph, self.runner, self.threshold = graph, runner, threshold
        self.kept = np.ones(len(graph.edges), dtype=bool)
        self.value = runner.run(self.kept, first=graph.n_layers).numpy().astype(float)
        self.source, self.target = graph.ends
        sends = runner.sends()
        place, number = np.array([_sender(graph, node) for node in graph.nodes[:-1]]).T
        self.sends = sends[place, number][self.source]  # by edge

    def edges(self, progress: bool) -> Float[np.ndarray, "prompt edge"]:
        """Take edges away."""
        out = np.zeros((len(self.value), len(self.kept)))
        groups = list(self._receivers())
        with tqdm(total=len(self.kept), desc="edges", disable=not progress, leave=False) as bar:
            for group in groups:
                bar.update(len(group.sets))
                for edges, effect in self._take(group):
                    out[:, edges] = effect[:, None]
        return out

    def nodes(self, progress: bool) -> Float[np.ndarray, "prompt edge"]:
        """Take nodes away; an edge's score is the smaller of those of its ends."""
        of_node = np.zeros((len(self.value), len(self.graph.nodes)))
        of_node[:, -1] = np.inf  # the logits stay
        groups = list(self._senders())
        for group in tqdm(groups, "nodes", disable=not progress, leave=False):
            for edges, effect in self._take(group):
                of_node[:, self.source[edges[0]]] = effect
        mean = abs(of_node.mean(0))
        weaker = np.where(mean[self.source] < mean[self.target], self.source, self.target)
        return of_node[:, weaker]

    def _receivers(self) -> Iterator[_Group]:
        """Group edges by the layer, input and place that they lead into, the last first."""
        keys = [_receiver(self.graph, edge) for edge in self.graph.edges]
        found: dict[tuple[int, str], list[np.ndarray]] = {}
        for number in reversed(range(len(keys))):
            found.setdefault(keys[number], []).append(np.array([number]))
        for (layer, _), sets in found.items():
            yield _Group(layer, sets)

    def _senders(self) -> Iterator[_Group]:
        """Group the edges out of each node, with nodes of one layer together, the last first."""
        graph = self.graph
        by_layer: dict[tuple[int, bool], list[np.ndarray]] = {}
        for node in reversed(range(len(graph.nodes) - 1)):
            name = graph.nodes[node]
            layer = graph.layer_of(_sender(graph, name)[1])
            edges = np.flatnonzero(self.source == node)
            by_layer.setdefault((layer, ".mlp" in name), []).append(edges)
        for layer, is_mlp in sorted(by_layer, reverse=True):
            # what a head writes its own layer's MLP may read
            yield _Group(max(0, layer + is_mlp), by_layer[layer, is_mlp])

    def _take(
        self, group: _Group
    ) -> Iterator[tuple[Int[np.ndarray, " edge"], Float[np.ndarray, " prompt"]]]:
        """Take the sets of a group away where they do not matter: edges and effects."""
        is_used = np.zeros(len(self.graph.nodes), dtype=bool)
        is_used[self.source[self.kept]] = True
        is_used[-1] = True
        matters = self.sends & is_used[self.target]
        todo = []
        for edges in group.sets:
            if matters[edges].any():
                todo.append(edges)
            else:
                self.kept[edges] = False
        size = 4
        while todo:
            some = todo[:size]
            variants = np.tile(self.kept, (len(some), 1))
            for i, edges in enumerate(some):
                variants[i:, edges] = False
            values = self.runner.run(variants, first=group.layer).numpy().astype(float)
            effects = np.concatenate([self.value[None], values[:-1]]) - values
            stay = np.flatnonzero(abs(effects.mean(1)) >= self.threshold)
            n_gone = int(stay[0]) if len(stay) else len(some)
            if n_gone:
                self.kept, self.value = variants[n_gone - 1], values[n_gone - 1]
            n_done = min(n_gone + 1, len(some))
            yield from zip(some[:n_done], effects[:n_done], strict=True)
            todo = todo[n_done:]
            size = min(MOST, 2 * size) if n_gone == len(some) else max(1, n_gone)


def _sender(graph: RoleGraph, node: str) -> tuple[int, int]:
    """Get the place and the number of a sender."""
    what, place = node.split("@")
    at = graph.places.index(place)
    if what == "embed":
        return at, 0
    layer, *head = map(int, re.findall(r"\d+", what))
    return at, graph.below(layer) + (head[0] if head else graph.n_heads)


def _receiver(graph: RoleGraph, edge: str) -> tuple[int, str]:
    """Get the layer of a receiver, and its name without the head."""
    receiver = split_edge(edge)[1]
    if receiver == "logits":
        return graph.n_layers, receiver
    return int(re.findall(r"\d+", receiver)[0]), re.sub(r"H\d+", "", receiver)
