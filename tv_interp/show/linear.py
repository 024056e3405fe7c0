"""Figures of the experiments on linear transformers, and their page.

Signed maps are red to blue with white at 0. Predictions are lines without markers; what was
measured has markers or bars.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import TvInterpError, unknown
from ..files import write_text
from . import plots
from .page import render_page
from .plots import COLORS, DASHES, PLAIN, SYMBOLS, _colors, _errors, _numbers, _Sheet

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr

    from ..theory.report import LinearReport

_AXES = {
    "n": "demonstrations n", "keep": "keep probability p", "vectors": "injected vectors k",
    "rank": "rank r of the task's map", "demo": "demonstration (from 1)", "value": "singular value",
    "source": "source (read)", "destination": "destination (written)", "row": "row",
    "column": "column", "arrow": "arrow", "task": "", "rung": "",
}  # fmt: skip


def plot_linear(report: LinearReport, name: str) -> go.Figure:
    """Draw one figure of a report.

    Args:
        report: From `run_linear`.
        name: One of `linear_figures`.

    Returns:
        The figure, without a fixed width.

    Raises:
        UnknownName: if the report has no such figure.
    """
    known = linear_figures(report)
    if name not in known:
        raise unknown("figure", name, known)
    return FIGURES[name][0](report.data)


def linear_figures(report: LinearReport) -> dict[str, str]:
    """List the figures that a report has arrays for: captions by name."""
    return {
        name: caption
        for name, (_, needs, caption) in FIGURES.items()
        if set(needs) <= set(report.data)
    }


def write_linear_page(
    path: str | os.PathLike, report: LinearReport, *, command: str | None = None
) -> None:
    """Write checks, findings and figures as one HTML file that needs no network.

    Args:
        path: File to write, under its final name only once it is whole.
        report: From `run_linear`.
        command: The command that made the report; None for the call in Python.

    Raises:
        TvInterpError: for anything else than a report.
        FileError: if the file cannot be written.
    """
    from markupsafe import Markup

    from ..theory.report import LinearReport

    if not isinstance(report, LinearReport):
        raise TvInterpError(
            f"expected a LinearReport as made by run_linear, got {type(report).__name__}"
        )
    figures = [
        {
            "title": name,
            "caption": caption,
            "figure": Markup(plots.fragment(plot_linear(report, name), f"figure-{i}")),
        }
        for i, (name, caption) in enumerate(linear_figures(report).items(), 1)
    ]
    settings = {k: v for k, v in report.settings.items() if k != "sections"}
    call = f"run_linear({report.settings['preset']!r}, seed={report.settings['seed']})"
    page = render_page(
        "linear.html.j2",
        report=report,
        settings=settings,
        command=command or call,
        figures=figures,
        missed=[c for c in report.checks if not c.passed],
    )
    write_text(Path(path), page)


# ------------------------------------------------------------------------------- kinds of figure


def _heatmaps(arrays: Mapping[str, xr.DataArray], title: str) -> go.Figure:
    """Draw signed matrices side by side under one scale."""
    limit = max(float(abs(a).max()) for a in arrays.values())
    sheet = _Sheet(1, len(arrays), 360 if len(arrays) < 3 else 250)  # panels are square
    for i, (name, array) in enumerate(arrays.items()):
        rows, cols = (str(dim) for dim in array.dims)
        square = {
            "scaleanchor": f"x{i + 1 if i else ''}",
            "constrain": "domain",
            "constraintoward": "top",
        }
        x, y = sheet.panel(
            0, i, name,
            {"title": {"text": _AXES[cols]}, "type": "category", "showgrid": False,
             "tickangle": 90, "constrain": "domain", "constraintoward": "left"},
            {"title": {"text": _AXES[rows] if i == 0 else ""}, "type": "category",
             "autorange": "reversed", "showgrid": False, **square},
        )  # fmt: skip
        unit = str(array.attrs["unit"])
        sheet.traces.append(
            {
                "type": "heatmap", "z": _numbers(array.values), "xaxis": x, "yaxis": y,
                "x": [str(v) for v in array[cols].values],
                "y": [str(v) for v in array[rows].values],
                "hovertemplate": f"%{{y}} → %{{x}}: %{{z:+.4g}}<extra>{name}</extra>",
                **_colors(limit, unit), "showscale": i == len(arrays) - 1, "xgap": 0, "ygap": 0,
            }
        )  # fmt: skip
    return sheet.figure(title, least=280 * len(arrays) if len(arrays) > 2 else 0)


def _curves(
    array: xr.DataArray,
    title: str,
    *,
    scale: str = "linear",
    values: Literal["tozero", "normal"] = "tozero",
) -> go.Figure:
    """Draw series over a numeric axis; predictions as lines, measurements with markers."""
    along = str(array.dims[0])
    predicted = array.attrs.get("predicted", [])
    sheet = _Sheet(1, 1, 300, legend=True)
    for i, name in enumerate(map(str, array["series"].values)):
        look = i % len(COLORS)
        line = {"color": COLORS[look], "dash": DASHES[look]}
        sheet.traces.append(
            {
                "type": "scatter", "name": name,
                "mode": "lines" if name in predicted else "lines+markers",
                "x": array[along].values.tolist(), "y": _numbers(array.sel(series=name).values),
                "line": {"color": "#444", "dash": "dot"} if name in predicted else line,
                "marker": {"symbol": SYMBOLS[look], "size": 9},
                "hovertemplate": f"{name}, {along} %{{x}}: %{{y:.4g}}<extra></extra>",
            }
        )  # fmt: skip
    sheet.panel(
        0, 0, "", {"title": {"text": _AXES[along]}, "type": scale,
                   "tickvals": array[along].values.tolist()},
        {"title": {"text": str(array.attrs["unit"])}, "rangemode": values, "zeroline": True},
    )  # fmt: skip
    return sheet.figure(title)


def _by_rank(arrays: Mapping[str, xr.DataArray], title: str) -> go.Figure:
    """Draw errors with their intervals against rank, and the floor of one vector."""
    sheet = _Sheet(1, len(arrays), 300, legend=True)
    for col, (name, array) in enumerate(arrays.items()):
        ranks = [int(r) for r in array["rank"].values]
        x, y = sheet.panel(
            0, col, name,
            {"title": {"text": _AXES["rank"]}, "tickvals": ranks},
            {"title": {"text": str(array.attrs["unit"]) if col == 0 else ""}, "range": [-0.03, 1],
             "zeroline": True},
        )  # fmt: skip
        for i, part in enumerate(map(str, array["part"].values)):
            value, lo, hi = (
                _numbers(array.sel(part=part, bound=b).values) for b in ("value", "lo", "hi")
            )
            sheet.traces.append(
                {
                    "type": "scatter", "mode": "lines+markers", "name": part, "legendgroup": part,
                    "showlegend": col == 0, "x": ranks, "y": value, "xaxis": x, "yaxis": y,
                    "error_y": _errors(value, lo, hi),
                    "line": {"color": COLORS[i], "dash": DASHES[i]},
                    "marker": {"symbol": SYMBOLS[i], "size": 8},
                    "hovertemplate": f"{part}, rank %{{x}}: %{{y:.4g}}<extra></extra>",
                }
            )  # fmt: skip
        floor = "floor of one vector, 1 - 1/r"
        sheet.traces.append(
            {
                "type": "scatter", "mode": "lines", "name": floor, "legendgroup": floor,
                "showlegend": col == 0, "x": ranks, "y": [1 - 1 / r for r in ranks],
                "xaxis": x, "yaxis": y, "line": {"color": "#444", "dash": "dot"},
            }
        )  # fmt: skip
    return sheet.figure(title, least=280 * len(arrays))


def _bars(arrays: Mapping[str, xr.DataArray], title: str, along: str, color: str) -> go.Figure:
    """Draw means with intervals as bars, one panel above the other."""
    sheet = _Sheet(len(arrays), 1, 210, legend=True)
    for row, (name, array) in enumerate(arrays.items()):
        x, y = sheet.panel(
            row, 0, name, {"type": "category"},
            {"title": {"text": str(array.attrs["unit"])}, "range": [0, 1.05], "zeroline": True},
        )  # fmt: skip
        for i, part in enumerate(map(str, array[color].values)):
            chosen = array.sel({color: part})
            value, lo, hi = (_numbers(chosen.sel(bound=b).values) for b in ("value", "lo", "hi"))
            sheet.traces.append(
                {
                    "type": "bar", "name": part, "legendgroup": part, "showlegend": row == 0,
                    "x": [str(v) for v in array[along].values], "y": value, "xaxis": x, "yaxis": y,
                    "error_y": _errors(value, lo, hi), "marker": {"color": COLORS[i]},
                    "hovertemplate": f"%{{x}}, {part}: %{{y:.3f}}<extra></extra>",
                }
            )  # fmt: skip
        sheet.shapes.append(_level(x, y, 0.5))
    return sheet.figure(title)


def _graph(array: xr.DataArray, title: str, *, least: float = 0.01, widths: int = 8) -> go.Figure:
    """Draw tokens before and after each layer, and what is read from where, by line width.

    Widths are shares of the largest saliency of the layer; below `least` nothing is drawn.
    """
    names = [str(v) for v in array["src"].values]
    layers = [int(v) for v in array["layer"].values]
    sheet = _Sheet(1, 1, 130 + 150 * len(layers))
    for layer in layers:
        values = array.sel(layer=layer).values
        shares = values / values.max()
        bins = np.ceil(shares * widths).astype(int) * (shares >= least)
        color = COLORS[(layer - 1) % len(COLORS)]
        for width in range(1, widths + 1):
            x: list[float | None] = []
            y: list[float | None] = []
            for src, dest in np.argwhere(bins == width):
                x += [int(src), int(dest), None]
                y += [layer - 1, layer, None]
            if x:
                sheet.traces.append(
                    {
                        "type": "scatter", "mode": "lines", "x": x, "y": y, "hoverinfo": "skip",
                        "line": {"color": color, "width": 0.75 * width},
                        "opacity": 0.3 + 0.7 * width / widths, "showlegend": False,
                    }
                )  # fmt: skip
    for level in [0, *layers]:
        sheet.traces.append(
            {
                "type": "scatter", "mode": "markers", "x": list(range(len(names))),
                "y": [level] * len(names), "text": names, "showlegend": False,
                "marker": {"size": 8, "color": PLAIN}, "hovertemplate": "%{text}<extra></extra>",
            }
        )  # fmt: skip
    sheet.panel(
        0, 0, "",
        {"title": {"text": "token"}, "tickvals": list(range(len(names))), "ticktext": names,
         "tickangle": 0, "showgrid": False, "tickfont": {"size": 10}},
        {"tickvals": [0, *layers], "showgrid": False, "autorange": "reversed",
         "ticktext": ["prompt", *(f"after layer {i}" for i in layers)]},
    )  # fmt: skip
    return sheet.figure(title, least=100 + 26 * len(names))


def _rungs(array: xr.DataArray, title: str) -> go.Figure:
    """Draw the three predictions on every rung, for models trained with and without dropout."""
    panels = {
        "combination": ("1. Combination: variance explained of the\nlast arrow, held out", 1.0),
        "rank": ("2. Effective rank of one vector's map", 1.0),
        "fit": ("2. One vector's error on a map of rank 2\n(0.5 at best)", 0.5),
        "gain": ("3. Risk added when arrows are emptied,\nunder dropout", 0.0),
    }
    sheet = _Sheet(len(panels), 1, 150, legend=True)
    rungs = [str(v) for v in array["rung"].values]
    for row, (quantity, (name, predicted)) in enumerate(panels.items()):
        x, y = sheet.panel(
            row, 0, name, {"type": "category"}, {"zeroline": True, "rangemode": "tozero"}
        )
        for i, trained in enumerate(map(str, array["trained"].values)):
            label = f"trained {trained}"
            sheet.traces.append(
                {
                    "type": "bar", "name": label, "legendgroup": label, "showlegend": row == 0,
                    "x": rungs, "xaxis": x, "yaxis": y, "marker": {"color": COLORS[i]},
                    "y": _numbers(array.sel(quantity=quantity, trained=trained).values),
                    "hovertemplate": f"%{{x}}, {label}: %{{y:.3f}}<extra></extra>",
                }
            )  # fmt: skip
        sheet.shapes.append(_level(x, y, predicted))
    return sheet.figure(title)


def _level(x: str, y: str, value: float) -> dict[str, Any]:
    """Make a dotted line at a predicted value."""
    return {
        "type": "line", "xref": f"{x} domain", "yref": y, "x0": 0, "x1": 1, "y0": value,
        "y1": value, "line": {"color": "#444", "dash": "dot", "width": 1.5},
    }  # fmt: skip


# --------------------------------------------------------------------------------------- the list

_D = ("D, pair", "D, triplet, dropout", "D, triplet, no dropout")
Data = Mapping[str, "xr.DataArray"]


def _pick(data: Data, names: Sequence[str]) -> dict[str, xr.DataArray]:
    return {name: data[name] for name in names}


FIGURES: dict[str, tuple[Callable[[Data], Any], tuple[str, ...], str]] = {
    "V and Q": (
        lambda data: _heatmaps(_pick(data, ("V", "Q")), "One layer, all of V and Q free"),
        ("V", "Q"),
        "One layer on single prompts, trained with every entry of V and Q free. Predicted: only "
        "b I in V's lower right and c I in Q's upper left. Entries that never reach the prediction "
        "are 0.",
    ),
    "D": (
        lambda data: _heatmaps(_pick(data, _D), "Positions D of the first layer"),
        _D,
        "What the first layer moves from row to column. Predicted: equal blocks on the diagonal "
        "and, in triplets, task vectors in the columns of the arrows. Without dropout the penalty "
        "empties the arrows.",
    ),
    "Gram of L4": (
        lambda data: _heatmaps(_pick(data, ("L4 L4^T",)), "Λ4 Λ4ᵀ of the triplet with dropout"),
        ("L4 L4^T",),
        "Proposition 3: diag(I, 0). Demonstrations are spread over the arrows orthogonally; the "
        "last row, from the query, is empty.",
    ),
    "weights by demonstration": (
        lambda data: _heatmaps(
            _pick(data, ("weights by demonstration",)), "Demonstrations in each arrow"
        ),
        ("weights by demonstration",),
        "Column i holds the weights with which arrow i combines the demonstrations; the last is "
        "the query's arrow, the task vector.",
    ),
    "causal weights": (
        lambda data: _curves(
            data["weights in the last arrow, causal"], "Proposition 5, causal: the last arrow"
        ),
        ("weights in the last arrow, causal",),
        "Minimiser of Proposition 5's objective with causal arrows. The printed constants do not "
        "agree with enumeration; with the corrected ones, weights that decay to earlier "
        "demonstrations appear at p = .5, while at p = .8 each arrow holds one demonstration.",
    ),
    "risk against demonstrations": (
        lambda data: _curves(
            data["risk against demonstrations"], "Risk of each prompt format", scale="log"
        ),
        ("risk against demonstrations",),
        "Two layers on pairs or triplets, without content scores in the first, reach what one "
        "layer reaches on single prompts, and the closed form.",
    ),
    "risk against keep probability": (
        lambda data: _curves(
            data["risk against keep probability"], "Risk under dropout", values="normal"
        ),
        ("risk against keep probability",),
        "Each model is trained with the dropout it is tested with. Arrows lower the risk, most "
        "where more tokens are dropped; emptied and rescaled, the triplet model loses it.",
    ),
    "error against rank": (
        lambda data: _by_rank(
            {
                "x in the row space": data["error against rank"],
                "isotropic x": data["error against rank, isotropic x"],
            },
            "Error of the map implied by injected vectors",
        ),  # fmt: skip
        ("error against rank", "error against rank, isotropic x"),
        "1 - cos² of the implied map and the task's, with 95 % intervals. With x in the row space "
        "of W one vector sits on its floor; with isotropic x its error is the same at every rank.",
    ),
    "error against number of vectors": (
        lambda data: _curves(
            data["error against number of vectors"],
            f"Several vectors, map of rank {data['error against number of vectors'].attrs['rank']}",
            scale="log",
        ),
        ("error against number of vectors",),
        "The model's single gradient step improves smoothly; a least-squares read-out of the same "
        "vectors is exact from k = r on.",
    ),
    "singular values": (
        lambda data: _curves(data["singular values"], "Singular values of the implied map"),
        ("singular values",),
        "Map implied by one injected vector, and by the demonstrations in the prompt, for tasks of "
        "full rank, each over its largest singular value.",
    ),
    "bijections": (
        lambda data: _bars(
            {
                "absolute projection": data["accuracy on bijections, absolute"],
                "signed projection": data["accuracy on bijections, signed"],
            },
            "Accuracy on maps between two codes",
            "task",
            "part",
        ),  # fmt: skip
        ("accuracy on bijections, absolute", "accuracy on bijections, signed"),
        "One vector is at chance (dotted) on the bijection alone; copy and negate are the "
        "bijections of rank one. By signed projection chance hides, and one vector gets three "
        "quarters.",
    ),
    "saliency": (
        lambda data: _graph(data["saliency"], "Who is read by whom"),
        ("saliency",),
        "Mean |G ∂L/∂G| of the triplet model trained with dropout, width relative to the largest "
        "of the layer, from 1 % on. Layer 1 joins x and y of a demonstration, fills the arrows and "
        "copies the query to the end; layer 2 reads all of them there.",
    ),
    "ladder": (
        lambda data: _rungs(data["ladder"], "The ladder from linear attention to a transformer"),
        ("ladder",),
        "Each rung adds one thing to the rung on its left; dotted: predicted (for the last panel, "
        "without dropout; with dropout above it).",
    ),
}
