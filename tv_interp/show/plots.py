"""Plotly figures of scores and reports.

Blue carries the task, red works against it; 0 is white. Colours are told apart by colour-blind
readers: RdBu for signed maps, Okabe and Ito's for lines and bars, where marker and dash differ too.
Every number in a figure is the one in the data, rounded to six digits.
"""

from __future__ import annotations

import html
import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import ScoreError, TvInterpError, unknown

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr

    from ..analysis.comparison import VectorReport
    from ..analysis.features import Geometry
    from ..analysis.find import Effect, FoundHead, HeadReport
    from ..analysis.information import InformationMap
    from ..scores import Scores

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid")
PLAIN = "#777777"
"""Runs as they are: seen on light and on dark ground."""
CONFIG = {"responsive": True, "displaylogo": False, "showSendToCloud": False}
_BETWEEN = 100  # pixels between the rows of a sheet: axis title above, panel title below
LETTERS = {"writer": "W", "copier": "C", "reader": "R", "relay": "L"}
FADED = 0.04
"""Opacity of the edges of a circuit that are not on the chosen paths."""
_PLANES = (("layer", "head"), ("sender", "receiver"), ("dest", "src"), ("layer", "site"),
           ("role", "layer"))  # fmt: skip
_AXES = {"layer": "layer (0 at the top)", "demo": "demonstration (from 0)", "src": "source",
         "dest": "destination", "sender": "sender (writes)", "receiver": "receiver (reads)",
         "role": "source role", "site": ""}  # fmt: skip


def plot_scores(
    scores: Scores,
    *,
    of: Literal["auto", "mean", "recovered"] = "auto",
    marked: xr.DataArray | Literal["significant"] | None = "significant",
    top: int = 5,
    title: str | None = None,
) -> go.Figure:
    """Draw scores by their axes.

    Two axes of a plane (layer and head, sender and receiver, dest and src) give a heatmap with
    layer 0 at the top, one panel for each value of a further axis. An axis ``demo``, or layers
    alone, give lines with intervals; ``site``, ``role`` and ``part`` give bars.

    Args:
        scores: What to draw.
        of: ``"recovered"`` share of the total or ``"mean"`` effect; ``"auto"`` for the share where
            the total is clear.
        marked: Cells of a heatmap that get a dot; ``"significant"`` computes them, None marks none.
        top: Lines, or panels of bars, are drawn for so many heads or sites, the strongest.
        title: Title; None for what was measured, the empty text for no title.

    Returns:
        The figure, without a fixed width.

    Raises:
        UnknownName: for an unknown ``of``.
        ScoreError: if there are more axes than a figure can show, or no total for ``"recovered"``.
    """
    if of not in ("auto", "mean", "recovered"):
        raise unknown("quantity", of, ("auto", "mean", "recovered"))
    if of == "auto":
        of = "recovered" if scores.total_is_clear() else "mean"
    table = scores.ci(of)
    unit = "share of total" if of == "recovered" else str(scores.unit)
    dims = [str(d) for d in table["value"].dims]
    plane = next((p for p in _PLANES if set(p) <= set(dims)), None)
    if "demo" in dims or dims == ["layer"]:
        sheet = _lines(table, unit, top)
    elif plane is not None and len(dims) <= 3:
        if isinstance(marked, str):
            marked = scores.significant()
        sheet = _planes(table, plane, unit, marked)
    elif dims and set(dims) <= {"site", "role", "part"}:
        sheet = _bars(table, unit, top)
    else:
        raise ScoreError(
            f"cannot draw axes {dims or 'none'}: expected layer and head, sender and receiver, or "
            "dest and src with at most one more, demo, or any of site, role, part; select or "
            "average the rest of scores.data first"
        )
    title = describe(scores) if title is None else title
    return sheet.figure(title, gaps=plane is not None and "demo" not in dims)


def plot_flow(flow: Scores, *, title: str | None = None) -> go.Figure:
    """Draw saliency by layer and pair of roles, summed over heads, sign kept.

    Args:
        flow: From `saliency_flow`.
        title: Title; None for what was measured.

    Returns:
        A heatmap, a column a pair of roles ("from what → who reads it"), with a dot where the mean
        over prompts is significant. Pairs that no head can join are left out.

    Raises:
        ScoreError: if these are no scores over layer, head, dest and src.
    """
    if {str(d) for d in flow.data.dims} != {"prompt", "layer", "head", "dest", "src"}:
        raise ScoreError(
            f"expected scores over layer, head, dest and src, got {list(flow.data.dims)}: make "
            "them with saliency_flow"
        )
    pairs = flow.data.sum("head").stack(site=("src", "dest"))
    pairs = pairs.isel(site=np.flatnonzero(abs(pairs).max(("prompt", "layer")).values > 0))
    names = [f"{src} → {dest}" for src, dest in pairs["site"].values]
    data = pairs.drop_vars(("site", "src", "dest")).assign_coords(site=names)
    scores = replace(flow, data=data.transpose("prompt", "layer", "site"))
    return plot_scores(scores, of="mean", title=title)


