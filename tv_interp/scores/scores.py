"""Scores: numbers with labelled axes that know their unit, their sign and where they come from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr

from ..display import Shown, Table, as_text
from ..errors import FileError, ScoreError
from ..files import whole_file
from ..interventions.sites import Site
from .statistics import adjust, bootstrap, cluster_ids, sign_flip_pvalues

if TYPE_CHECKING:
    import pandas as pd

DIMS = (
    "prompt", "layer", "head", "demo", "role", "dest", "src",
    "part", "site", "sender", "receiver", "via", "edge",
)  # fmt: skip


SHOWN = 10
"""Cells that are shown when scores are printed."""


@dataclass(frozen=True, eq=False)
class Scores(Shown):
    """Effects of interventions, prompt by prompt.

    Attributes:
        data: Effects over ``prompt`` and any of layer, head, demo, role, dest, src, part, site,
            sender, receiver, via, edge. Positive: the intervention's subject carries the task.
        unit: Unit of the numbers.
        total: Effect of exchanging everything, by prompt: m(clean) - m(corrupted), or m(clean)
            minus the chance level where only clean prompts ran; None where there is neither.
        clusters: Query item of each prompt: the unit that statistics resample.
        attrs: Provenance as plain values: model, task, corruption, direction, metric, seeds.
    """

    data: xr.DataArray
    unit: str
    total: xr.DataArray | None
    clusters: tuple[str, ...]
    attrs: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Refuse unknown or disordered axes."""
        dims = [str(d) for d in self.data.dims]
        if dims[:1] != ["prompt"] or dims != [d for d in DIMS if d in dims]:
            raise ScoreError(f"expected dims in the order of {DIMS}, prompt first, got {dims}")
        if len(self.clusters) != self.data.sizes["prompt"]:
            raise ScoreError(
                f"{len(self.clusters)} cluster labels for {self.data.sizes['prompt']} prompts"
            )

    def mean(self) -> xr.DataArray:
        """Average over prompts, sign kept."""
        return self.data.mean("prompt").assign_attrs(unit=self.unit)

    def recovered(self) -> xr.DataArray:
        """Divide the mean effect by the mean total: 1 is all of it, negative works against it.

        Raises:
            ScoreError: if there is no total, or its interval contains 0 (the corruption makes no
                measurable difference, so a share of it means nothing).
        """
        total = self._safe_total()
        return (self.mean() / total.mean()).assign_attrs(unit="fraction of total")

    def ci(
        self,
        of: Literal["mean", "recovered"] = "mean",
        *,
        level: float = 0.95,
        seed: int = 0,
    ) -> xr.Dataset:
        """Bootstrap an interval over query items.

        Args:
            of: ``"mean"`` effect, or ``"recovered"`` share (paired: effect and total of a prompt
                are resampled together).
            level: Coverage.
            seed: Decides the resamples.

        Returns:
            Dataset of ``value``, ``lo`` and ``hi``.

        Raises:
            ScoreError: as `recovered`.
        """
        if of not in ("mean", "recovered"):
            raise ScoreError(f"expected of='mean' or of='recovered', got {of!r}")
        over = self._safe_total().values if of == "recovered" else None
        value = self.recovered() if of == "recovered" else self.mean()
        cells = self._cells()
        low, high = bootstrap(cells, cluster_ids(self.clusters), level=level, seed=seed, over=over)
        return xr.Dataset(
            {
                "value": value,
                "lo": value.copy(data=low.reshape(value.shape)),
                "hi": value.copy(data=high.reshape(value.shape)),
            },
            attrs={"level": level, "of": of},
        )

    def pvalues(self, *, seed: int = 0, smallest: float | None = None) -> xr.DataArray:
        """Test each mean against 0 by sign flips over query items, two-sided, not adjusted."""
        mean = self.mean()
        flat = sign_flip_pvalues(
            self._cells(), cluster_ids(self.clusters), seed=seed, smallest=smallest
        )
        return mean.copy(data=flat.reshape(mean.shape)).assign_attrs(unit="p-value")

    def significant(
        self, fdr: float = 0.05, *, min_recovered: float = 0.02, seed: int = 0
    ) -> xr.DataArray:
        """Mark cells at a false discovery rate over all cells of these scores, and large enough.

        Args:
            fdr: Rate after Benjamini and Hochberg.
            min_recovered: Least absolute share of the total; not asked where there is no total or
                its interval contains 0.
            seed: Decides the sign flips.
        """
        pvalues = self.pvalues(seed=seed, smallest=fdr / max(1, self._cells().shape[1]))
        found = pvalues.copy(data=adjust(pvalues.values.ravel()).reshape(pvalues.shape) <= fdr)
        if self.total_is_clear():
            found &= abs(self.recovered()) >= min_recovered
        return found.assign_attrs(fdr=fdr, min_recovered=min_recovered, unit="")

    def total_is_clear(self, *, level: float = 0.95, seed: int = 0) -> bool:
        """Whether there is a total and its interval excludes 0."""
        if self.total is None:
            return False
        low, high = bootstrap(
            self.total.values[:, None].astype(float),
            cluster_ids(self.clusters),
            level=level,
            seed=seed,
        )
        return bool(low[0] > 0 or high[0] < 0)

    def top(self, k: int = 10) -> tuple[Site, ...]:
        """List the k heads with the largest absolute mean effect as sites.

        Needs axes layer and head; over other axes the largest absolute mean counts.

        Raises:
            ScoreError: if there are no such axes.
        """
        mean = abs(self.mean())
        if not {"layer", "head"} <= set(mean.dims):
            raise ScoreError(
                f"top needs axes layer and head, these scores have {list(self.data.dims)}"
            )
        rest = [d for d in mean.dims if d not in ("layer", "head")]
        flat = mean.max(rest).transpose("layer", "head") if rest else mean
        order = np.argsort(-flat.values.ravel(), kind="stable")[:k]
        layers, heads = np.unravel_index(order, flat.shape)
        role = str(self.attrs.get("at", "answer"))
        return tuple(
            Site(int(flat["layer"][i]), int(flat["head"][j]), "z", role)
            for i, j in zip(layers, heads, strict=True)
        )

    def to_pandas(self) -> pd.DataFrame:
        """Write one row a cell: its labels, mean effect and, where there is one, recovered."""
        out = self.mean().rename("mean").to_dataframe()[["mean"]]
        if self.total_is_clear():
            out["recovered"] = self.recovered().rename("recovered").to_dataframe()["recovered"]
        return out.reset_index()

    def plot(self, **settings: Any) -> Any:
        """Draw the scores with plotly; see `tv_interp.show.plots.plot_scores`."""
        from ..show.plots import plot_scores

        return plot_scores(self, **settings)

    def save(self, path: str | os.PathLike) -> None:
        """Write to a netCDF file: no timestamps, so one seed gives identical bytes.

        Raises:
            FileError: if the file cannot be written.
        """
        save_dataset(self._to_dataset(), path)

    @classmethod
    def load(cls, path: str | os.PathLike, group: str | None = None) -> Scores:
        """Read what `save` wrote.

        Raises:
            FileError: if there is no such file, or it is no scores file.
        """
        return cls._from_dataset(load_dataset(path, group), path)

    def __add__(self, other: Scores) -> Scores:
        """Add effects cell by cell.

        Raises:
            ScoreError: if unit, corruption, prompts or axes differ.
        """
        if not isinstance(other, Scores):
            return NotImplemented
        for what, ours, theirs in (
            ("unit", self.unit, other.unit),
            *((k, self.attrs.get(k), other.attrs.get(k)) for k in ("corruption", "direction")),
            ("prompts", self.clusters, other.clusters),
            ("axes", _axes(self.data), _axes(other.data)),
        ):
            if ours != theirs:
                raise ScoreError(
                    f"scores of different {what} cannot be added: {_short(ours)} and "
                    f"{_short(theirs)}"
                )
        return replace(self, data=self.data + other.data)

    def _blocks(self) -> Iterator[str | Table]:
        mean = self.mean()
        flat = mean.values.ravel()
        order = np.argsort(-abs(np.nan_to_num(flat)), kind="stable")[:SHOWN]
        clear = self.total_is_clear()
        over = self._safe_total().values if clear else None
        parts, ids = self._cells()[:, order], cluster_ids(self.clusters)
        values = flat[order] / over.mean() if over is not None else flat[order]
        ends = bootstrap(parts, ids, over=over)
        yield repr(self)
        yield (
            ("Share of the total recovered" if clear else f"Mean in {self.unit}")
            + f" [95 % interval], the {len(order)} largest of {flat.size}:"
        )
        form = "{:+.3f}" if clear else "{:+.4g}"
        places = np.unravel_index(order, mean.shape or (1,))  # scores over prompts alone: one cell
        labels = [mean[d].values[i] for d, i in zip(mean.dims, places, strict=False)]
        numbers = zip(values, *ends, strict=True)
        rows = [
            (
                *(str(at[i]) for at in labels),
                form.format(v),
                f"[{form.format(lo)}, {form.format(hi)}]",
            )
            for i, (v, lo, hi) in enumerate(numbers)
        ]
        yield Table((*map(str, mean.dims), "recovered" if clear else "mean", "interval"), rows)

    def __str__(self) -> str:
        """What was measured, and the largest cells with their intervals."""
        return as_text(self._blocks())

    def __repr__(self) -> str:
        """Axes, unit, and what was measured."""
        sizes = ", ".join(f"{d} {n}" for d, n in self.data.sizes.items())
        what = " ".join(
            str(self.attrs[k]) for k in ("task", "corruption", "direction") if k in self.attrs
        )
        return f"Scores({sizes}; {self.unit}; {what})"

    def _cells(self) -> np.ndarray:
        return self.data.values.reshape(self.data.sizes["prompt"], -1).astype(float)

    def _safe_total(self) -> xr.DataArray:
        if self.total is None:
            raise ScoreError(
                "there is no total to recover (no corrupted run, and the metric has no chance "
                "level): use mean()"
            )
        if not self.total_is_clear():
            raise ScoreError(
                f"the interval of the mean total {float(self.total.mean()):.3g} {self.unit} "
                f"contains 0: corruption {self.attrs.get('corruption')!r} makes no measurable "
                "difference here, so a share of it means nothing; use mean() or another corruption"
            )
        return self.total

    def _to_dataset(self) -> xr.Dataset:
        out = xr.Dataset({"effect": self.data})
        if self.total is not None:
            out["total"] = self.total
        out = out.assign_coords(cluster=("prompt", np.array(self.clusters, dtype=object)))
        about = {"unit": self.unit, "attrs": dict(self.attrs), "format": "tv_interp.Scores 1"}
        out.attrs = {"tv_interp": json.dumps(about, sort_keys=True)}
        return out

    @classmethod
    def _from_dataset(cls, data: xr.Dataset, path: Any) -> Scores:
        try:
            about = json.loads(data.attrs["tv_interp"])
            clusters = tuple(str(c) for c in data["cluster"].values)
            effect = data["effect"].drop_vars("cluster")
            total = data["total"].drop_vars("cluster") if "total" in data else None
            return cls(effect, about["unit"], total, clusters, about["attrs"])
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"{path} is no scores file of tv_interp: {error}") from error


