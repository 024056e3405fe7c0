"""What decides convergence?

``python -m tv_interp.show.familiarity measure RUNS --out FILE`` measures what ``train`` wrote,
``python -m tv_interp.show.familiarity table FILE`` shows it.

arXiv 2406.16007 leaves open what makes local vectors converge into one: how well the model knows
the relation, or how complex its rule is. Models of the preset ``familiarity`` saw some relations up
to fifty times as often as others, and the seed decides which: so familiarity can be told apart from
what else a relation is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..analysis.convergence import measure_convergence
from ..errors import TvInterpError
from ..files import read_rows, write_rows
from ..models.load import load_model
from ..prompts.tasks.knowledge import SHARED, relations
from .arms import as_table, finished_runs

FACTORS = {
    "familiarity": "per factor of ten in how often training showed the relation, same relation",
    "answers": "per doubling of the number of answers the relation has",
    "shared": "relations told by the pair alone, over those told by the answer",
}


def measure_familiarity(
    runs: str, *, out: str = "familiarity.json", n_demos: int = 8, n_prompts: int = 64
) -> None:
    """Measure the convergence of every relation in every trained model and write one file.

    Args:
        runs: Directory of directories that ``train`` wrote.
        out: File of rows: seed, relation, ``weight`` (how often training showed it, the most
            frequent of its family is 1), ``answers`` (how many it has), ``shared`` (whether another
            relation has the same inputs and answers), accuracies with ``all`` local vectors and
            with ``none``, ``convergence`` (effect of one vector at every answer over that of all,
            in the last layer where these keep half of their effect; null without effect).
        n_demos: Demonstrations.
        n_prompts: Prompts of each relation.

    Raises:
        FileError: if there is no finished run, or ``out`` cannot be written.
    """
    found_runs = finished_runs(runs, "familiarity")
    torch.set_num_threads(1)  # small models: more threads only wait for each other
    rows = []
    for directory, about in found_runs:
        model = load_model(directory)
        print(f"{about['preset']} seed {about['seed']}", flush=True)
        for name, weight in about["familiarity"].items():
            demos = min(n_demos, len(relations()[name]) - 2)
            found = measure_convergence(model, name, n_demos=demos, n_prompts=n_prompts)
            layer = found.last_working_layer
            means = found.scores.mean().sel(layer=layer)
            ratio = float(found.effect_ratio()["value"].sel(layer=layer))
            row = {"seed": about["seed"], "relation": name, "weight": round(weight, 4)}
            row |= {"answers": len({*relations()[name].values()}), "shared": name in SHARED}
            row |= {"layer": layer} | {k: round(float(means.sel(site=k)), 4) for k in _SITES}
            rows.append(row | {"convergence": round(ratio, 4) if np.isfinite(ratio) else None})
    write_rows(out, rows)


_SITES = ("all", "none")


def explain_convergence(rows: Sequence[dict[str, Any]], *, seed: int = 0) -> pd.DataFrame:
    """Say how much convergence goes with familiarity and with the rule's complexity.

    Familiarity differs between seeds for one and the same relation, so its slope is taken within
    relations and within seeds: nothing else about a relation can stand behind it. What a relation
    is (how many answers, shared or not) differs between relations only: those rows are a
    correlation over 28 of them.

    Args:
        rows: What `measure_familiarity` wrote; rows without convergence are left out.
        seed: Of the bootstrap over relations.

    Returns:
        One row a factor of `FACTORS`: its ``slope`` with ``lo`` and ``hi`` (95 %, bootstrap over
        relations), ``n`` relations and what it is ``per``.

    Raises:
        TvInterpError: if fewer than two seeds or five relations have a convergence.
    """
    table = pd.DataFrame([row for row in rows if row["convergence"] is not None])
    groups = dict(list(table.groupby("relation"))) if len(table) else {}
    if len(groups) < 5 or table.seed.nunique() < 2:
        raise TvInterpError(
            "expected convergence of five or more relations over two or more seeds, got "
            f"{len(groups)} relations"
        )
    rng, names = np.random.default_rng(seed), list(groups)
    drawn = [_slopes(list(groups.values()))]
    for _ in range(1000):
        picked = rng.integers(len(names), size=len(names))
        drawn.append(_slopes([groups[names[i]] for i in picked]))
    lo, hi = np.nanpercentile(drawn[1:], [2.5, 97.5], axis=0)
    columns = {"factor": list(FACTORS), "slope": drawn[0], "lo": lo, "hi": hi}
    return pd.DataFrame({**columns, "n": len(names), "per": list(FACTORS.values())})


def show_familiarity(path: str) -> None:
    """Print what `explain_convergence` says of a file of `measure_familiarity`.

    Args:
        path: The file.

    Raises:
        FileError: if it cannot be read.
        TvInterpError: as `explain_convergence`.
    """
    print(as_table(explain_convergence(read_rows(path))))


def _slopes(groups: Sequence[pd.DataFrame]) -> list[float]:
    """Fit the slopes of the three factors over groups of rows, one a relation."""
    value, weight, seeds = (
        np.concatenate([group[name].to_numpy() for group in groups])
        for name in ("convergence", "weight", "seed")
    )
    which = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    levels = [*np.eye(len(groups))[which].T, *(seeds == s for s in np.unique(seeds)[1:])]
    within = np.linalg.lstsq(np.column_stack([np.log10(weight), *levels]), value, rcond=None)[0][0]
    answers, shared, mean = (
        np.array([float(group[name].to_numpy().mean()) for group in groups])
        for name in ("answers", "shared", "convergence")
    )
    design = np.column_stack([np.ones(len(groups)), np.log2(answers), shared])
    between = np.linalg.lstsq(design, mean, rcond=None)[0]
    return [float(within), float(between[1]), float(between[2])]


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli({"measure": measure_familiarity, "table": show_familiarity}, as_positional=True)