def plot_information(
    found: InformationMap, *, of: Literal["held", "decoded"] = "held", title: str | None = None
) -> go.Figure:
    """Draw what each role holds after each layer: a panel each for rule, query and answer.

    Args:
        found: From `information_map`.
        of: ``"held"``, by intervention: the share of the total, or the effect where a total is not
            clear. ``"decoded"``, the screen: accuracy above shuffled labels.
        title: Title; None for what was measured.

    Returns:
        Heatmaps of role by layer with one colour scale and a dot where the mean over prompts is
        significant within its panel; grey where nothing could be measured.

    Raises:
        UnknownName: for another ``of``.
    """
    if of not in ("held", "decoded"):
        raise unknown("map", of, ("held", "decoded"))
    import xarray as xr

    maps = found.held if of == "held" else found.decoded
    if not maps:
        raise ScoreError("nothing could be decoded: too few states share a word; take more prompts")
    clear = all(scores.total_is_clear() for scores in maps.values())
    names = xr.DataArray(list(maps), dims=("part",), name="part")
    table = xr.concat([s.ci("recovered" if clear else "mean") for s in maps.values()], dim=names)
    marked = xr.concat([s.significant() for s in maps.values()], dim=names)
    unit = "share of total" if clear else next(iter(maps.values())).unit
    sheet = _planes(table, ("role", "layer"), unit, marked)
    s = found.settings
    if title is None:
        how = "what a state holds" if of == "held" else "what a linear decoder reads (a screen)"
        title = f"{how}: {s['task']} on {s['model']}, other rule: {s['other']}"
    return sheet.figure(title, gaps=True)


def describe(scores: Scores) -> str:
    """Say what scores are of: corruption, direction, role, task and model, where they are known."""
    a = scores.attrs
    about = [
        f"{a['at']}" if "at" in a else "",
        f"corruption {a['corruption']}" if "corruption" in a else "",
        str(a.get("direction", "")),
        str(a.get("metric", "")),
        f"{a['task']} on {a['model']}" if {"task", "model"} <= set(a) else str(a.get("task", "")),
    ]
    return ", ".join(part for part in about if part)


def plot_heads(
    report: HeadReport,
    *,
    corruption: str | None = None,
    direction: str | None = None,
    at: str | None = None,
    title: str | None = None,
) -> go.Figure:
    """Draw what each head writes at answers and reads at ``query_is``, side by side.

    One row for each corruption and direction; all panels share their colours. Found heads are
    outlined and lettered (W writer, C copier, R reader, L relay): solid where the head was found
    with this corruption and direction, dotted where only with another.

    Args:
        report: From `find_heads`.
        corruption: Draw only this one.
        direction: Draw only this one.
        at: Draw only this role.
        title: Title; None for task and model.

    Raises:
        UnknownName: for what the report does not have.
    """
    keys = [tuple(key.split("/")) for key in report.scores]
    for i, (kind, wanted) in enumerate(
        (("corruption", corruption), ("direction", direction), ("role", at))
    ):
        if wanted is not None and wanted not in {key[i] for key in keys}:
            raise unknown(kind, wanted, {key[i] for key in keys})
    tables = head_tables(report)
    if title is None:
        title = f"{report.settings.get('task')} on {report.settings.get('model')}"
    wanted_key = (corruption, direction, at)
    shown = {
        key: table
        for key, table in tables.items()
        if all(w in (None, k) for w, k in zip(wanted_key, key, strict=True))
    }
    if not shown:
        return _message("No corruption makes a measurable difference.", title)
    return draw_heads(report, shown, _limit(tables.values()), title)


def head_tables(report: HeadReport) -> dict[tuple[str, ...], xr.Dataset]:
    """Get value, lo and hi of recovered by (corruption, direction, role), where it is clear."""
    return {
        tuple(key.split("/")): scores.ci("recovered")
        for key, scores in report.scores.items()
        if scores.total_is_clear()
    }


