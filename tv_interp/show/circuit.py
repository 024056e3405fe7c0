"""A circuit as a picture: roles from left to right, layers from bottom to top, signed edges."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import TvInterpError

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from ..analysis.circuits import Circuit

FOR, AGAINST = "#0072B2", "#D55E00"
LOOKS = {  # kind of node: symbol, size, name in the legend
    "embed": ("square", 13, "embedding"),
    "head": ("circle", 15, "head (layer.head)"),
    "mlp": ("diamond", 14, "MLP"),
    "logits": ("star", 18, "logits"),
}
INPUTS = {"q": "into queries", "k": "into keys", "v": "into values", "mlp": "into MLPs"}
_NODE = re.compile(r"L(\d+)(?:H(\d+)|\.mlp)@(.+)")


def plot_circuit(circuit: Circuit, *, top: int | None = 80, title: str | None = None) -> go.Figure:
    """Draw a circuit with its roles on x and its layers on y.

    An edge is blue where it carries the task and orange where it works against it, and as wide as
    its weight is large. An edge that crosses roles is attention: it goes from the role that is read
    to the role that reads. A click in the legend takes one kind of edge away, a double click leaves
    it alone; hovering names an edge and its weight.

    Args:
        circuit: The circuit.
        top: How many edges, the largest by absolute weight; None for all. The title says how many.
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
        kind = INPUTS.get(str(row["via"]), "into logits")
        x, y = _curve(where.of(row["sender"]), where.of(row["receiver"]))
        share = abs(row["weight"]) / largest
        hover = f"{row['edge']}<br>{row['weight']:+.3g} {unit}"
        traces.append(
            {
                "type": "scatter", "mode": "lines", "x": x, "y": y, "name": kind,
                "legendgroup": kind, "showlegend": kind not in named, "hoverinfo": "text",
                "text": [hover] * len(x), "opacity": round(0.35 + 0.6 * share, 3),
                "line": {"color": FOR if row["weight"] > 0 else AGAINST,
                         "width": round(1 + 6 * share, 2)},
            }
        )  # fmt: skip
        named.add(kind)
    traces += _nodes(where, sorted({*shown.sender, *shown.receiver}))
    count = f"{len(shown)} largest of {len(table)} edges" if len(shown) < len(table) else None
    if title is None:
        about = circuit.attrs
        title = f"{about.get('task', 'circuit')} on {about.get('model', 'a model')}"
        title += f", {about.get('method', '')}, corruption {about.get('corruption', '')}"
    levels = circuit.graph.n_layers
    layout: dict[str, Any] = {
        "title": {"text": title + (f"<br><sub>{count}</sub>" if count else ""), "x": 0.01,
                  "font": {"size": 14}},
        "height": 160 + 90 * (levels + 1), "hovermode": "closest",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#222"},
        "plot_bgcolor": "rgba(255,255,255,0)", "margin": {"l": 60, "r": 20, "t": 70, "b": 50},
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


def _nodes(where: _Places, nodes: list[str]) -> list[dict[str, Any]]:
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
                "textposition": "middle right", "textfont": {"size": 10}, "name": name,
                "hovertext": members, "hoverinfo": "text",
                "marker": {"symbol": symbol, "size": size, "color": "#fff",
                           "line": {"color": "#333", "width": 1.5}},
            }
        )  # fmt: skip
    return out


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
