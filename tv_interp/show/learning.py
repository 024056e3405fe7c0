"""What a model could do while it was trained."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FileError, TvInterpError
from ..models.load import reference_directory
from .plots import COLORS, DASHES, SYMBOLS

if TYPE_CHECKING:
    import plotly.graph_objects as go

NOT_FAMILIES = ("step", "loss")


def read_curve(model: str | os.PathLike) -> list[dict[str, Any]]:
    """Read accuracy by family over steps, as training wrote it.

    Args:
        model: Name of a shipped model, or the directory that training wrote.

    Returns:
        One row a measurement: ``step``, ``loss`` and a share for each family.

    Raises:
        FileError: if there is no ``curve.jsonl``.
    """
    directory = reference_directory(str(model)) or Path(model)
    try:
        lines = (directory / "curve.jsonl").read_text("utf-8").splitlines()
    except OSError as error:
        raise FileError(
            f"expected the name of a shipped model or a directory with curve.jsonl, got "
            f"{str(model)!r} ({error.strerror})"
        ) from None
    return [json.loads(line) for line in lines]


def plot_learning(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> go.Figure:
    """Draw accuracy by family over steps, one panel a run.

    Args:
        curves: Rows of `read_curve` by the title of their panel.

    Raises:
        TvInterpError: if there are no curves.
    """
    from plotly.subplots import make_subplots

    if not curves:
        raise TvInterpError("empty selection: expected at least one learning curve")
    figure = make_subplots(rows=len(curves), cols=1, subplot_titles=list(curves))
    families = dict.fromkeys(k for rows in curves.values() for k in rows[0])
    families = [name for name in families if name not in NOT_FAMILIES]
    for panel, rows in enumerate(curves.values(), 1):
        for i, family in enumerate(families):
            j = i % len(COLORS)
            figure.add_scatter(
                x=[row["step"] for row in rows],
                y=[row.get(family) for row in rows],
                name=family,
                legendgroup=family,
                showlegend=panel == 1,
                mode="lines+markers",
                line={"color": COLORS[j], "dash": DASHES[j]},
                marker={"symbol": SYMBOLS[j], "size": 5},
                row=panel,
                col=1,
            )
    figure.update_xaxes(title_text="step")
    figure.update_yaxes(title_text="share right", range=[-0.03, 1.03])
    figure.update_layout(template="plotly_white", height=120 + 280 * len(curves))
    return figure