def draw_heads(
    report: HeadReport, tables: Mapping[tuple[str, ...], xr.Dataset], limit: float, title: str
) -> go.Figure:
    """Draw maps of `head_tables` with colours from -limit to limit; see `plot_heads`."""
    rows = list(dict.fromkeys(key[:2] for key in tables))
    cols = list(dict.fromkeys(key[2] for key in tables))
    names = {"answer": "written at answer", "query_is": "read at query_is"}
    height = max(_plane_height(table.sizes["layer"]) for table in tables.values())
    sheet = _Sheet(len(rows), len(cols), height)
    for (kind, way, role), table in tables.items():
        row, col = rows.index((kind, way)), cols.index(role)
        name = f"{names.get(role, role)}:\n{kind}, {way}" if len(rows) * len(cols) > 1 else ""
        letters = np.full(table["value"].shape, "", dtype=object)
        x, y = sheet.panel(row, col, name, *_plane_axes(table, ("layer", "head")))
        for head in (h for h in report.found if h.site.role == role):
            letters[head.site.at] = LETTERS[head.label]
            here = any(
                e.significant and (e.corruption, e.direction) == (kind, way) for e in head.effects
            )
            layer, index = head.site.at
            sheet.shapes.append(
                {
                    "type": "rect", "xref": x, "yref": y,
                    "x0": index - 0.5, "x1": index + 0.5, "y0": layer - 0.5, "y1": layer + 0.5,
                    "line": {"color": "#E69F00", "width": 3, "dash": "solid" if here else "dot"},
                }
            )  # fmt: skip
        scale = (row, col) == (0, len(cols) - 1)
        trace = _heatmap(table, ("layer", "head"), "share of total", letters, limit, scale=scale)
        sheet.traces.append(trace | {"xaxis": x, "yaxis": y})
    return sheet.figure(title, gaps=True)


def plot_sources(
    report: HeadReport, *, at: str | None = None, title: str | None = None
) -> go.Figure:
    """Draw what part of each found head's effect comes from which source role.

    Args:
        report: From `find_heads`.
        at: Draw only heads at this role.
        title: Title; None for task and model.
    """
    heads = [h for h in report.found if h.sources and at in (None, h.site.role)]
    if title is None:
        title = f"Effect by source role, {report.settings.get('task')}"
    if not heads:
        return _message("No head was found.", title)
    roles = list(dict.fromkeys(role for head in heads for role in head.sources))
    roles = [r for r in roles if r != "all"] + ["all"] * ("all" in roles)
    values = [[_number(head.sources.get(role)) for role in roles] for head in heads]
    limit = max(abs(v) for row in values for v in row if v is not None)
    sheet = _Sheet(1, 1, 40 + 32 * len(heads))
    trace = {
        "type": "heatmap",
        "z": values,
        "x": [_text(role) for role in roles],
        "y": [f"{_name(h)} {h.label}" for h in heads],
        "text": [["" if v is None else f"{v:.2f}" for v in row] for row in values],
        "texttemplate": "%{text}",
        "hovertemplate": "%{y} from %{x}: %{z:+.3f}<extra></extra>",
        **_colors(limit, "share of total"),
    }
    sheet.traces.append(trace)
    sheet.panel(
        0, 0, "", {"title": {"text": "source role"}, "showgrid": False},
        {"autorange": "reversed", "showgrid": False},
    )  # fmt: skip
    return sheet.figure(title, gaps=True)


def plot_joint(report: HeadReport, *, title: str | None = None) -> go.Figure:
    """Draw joint effects with their intervals above the range of their control sets.

    Args:
        report: From `find_heads`.
        title: Title; None for task and model.
    """
    if title is None:
        title = f"Joint effects and controls, {report.settings.get('task')}"
    found = [j for j in report.joint if j.label in LETTERS]
    if not found:
        return _message("No writers or readers were found.", title)
    whole = {
        (j.label, j.effect.corruption, j.effect.direction): j.effect
        for j in report.joint
        if j not in found
    }
    sheet = _Sheet(1, 1, 50 + 46 * len(found), legend=True)
    listed: set[str] = set()

    def add(name: str, row: str, x: list[float], **look: Any) -> None:
        sheet.traces.append(
            {
                "type": "scatter", "x": [_number(v) for v in x], "y": [row] * len(x), "name": name,
                "legendgroup": name, "showlegend": name not in listed, **look,
            }
        )  # fmt: skip
        listed.add(name)

    for j in found:
        row = _joint_name(j.label, j.n_heads, j.effect)
        if j.control:
            low, high = min(j.control), max(j.control)
            add(
                "range of control sets", row, [low, high], mode="lines+markers",
                line={"color": "#888888", "width": 6},
                marker={"symbol": "line-ns", "size": 16, "line": {"color": "#888888", "width": 4}},
                hovertemplate=f"{len(j.control)} control sets: {low:+.3f} to {high:+.3f}"
                "<extra></extra>",
            )  # fmt: skip
        role = "answer" if j.label == "writer" else "query_is"
        every = whole.get((f"all heads at {role}", j.effect.corruption, j.effect.direction))
        for effect, label, color, symbol, size in (
            (every, "all heads at the role", COLORS[5], "circle-open", 17),
            (j.effect, "found heads", COLORS[0], "diamond", 10),
        ):
            if effect:
                ends = ([_number(v)] for v in (effect.recovered, effect.lo, effect.hi))
                add(
                    label, row, [effect.recovered], mode="markers", error_x=_errors(*ends),
                    marker={"color": color, "symbol": symbol, "size": size, "line": {"width": 2}},
                    hovertemplate=f"{label}: {effect.recovered:+.3f} "
                    f"[{effect.lo:+.3f}, {effect.hi:+.3f}]<extra></extra>",
                )  # fmt: skip
    sheet.panel(
        0, 0, "", {"title": {"text": "share of total recovered"}, "zeroline": True},
        {"autorange": "reversed", "type": "category"},
    )  # fmt: skip
    return sheet.figure(title)


