"""The picture of a table of claims: what appears where."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from ..analysis.verdicts import Claim, Claims
from ..errors import TvInterpError

VERDICTS = {"does not": "#E69F00", "undecided": "#DDDDDD", "appears": "#56B4E9"}


def plot_claims(tables: Sequence[Claims], *, title: str | None = None) -> go.Figure:
    """Draw verdicts as colours: a row a claim, a column a model and task, the effect in each cell.

    Args:
        tables: From `check_claims`, of one model or several.
        title: Title; None for the models and the number of prompts.

    Raises:
        TvInterpError: if there are no claims.
    """
    rows = [row for table in tables for row in table.rows]
    if not rows:
        raise TvInterpError("empty selection: expected at least one claim")
    texts = list(dict.fromkeys(row.text for row in rows))
    columns = list(dict.fromkeys((row.model, row.task) for row in rows))
    found = {(row.text, row.model, row.task): row for row in rows}
    cells = [[found.get((text, *column)) for column in columns] for text in texts]
    names = list(VERDICTS)
    values = [[np.nan if c is None else names.index(c.verdict) for c in line] for line in cells]
    several = len({model for model, _ in columns}) > 1
    labels = [f"{task}<br>{model}" if several else task for model, task in columns]
    steps = np.linspace(0, 1, len(names) + 1)
    colors = [
        [float(end), color]
        for (start, stop), color in zip(
            zip(steps[:-1], steps[1:], strict=True), VERDICTS.values(), strict=True
        )
        for end in (start, stop)
    ]
    heatmap = go.Heatmap(
        z=values, x=labels, y=["<br>".join(textwrap.wrap(text, 46)) for text in texts],
        zmin=-0.5, zmax=len(names) - 0.5, colorscale=colors, xgap=2, ygap=2,
        text=[[_number(cell) for cell in line] for line in cells], texttemplate="%{text}",
        customdata=[[_story(cell) for cell in line] for line in cells],
        hovertemplate="%{customdata}<extra></extra>",
        colorbar={"tickvals": list(range(len(names))), "ticktext": names, "thickness": 14},
    )  # fmt: skip
    models = ", ".join(dict.fromkeys(model for model, _ in columns))
    counts = ", ".join(dict.fromkeys(str(t.settings["n_prompts"]) for t in tables))
    figure = go.Figure(heatmap)
    return figure.update_layout(
        title=title or f"Claims of arXiv 2406.16007 on {models}, {counts} prompts",
        template="plotly_white", height=150 + 42 * len(texts), margin={"l": 330, "t": 70},
        yaxis={"autorange": "reversed", "tickfont": {"size": 11}, "showgrid": False},
        xaxis={"tickangle": -35, "tickfont": {"size": 11}, "showgrid": False},
    )  # fmt: skip


def _number(cell: Claim | None) -> str:
    return f"{cell.effect:.2f}" if cell is not None and np.isfinite(cell.effect) else ""


def _story(cell: Claim | None) -> str:
    if cell is None:
        return "not asked"
    interval = f"{cell.effect:.2f} [{cell.lo:.2f}, {cell.hi:.2f}]" if _number(cell) else ""
    return f"{cell.verdict} {interval}<br>control: {cell.control}<br>{cell.reason}"
