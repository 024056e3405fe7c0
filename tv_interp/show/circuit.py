"""A circuit as a picture: roles from left to right, layers from bottom to top, signed edges."""

from __future__ import annotations

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
    "head": ("circle", 15, "head (layer.head)"),
    "mlp": ("diamond", 14, "MLP"),
    "logits": ("star", 18, "logits"),
}
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
    where = _Places(circuit, places)
    largest = float(shown.weight.abs().max())
    unit = circuit.attrs.get("unit", "logits")
    traces: list[dict[str, Any]] = []
    named: set[str] = set()
    for row in shown.iloc[::-1].to_dict("records"):  # the largest last, on top
        kind = INPUTS.get(str(row["via"]), LAST)
        x, y = _curve(where.of(row["sender"]), where.of(row["receiver"]))
        share = abs(row["weight"]) / largest
        hover = f"{row['edge']}<br>{row['weight']:+.3g} {unit}"
        if row["edge"] in circuit.intervals:
            low, high = circuit.intervals[row["edge"]]
            hover += f"<br>95 % interval {low:+.3g} to {high:+.3g}, on the prompts that chose it"
        traces.append(
            {
                "type": "scatter", "mode": "lines", "x": x, "y": y, "name": kind,
                "legendgroup": kind, "showlegend": kind not in named, "hoverinfo": "text",
                "text": [hover] * len(x), "opacity": round(0.35 + 0.6 * share, 3),
                "customdata": [row["edge"]] * len(x),
                "line": {"color": FOR if row["weight"] > 0 else AGAINST,
                         "width": round(1 + 6 * share, 2)},
            }
        )  # fmt: skip
        named.add(kind)
    nodes = sorted({*shown.sender, *shown.receiver})
    traces += _nodes(where, nodes, lost or {})
    paths = _paths(shown.iloc[::-1])
    count = f"{len(shown)} largest of {len(table)} edges" if len(shown) < len(table) else None
    if title is None:
        about = circuit.attrs
        title = f"{about.get('task', 'circuit')} on {about.get('model', 'a model')}"
        title += f", {about.get('method', '')}, corruption {about.get('corruption', '')}"
    levels = circuit.graph.n_layers
    layout: dict[str, Any] = {
        "title": {"text": "<br>".join(filter(None, (title, count and f"<sub>{count}</sub>"))),
                  "x": 0.01, "y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 16},
                  "font": {"size": 14}},
        "height": 230 + 90 * (levels + 1), "hovermode": "closest", "autosize": True,
        "meta": {"paths": paths}, "updatemenus": [_menu(traces, nodes, paths)],
        "legend": {"orientation": "h", "x": 0, "y": -0.09, "yanchor": "top"},
        "modebar": {"remove": ["sendChartToCloud", "select2d", "lasso2d"]},
        "paper_bgcolor": "rgba(255,255,255,0)", "hoverlabel": {"namelength": -1},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#222"},
        "plot_bgcolor": "rgba(255,255,255,0)", "margin": {"l": 60, "r": 20, "t": 110, "b": 90},
        "xaxis": {"tickvals": list(range(len(places))), "ticktext": places, "title": "role",
                  "showgrid": False, "zeroline": False, "range": [-0.6, len(places) - 0.4]},
        "yaxis": {"tickvals": [-1, *range(levels), levels],
                  "ticktext": ["embed", *map(str, range(levels)), "logits"], "title": "layer",
                  "gridcolor": "#eee", "zeroline": False, "range": [-1.5, levels + 0.5]},
    }  # fmt: skip
    return go.Figure({"data": traces, "layout": layout})


class _Places:
    """Where nodes stand."""

    def __init__(self, circuit: Circuit, places: list[str]) -> None:
        self.x = {place: float(i) for i, place in enumerate(places)}
        self.n_layers, self.n_heads = circuit.graph.n_layers, circuit.graph.n_heads

    def of(self, node: str) -> tuple[float, float]:
        """Get x and y of a node."""
        if node == "logits":
            return self.x["query_is"], float(self.n_layers)
        if node.startswith("embed@"):
            return self.x[node.split("@")[1]], -1.0
        layer, head, place = _parse(node)
        if head is None:
            return self.x[place], layer + 0.32
        spread = (head + 0.5) / self.n_heads - 0.5
        return self.x[place] + 0.72 * spread, layer - 0.12


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
    """Draw the nodes, one trace a kind, with their names."""
    kinds: Mapping[str, list[str]] = {kind: [] for kind in LOOKS}
    for node in nodes:
        first = node.split("@")[0]
        kind = first if first in ("embed", "logits") else "mlp" if ".mlp" in first else "head"
        kinds[kind].append(node)
    out = []
    for kind, members in kinds.items():
        if not members:
            continue
        symbol, size, name = LOOKS[kind]
        x, y = zip(*map(where.of, members), strict=True)
        label = [f"{_parse(n)[0]}.{_parse(n)[1]}" if kind == "head" else "" for n in members]
        out.append(
            {
                "type": "scatter", "mode": "markers+text", "x": x, "y": y, "text": label,
                "textposition": "bottom center", "textfont": {"size": 10}, "name": name,
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
    bow = 0.06 * (y1 - y0) if abs(x1 - x0) < 0.5 else 0.0
    x = x0 + (x1 - x0) * t**1.5 - bow * np.sin(np.pi * t)
    y = y0 + (y1 - y0) * t
    return np.round(x, 4).tolist(), np.round(y, 4).tolist()
