"""Figures for papers: the picture that plotly draws, drawn by matplotlib as SVG, PDF or PNG.

Plotly needs a browser to write a file. Its figures are plain values, and those of this package use
few kinds of them: heatmaps, lines with markers and intervals, and bars, on axes that say where they
stand. So whatever is shown can be printed, with the same numbers, colours, marks and labels.
"""

from __future__ import annotations

import html
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import TvInterpError
from ..files import whole_file

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("svg", "pdf", "png")
PIXELS = 96
"""Plotly's pixels in an inch; its texts and lines keep their size on paper."""
POINT = 0.75
"""Points in a pixel."""
SYMBOLS = {
    "circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "x": "x", "star": "*",
    "cross": "P", "circle-open": "o", "line-ns": "|",
}  # fmt: skip
DASHES = {
    "solid": "-", "dash": "--", "dot": ":", "dashdot": "-.", "longdash": (0, (8, 3)),
    "longdashdot": (0, (8, 3, 2, 3)),
}  # fmt: skip
_STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    "pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "tv_interp", "savefig.dpi": 200,
}  # fmt: skip


def save_figure(figure: go.Figure, path: str | os.PathLike, *, width: float = 6.5) -> None:
    """Write a figure of this package for a paper, or for a page that shows pictures alone.

    Args:
        figure: What any ``plot`` method or function of this package returned.
        path: File that ends in ``.svg``, ``.pdf`` or ``.png``; one figure gives the same bytes.
        width: Width of the plot in inches, without the labels around it.

    Raises:
        TvInterpError: for another ending, without matplotlib, or for a kind of trace that no figure
            of this package has.
        FileError: if the file cannot be written.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise TvInterpError(f"expected a file that ends in .svg, .pdf or .png, got {path.name!r}")
    try:
        import matplotlib
    except ImportError as error:
        raise TvInterpError(
            "save_figure needs matplotlib: pip install 'tv-interp[paper]'"
        ) from error
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # of a word, not of ours
        drawn = _Drawing(figure.to_dict(), width).figure
        dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[kind]
        with whole_file(path) as partial:
            drawn.savefig(partial, format=kind, bbox_inches="tight", metadata=dates)


class _Drawing:
    """One figure on its way from plotly's values to matplotlib's."""

    def __init__(self, parts: Mapping[str, Any], width: float) -> None:
        from matplotlib.figure import Figure

        self.layout = parts["layout"]
        self.traces = [t for t in parts["data"] if t.get("visible", True) is True]
        margin = self.layout.get("margin", {})
        height = self.layout.get("height", 450) - margin.get("t", 80) - margin.get("b", 60)
        self.figure: Figure = Figure(figsize=(width, max(0.8, height / PIXELS)))
        self.axes: dict[str, Axes] = {}
        self.order: dict[str, list[Any]] = {}  # categories of each axis
        self.handles: dict[str, Any] = {}
        for trace in self.traces:
            self._sort(trace)
        for trace in self.traces:
            draw = {"heatmap": self._heatmap, "scatter": self._scatter, "bar": self._bar}.get(
                trace.get("type", "scatter")
            )
            if draw is None:
                raise TvInterpError(
                    f"expected heatmaps, lines and bars, got a trace {trace['type']!r}: "
                    "save_figure draws the figures of tv_interp"
                )
            draw(trace)
        for shape in self.layout.get("shapes", ()):
            self._shape(shape)
        for name, ax in self.axes.items():
            self._label(name, ax)
        for note in self.layout.get("annotations", ()):
            sides = {"center": "center", "middle": "center"}
            self.figure.text(
                note["x"], note["y"], plain(note["text"]), fontsize=9.5,
                ha=sides.get(note.get("xanchor", "center"), note.get("xanchor", "center")),
                va=sides.get(note.get("yanchor", "bottom"), note.get("yanchor", "bottom")),
            )  # fmt: skip
        self._head()

    # ------------------------------------------------------------------------------- places

    def _axis(self, letter: str, name: str) -> dict[str, Any]:
        return self.layout.get(f"{letter}axis{name.removeprefix(letter)}", {})

    def _ax(self, trace: Mapping[str, Any]) -> Axes:
        x, y = trace.get("xaxis") or "x", trace.get("yaxis") or "y"
        key = f"{x} {y}"
        if key not in self.axes:
            (left, right), (low, high) = (
                self._axis(letter, name).get("domain") or (0, 1)
                for letter, name in (("x", x), ("y", y))
            )
            self.axes[key] = self.figure.add_axes((left, low, right - left, high - low))
        return self.axes[key]

    def _sort(self, trace: Mapping[str, Any]) -> None:
        """Note the categories of both axes, in the order in which they come."""
        for letter in "xy":
            name = trace.get(f"{letter}axis") or letter
            values = list(trace.get(letter, ()))
            named = self._axis(letter, name).get("type") == "category"
            if named or any(isinstance(v, str) for v in values):
                known = self.order.setdefault(name, [])
                known += [v for v in dict.fromkeys(values) if v not in known and v is not None]

    def _numbers(self, trace: Mapping[str, Any], letter: str) -> np.ndarray:
        name = trace.get(f"{letter}axis") or letter
        values = trace.get(letter)
        if values is None:
            values = range(len(trace["z"] if letter == "y" else trace["z"][0]))
        known = self.order.get(name)
        if known is not None:
            values = [np.nan if v is None else known.index(v) for v in values]
        return np.array([np.nan if v is None else v for v in values], dtype=float)

    # ------------------------------------------------------------------------------- traces

    def _heatmap(self, trace: Mapping[str, Any]) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        ax = self._ax(trace)
        z = np.array([[np.nan if v is None else v for v in row] for row in trace["z"]], float)
        x, y = self._numbers(trace, "x"), self._numbers(trace, "y")
        stops = [(float(at), color(name)) for at, name in trace["colorscale"]]
        colors = LinearSegmentedColormap.from_list("scale", stops).with_extremes(bad="#dddddd")
        gap = 0.6 if trace.get("xgap") else 0
        mesh = ax.pcolormesh(
            _edges(x), _edges(y), np.ma.masked_invalid(z), cmap=colors, vmin=trace.get("zmin"),
            vmax=trace.get("zmax"), edgecolors="#b8bdc4", linewidth=gap, rasterized=z.size > 20_000,
        )  # fmt: skip
        for row, texts in zip(y, trace.get("text") or (), strict=False):
            for col, text, value in zip(x, texts, z[list(y).index(row)], strict=True):
                if text:
                    ink = _ink(mesh.to_rgba(value)) if np.isfinite(value) else "black"
                    ax.text(col, row, plain(text), ha="center", va="center", color=ink, fontsize=8)
        if trace.get("showscale", True):
            at = ax.get_position()
            side = self.figure.add_axes((at.x1 + 0.02, at.y0, 0.018, at.height))
            bar = self.figure.colorbar(mesh, cax=side)
            scale = trace.get("colorbar", {})
            bar.set_label(plain(_text(scale.get("title"))))
            if scale.get("tickvals") is not None:
                bar.set_ticks(list(scale["tickvals"]), labels=list(map(plain, scale["ticktext"])))
            bar.outline.set_linewidth(0.5)  # type: ignore[union-attr]

    def _scatter(self, trace: Mapping[str, Any]) -> None:
        ax = self._ax(trace)
        x, y = self._numbers(trace, "x"), self._numbers(trace, "y")
        mode, line, marker = (
            trace.get("mode", "lines"),
            trace.get("line", {}),
            trace.get("marker", {}),
        )
        symbol = marker.get("symbol", "circle")
        edge = marker.get("line", {})
        ink = color(line.get("color") or marker.get("color") or edge.get("color") or "#0072B2")
        fill = color(marker.get("color", ink))
        look: dict[str, Any] = {
            "color": ink, "alpha": trace.get("opacity"), "zorder": 3 if "markers" in mode else 2,
            "linestyle": DASHES[line.get("dash", "solid")] if "lines" in mode else "none",
            "linewidth": line.get("width", 2) * POINT,
        }  # fmt: skip
        if "markers" in mode:
            hollow = symbol.endswith("-open")
            look |= {
                "marker": SYMBOLS.get(symbol, "o"), "markersize": marker.get("size", 6) * POINT,
                "markerfacecolor": "none" if hollow else fill,
                "markeredgecolor": fill if hollow else color(edge.get("color", fill)),
                "markeredgewidth": edge.get("width", 1) * POINT,
            }  # fmt: skip
        (handle,) = ax.plot(x, y, **look)
        for letter in "xy":
            self._errors(ax, trace.get(f"error_{letter}"), letter, x, y, ink)
        if "text" in mode:
            inside = trace.get("textposition") == "middle center"
            for col, row, text in zip(x, y, trace["text"], strict=True):
                ax.annotate(
                    plain(text), (col, row), (0, 0 if inside else -6), zorder=4, ha="center",
                    va="center_baseline" if inside else "top", textcoords="offset points",
                    fontsize=7,
                )  # fmt: skip
        self._list(trace, handle)

    def _bar(self, trace: Mapping[str, Any]) -> None:
        ax = self._ax(trace)
        beside = [
            t for t in self.traces
            if t["type"] == "bar" and t.get("xaxis", "x") == trace.get("xaxis", "x")
        ]  # fmt: skip
        wide = 0.8 / len(beside)
        x, y = self._numbers(trace, "x"), self._numbers(trace, "y")
        x = x + (next(i for i, t in enumerate(beside) if t is trace) + 0.5) * wide - 0.4
        handle = ax.bar(x, y, wide * 0.92, color=color(trace["marker"]["color"]))
        self._errors(ax, trace.get("error_y"), "y", x, y, "#444444")
        self._list(trace, handle)

    def _errors(
        self, ax: Axes, error: Any, letter: str, x: np.ndarray, y: np.ndarray, ink: Any
    ) -> None:
        if not error:
            return
        ends = [
            np.array([np.nan if v is None else v for v in error[side]], dtype=float)
            for side in ("arrayminus", "array")
        ]
        sides: dict[str, Any] = {f"{letter}err": ends}
        ax.errorbar(x, y, fmt="none", ecolor=ink, elinewidth=1, capsize=2, **sides)

    def _list(self, trace: Mapping[str, Any], handle: Any) -> None:
        """Put a trace into the legend where plotly would."""
        wanted = trace.get("showlegend", len(self.traces) > 1)
        if wanted and trace.get("name"):
            self.handles.setdefault(plain(trace["name"]), handle)

    def _shape(self, shape: Mapping[str, Any]) -> None:
        from matplotlib.patches import Rectangle

        names = [shape[f"{letter}ref"].removesuffix(" domain") for letter in "xy"]
        ax = self._ax({"xaxis": names[0], "yaxis": names[1]})
        line = shape.get("line", {})
        look: dict[str, Any] = {
            "linestyle": DASHES[line.get("dash", "solid")],
            "linewidth": line.get("width", 2) * POINT,
        }
        if shape["type"] == "rect":
            wide, high = shape["x1"] - shape["x0"], shape["y1"] - shape["y0"]
            corner = (shape["x0"], shape["y0"])
            ax.add_patch(
                Rectangle(corner, wide, high, fill=False, ec=line["color"], zorder=3, **look)
            )
        else:
            ax.axhline(shape["y0"], color=line["color"], zorder=1, **look)

    # ------------------------------------------------------------------------------- labels

    def _label(self, name: str, ax: Axes) -> None:
        """Give both axes their title, ticks and range."""
        for letter, which in zip("xy", name.split(" "), strict=True):
            axis, known = self._axis(letter, which), self.order.get(which)
            if axis.get("visible") is False:
                ax.set_axis_off()
            getattr(ax, f"set_{letter}label")(plain(_text(axis.get("title"))))
            ticks = getattr(ax, f"set_{letter}ticks")
            if axis.get("tickvals") is not None:
                labels = axis.get("ticktext") or axis["tickvals"]
                ticks(list(axis["tickvals"]), [plain(text) for text in labels])
            elif known is not None:
                long = letter == "x" and max(map(len, map(str, known)), default=0) > 6
                turned = {"rotation": 35, "ha": "right"} if long and len(known) > 5 else {}
                ticks(range(len(known)), [plain(text) for text in known], **turned)
            elif "dtick" in axis:
                low, high = sorted(getattr(ax, f"get_{letter}lim")())
                first = np.ceil(low / axis["dtick"]) * axis["dtick"]
                ticks(np.arange(first, high + 1e-9, axis["dtick"]))
            if axis.get("type") == "log":
                getattr(ax, f"set_{letter}scale")("log")
            limits = getattr(ax, f"set_{letter}lim")
            if known is not None:
                limits(-0.5, len(known) - 0.5)
            if axis.get("range") and axis.get("type") != "log":
                limits(*axis["range"])
            if axis.get("autorange") == "reversed":
                getattr(ax, f"invert_{letter}axis")()
            if axis.get("zeroline"):
                (ax.axhline if letter == "y" else ax.axvline)(0, color="#888888", lw=0.8, zorder=1)

    def _head(self) -> None:
        """Put the legend above the plot, and the title above the legend."""
        top = 1.02 + 0.2 / self.figure.get_figheight() * bool(self.layout.get("annotations"))
        if self.handles:
            legend = self.figure.legend(
                self.handles.values(), self.handles.keys(), loc="lower left", frameon=False,
                bbox_to_anchor=(0, top), ncols=min(3, len(self.handles)), borderaxespad=0,
                fontsize=8, handlelength=2.5,
            )  # fmt: skip
            for line in legend.get_lines():
                line.set_linewidth(min(line.get_linewidth(), 2))
                line.set_markersize(min(line.get_markersize(), 8))
            self.figure.draw_without_rendering()
            box = legend.get_window_extent().transformed(self.figure.transFigure.inverted())
            top = box.y1 + 0.02
        title = plain(_text(self.layout.get("title")))
        if title:
            self.figure.text(0, top + 0.01, title, fontsize=10.5, va="bottom", ha="left")


def plain(text: Any) -> str:
    """Write plotly's markup as text, and keep dollars from being read as mathematics."""
    text = re.sub(r"<br\s*/?>", "\n", str(text))
    text = html.unescape(re.sub(r"</?(?:sub|sup|b|i|span)\b[^>]*>", "", text))
    return text.replace("$", r"\$")


def color(name: Any) -> Any:
    """Read a colour that plotly knows."""
    match = re.fullmatch(r"rgba?\(([^)]*)\)", str(name))
    if match is None:
        return name
    parts = [float(part) for part in match[1].split(",")]
    return (*(part / 255 for part in parts[:3]), *parts[3:])


def _edges(centres: np.ndarray) -> np.ndarray:
    """Get the borders between cells of which the centres are known."""
    if len(centres) < 2:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.array([2 * centres[0] - middle[0], *middle, 2 * centres[-1] - middle[-1]])


def _ink(rgba: Any) -> str:
    """Choose black or white for a text on a colour."""
    return "black" if np.dot(rgba[:3], (0.299, 0.587, 0.114)) > 0.5 else "white"


def _text(title: Any) -> str:
    return str((title.get("text") if isinstance(title, Mapping) else title) or "")
