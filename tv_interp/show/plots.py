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
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import ScoreError, TvInterpError, unknown

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr

    from ..analysis.find import Effect, FoundHead, HeadReport
    from ..scores import Scores

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid")
CONFIG = {"responsive": True, "displaylogo": False, "showSendToCloud": False}
LETTERS = {"writer": "W", "copier": "C", "reader": "R", "relay": "L"}
_PLANES = (("layer", "head"), ("sender", "receiver"), ("dest", "src"))
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
        figure = _lines(table, unit, top)
    elif plane is not None and len(dims) <= 3:
        if isinstance(marked, str):
            marked = scores.significant()
        figure = _planes(table, plane, unit, marked)
    elif dims and set(dims) <= {"site", "role", "part"}:
        figure = _bars(table, unit, top)
    else:
        raise ScoreError(
            f"cannot draw axes {dims or 'none'}: expected layer and head, sender and receiver, or "
            "dest and src with at most one more, demo, or any of site, role, part; select or "
            "average the rest of scores.data first"
        )
    return _finish(figure, describe(scores) if title is None else title)


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
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    keys = [tuple(key.split("/")) for key in report.scores]
    for i, (kind, wanted) in enumerate(
        (("corruption", corruption), ("direction", direction), ("role", at))
    ):
        if wanted is not None and wanted not in {key[i] for key in keys}:
            raise unknown(kind, wanted, {key[i] for key in keys})
    clear = {key: report.scores["/".join(key)] for key in keys}
    clear = {key: s for key, s in clear.items() if s.total_is_clear()}
    limit = max((float(abs(s.recovered()).max()) for s in clear.values()), default=0.0)
    shown = {
        key: s
        for key, s in clear.items()
        if all(w in (None, k) for w, k in zip((corruption, direction, at), key, strict=True))
    }
    if title is None:
        title = f"{report.settings.get('task')} on {report.settings.get('model')}"
    if not shown:
        return _finish(_message("No corruption makes a measurable difference."), title)
    rows = list(dict.fromkeys(key[:2] for key in shown))
    cols = list(dict.fromkeys(key[2] for key in shown))
    names = {"answer": "written at answer", "query_is": "read at query_is"}
    several = len(rows) * len(cols) > 1
    figure = make_subplots(
        rows=len(rows), cols=len(cols), horizontal_spacing=0.12,
        vertical_spacing=0.3 / len(rows),
        subplot_titles=[_text(f"{names.get(c, c)}: {r[0]}, {r[1]}") for r in rows for c in cols]
        if several else None,
    )  # fmt: skip
    for (kind, way, role), scores in shown.items():
        row, col = rows.index((kind, way)) + 1, cols.index(role) + 1
        table = scores.ci("recovered")
        letters = np.full(table["value"].shape, "", dtype=object)
        for head in (h for h in report.found if h.site.role == role):
            letters[head.site.at] = LETTERS[head.label]
            here = any(
                e.significant and (e.corruption, e.direction) == (kind, way) for e in head.effects
            )
            _outline(figure, head, here, row, col)
        trace = _heatmap(
            table, ("layer", "head"), "share of total", letters, limit,
            scale=(row, col) == (1, len(cols)),
        )  # fmt: skip
        figure.add_trace(go.Heatmap(trace), row=row, col=col)
        _plane_axes(figure, table, ("layer", "head"), row, col)
    height = 110 + len(rows) * (90 + _plane_height(next(iter(shown.values())).data.sizes["layer"]))
    return _finish(figure.update_layout(height=height), title)