VECTOR_LINES = {
    "dummy": ("local", "local, Pos Avg", "local, Trial Avg", "global, other query"),
    "zero-shot": ("local, Pos Avg", "global, other query", "global, Trial Avg", "global"),
}
"""What `plot_vectors` draws of each kind of recipients, beside all controls."""


def plot_vectors(
    report: VectorReport, *, metric: str | None = None, title: str | None = None
) -> go.Figure:
    """Draw local and global vectors by layer, with controls and reference lines.

    One panel for dummy prompts and one for zero-shot prompts. Controls are grey; the levels of the
    few-shot prompts and of the recipients as they are stand as horizontal lines. The layer that was
    chosen on other prompts has an open ring.

    Args:
        report: From `compare_vectors`.
        metric: ``accuracy``, ``choice`` or ``label_rate``; None for the one that chose the layers.
        title: Title; None for task and model.

    Raises:
        UnknownName: for a metric that was not measured.
    """
    metric = str(report.settings["select"]) if metric is None else metric
    if f"test/{metric}" not in report.scores:
        raise unknown("metric", metric, {key.split("/")[1] for key in report.scores})
    scores, runs = report.scores[f"test/{metric}"], report.runs[f"test/{metric}"].mean()
    table = scores.ci("mean")
    if title is None:
        title = f"{metric}, {report.settings['task']} on {report.settings['model']}"
    sheet = _Sheet(1, 2, 300)
    listed: set[str] = set()
    lines = list(dict.fromkeys(name for names in VECTOR_LINES.values() for name in names))
    last = int(table["layer"].max())
    for col, (recipient, wanted) in enumerate(VECTOR_LINES.items()):
        x, y = sheet.panel(
            0, col, f"into {recipient} prompts",
            {"title": {"text": "layer"}, "tickmode": "linear", "tick0": 0,
             "dtick": math.ceil((last + 1) / 14), "range": [-0.3, last + 0.3]},
            {"title": {"text": metric if col == 0 else ""}, "range": [-0.04, 1.06]},
        )  # fmt: skip

        def add(name: str, trace: dict[str, Any], x: str = x, y: str = y) -> None:
            sheet.traces.append(
                {"type": "scatter", "name": _text(name), "legendgroup": name, "xaxis": x,
                 "yaxis": y, "showlegend": name not in listed} | trace
            )  # fmt: skip
            listed.add(name)

        for name, dash in (("few-shot", "dot"), (recipient, "dash")):
            level = _number(float(runs.sel(site=name)))
            label = name if name == "few-shot" else "recipients as they are"
            add(
                label,
                {
                    "mode": "lines", "x": [-0.3, last + 0.3], "y": [level, level],
                    "line": {"color": PLAIN, "width": 1.5, "dash": dash},
                    "hovertemplate": f"{name}: %{{y:.3f}}<extra></extra>",
                },
            )  # fmt: skip
        for row in report.rows:
            if row.recipient != recipient or (row.group != "control" and row.name not in wanted):
                continue
            part = table.sel(site=f"{recipient}: {row.name}")
            value, lo, hi = (_numbers(part[k].values) for k in ("value", "lo", "hi"))
            control = row.group == "control"
            look = 0 if control else lines.index(row.name)
            color = "#999999" if control else COLORS[look]
            trace: dict[str, Any] = {
                "mode": "lines+markers", "x": part["layer"].values.tolist(), "y": value,
                "line": {"color": color, "dash": "solid" if control else DASHES[look],
                         "width": 1 if control else 2},
                "marker": {"symbol": "circle" if control else SYMBOLS[look],
                           "size": 4 if control else 8},
                "customdata": [list(ends) for ends in zip(lo, hi, strict=True)],
                "hovertemplate": f"{_text(row.name)}, layer %{{x}}: %{{y:.3f}} "
                "[%{customdata[0]:.3f}, %{customdata[1]:.3f}]<extra></extra>",
            }  # fmt: skip
            if not control:
                trace["error_y"] = _errors(value, lo, hi)
            add("controls" if control else row.name, trace)
            if not control:
                ring = {"symbol": "circle-open", "size": 16, "color": color, "line": {"width": 2}}
                add(
                    "layer chosen on dev",
                    {
                        "mode": "markers", "x": [row.layer], "y": [value[row.layer]],
                        "marker": ring, "hoverinfo": "skip",
                    },
                )  # fmt: skip
    figure = sheet.figure(title)
    legend = {"orientation": "h", "x": 0, "y": -0.22, "yanchor": "top"}  # two rows, below the axes
    return figure.update_layout(
        legend=legend, margin={"b": 130}, height=figure.to_dict()["layout"]["height"] + 70
    )


