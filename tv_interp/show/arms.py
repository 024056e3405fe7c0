"""Models that differ in one thing, over seeds.

``python -m tv_interp.show.arms measure RUNS --out FILE`` measures what ``train`` wrote,
``python -m tv_interp.show.arms table FILE`` shows it.

arXiv 2506.09048 says that task vectors are the redundancy that dropout asks for (its Proposition 5,
for linear transformers whose token columns are dropped). The arms ask this of trained ones: the
same start, data and steps, with dropout of heads, of token columns, or of nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

from ..errors import FileError, TvInterpError
from ..files import read_rows, write_rows
from ..models.load import load_model
from .paper import save_figure
from .phenomena import KINDS, WITHOUT, measure_phenomena
from .plots import COLORS, DASHES

if TYPE_CHECKING:
    import plotly.graph_objects as go

TASKS = (
    *("country-currency", "capital-country", "adjective-antonym", "verb-gerund"),
    *("country-capital", "country-language"),
)
BASELINE = "arm-nothing"
REDUNDANCY = "redundancy"
"""Accuracy with k of n answers hidden over that with all, mean over k from 1 to n - 1."""


def measure_arms(
    runs: str,
    *,
    out: str = "arms.json",
    n_prompts: int = 100,
    tasks: Sequence[str] = TASKS,
) -> None:
    """Measure every trained model below a directory and write one file.

    Args:
        runs: Directory of directories that ``train`` wrote, one for each arm and seed.
        out: File of rows as of `measure_phenomena`, each with ``arm`` and ``seed``.
        n_prompts: Prompts of each half, dev and test.
        tasks: Names of knowledge tasks.

    Raises:
        FileError: if there is no finished run, or ``out`` cannot be written.
    """
    found_runs = finished_runs(runs, "arm-heads")
    torch.set_num_threads(1)  # small models: more threads only wait for each other
    rows = []
    for directory, about in found_runs:
        print(f"{about['preset']} seed {about['seed']}", flush=True)
        found = measure_phenomena(
            load_model(directory), tasks, n_prompts=n_prompts, ablated=tasks, seed=0
        )
        rows += [{"arm": about["preset"], "seed": about["seed"]} | row for row in found]
    write_rows(out, rows)


def finished_runs(runs: str, preset: str) -> list[tuple[Path, dict[str, Any]]]:
    """List the finished runs of a preset below a directory, with what decided their weights.

    Args:
        runs: Directory of directories that ``train`` wrote.
        preset: Name of a preset, or what such names begin with up to ``-``.

    Raises:
        FileError: if there is none.
    """
    found = []
    for path in sorted(Path(runs).glob("*/training.json")):
        about = json.loads((path.parent / "config.json").read_text("utf-8"))["tv_interp"]
        if about["preset"].partition("-")[0] == preset.partition("-")[0]:
            found.append((path.parent, about))
    if not found:
        raise FileError(
            f"expected directories of finished runs in {runs!r}, found none: make one with "
            f"python -m tv_interp.models.reference.train --preset {preset} --seed 0 "
            f"--out {Path(runs) / preset}-0"
        )
    return found


def compare_arms(rows: Sequence[dict[str, Any]], *, baseline: str = BASELINE) -> pd.DataFrame:
    """Hold each arm against the baseline, seed by seed.

    A seed decides the start and the batches of every arm, so the difference of a pair is that of
    the arms; the interval is over seeds, since seeds are what repeats the training.

    Args:
        rows: What `measure_arms` wrote.
        baseline: Arm that the others are held against.

    Returns:
        One row a quantity and arm: the ``mean`` over tasks and seeds, ``n`` seeds, and for all but
        the baseline the ``difference`` to it with ``lo`` and ``hi`` (95 %, Student's t over pairs
        of seeds). Quantities: the gain by each kind of vector at its best layer past block 0, and
        `REDUNDANCY`.

    Raises:
        TvInterpError: if the baseline is not there, or an arm shares fewer than two seeds with it.
    """
    table = pd.DataFrame([_quantity(row) for row in rows])
    if baseline not in set(table.arm):
        raise TvInterpError(f"expected rows of the arm {baseline!r}, got {sorted(set(table.arm))}")
    wide = table.pivot_table(index=["quantity", "seed"], columns="arm", values="value")
    out = []
    for quantity, block in wide.groupby(level="quantity", sort=False):
        measured = block.dropna(axis="columns", how="all")  # separators are not in every arm
        for arm in sorted(measured, key=lambda name: (name != baseline, name)):
            row: dict[str, Any] = {"quantity": quantity, "arm": arm, "mean": block[arm].mean()}
            row["n"] = int(np.isfinite(block[arm].to_numpy()).sum())
            if arm != baseline and baseline in measured:
                pairs = (block[arm] - block[baseline]).dropna().to_numpy()
                if len(pairs) < 2:
                    raise TvInterpError(
                        f"expected two or more seeds of {arm!r} that {baseline!r} has too, got "
                        f"{len(pairs)}: train more seeds"
                    )
                half = stats.t.ppf(0.975, len(pairs) - 1) * stats.sem(pairs)
                mean = pairs.mean()
                row |= {"difference": mean, "lo": mean - half, "hi": mean + half}
            out.append(row)
    return pd.DataFrame(out)


def show_arms(path: str, *, figure: str | None = None) -> None:
    """Print what `compare_arms` says of a file of `measure_arms`.

    Args:
        path: The file.
        figure: Where to draw it (SVG, PDF or PNG); None for no figure.

    Raises:
        FileError: if a file cannot be read or written.
        TvInterpError: as `compare_arms`.
    """
    rows = read_rows(path)
    print(as_table(compare_arms(rows)))
    if figure is not None:
        save_figure(plot_arms(rows), figure)


def as_table(table: pd.DataFrame) -> str:
    """Write a table as Markdown; numbers have two digits, what is not there is blank."""
    cells = [
        [
            "" if value != value else f"{value:.2f}" if isinstance(value, float) else str(value)
            for value in row
        ]
        for row in table.astype(object).itertuples(index=False)
    ]
    head = [[str(name) for name in table.columns], ["---"] * len(table.columns)]
    return "\n".join("| " + " | ".join(row) + " |" for row in head + cells)


def plot_arms(rows: Sequence[dict[str, Any]]) -> go.Figure:
    """Draw vectors by layer and answers taken away, one line an arm, one thin line a seed.

    Args:
        rows: What `measure_arms` wrote.

    Raises:
        TvInterpError: if there are no rows.
    """
    from plotly.subplots import make_subplots

    if not rows:
        raise TvInterpError("empty selection: expected rows of measure_arms")
    seen = {row["kind"] for row in rows}
    panels = {kind: f"gain by the {kind} vector" for kind in KINDS if kind in seen}
    panels |= {WITHOUT: "answers hidden"}
    deep = -(-len(panels) // 2)
    figure = make_subplots(rows=deep, cols=2, subplot_titles=list(panels.values()))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for panel, kind in enumerate(panels):
        at, across = 1 + panel // 2, 1 + panel % 2
        for i, arm in enumerate(arms):
            seeds: dict[int, list[np.ndarray]] = {}
            for row in rows:
                if (row["arm"], row["kind"]) == (arm, kind):
                    values = row["value"] if kind == WITHOUT else row["by_layer"]
                    seeds.setdefault(row["seed"], []).append(
                        np.array(values) - row.get("recipient", 0.0)
                    )
            lines = [np.round(np.mean(tasks, 0), 6).tolist() for tasks in seeds.values()]
            if not lines:
                continue
            look = {"color": COLORS[i], "dash": DASHES[i]}
            for line in lines:
                figure.add_scatter(
                    x=list(range(len(line))), y=line, mode="lines", legendgroup=arm,
                    showlegend=False, opacity=0.35, hoverinfo="skip",
                    line={**look, "width": 1}, row=at, col=across,
                )  # fmt: skip
            mean = np.round(np.mean(lines, 0), 6).tolist()
            figure.add_scatter(
                x=list(range(len(mean))), y=mean, mode="lines+markers", name=arm,
                legendgroup=arm, showlegend=panel == 0, line=look, row=at, col=across,
            )  # fmt: skip
        figure.update_xaxes(
            title_text="answers" if kind == WITHOUT else "block", row=at, col=across
        )
        title = "share right" if kind == WITHOUT else "share right, over none"
        figure.update_yaxes(title_text=title, row=at, col=across)
    figure.update_layout(template="plotly_white", height=360 * deep)
    return figure


def _quantity(row: dict[str, Any]) -> dict[str, Any]:
    about = {"arm": row["arm"], "seed": row["seed"], "task": row["task"]}
    if row["kind"] != WITHOUT:
        return about | {"quantity": row["kind"], "value": row["gain_value"]}
    values = np.array(row["value"])
    redundancy = float((values[1:-1] / values[0]).mean()) if values[0] else float("nan")
    return about | {"quantity": REDUNDANCY, "value": redundancy}


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli({"measure": measure_arms, "table": show_arms}, as_positional=True)