def plot_sources(
    report: HeadReport, *, at: str | None = None, title: str | None = None
) -> go.Figure:
    """Draw what part of each found head's effect comes from which source role.

    Args:
        report: From `find_heads`.
        at: Draw only heads at this role.
        title: Title; None for task and model.
    """
    import plotly.graph_objects as go

    heads = [h for h in report.found if h.sources and at in (None, h.site.role)]
    if title is None:
        title = f"Effect by source role, {report.settings.get('task')}"
    if not heads:
        return _finish(_message("No head was found."), title)
    roles = list(dict.fromkeys(role for head in heads for role in head.sources))
    roles = [r for r in roles if r != "all"] + ["all"] * ("all" in roles)
    values = [[_number(head.sources.get(role)) for role in roles] for head in heads]
    limit = max(abs(v) for row in values for v in row if v is not None)
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=[_text(role) for role in roles],
            y=[f"{_name(h)} {h.label}" for h in heads],
            text=[["" if v is None else f"{v:.2f}" for v in row] for row in values],
            texttemplate="%{text}",
            hovertemplate="%{y} from %{x}: %{z:+.3f}<extra></extra>",
            **_colors(limit, "share of total"),
        )
    )
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(title="source role", automargin=True)
    return _finish(figure.update_layout(height=150 + 32 * len(heads)), title)


def plot_joint(report: HeadReport, *, title: str | None = None) -> go.Figure:
    """Draw joint effects with their intervals above the range of their control sets.

    Args:
        report: From `find_heads`.
        title: Title; None for task and model.
    """
    import plotly.graph_objects as go

    if title is None:
        title = f"Joint effects and controls, {report.settings.get('task')}"
    found = [j for j in report.joint if j.label in LETTERS]
    if not found:
        return _finish(_message("No writers or readers were found."), title)
    rows = {_joint_name(j.label, j.n_heads, j.effect): j for j in found}
    whole = {
        (j.label.removeprefix("all heads at "), j.effect.corruption, j.effect.direction): j
        for j in report.joint
        if j not in found
    }
    figure = go.Figure()
    for i, (name, j) in enumerate(rows.items()):
        if j.control:
            low, high = min(j.control), max(j.control)
            figure.add_trace(
                go.Scatter(
                    x=[_number(low), _number(high)], y=[name, name], mode="lines+markers",
                    line={"color": "#999999", "width": 6}, marker={"size": 8, "symbol": "line-ns"},
                    name="range of control sets", legendgroup="control",
                    showlegend=not any(t.legendgroup == "control" for t in figure.data),
                    hovertemplate=f"{len(j.control)} control sets: {low:+.3f} to {high:+.3f}"
                    "<extra></extra>",
                )
            )  # fmt: skip
        role = "answer" if j.label == "writer" else "query_is"
        every = whole.get((role, j.effect.corruption, j.effect.direction))
        for effect, label, color, symbol in (
            (every and every.effect, "all heads at the role", COLORS[5], "circle-open"),
            (j.effect, "found heads", COLORS[0], "diamond"),
        ):
            if effect:
                figure.add_trace(
                    go.Scatter(
                        x=[_number(effect.recovered)], y=[name], mode="markers", name=label,
                        legendgroup=label, showlegend=i == 0,
                        marker={"color": color, "symbol": symbol, "size": 11, "line": {"width": 2}},
                        error_x=_errors(
                            *([_number(v)] for v in (effect.recovered, effect.lo, effect.hi))
                        ),
                        hovertemplate=f"{label}: {effect.recovered:+.3f} "
                        f"[{effect.lo:+.3f}, {effect.hi:+.3f}]<extra></extra>",
                    )
                )  # fmt: skip
    figure.update_xaxes(title="share of total recovered", zeroline=True, showgrid=True)
    figure.update_yaxes(autorange="reversed", automargin=True, type="category")
    figure.update_layout(
        height=150 + 46 * len(rows), legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    )
    return _finish(figure, title)