def plot_geometry(found: Geometry, *, title: str | None = None) -> go.Figure:
    """Draw what states at answers hold by layer, and whether it is used.

    Args:
        found: From `measure_geometry`.
        title: Title; None for task and model.

    Returns:
        Three panels over layers: the share of variance of each feature, the Mahalanobis distance
        between its levels with a 95 % interval by jackknife, and the metric with a feature taken
        out from that layer on. Controls are grey: shuffled levels, random subspaces, and dotted the
        run as it is.
    """
    import xarray as xr

    from ..scores.statistics import jackknife

    s = found.settings
    left = found.blocks.transpose("part", *found.distance.dims).values
    ends = [jackknife(0.0, parts)[2] for parts in left.reshape(len(left), -1).T.tolist()]
    reach = found.distance.copy(data=np.reshape(ends, found.distance.shape))
    panels: list[tuple[str, str, xr.Dataset]] = [
        ("share of the variance of means", "share", xr.Dataset({"value": found.shares})),
        ("distance between levels", "Mahalanobis distance", xr.Dataset(
            {"value": found.distance, "lo": found.distance - reach, "hi": found.distance + reach})),
        ("taken out from a layer on", str(s["metric"]), found.ablated.ci("mean")),
    ]  # fmt: skip
    chosen = [s["abstract"], s["concrete"], "both", f"{s['abstract']}:{s['concrete']}"]
    sheet = _Sheet(len(panels), 1, 190, legend=True)
    listed: set[str] = set()
    for row, (name, unit, table) in enumerate(panels):
        last = table.sizes["layer"] - 1
        x, y = sheet.panel(
            row, 0, name,
            {"title": {"text": "layer" if row == len(panels) - 1 else ""}, "tickmode": "linear",
             "tick0": 0, "dtick": math.ceil((last + 1) / 14), "range": [-0.3, last + 0.3]},
            {"title": {"text": _text(unit)}, "rangemode": "tozero"},
        )  # fmt: skip
        (other,) = set(table["value"].dims) - {"layer"}
        for key in sorted(table[other].values, key=lambda key: key in chosen):  # controls below
            part = table.sel({other: key})
            at = chosen.index(key) if key in chosen else None
            value = _numbers(part["value"].values)
            color = PLAIN if key == "none" else "#999999" if at is None else COLORS[at]
            group = "as it is" if key == "none" else "controls" if at is None else str(key)
            trace: dict[str, Any] = {
                "type": "scatter", "mode": "lines+markers", "xaxis": x, "yaxis": y,
                "x": part["layer"].values.tolist(), "y": value, "name": _text(group),
                "legendgroup": group, "showlegend": group not in listed,
                "line": {"color": color, "width": 1 if at is None else 2,
                         "dash": "dot" if at is None else DASHES[at]},
                "marker": {"symbol": SYMBOLS[at or 0], "size": 4 if at is None else 8},
                "hovertemplate": f"{_text(key)}, layer %{{x}}: %{{y:.3g}}<extra></extra>",
            }  # fmt: skip
            if "lo" in part:
                lo, hi = (_numbers(part[k].values) for k in ("lo", "hi"))
                trace["customdata"] = [list(pair) for pair in zip(lo, hi, strict=True)]
                trace["hovertemplate"] = trace["hovertemplate"].replace(
                    "<extra>", " [%{customdata[0]:.3g}, %{customdata[1]:.3g}]<extra>"
                )
                if at is not None:
                    trace["error_y"] = _errors(value, lo, hi)
            listed.add(group)
            sheet.traces.append(trace)
    if title is None:
        title = f"{s['abstract']} and {s['concrete']} at answers, {s['task']} on {s['model']}"
    return sheet.figure(title)


def fragment(figure: go.Figure, name: str) -> str:
    """Write a figure as HTML for a page that holds `plotly_script` once.

    Args:
        figure: The figure.
        name: Id of its element; letters, digits and dashes.

    Raises:
        TvInterpError: if the name has other characters.
    """
    check_id(name)
    parts = json.loads(str(figure.to_json(engine="json")))
    height = parts["layout"].get("height", 450)
    arguments = ",".join(
        script_json(part) for part in (name, parts["data"], parts["layout"], CONFIG)
    )
    least = (parts["layout"].get("meta") or {}).get("min_width", 0)
    box = (
        f'<div id="{name}" class="tv-plot" style="height:{int(height)}px;min-width:{int(least)}px">'
        "<noscript>This figure needs JavaScript.</noscript></div>"
    )
    if least:  # narrower, it would be illegible
        box = f'<div class="scroll" style="overflow-x:auto">{box}</div>'
    return f"{box}\n<script>Plotly.newPlot({arguments}){_on_click(parts['layout'])};</script>\n"


