"""A circuit as a picture: roles from left to right, layers from bottom to top, signed edges."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import TvInterpError
from .plots import FADED

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from ..analysis.circuits import Circuit
    from ..analysis.faithfulness import Interval

FOR, AGAINST = "#0072B2", "#D55E00"
LOOKS = {  # kind of node: symbol, size, name in the legend
    "embed": ("square", 13, "embedding"),
    "head": ("circle", 16, "head, by its number"),
    "mlp": ("diamond", 14, "MLP"),
    "logits": ("star", 18, "logits"),
}
PITCH = 18
"""Pixels from one head to the next: the number fits into its circle, and circles do not touch."""
NARROW = 290
"""Pixels across the plot on a screen of 400."""
LEVEL = 90
"""Least pixels from layer to layer."""
LEFT, RIGHT, TOP = 60, 20, 110
BELOW, LINE = 76, 29
"""Pixels from the plot to the legend, and of one line of it: two names on a narrow screen."""
LAST = "into logits"
INPUTS = {"q": "into queries", "k": "into keys", "v": "into values", "mlp": "into MLPs"}
_NODE = re.compile(r"L(\d+)(?:H(\d+)|\.mlp)@(.+)")


def plot_circuit(
    circuit: Circuit,
    *,
    top: int | None = 80,
    lost: Mapping[str, Interval] | None = None,
    title: str | None = None,
) -> go.Figure:
    """Draw a circuit with its roles on x and its layers on y.

    An edge is blue where it carries the task and orange where it works against it, and as wide as
    its weight is large. An edge that crosses roles is attention: it goes from the role that is read
    to the role that reads. The list above the picture leaves only the paths through a node; in a
    report or another page of ours a click on a node or an edge does so too, and a second click
    takes it back. A click in the legend takes one kind of edge away, a double click leaves it
    alone. Hovering names an edge, its weight and its interval.

    Args:
        circuit: The circuit.
        top: How many edges, the largest by absolute weight; None for all. The title says how many.
        lost: Faithfulness lost without a node, shown where it is hovered; from `evaluate_circuit`.
        title: Title; None for what the circuit is of.

    Raises:
        TvInterpError: if ``top`` is below 1.
    """
    import plotly.graph_objects as go

    if top is not None and top < 1:
        raise TvInterpError(f"expected top of 1 or more, got {top}")
    table = circuit.to_pandas()
    table = table.reindex(table.weight.abs().sort_values(ascending=False, kind="stable").index)
    shown = table.head(len(table) if top is None else top)
    places = [p for p in circuit.graph.places if p in {*shown.src, *shown.dest}]
    nodes = sorted({*shown.sender, *shown.receiver})
    where = _Places(circuit, places, nodes)
    largest = float(shown.weight.abs().max())
    unit = circuit.attrs.get("unit", "logits")
    traces: list[dict[str, Any]] = []
    named = {_via(row): row["edge"] for row in shown.iloc[::-1].to_dict("records")}  # the largest
    for row in shown.iloc[::-1].to_dict("records"):  # the largest last, on top
        kind = _via(row)
        x, y = _curve(where.of(row["sender"]), where.of(row["receiver"]))
        share = abs(row["weight"]) / largest
        hover = f"{row['edge']}<br>{row['weight']:+.3g} {unit}"
        if row["edge"] in circuit.intervals:
            low, high = circuit.intervals[row["edge"]]
            hover += f"<br>95 % interval {low:+.3g} to {high:+.3g}, on the prompts that chose it"
        traces.append(
            {
                "type": "scatter", "mode": "lines", "x": x, "y": y, "name": kind,
                "legendgroup": kind, "showlegend": row["edge"] == named[kind], "hoverinfo": "text",
                "text": [hover] * len(x), "opacity": round(0.35 + 0.6 * share, 3),
                "customdata": [row["edge"]] * len(x),
                "line": {"color": FOR if row["weight"] > 0 else AGAINST,
                         "width": round(1 + 6 * share, 2)},
            }
        )  # fmt: skip
    traces += _nodes(where, nodes, lost or {})
    paths = _paths(shown.iloc[::-1])
    count = f"{len(shown)} largest of {len(table)} edges" if len(shown) < len(table) else None
    if title is None:
        about = circuit.attrs
        title = f"{about.get('task', 'circuit')} on {about.get('model', 'a model')}"
        title += f", {about.get('method', '')}, corruption {about.get('corruption', '')}"
    layers = [f"layer {i}" for i in range(circuit.graph.n_layers)]
    ends = where.y[-1] - LEVEL / 2, where.y[len(layers)] + LEVEL / 2
    high = ends[1] - ends[0]
    listed = sum(trace.get("showlegend", True) for trace in traces)
    margin = {"l": LEFT, "r": RIGHT, "t": TOP, "b": BELOW + LINE * -(-listed // 2) + 10}
    layout: dict[str, Any] = {
        "title": {"text": "<br>".join(filter(None, (title, count and f"<sub>{count}</sub>"))),
                  "x": 0.01, "y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 16},
                  "font": {"size": 14}},
        "height": high + margin["t"] + margin["b"], "hovermode": "closest", "autosize": True,
        "meta": {"paths": paths, "min_width": where.min_width},
        "updatemenus": [_menu(traces, nodes, paths)],
        "legend": {"orientation": "h", "x": 0, "y": round(-BELOW / high, 4), "yanchor": "top",
                   "itemsizing": "constant"},
        "modebar": {"remove": ["sendChartToCloud", "select2d", "lasso2d"]},
        "paper_bgcolor": "rgba(255,255,255,0)", "hoverlabel": {"namelength": -1},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#222"},
        "plot_bgcolor": "rgba(255,255,255,0)", "margin": margin,
        "xaxis": {"tickvals": list(range(len(places))), "ticktext": places, "title": "role",
                  "showgrid": False, "zeroline": False, "range": [-0.6, len(places) - 0.4]},
        "yaxis": {"tickvals": list(where.y.values()), "ticktext": ["embed", *layers, "logits"],
                  "gridcolor": "#eee", "zeroline": False, "range": list(ends)},
    }  # fmt: skip
    return go.Figure({"data": traces, "layout": layout})


class _Places:
    """Where nodes stand: x counts roles, y is in pixels.

    Heads of one layer and role stand in rows, lowest number first, as many to a row as have room
    between two roles on a narrow screen; a layer is as high as its rows need.
    """

    def __init__(self, circuit: Circuit, places: list[str], nodes: list[str]) -> None:
        self.x = {place: float(i) for i, place in enumerate(places)}
        self.last = circuit.graph.n_layers
        self.columns = max(2, int(NARROW / (len(places) + 0.2) / PITCH))
        self.cells: dict[tuple[int, str], list[int]] = {}
        for node in nodes:
            if _kind(node) == "head":
                layer, head, place = _parse(node)
                assert head is not None
                self.cells.setdefault((layer, place), []).append(head)
        rows = [0] * self.last  # beyond the first, by layer
        for (layer, _), heads in self.cells.items():
            heads.sort()
            rows[layer] = max(rows[layer], (len(heads) - 1) // self.columns)
        self.half = [0.5 * PITCH * n for n in rows]
        halves = [0.0, *self.half, 0.0]
        steps = [LEVEL + a + b for a, b in itertools.pairwise(halves)]
        self.y = dict(enumerate(itertools.accumulate(steps, initial=0.0), -1))

    @property
    def min_width(self) -> int:
        """Pixels below which heads of neighbouring roles would touch."""
        return int(self.columns * PITCH * (len(self.x) + 0.2)) + LEFT + RIGHT

    def of(self, node: str) -> tuple[float, float]:
        """Get x and y of a node."""
        if node == "logits":
            return self.x["query_is"], self.y[self.last]
        if node.startswith("embed@"):
            return self.x[node.split("@")[1]], self.y[-1]
        layer, head, place = _parse(node)
        if head is None:
            return self.x[place], self.y[layer] + self.half[layer] + 0.42 * LEVEL
        heads = self.cells[layer, place]
        row, column = divmod(heads.index(head), self.columns)
        beside = min(self.columns, len(heads) - row * self.columns)
        lines = (len(heads) - 1) // self.columns
        across = (column - (beside - 1) / 2) / self.columns
        return self.x[place] + across, self.y[layer] + PITCH * (lines / 2 - row)


def _via(row: Mapping[Any, Any]) -> str:
    return INPUTS.get(str(row["via"]), LAST)


def _kind(node: str) -> str:
    first = node.split("@")[0]
    return first if first in ("embed", "logits") else "mlp" if ".mlp" in first else "head"


def _parse(node: str) -> tuple[int, int | None, str]:
    match = _NODE.fullmatch(node)
    assert match is not None, node
    return int(match[1]), None if match[2] is None else int(match[2]), match[3]


def _paths(edges: pd.DataFrame) -> dict[str, list[int]]:
    """Number the edges on the paths through each node, and through each edge."""
    import networkx

    ends = list(zip(edges.sender, edges.receiver, strict=True))
    graph = networkx.DiGraph(ends)
    above = {node: networkx.ancestors(graph, node) | {node} for node in graph}
    below = {node: networkx.descendants(graph, node) | {node} for node in graph}

    def through(first: str, last: str) -> set[int]:
        return {
            i for i, (start, end) in enumerate(ends) if end in above[first] or start in below[last]
        }

    paths = {node: sorted(through(node, node)) for node in sorted(graph)}
    for i, (name, (start, end)) in enumerate(zip(edges.edge, ends, strict=True)):
        paths[name] = sorted(through(start, end) | {i})
    return paths


def _menu(
    traces: list[dict[str, Any]], nodes: list[str], paths: Mapping[str, list[int]]
) -> dict[str, Any]:
    """Make the list of nodes whose paths can be left alone."""
    edges = [i for i, trace in enumerate(traces) if trace["mode"] == "lines"]
    look = [traces[i]["opacity"] for i in edges]
    buttons = [{"label": "all paths", "method": "restyle", "args": [{"opacity": look}, edges]}]
    for node in nodes:
        kept = set(paths[node])
        some = [full if i in kept else FADED for i, full in enumerate(look)]
        label = f"through {node}"
        buttons.append({"label": label, "method": "restyle", "args": [{"opacity": some}, edges]})
    return {
        "buttons": buttons, "x": 0, "xanchor": "left", "y": 1.01, "yanchor": "bottom",
        "pad": {"t": 0, "b": 4}, "font": {"size": 11}, "bgcolor": "#fff", "bordercolor": "#bbb",
    }  # fmt: skip


def _nodes(where: _Places, nodes: list[str], lost: Mapping[str, Interval]) -> list[dict[str, Any]]:
    """Draw the nodes, one trace a kind; a head's number stands in its circle."""
    kinds: Mapping[str, list[str]] = {kind: [] for kind in LOOKS}
    for node in nodes:
        kinds[_kind(node)].append(node)
    out = []
    for kind, members in kinds.items():
        if not members:
            continue
        symbol, size, name = LOOKS[kind]
        x, y = zip(*map(where.of, members), strict=True)
        label = [str(_parse(n)[1]) if kind == "head" else "" for n in members]
        out.append(
            {
                "type": "scatter", "mode": "markers+text", "x": x, "y": y, "text": label,
                "textposition": "middle center", "name": name,
                "textfont": {"size": 10, "color": "#222"},
                "hovertext": [n + _loss(lost.get(n)) for n in members], "hoverinfo": "text",
                "customdata": members,
                "marker": {"symbol": symbol, "size": size, "color": "#fff",
                           "line": {"color": "#333", "width": 1.5}},
            }
        )  # fmt: skip
    return out


def _loss(interval: Interval | None) -> str:
    return f"<br>without it faithfulness falls by {interval}" if interval else ""


def _curve(
    start: tuple[float, float], end: tuple[float, float], n: int = 16
) -> tuple[list[float], list[float]]:
    """Bend a line between two nodes, so that edges along one role can be told apart."""
    t = np.linspace(0, 1, n)
    (x0, y0), (x1, y1) = start, end
    bow = 0.06 * (y1 - y0) / LEVEL if abs(x1 - x0) < 0.5 else 0.0
    x = x0 + (x1 - x0) * t**1.5 - bow * np.sin(np.pi * t)
    y = y0 + (y1 - y0) * t
    return np.round(x, 4).tolist(), np.round(y, 2).tolist()
