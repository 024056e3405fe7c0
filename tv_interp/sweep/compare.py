"""Which heads do the same across tasks, seeds and models: overlap of the strongest, and depth."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import stats

from ..errors import ScoreError
from ..scores.statistics import adjust

if TYPE_CHECKING:
    import xarray as xr


def compare_heads(data: xr.Dataset, *, by: str = "task", k: int = 5) -> pd.DataFrame:
    """Ask of each two values of a field whether they share their strongest heads.

    The strongest heads of a value are the k largest by absolute mean effect, each cell's effects
    divided by its mean total and averaged over the cells of that value. The null: k heads drawn at
    random for one of the two, so that the overlap is hypergeometric.

    Args:
        data: From `load_sweep`: effects over layer and head, of one model.
        by: Field of `Cell` whose values are compared, such as ``task``, ``seed``, ``corruption``.
        k: How many heads.

    Returns:
        One row for each two values: ``shared`` heads, the number ``expected`` by chance, ``p``
        (one-sided) and ``q`` (adjusted over all rows, Benjamini and Hochberg), and ``heads``, the
        names of those that are shared.

    Raises:
        ScoreError: if the cells are of several models, have no heads, there are fewer than two
            values, or k is not between 1 and the number of heads.
    """
    share = _share(data, by)
    if len(set(data.model.values.tolist())) > 1:
        raise ScoreError("heads of several models have nothing in common: see depth_profile")
    n = share.sizes["layer"] * share.sizes["head"]
    if not 1 <= k <= n:
        raise ScoreError(f"expected k between 1 and {n} heads, got {k}")
    top = {
        value: set(np.abs(share.sel({by: value}).values).ravel().argsort()[::-1][:k].tolist())
        for value in share[by].values.tolist()
    }
    if len(top) < 2:
        raise ScoreError(f"the cells have one value of {by}: give the sweep's grid at least two")
    rows = []
    for one, two in itertools.combinations(top, 2):
        both = sorted(top[one] & top[two])
        names = [f"L{i // share.sizes['head']}H{i % share.sizes['head']}" for i in both]
        p = float(stats.hypergeom.sf(len(both) - 1, n, k, k))
        rows.append((one, two, len(both), k * k / n, p, " ".join(names)))
    table = pd.DataFrame(rows, columns=["one", "two", "shared", "expected", "p", "heads"])
    table.insert(5, "q", adjust(table.p.to_numpy()))
    return table


def depth_profile(data: xr.Dataset, *, by: str = "model", bins: int = 4) -> pd.DataFrame:
    """Say at which relative depth the effect lies: comparable between models of other sizes.

    Args:
        data: From `load_sweep`: effects over layer and head.
        by: Field of `Cell` that makes the rows.
        bins: Equal parts of the depth; layer l of n is at (l + 1/2) / n.

    Returns:
        A row for each value: the part of the absolute effect that lies in each bin, and its mean
        relative ``depth``.

    Raises:
        ScoreError: if the cells have no heads, or bins is below 1.
    """
    if bins < 1:
        raise ScoreError(f"expected bins of 1 or more, got {bins}")
    share = abs(_share(data, by)).sum("head")
    rows = {}
    for value in share[by].values.tolist():
        weight = share.sel({by: value}).values
        # models of fewer layers are filled up with NaN, which the sum over heads made 0
        n = _n_layers(data, by, value)
        depth = (np.arange(n) + 0.5) / n
        weight = weight[:n] / weight[:n].sum()
        part, _ = np.histogram(depth, bins, (0, 1), weights=weight)
        rows[value] = [*part, float(depth @ weight)]
    names = [f"{i / bins:.2f}-{(i + 1) / bins:.2f}" for i in range(bins)]
    return pd.DataFrame.from_dict(rows, orient="index", columns=[*names, "depth"])


def _share(data: xr.Dataset, by: str) -> xr.DataArray:
    """Mean effect over mean total by value of a field, over layer and head."""
    if not {"layer", "head"} <= set(map(str, data.effect.dims)):
        raise ScoreError(f"expected effects over layer and head, got {data.effect.dims}")
    if by not in data.coords or data[by].dims != ("cell",):
        fields = sorted(str(c) for c in data.coords if data[c].dims == ("cell",))
        raise ScoreError(f"expected by= to be one of {fields}, got {by!r}")
    share = data.effect.mean("prompt") / data.total.mean("prompt")
    return share.groupby(by).mean("cell")


def _n_layers(data: xr.Dataset, by: str, value: object) -> int:
    cells = data.effect.isel(cell=np.flatnonzero(data[by].values == value))
    return int(cells.notnull().any(("cell", "prompt", "head")).sum())