def _on_click(layout: Mapping[str, Any]) -> str:
    """Let a click on a part of a circuit fade all that is on no path through it."""
    if "paths" not in (layout.get("meta") or {}):
        return ""
    return (
        ".then(plot=>{"
        "const lines=plot.data.map((t,i)=>i).filter(i=>plot.data[i].mode==='lines');"
        "const whole=lines.map(i=>plot.data[i].opacity);let shown=null;"
        "plot.on('plotly_click',event=>{"
        "const name=event.points[0].customdata,kept=new Set(plot.layout.meta.paths[name]);"
        "shown=shown===name?null:name;"
        f"Plotly.restyle(plot,{{opacity:whole.map((full,i)=>!shown||kept.has(i)?full:{FADED})}},"
        "lines);})})"
    )


def plotly_script() -> str:
    """Write plotly.js as one script element, to stand once in a page, before its figures."""
    from plotly.offline import get_plotlyjs

    return f"<script>{_inline(get_plotlyjs())}</script>\n"


def check_id(name: str) -> None:
    """Refuse what cannot stand as an id in HTML and in a script.

    Raises:
        TvInterpError: if it has other characters than letters, digits and dashes.
    """
    if not name.replace("-", "").isalnum() or not name.isascii():
        raise TvInterpError(
            f"expected an id of letters, digits and dashes, got {name!r}: choose another name"
        )


def script_json(value: Any) -> str:
    """Write plain values so that nothing in them can end a script element."""
    text = json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def read_asset(package: str, *parts: str) -> str:
    """Read a text file of an installed package."""
    return resources.files(package).joinpath(*parts).read_text(encoding="utf-8")


def _inline(script: str) -> str:
    """Make a script safe inside an element: nothing in it ends the element, or asks for a map."""
    script = script.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    return script.replace("//# sourceMappingURL=", "// ")


# ------------------------------------------------------------------------------- kinds of figure


def _planes(
    table: xr.Dataset, plane: tuple[str, str], unit: str, marked: xr.DataArray | None
) -> _Sheet:
    """Draw a heatmap, or one for each value of the axis that is left."""
    rest = [str(d) for d in table["value"].dims if d not in plane]
    panels = [{rest[0]: v} for v in table[rest[0]].values] if rest else [{}]
    sheet = _Sheet(1, len(panels), _plane_height(table.sizes[plane[0]]))
    if max(len(str(v)) for v in table[plane[1]].values) > 8:
        sheet.below = 60  # turned where there is little room
    limit = _limit([table])
    for i, panel in enumerate(panels):
        part = table.sel(panel).transpose(*plane)
        text = None
        if marked is not None:
            text = np.where(marked.sel(panel).transpose(*plane).values, "•", "")
        name = f"{rest[0]} {panel[rest[0]]}" if len(panels) > 1 else ""
        axes = _plane_axes(part, plane)
        if i:  # it would stand on the panel before
            axes[1]["title"] = {"text": ""}
        x, y = sheet.panel(0, i, name, *axes)
        trace = _heatmap(part, plane, unit, text, limit, scale=i == len(panels) - 1)
        sheet.traces.append(trace | {"xaxis": x, "yaxis": y})
    return sheet


def _heatmap(
    table: xr.Dataset,
    plane: tuple[str, str],
    unit: str,
    text: np.ndarray | None,
    limit: float,
    *,
    scale: bool,
) -> dict[str, Any]:
    rows, cols = plane
    points = {("layer", "head"): "L%{y}H%{x}", ("role", "layer"): "%{y} after layer %{x}"}
    point = points.get(plane, "%{y} → %{x}")
    trace: dict[str, Any] = {
        "type": "heatmap",
        "z": _numbers(table["value"].values),
        "x": [_label(v) for v in table[cols].values],
        "y": [_label(v) for v in table[rows].values],
        "customdata": _numbers(np.stack([table["lo"].values, table["hi"].values], -1)),
        "hovertemplate": f"{point} %{{text}}<br>%{{z:+.4g}} {_text(unit)}<br>95 % interval "
        "%{customdata[0]:+.4g} to %{customdata[1]:+.4g}<extra></extra>",
        **_colors(limit, unit),
        "showscale": scale,
    }
    if text is not None:
        trace |= {"text": text.tolist(), "texttemplate": "%{text}"}
    else:
        trace["hovertemplate"] = trace["hovertemplate"].replace(" %{text}", "")
    return trace


def _plane_axes(table: xr.Dataset, plane: tuple[str, str]) -> tuple[dict, dict]:
    """Make the x and the y axis of a heatmap."""
    out = []
    for dim in (plane[1], plane[0]):
        name = dim if plane == ("role", "layer") else _AXES.get(dim, dim)
        axis: dict[str, Any] = {"title": {"text": name}, "showgrid": False}
        if plane == ("layer", "head"):
            axis |= {"tickmode": "linear", "tick0": 0, "dtick": math.ceil(table.sizes[dim] / 14)}
        else:
            axis["type"] = "category"
        out.append(axis)
    return out[0], out[1] | {"autorange": "reversed"}


