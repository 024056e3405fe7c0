"""What every analysis shares: the runs it starts from, and the scores it hands back."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from ..errors import ScoreError, TvInterpError, unknown
from ..interventions.engine import run_variants
from ..interventions.recording import MAX_SHARE, Recorded, Run, record_run
from ..interventions.sites import Head, Site, Variant
from ..models.adapter import Adapter
from ..prompts import Contrast, Prompts, check_contrast
from ..prompts.roles import parse_role
from ..scores import Metric, Scores, get_metric
from ..scores.metrics import Readout, Targets

Direction = Literal["denoise", "noise"]
DIRECTIONS: tuple[Direction, ...] = ("denoise", "noise")
Side = Literal["clean", "corrupted"]


def check_direction(direction: str) -> None:
    """Refuse an unknown direction.

    Raises:
        UnknownName: if it is neither ``"denoise"`` nor ``"noise"``.
    """
    if direction not in DIRECTIONS:
        raise unknown("direction", direction, DIRECTIONS)


class Experiment:
    """A contrast under one metric and direction: how to read a run, and how to label an effect.

    Denoising patches the clean run into the corrupted one; the effect is how far the metric rises.
    Noising patches the corrupted run into the clean one; the effect is how far it falls. In both,
    positive means that what was patched carries the task, and the total is m(clean) - m(corrupted).
    """

    def __init__(
        self,
        model: Any,
        contrast: Contrast,
        recorded: Recorded | None,
        direction: Direction,
        metric: str | Metric,
        at: str,
    ) -> None:
        """Fix what is measured; a run that is not given is recorded when it is first asked for."""
        check_contrast(contrast)
        check_direction(direction)
        parse_role(at)
        self.metric = get_metric(metric)
        self.adapter = Adapter.of(model)
        if recorded is not None and (
            recorded.contrast is not contrast or recorded.model is not model
        ):
            raise ScoreError(
                "recorded= belongs to another model or contrast: make it with "
                "record(model, contrast) from the same two"
            )
        self.model, self.contrast = model, contrast
        self.direction: Direction = direction
        self.at = at
        self._runs: dict[str, Run] = {}
        if recorded is not None:
            self._runs = {"clean": recorded.clean, "corrupted": recorded.corrupted}

    def _run(self, side: Side) -> Run:
        if side not in self._runs:
            known = [run.replays for run in self._runs.values()]
            prompts = getattr(self.contrast, side)
            replays = known[0] if known else None
            run = record_run(self.adapter, prompts, max_memory=MAX_SHARE, replays=replays)
            self._runs[side] = run
        return self._runs[side]

    @property
    def sides(self) -> tuple[Side, Side]:
        """Which run is patched, and which the patches are taken from."""
        if self.direction == "denoise":
            return "corrupted", "clean"
        return "clean", "corrupted"

    @property
    def has_base(self) -> bool:
        """Whether the run that is patched has been recorded already."""
        return self.sides[0] in self._runs

    @property
    def base(self) -> Run:
        """The run that is patched."""
        return self._run(self.sides[0])

    @property
    def donor(self) -> Run:
        """The run that patches are taken from."""
        return self._run(self.sides[1])

    @cached_property
    def readout(self) -> Readout:
        """How the metric is read off logits."""
        clean = self._run("clean").logits if self.metric.name == "kl" else None
        return self.metric.readout(Targets.of(self.contrast.clean, clean))

    @cached_property
    def base_value(self) -> Float[Tensor, " prompt"]:
        """The metric of the run that is patched."""
        return self.readout(self.base.logits, torch.arange(len(self.contrast)))

    @cached_property
    def total(self) -> Float[Tensor, " prompt"]:
        """What effects are compared with: m(clean) - m(corrupted)."""
        donor = self.readout(self.donor.logits, torch.arange(len(self.contrast)))
        return donor - self.base_value if self.direction == "denoise" else self.base_value - donor

    def effects(
        self,
        variants: Sequence[Variant],
        progress: str | None = None,
        *,
        others: Literal["respond", "frozen"] = "respond",
    ) -> np.ndarray:
        """Run the base under each variant: effects ``[prompt, variant]``; see `run_variants`."""
        values = run_variants(
            self.model,
            self.base.prompts,
            variants,
            self.readout,
            others=others,
            run=self.base,
            max_memory=self.base.max_memory,
            progress=progress,
        )
        change = values - self.base_value
        return (change if self.direction == "denoise" else -change).T.numpy()

    def scores(
        self, effects: np.ndarray, dims: Iterable[str], coords: Mapping[str, Any], **attrs: Any
    ) -> Scores:
        """Label effects ``[prompt, ...]``."""
        about = provenance(self.adapter) | self.contrast.provenance
        about |= {"direction": self.direction, "metric": self.metric.name, "at": self.at}
        return label_scores(
            effects,
            dims,
            coords,
            unit=self.metric.unit,
            total=self.total,
            prompts=self.contrast.clean,
            attrs=about | attrs,
        )


def label_scores(
    effects: np.ndarray,
    dims: Iterable[str],
    coords: Mapping[str, Any],
    *,
    unit: str,
    total: Tensor | None,
    prompts: Prompts,
    attrs: Mapping[str, Any],
) -> Scores:
    """Make scores from bare arrays."""
    rows = {"prompt": np.arange(len(prompts))}
    data = xr.DataArray(effects, dims=("prompt", *dims), coords=rows | dict(coords), name="effect")
    whole = None
    if total is not None:
        whole = xr.DataArray(total.numpy(), dims=("prompt",), coords=rows, name="total")
    return Scores(data, unit, whole, prompts.query, dict(attrs))


def provenance(adapter: Adapter) -> dict[str, Any]:
    """Name model and versions, as plain values without dates."""
    return {
        "model": adapter.name,
        "model_class": type(adapter.model).__name__,
        "tv_interp": _version("tv-interp"),
        "torch": _version("torch"),
        "transformer_lens": _version("transformer-lens"),
    }


@functools.cache
def _version(package: str) -> str:
    return version(package)  # reads and parses a file


def all_heads(adapter: Adapter) -> list[Head]:
    """List every head as (layer, head)."""
    return list(itertools.product(range(adapter.n_layers), range(adapter.n_heads)))


def head_coords(adapter: Adapter) -> dict[str, np.ndarray]:
    """Label the axes of scores over all heads."""
    return {"layer": np.arange(adapter.n_layers), "head": np.arange(adapter.n_heads)}


def as_sites(heads: Iterable[Site | Head | str], at: str, adapter: Adapter) -> list[Site]:
    """Accept sites, their text, or (layer, head) pairs; a head named twice counts once.

    Raises:
        UnknownName: if a text is no site.
        TvInterpError: if there are none, or one is outside of the model.
    """
    out = []
    for head in heads:
        site = Site.parse(head) if isinstance(head, str) else head
        if isinstance(site, Site) and site.head is None:
            raise TvInterpError(f"expected a head, got {site}, a component of a whole block")
        layer, number = site.at if isinstance(site, Site) else (int(site[0]), int(site[1]))
        if not (0 <= layer < adapter.n_layers and 0 <= number < adapter.n_heads):
            raise TvInterpError(
                f"head L{layer}H{number} is outside of {adapter.name}: it has "
                f"{adapter.n_layers} layers of {adapter.n_heads} heads"
            )
        out.append(Site(layer, number, "z", at))
    if not out:
        raise TvInterpError("empty selection: expected at least one head")
    return list(dict.fromkeys(out))