def save_dataset(data: xr.Dataset, path: str | os.PathLike, group: str | None = None) -> None:
    """Write a dataset to netCDF under its final name only once it is whole.

    Raises:
        FileError: if the file cannot be written.
    """
    save_groups({group or "/": data}, path)


def save_groups(groups: Mapping[str, xr.Dataset], path: str | os.PathLike) -> None:
    """Write datasets as the groups of one netCDF file; see `save_dataset`."""
    with whole_file(path) as partial:
        mode: Literal["w", "a"] = "w"
        for name, data in groups.items():
            floats = [v for v in data.data_vars if data[v].dtype.kind == "f"]
            data.to_netcdf(
                partial,
                mode=mode,
                group=None if name == "/" else name,
                engine="h5netcdf",
                encoding={v: {"zlib": True, "complevel": 4} for v in floats},
            )
            mode = "a"


def load_dataset(path: str | os.PathLike, group: str | None = None) -> xr.Dataset:
    """Read a netCDF file into memory.

    Raises:
        FileError: if there is no such file or group, or it is corrupt.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"expected a .nc file, got {path}: there is no such file")
    try:
        with xr.open_dataset(path, engine="h5netcdf", group=group) as data:
            return data.load()
    except Exception as error:  # h5py, h5netcdf and xarray each raise their own
        raise FileError(
            f"{path} is corrupt or no netCDF file: {str(error).splitlines()[0]}"
        ) from error


def _axes(data: xr.DataArray) -> list[tuple[str, list]]:
    return [(str(dim), data[dim].values.tolist()) for dim in data.dims]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 40 else text[:37] + "..."