def _lines(table: xr.Dataset, unit: str, top: int) -> _Sheet:
    """Draw effects along demonstrations or layers, one line for each of the strongest series."""
    along = "demo" if "demo" in table.dims else "layer"
    series = _series(table, [str(d) for d in table["value"].dims if d != along])
    series.sort(key=lambda pair: -float(abs(pair[1]["value"]).max()))
    sheet = _Sheet(1, 1, 260, legend=True)
    for i, (name, part) in enumerate(series[:top]):
        value, lo, hi = (_numbers(part[k].values) for k in ("value", "lo", "hi"))
        look = i % len(COLORS)
        sheet.traces.append(
            {
                "type": "scatter", "mode": "lines+markers",
                "x": [_label(v) for v in part[along].values], "y": value, "name": name,
                "error_y": _errors(value, lo, hi), "showlegend": bool(name),
                "line": {"color": COLORS[look], "dash": DASHES[look]},
                "marker": {"symbol": SYMBOLS[look], "size": 8},
                "customdata": [list(ends) for ends in zip(lo, hi, strict=True)],
                "hovertemplate": f"{name} {along} %{{x}}: %{{y:+.4g}} [%{{customdata[0]:+.4g}}, "
                "%{customdata[1]:+.4g}]<extra></extra>",
            }
        )  # fmt: skip
    ticks = {"tickmode": "linear", "tick0": 0, "dtick": math.ceil(table.sizes[along] / 14)}
    name = "layer" if along == "layer" else _AXES[along]
    sheet.panel(
        0, 0, "", {"title": {"text": name}} | ticks,
        {"title": {"text": _text(unit)}, "zeroline": True},
    )  # fmt: skip
    return sheet


def _bars(table: xr.Dataset, unit: str, top: int) -> _Sheet:
    """Draw bars along role (else site, else part), coloured by part, a panel for each site."""
    dims = [str(d) for d in table["value"].dims]
    along = next(d for d in ("role", "site", "part") if d in dims)
    color = ["part"] if "part" in dims and along != "part" else []
    panels = _series(table, [d for d in dims if d not in (along, *color)])
    panels.sort(key=lambda pair: -float(abs(pair[1]["value"]).max()))
    panels = panels[:top]
    sheet = _Sheet(len(panels), 1, 160, legend=bool(color))
    for row, (title, panel) in enumerate(panels):
        x, y = sheet.panel(
            row, 0, title, {"type": "category"},
            {"title": {"text": _text(unit)}, "zeroline": True, **({"matches": "y"} if row else {})},
        )  # fmt: skip
        for i, (name, part) in enumerate(_series(panel, color)):
            value, lo, hi = (_numbers(part[k].values) for k in ("value", "lo", "hi"))
            sheet.traces.append(
                {
                    "type": "bar", "xaxis": x, "yaxis": y,
                    "x": [_label(v) for v in part[along].values], "y": value, "name": name,
                    "marker": {"color": COLORS[i % len(COLORS)]}, "legendgroup": name,
                    "error_y": _errors(value, lo, hi), "showlegend": bool(name) and row == 0,
                    "customdata": [list(ends) for ends in zip(lo, hi, strict=True)],
                    "hovertemplate": f"%{{x}} {name}: %{{y:+.4g}} [%{{customdata[0]:+.4g}}, "
                    "%{customdata[1]:+.4g}]<extra></extra>",
                }
            )  # fmt: skip
    return sheet


def _series(table: xr.Dataset, dims: Sequence[str]) -> list[tuple[str, xr.Dataset]]:
    """Split along axes; a series is named by its labels."""
    out: list[tuple[str, Any]] = [("", table)]
    for dim in dims:
        letter = {"layer": "L", "head": "H"}.get(dim)
        out = [
            (f"{name}{letter}{v}" if letter else f"{name} {_text(v)}".strip(), part.sel({dim: v}))
            for name, part in out
            for v in part[dim].values
        ]
    return out


# ------------------------------------------------------------------------------------- small parts