def fragment(figure: go.Figure, name: str) -> str:
    """Write a figure as HTML for a page that holds `plotly_script` once.

    Args:
        figure: The figure.
        name: Id of its element; letters, digits and dashes.

    Raises:
        TvInterpError: if the name has other characters.
    """
    check_id(name)
    parts = json.loads(figure.to_json(engine="json"))
    height = parts["layout"].get("height", 450)
    arguments = ",".join(
        script_json(part) for part in (name, parts["data"], parts["layout"], CONFIG)
    )
    return (
        f'<div id="{name}" class="tv-plot" style="height:{int(height)}px">'
        "<noscript>This figure needs JavaScript.</noscript></div>\n"
        f"<script>Plotly.newPlot({arguments});</script>\n"
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
    r"""Write plain values for a script element: ``<``, ``>`` and ``&`` become ``\u003c`` and so on."""
    text = json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def read_asset(package: str, *parts: str) -> str:
    """Read a text file of an installed package."""
    return resources.files(package).joinpath(*parts).read_text(encoding="utf-8")


def _inline(script: str) -> str:
    return script.replace("</script", "<\\/script").replace("//# sourceMappingURL=", "// ")


# ------------------------------------------------------------------------------- kinds of figure


def _planes(
    table: xr.Dataset, plane: tuple[str, str], unit: str, marked: xr.DataArray | None
) -> go.Figure:
    """Draw a heatmap, or one for each value of the axis that is left."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    rest = [str(d) for d in table["value"].dims if d not in plane]
    panels = [{rest[0]: v} for v in table[rest[0]].values] if rest else [{}]
    titles = [_text(f"{rest[0]} {next(iter(p.values()))}") for p in panels] if rest else None
    if len(panels) == 1:
        titles = None
    figure = make_subplots(rows=1, cols=len(panels), subplot_titles=titles)
    limit = float(abs(table["value"]).max())
    for i, panel in enumerate(panels):
        part = table.sel(panel).transpose(*plane)
        text = None
        if marked is not None:
            text = np.where(marked.sel(panel).transpose(*plane).values, "•", "")
        trace = _heatmap(part, plane, unit, text, limit, scale=i == len(panels) - 1)
        figure.add_trace(go.Heatmap(trace), row=1, col=i + 1)
        _plane_axes(figure, part, plane, 1, i + 1)
    return figure.update_layout(height=140 + _plane_height(table.sizes[plane[0]]))


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
    point = "L%{y}H%{x}" if plane == ("layer", "head") else "%{y} → %{x}"
    trace: dict[str, Any] = {
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


def _plane_axes(
    figure: go.Figure, table: xr.Dataset, plane: tuple[str, str], row: int, col: int
) -> None:
    numbers = plane == ("layer", "head")
    for update, dim, backwards in (
        (figure.update_xaxes, plane[1], False),
        (figure.update_yaxes, plane[0], True),
    ):
        ticks = {"tickmode": "linear", "tick0": 0, "dtick": math.ceil(table.sizes[dim] / 14)}
        update(
            title=_AXES.get(dim, dim), row=row, col=col, automargin=True, showgrid=False,
            zeroline=False, **(ticks if numbers else {"type": "category"}),
            **({"autorange": "reversed"} if backwards else {}),
        )  # fmt: skip


def _outline(figure: go.Figure, head: FoundHead, here: bool, row: int, col: int) -> None:
    layer, index = head.site.at
    figure.add_shape(
        type="rect", x0=index - 0.5, x1=index + 0.5, y0=layer - 0.5, y1=layer + 0.5, row=row,
        col=col, line={"color": "#000000", "width": 2, "dash": "solid" if here else "dot"},
    )  # fmt: skip


def _lines(table: xr.Dataset, unit: str, top: int) -> go.Figure:
    """Draw effects along demonstrations or layers, one line for each of the strongest series."""
    import plotly.graph_objects as go

    along = "demo" if "demo" in table.dims else "layer"
    rest = [str(d) for d in table["value"].dims if d != along]
    series = _series(table, rest)
    series.sort(key=lambda pair: -float(abs(pair[1]["value"]).max()))
    figure = go.Figure()
    for i, (name, part) in enumerate(series[:top]):
        value, lo, hi = (_numbers(part[k].values) for k in ("value", "lo", "hi"))
        look = i % len(COLORS)
        figure.add_trace(
            go.Scatter(
                x=[_label(v) for v in part[along].values], y=value, name=name,
                mode="lines+markers", error_y=_errors(value, lo, hi), showlegend=bool(name),
                line={"color": COLORS[look], "dash": DASHES[look]},
                marker={"symbol": SYMBOLS[look], "size": 8},
                customdata=[list(ends) for ends in zip(lo, hi, strict=True)],
                hovertemplate=f"{name} {along} %{{x}}: %{{y:+.4g}} [%{{customdata[0]:+.4g}}, "
                "%{customdata[1]:+.4g}]<extra></extra>",
            )
        )  # fmt: skip
    figure.update_xaxes(
        title="layer" if along == "layer" else _AXES[along], tickmode="linear", tick0=0,
        dtick=math.ceil(table.sizes[along] / 14),
    )  # fmt: skip
    figure.update_yaxes(title=_text(unit), zeroline=True, showgrid=True, automargin=True)
    return figure.update_layout(
        height=360, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    )


def _bars(table: xr.Dataset, unit: str, top: int) -> go.Figure:
    """Draw bars along role (else site, else part), coloured by part, a panel for each site."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    dims = [str(d) for d in table["value"].dims]
    along = next(d for d in ("role", "site", "part") if d in dims)
    color = next((d for d in ("part",) if d in dims and d != along), None)
    rest = [d for d in dims if d not in (along, color)]
    panels = _series(table, rest)
    panels.sort(key=lambda pair: -float(abs(pair[1]["value"]).max()))
    panels = panels[:top]
    figure = make_subplots(
        rows=len(panels), cols=1, subplot_titles=[name for name, _ in panels] if rest else None,
        vertical_spacing=0.25 / len(panels), shared_yaxes="all",
    )  # fmt: skip
    for row, (_, panel) in enumerate(panels, 1):
        for i, (name, part) in enumerate(_series(panel, [color] if color else [])):
            value, lo, hi = (_numbers(part[k].values) for k in ("value", "lo", "hi"))
            figure.add_trace(
                go.Bar(
                    x=[_label(v) for v in part[along].values], y=value, name=name,
                    marker={"color": COLORS[i % len(COLORS)]}, legendgroup=name,
                    error_y=_errors(value, lo, hi), showlegend=bool(name) and row == 1,
                    customdata=[list(ends) for ends in zip(lo, hi, strict=True)],
                    hovertemplate=f"%{{x}} {name}: %{{y:+.4g}} [%{{customdata[0]:+.4g}}, "
                    "%{customdata[1]:+.4g}]<extra></extra>",
                ),
                row=row, col=1,
            )  # fmt: skip
    figure.update_xaxes(automargin=True, type="category")
    figure.update_yaxes(title=_text(unit), zeroline=True, showgrid=True, automargin=True)
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom"} if color and not rest else {}
    return figure.update_layout(height=130 + 230 * len(panels), barmode="group", legend=legend)


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


def _finish(figure: go.Figure, title: str) -> go.Figure:
    """Give every figure one look, and no button that sends data away."""
    figure.update_xaxes(showline=True, linecolor="#888", gridcolor="#ddd", zerolinecolor="#888")
    figure.update_yaxes(showline=True, linecolor="#888", gridcolor="#ddd", zerolinecolor="#888")
    heading = "<br>".join(textwrap.wrap(_text(title), 72))
    return figure.update_layout(
        template="none",
        autosize=True,
        title={"text": heading, "font": {"size": 14}} if title else None,
        font={"family": "system-ui, sans-serif", "size": 12, "color": "#222"},
        margin={"l": 60, "r": 20, "t": 70 if title else 40, "b": 50},
        modebar={"remove": ["sendChartToCloud", "select2d", "lasso2d"]},
        paper_bgcolor="rgba(255,255,255,0)",
        plot_bgcolor="rgba(255,255,255,0)",
        hoverlabel={"namelength": -1},
    )


def _message(text: str) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure().update_layout(height=140)
    figure.update_xaxes(visible=False).update_yaxes(visible=False)
    return figure.add_annotation(text=text, showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper")


def _colors(limit: float, unit: str) -> dict[str, Any]:
    limit = limit or 1.0
    return {
        "colorscale": "RdBu", "zmin": _number(-limit), "zmax": _number(limit), "zmid": 0,
        "xgap": 1, "ygap": 1,
        "colorbar": {"title": {"text": _text(unit), "side": "right"}, "thickness": 12},
    }  # fmt: skip


def _plane_height(rows: int) -> int:
    return max(120, min(26 * rows, 900))


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
