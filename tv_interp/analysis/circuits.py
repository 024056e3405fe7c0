"""Circuits: a few edges of the graph of roles, chosen by their scores."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from ..display import Shown, Table, as_text, wrapped
from ..errors import FileError, TvInterpError
from ..files import write_text
from ..interventions.recording import Recorded
from ..models.adapter import Adapter
from ..prompts import Contrast
from ..scores import Metric, Scores
from ..scores.statistics import bootstrap, cluster_ids
from .ablation import Ablation
from .common import Direction
from .edges import Method, score_edges
from .graph import END, Demos, RoleGraph, node_of, split_edge
from .pruning import Pruning, prune_edges

if TYPE_CHECKING:
    import networkx
    import pandas as pd
    import plotly.graph_objects as go

FORMAT = "tv_interp.Circuit 1"
SHOWN = 10
"""Edges that are shown when a circuit is printed."""


@dataclass(frozen=True, eq=False)
class Circuit(Shown):
    """Edges of a graph of roles, each with a weight.

    Two circuits are equal if they have the same edges in the same graph, whatever the weights.

    Attributes:
        graph: The graph that they are edges of.
        edges: Weight of each edge by name: the mean score that it was chosen by, positive where it
            carries the task.
        attrs: Provenance as plain values: model, task, corruption, method, direction, rule.
        intervals: 95 % interval of the weight of each edge, on the prompts that chose it; empty
            where it is not known.
    """

    graph: RoleGraph
    edges: Mapping[str, float]
    attrs: Mapping[str, Any]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse edges that the graph does not have."""
        self.graph.select(self.edges)

    @cached_property
    def mask(self) -> Bool[np.ndarray, " edge"]:
        """Mark the circuit's edges among those of its graph."""
        return self.graph.select(self.edges)

    @cached_property
    def nodes(self) -> frozenset[str]:
        """Nodes that some edge comes from or goes to."""
        pairs = [split_edge(edge) for edge in self.edges]
        return frozenset(n for s, r in pairs for n in (s, node_of(r)))

    @property
    def writers(self) -> tuple[str, ...]:
        """Heads at answers whose output the circuit uses, in order."""
        return self._heads(0, "answer")

    @property
    def readers(self) -> tuple[str, ...]:
        """Heads at "is" that read keys or values of answers, in order."""
        at_end = [e for e in self.edges if e.endswith(f"@{END}") and "@answer" in split_edge(e)[0]]
        return self._heads(1, END, at_end)

    def _heads(self, end: int, place: str, edges: Any = None) -> tuple[str, ...]:
        named = {node_of(split_edge(e)[end]) for e in (self.edges if edges is None else edges)}
        is_wanted = (n for n in self.graph.nodes if n in named and "H" in n and f"@{place}" in n)
        return tuple(is_wanted)

    def __len__(self) -> int:
        """Number of edges."""
        return len(self.edges)

    def __contains__(self, edge: object) -> bool:
        """Whether it has an edge."""
        return edge in self.edges

    def __eq__(self, other: object) -> bool:
        """Whether the other has the same edges in the same graph."""
        if not isinstance(other, Circuit):
            return NotImplemented
        return self.graph == other.graph and set(self.edges) == set(other.edges)

    def __hash__(self) -> int:
        """Hash of the edges."""
        return hash(frozenset(self.edges))

    def __or__(self, other: Circuit) -> Circuit:
        """Edges of either; weights of this one where both have them."""
        both = dict(self._same(other).edges) | dict(self.edges)
        theirs = {e: ends for e, ends in other.intervals.items() if e not in self.edges}
        return replace(self, intervals=theirs | dict(self.intervals))._with(both)

    def __and__(self, other: Circuit) -> Circuit:
        """Edges of both."""
        theirs = self._same(other).edges
        return self._with({e: w for e, w in self.edges.items() if e in theirs})

    def __sub__(self, other: Circuit) -> Circuit:
        """Edges of this one that the other does not have."""
        theirs = self._same(other).edges
        return self._with({e: w for e, w in self.edges.items() if e not in theirs})

    def _with(self, edges: dict[str, float]) -> Circuit:
        ordered = {e: edges[e] for e in sorted(edges, key=self.graph.number_of.__getitem__)}
        intervals = {e: self.intervals[e] for e in ordered if e in self.intervals}
        return replace(self, edges=ordered, intervals=intervals)

    def _same(self, other: Circuit) -> Circuit:
        if self.graph != other.graph:
            raise TvInterpError(
                "circuits of different graphs cannot be combined: they need the same model, places "
                "and demos="
            )
        return other

    def check_model(self, adapter: Adapter, graph: RoleGraph) -> None:
        """Refuse another model or other prompts than the circuit is of.

        Raises:
            TvInterpError: naming both.
        """
        model = self.attrs.get("model")
        if model is not None and model != adapter.name:
            raise TvInterpError(f"this circuit is of model {model!r}, got {adapter.name!r}")
        if graph != self.graph:
            raise TvInterpError(
                f"this circuit is of a graph of {_size(self.graph)}, these prompts and this model "
                f"make one of {_size(graph)}: use prompts with the same roles"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Write as JSON.

        Raises:
            FileError: if the file cannot be written.
        """
        graph = {
            "n_layers": self.graph.n_layers,
            "n_heads": self.graph.n_heads,
            "has_mlp": self.graph.has_mlp,
            "order": self.graph.order,
            "places": list(self.graph.places),
            "sees": sorted(map(list, self.graph.sees)),
        }
        content = {
            "format": FORMAT,
            "attrs": dict(self.attrs),
            "graph": graph,
            "edges": {edge: float(weight) for edge, weight in self.edges.items()},
            "intervals": {edge: list(ends) for edge, ends in self.intervals.items()},
        }
        write_text(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Circuit:
        """Read what `save` wrote.

        Raises:
            FileError: if there is no such file, or it is no circuit.
            UnknownName: if it names a node that its graph does not have, with the nearest names.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text("utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}, expected {FORMAT!r}")
            graph = dict(content["graph"])
            graph["places"] = tuple(graph["places"])
            graph["sees"] = frozenset((str(s), str(d)) for s, d in graph["sees"])
            edges = {str(e): float(w) for e, w in content["edges"].items()}
            intervals = {
                str(e): (float(lo), float(hi))
                for e, (lo, hi) in content.get("intervals", {}).items()
            }
            made = RoleGraph(**graph)
        except OSError as error:
            raise FileError(f"cannot read {path}: {error.strerror}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileError(f"{path} is no circuit file of tv_interp: {error}") from error
        return cls(made, edges, content.get("attrs", {}), intervals)

    def to_pandas(self) -> pd.DataFrame:
        """Write one row an edge: its ends, via which input, places and weight."""
        import pandas as pd

        rows = []
        for edge, weight in self.edges.items():
            sender, receiver = split_edge(edge)
            via = receiver.split("@")[0].rpartition(".")[2]
            rows.append(
                {
                    "edge": edge,
                    "sender": sender,
                    "receiver": node_of(receiver),
                    "via": via,
                    "src": sender.split("@")[1],
                    "dest": receiver.split("@")[1] if "@" in receiver else END,
                    "weight": weight,
                }
            )
        columns = ["edge", "sender", "receiver", "via", "src", "dest", "weight"]
        return pd.DataFrame(rows, columns=columns)

    def to_networkx(self) -> networkx.MultiDiGraph:
        """Make a graph of its nodes; edges are keyed by the input they go to, with a weight."""
        import networkx

        out = networkx.MultiDiGraph(**{k: v for k, v in self.attrs.items() if v is not None})
        for row in self.to_pandas().to_dict("records"):
            out.add_edge(row["sender"], row["receiver"], key=row["via"], weight=row["weight"])
        return out

    def plot(self, **options: Any) -> go.Figure:
        """Draw it; see `plot_circuit`."""
        from ..show.circuit import plot_circuit

        return plot_circuit(self, **options)

    def _blocks(self) -> Iterator[str | Table]:
        unit = self.attrs.get("unit", "logits")
        order = sorted(self.edges, key=lambda edge: -abs(self.edges[edge]))[:SHOWN]
        yield repr(self)
        heads = {"writers": self.writers, "readers": self.readers}
        named = [f"{kind}  {', '.join(some) or 'none'}" for kind, some in heads.items()]
        yield "\n".join(
            wrapped([*named, f"The {len(order)} largest edges, in {unit}; + carries the task:"])
        )
        rows = []
        for edge in order:
            ends = self.intervals.get(edge)
            known = f"[{ends[0]:+.3g}, {ends[1]:+.3g}]" if ends else ""
            rows.append((*split_edge(edge), f"{self.edges[edge]:+.3g}", known))
        yield Table(("from", "into", "weight", "interval"), rows)

    def __str__(self) -> str:
        """Size, writers, readers and the largest edges."""
        return as_text(self._blocks())

    def __repr__(self) -> str:
        """Size, and what it was found in."""
        about = " ".join(str(self.attrs[k]) for k in ("task", "method") if k in self.attrs)
        return f"Circuit({len(self)} of {len(self.graph.edges)} edges; {about})"


def discover_circuit(
    model: Any,
    contrast: Contrast,
    *,
    method: Method | Pruning = "eap-ig",
    n_edges: int | None = None,
    threshold: float | None = None,
    direction: Direction = "noise",
    ablation: Ablation = "corrupted",
    metric: str | Metric = "logit_diff",
    demos: Demos = "joint",
    scores: Scores | None = None,
    recorded: Recorded | None = None,
    progress: bool = False,
) -> Circuit:
    """Score all edges and keep the largest that connect the embedding with the logits.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        contrast: Clean and corrupted prompts.
        method: As in `score_edges`: ``"eap-ig"``, ``"exact"``, ``"eap"`` or
            ``"eap-ig-activations"``; or as in `prune_edges`: ``"acdc"`` takes edges away one after
            the other, ``"nodes"`` nodes, which needs a threshold.
        n_edges: How many edges with the largest absolute mean score, before those are taken away
            that nothing reaches or that reach nothing; None for 5 % of all, where no threshold is
            given.
        threshold: Least absolute mean score instead, in the metric's unit.
        direction: As in `score_edges`; pruning noises.
        ablation: As in `score_edges`: a circuit is one for its ablation.
        metric: As in `score_edges`.
        demos: As in `score_edges`.
        scores: What `score_edges` gave for the same model and contrast, where it has been run.
        recorded: As in `score_edges`.
        progress: As in `score_edges`.

    Returns:
        The circuit, with mean scores as weights.

    Raises:
        TvInterpError: if both a number and a threshold are given, the number is not positive,
            pruning is given a number, no threshold or another direction, or nothing is left.
        ScoreError: if the metric cannot be differentiated and the method needs it, or the scores
            are not of all edges.
        UnknownName: as `score_edges`.
    """
    if n_edges is not None and threshold is not None:
        raise TvInterpError("expected n_edges or threshold, got both")
    if n_edges is not None and n_edges < 1:
        raise TvInterpError(f"expected n_edges of 1 or more, got {n_edges}")
    if scores is None:
        how: dict[str, Any] = {"metric": metric, "demos": demos, "ablation": ablation}
        how |= {"recorded": recorded, "progress": progress}
        if method == "acdc" or method == "nodes":
            threshold = check_pruning(method, n_edges, threshold, direction)
            scores = prune_edges(model, contrast, threshold=threshold, method=method, **how)
        else:
            scores = score_edges(model, contrast, method=method, direction=direction, **how)
    demos = scores.attrs.get("demos", demos)
    graph = RoleGraph.of(model, contrast.clean, demos=demos)
    return choose_edges(graph, scores, n_edges=n_edges, threshold=threshold)


def check_pruning(
    method: str, n_edges: int | None, threshold: float | None, direction: str
) -> float:
    """Refuse what pruning cannot do, and get the threshold.

    Raises:
        TvInterpError: saying why.
    """
    if n_edges is not None:
        raise TvInterpError(
            f"method={method!r} cannot be told n_edges: what stays is decided edge by edge, by "
            "threshold"
        )
    if threshold is None:
        raise TvInterpError(
            f"method={method!r} needs threshold, the least change of the metric for which "
            "something stays"
        )
    if direction != "noise":
        raise TvInterpError(
            f"method={method!r} starts from the whole model and takes away, so it has "
            f"direction='noise' only, got {direction!r}"
        )
    return threshold


def choose_edges(
    graph: RoleGraph,
    scores: Scores,
    *,
    n_edges: int | None = None,
    threshold: float | None = None,
) -> Circuit:
    """Keep the edges with the largest absolute mean scores that connect embedding and logits.

    Args:
        graph: The graph that the scores are of.
        scores: Scores of all its edges.
        n_edges: As in `discover_circuit`.
        threshold: As in `discover_circuit`.

    Raises:
        TvInterpError: if the scores are of other edges, or nothing is left.
    """
    mean = scores.data.mean("prompt").values
    if tuple(scores.data.edge.values) != graph.edges:
        raise TvInterpError(
            f"expected scores of all {len(graph.edges)} edges of the graph, got {len(mean)}: make "
            "them with score_edges on the same model and prompts"
        )
    if threshold is None:
        n_edges = max(1, len(mean) // 20) if n_edges is None else n_edges
    mask = graph.prune(largest_edges(mean, n_edges, threshold))
    if not mask.any():
        raise TvInterpError(
            "no edges of that size connect the embedding with the logits: take more edges, or a "
            "lower threshold"
        )
    rule = {"n_edges": n_edges} if threshold is None else {"threshold": threshold}
    kept = np.flatnonzero(mask)
    low, high = bootstrap(scores.data.values[:, kept].astype(float), cluster_ids(scores.clusters))
    names = [graph.edges[i] for i in kept]
    ends = list(zip(low.tolist(), high.tolist(), strict=True)) if np.isfinite(low).all() else []
    return Circuit(
        graph,
        dict(zip(names, mean[kept].astype(float).tolist(), strict=True)),
        dict(scores.attrs) | rule,
        dict(zip(names, ends, strict=False)),  # none from one query item
    )


def largest_edges(
    mean: Float[np.ndarray, " edge"], n_edges: int | None, threshold: float | None
) -> Bool[np.ndarray, " edge"]:
    """Mark so many of the largest absolute means, or all from a threshold on; never zeros."""
    if threshold is not None:
        return abs(mean) >= threshold
    mask = np.zeros(len(mean), dtype=bool)
    mask[np.argsort(-abs(mean), kind="stable")[:n_edges]] = True
    return mask & (mean != 0)


def _size(graph: RoleGraph) -> str:
    return f"{graph.n_layers} layers of {graph.n_heads} heads over {', '.join(graph.places)}"