class _Sheet:
    """A grid of panels under one look; plain values, which plotly checks once at the end."""

    def __init__(self, rows: int, cols: int, height: int, *, legend: bool = False) -> None:
        self.rows, self.cols, self.height, self.legend = rows, cols, height, legend
        self.traces: list[dict] = []
        self.shapes: list[dict] = []
        self.axes: dict[str, dict] = {}
        self.titles: list[dict] = []
        self.below = 0  # pixels for long labels of the last row

    def panel(self, row: int, col: int, title: str, x: dict, y: dict) -> tuple[str, str]:
        """Add a panel, row 0 at the top; returns the names of its axes."""
        number = row * self.cols + col + 1
        suffix = "" if number == 1 else str(number)
        between = 0.14
        width = (1 - between * (self.cols - 1)) / self.cols
        step = self.height + _BETWEEN
        whole = self.rows * step - _BETWEEN
        top = 1 - row * step / whole
        domains = (
            [col * (width + between), col * (width + between) + width],
            [max(0.0, top - self.height / whole), top],
        )
        for letter, axis, domain, other in (("x", x, domains[0], "y"), ("y", y, domains[1], "x")):
            look = {
                "domain": [round(v, 6) for v in domain], "anchor": other + suffix,
                "automargin": True, "showline": True, "linecolor": "#888", "ticks": "outside",
                "gridcolor": "#ddd", "zeroline": False, "zerolinecolor": "#888", "showgrid": True,
            }  # fmt: skip
            self.axes[f"{letter}axis{suffix}"] = look | axis
        if title:
            self.titles.append(
                {
                    "text": _text(title).replace("\n", "<br>"), "align": "left",
                    "showarrow": False, "xref": "paper", "yref": "paper",
                    "x": round(domains[0][0], 6), "y": round(top, 6), "xanchor": "left",
                    "yanchor": "bottom", "font": {"size": 13},
                }
            )  # fmt: skip
        return f"x{suffix}", f"y{suffix}"

    def figure(self, title: str, *, gaps: bool = False, least: int = 0) -> go.Figure:
        """Make the figure: no fixed width, and no button that sends data away.

        Below ``least`` pixels it is not legible: a page lets it be scrolled instead.
        """
        import plotly.graph_objects as go

        heading = textwrap.wrap(_text(title), 50)  # what a screen of 400 pixels holds
        lines = max((1 + each["text"].count("<br>") for each in self.titles), default=0)
        top = 14 + 20 * len(heading) + 6 * bool(lines) + 18 * lines
        plot = self.rows * (self.height + _BETWEEN) - _BETWEEN
        below = 60 + 40 * self.legend + self.below
        layout = {
            "template": "none",
            "autosize": True,
            "height": top + below + plot,
            "margin": {"l": 60, "r": 20, "t": top, "b": below},
            "title": {
                "text": "<br>".join(heading), "font": {"size": 14}, "x": 0.01, "y": 1,
                "yref": "container", "yanchor": "top",
                "pad": {"t": 12 if len(heading) == 1 else 20},  # plotly moves several lines up
            },
            "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#222"},
            "legend": {
                "orientation": "h", "yanchor": "top", "x": 0,
                "y": round(-(64 + self.below) / plot, 6),
            },
            "modebar": {"remove": ["sendChartToCloud", "select2d", "lasso2d"]},
            "paper_bgcolor": "rgba(255,255,255,0)",
            "plot_bgcolor": "#b8bdc4" if gaps else "rgba(255,255,255,0)",
            "hoverlabel": {"namelength": -1},
            "barmode": "group",
            "shapes": self.shapes,
            "annotations": self.titles,
            **self.axes,
        }  # fmt: skip
        if least:
            layout["meta"] = {"min_width": least}
        return go.Figure({"data": self.traces, "layout": layout})


def _message(text: str, title: str) -> go.Figure:
    sheet = _Sheet(1, 1, 60)
    sheet.panel(0, 0, "", {"visible": False}, {"visible": False})
    sheet.titles.append(
        {"text": text, "showarrow": False, "x": 0.5, "y": 0.5, "xref": "paper", "yref": "paper"}
    )
    return sheet.figure(title)


def _limit(tables: Iterable[xr.Dataset]) -> float:
    return max((float(abs(table["value"]).max()) for table in tables), default=0.0)


def _colors(limit: float, unit: str) -> dict[str, Any]:
    limit = limit or 1.0
    return {
        "colorscale": "RdBu", "zmin": _number(-limit), "zmax": _number(limit), "zmid": 0,
        "xgap": 1, "ygap": 1,
        "colorbar": {"title": {"text": _text(unit), "side": "right"}, "thickness": 12},
    }  # fmt: skip


def _plane_height(rows: int) -> int:
    return max(150, min(26 * rows, 900))


def _errors(value: Iterable, lo: Iterable, hi: Iterable) -> dict[str, Any]:
    lo, hi, value = list(lo), list(hi), list(value)

    def gap(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else _number(max(0.0, a - b))

    return {
        "type": "data", "symmetric": False, "thickness": 1.3,
        "array": [gap(h, v) for h, v in zip(hi, value, strict=True)],
        "arrayminus": [gap(v, low) for v, low in zip(value, lo, strict=True)],
    }  # fmt: skip


def _joint_name(label: str, n: int, effect: Effect) -> str:
    count = f"{n} {label}" + "s" * (n != 1)
    return f"{count}<br>{_text(effect.corruption)}, {effect.direction}"


def _name(head: FoundHead) -> str:
    return f"L{head.site.layer}H{head.site.head}"


def _label(value: Any) -> Any:
    return int(value) if isinstance(value, (int, np.integer)) else _text(value)


def _text(value: object) -> str:
    """Escape what plotly would read as markup."""
    return html.escape(str(value), quote=False)


def _number(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def _numbers(values: np.ndarray) -> list:
    return [_numbers(v) if isinstance(v, np.ndarray) else _number(v) for v in np.asarray(values)]
