"""Which features the states at answers hold, abstract and concrete, and whether they are used.

After the geometry of arXiv 2406.16007: of the demonstration's input a *concrete* feature (length,
value, continent), of the rule an *abstract* one: the label in categorization, the relation in
knowledge tasks. The paper's digest names length and label; its marginalisations, covariance and
ablation operator are not known, and those here are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from ..display import Shown
from ..errors import TvInterpError
from ..models.adapter import Adapter
from ..prompts import Prompts, get_task, make_prompts
from ..prompts.tasks.categorization import Categorization
from ..prompts.tasks.knowledge import relations
from ..scores import Scores
from ..scores.statistics import jackknife
from .common import provenance
from .geometry import Subspace, ablate_subspaces, demix, mahalanobis, random_subspace
from .vectors import extract_vectors

Level = Callable[[str], Hashable]
N_BLOCKS = 20
"""Blocks of prompts that are left out in turn for an interval."""


def _continent(x: str) -> str:
    return relations()["country-continent"][x]


CONCRETE: dict[str, tuple[str, Level]] = {
    "simple-string": ("length", lambda x: len(x.split())),
    "digit": ("value", lambda x: int(x) // 20),
    "2d-data": ("value", lambda x: sum(map(int, x.split())) // 4),
    "country-capital": ("continent", _continent),
    "country-currency": ("continent", _continent),
    "number-next": ("value", lambda x: int(x) // 20),
}
"""The concrete feature of an input: length in letters, value in steps of 20, sum of the two
coordinates in steps of 4, continent."""


@dataclass(frozen=True, eq=False, repr=False)
class Geometry(Shown):
    """What `measure_geometry` found.

    Attributes:
        shares: Share of the variance of condition means by ``(layer, factor)``; factors are the
            abstract one, the concrete one, and their interaction.
        distance: Mahalanobis distance between levels by ``(layer, factor)``: of both factors, of
            either ``shuffled`` among all states (what few states give by themselves) and, in
            categorization, of labels in prompts with ``random answers`` (what the label's word
            gives by itself).
        blocks: The same without each block of prompts, ``(part, layer, factor)``.
        ablated: Values over ``(prompt, layer, site)``: the subspace of either factor or of ``both``
            taken out from that layer on, and random ones of equal rank and variance.
        settings: Provenance as plain values; ``abstract`` and ``concrete`` name the factors.
    """

    shares: xr.DataArray
    distance: xr.DataArray
    blocks: xr.DataArray
    ablated: Scores
    settings: Mapping[str, Any]

    def interval(self, statistic: Callable[[xr.DataArray], float]) -> tuple[float, float, float]:
        """Compute a number from the distances with its 95 % interval, by jackknife over prompts.

        Args:
            statistic: From distances ``(layer, factor)`` to a number.

        Returns:
            Value, lower and upper end.
        """
        return jackknife(statistic(self.distance), [statistic(each) for each in self.blocks])

    def __str__(self) -> str:
        """A table at 80 columns."""
        s, abstract, concrete = self.settings, self.settings["abstract"], self.settings["concrete"]
        heads = ["none", abstract[:5], concrete[:5], "both", "rank1", "var1", "rank2", "var2"]
        lines = [
            f"{s['task']} on {s['model']}: states at answers, {abstract} and {concrete}",
            f"Share of variance, Mahalanobis distance, and {s['metric']} with a factor taken out",
            "from a layer on (0: all layers). rank, var: random subspaces of equal rank or",
            f"removed variance as {abstract} (1) or {concrete} (2).",
            f"{'':>5}{'share':>12}{'distance':>14}  {s['metric']} without",
            f"layer{heads[1]:>6}{heads[2]:>6}{abstract[:6]:>7}{concrete[:6]:>7}"
            + "".join(f"{h:>6}" for h in heads),
        ]
        mean = self.ablated.mean()
        for layer in mean["layer"].values:
            cells = [
                float(table.sel(layer=layer, factor=factor))
                for table in (self.shares, self.distance)
                for factor in (abstract, concrete)
            ]
            lines.append(
                f"{layer:>5}{cells[0]:>6.2f}{cells[1]:>6.2f}{cells[2]:>7.1f}{cells[3]:>7.1f}"
                + "".join(f"{float(v):>6.2f}" for v in mean.sel(layer=layer))
            )
        return "\n".join(lines)


class _States(NamedTuple):
    """States at answers, one a demonstration, with the levels of their factors.

    Attributes:
        states: ``[sample, layer, d_model]``.
        row: Prompt of each.
        abstract: Level of the abstract factor.
        concrete: Level of the concrete one.
    """

    states: Float[np.ndarray, "sample layer d_model"]
    row: Int[np.ndarray, " sample"]
    abstract: list[Any]
    concrete: list[Any]

    @classmethod
    def at_answers(
        cls, model: Any, prompts: Prompts, level: Level, relation: str | None
    ) -> _States:
        """Read the states; the abstract level is the relation given, or else each label."""
        data = extract_vectors(model, prompts).data.transpose("prompt", "demo", "layer", "d_model")
        states = data.values.astype(float).reshape(-1, *data.shape[2:])
        demos = [pair for sample in prompts.samples for pair in sample.demos]
        row = np.repeat(np.arange(len(prompts)), prompts.n_demos)
        abstract = [relation or y for _, y in demos]
        return cls(states, row, abstract, [level(x) for x, _ in demos])

    def and_(self, other: _States) -> _States:
        """Join the states of twins, prompt by prompt."""
        return _States(
            np.concatenate([self.states, other.states]),
            np.concatenate([self.row, other.row]),
            self.abstract + other.abstract,
            self.concrete + other.concrete,
        )


def measure_geometry(
    model: Any,
    task: str,
    *,
    n_demos: int = 8,
    n_prompts: int = 200,
    n_components: int = 2,
    seed: int = 0,
) -> Geometry:
    """Split the states at answers into an abstract and a concrete feature, and take either out.

    Categorization: all prompts share two label words, so that the label is a factor of two levels;
    which class it names is drawn for each prompt. Knowledge: the same inputs are shown in the
    task's relation and in its partner's (the corruption ``task``), so that the relation is a factor
    of two levels, and the foil is the partner's answer. Subspaces are fitted on one half of the
    prompts, and taken out of the task's own prompts in the other.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        task: One of `CONCRETE`.
        n_demos: Demonstrations.
        n_prompts: Prompts in each half.
        n_components: Directions of the concrete factor; the abstract one has one.
        seed: Decides prompts and random subspaces.

    Raises:
        TvInterpError: for a task without a concrete feature, or if a pair of levels does not occur.
        ScoreError: if the prompts are too few for a covariance.
        PromptError: if the prompts cannot be built.
    """
    if task not in CONCRETE:
        raise TvInterpError(f"expected a task of {', '.join(CONCRETE)}, got {task!r}")
    concrete, level = CONCRETE[task]
    chosen = get_task(task)
    if isinstance(chosen, Categorization):
        chosen, abstract, kind = chosen.with_labels(chosen.labels[:2]), "label", "random_answers"
        names: tuple[str | None, str | None] = (None, None)
    else:
        abstract, kind, names = "relation", "task", (task, chosen.partner)
    fit, test = (
        make_prompts(
            model, chosen, n_demos=n_demos, n_prompts=n_prompts, seed=seed + 1000 * half
        ).corrupt(kind, seed=seed + 1)
        for half in (0, 1)
    )
    own, twins = (
        _States.at_answers(model, prompts, level, name)
        for prompts, name in zip((fit.clean, fit.corrupted), names, strict=True)
    )
    held = own if abstract == "label" else own.and_(twins)
    factors = {abstract: held.abstract, concrete: _merged(held.concrete)}
    layers = range(held.states.shape[1])
    fits = [demix(held.states[:, la], factors, n_components=n_components) for la in layers]
    parts = list(fits[0].shares)
    shares = xr.DataArray(
        [[f.shares[n] for n in parts] for f in fits], dims=("layer", "factor"),
        coords={"layer": np.array(layers), "factor": parts}, name="share",
    )  # fmt: skip
    order = np.random.default_rng([seed, 13]).permutation(len(held.row))
    asked = {name: (held, codes) for name, codes in factors.items()}
    asked |= {
        f"{name}, shuffled": (held, [codes[i] for i in order]) for name, codes in factors.items()
    }
    if abstract == "label":
        asked["label, random answers"] = twins, twins.abstract
    whole, *without = (_distances(asked, block) for block in (None, *range(N_BLOCKS)))
    ablated = ablate_subspaces(
        model, test.clean, _spaces(held.states, fits, abstract, concrete, n_components, seed),
        metric="choice",
    )  # fmt: skip
    settings = provenance(Adapter.of(model)) | test.provenance
    settings |= {"abstract": abstract, "concrete": concrete, "n_components": n_components}
    settings |= {"metric": "choice"}
    return Geometry(shares, whole, xr.concat(without, dim="part"), ablated, settings)


def _distances(
    asked: Mapping[str, tuple[_States, Sequence[Any]]], without: int | None
) -> xr.DataArray:
    """Measure the distance between levels of each factor by layer, without a block of prompts."""
    columns = []
    for held, levels in asked.values():
        kept = np.ones(len(held.row), dtype=bool) if without is None else (
            held.row % N_BLOCKS != without
        )  # fmt: skip
        some = [each for each, is_kept in zip(levels, kept, strict=True) if is_kept]
        states = held.states[kept]
        columns.append([mahalanobis(states[:, la], some) for la in range(states.shape[1])])
    values = np.array(columns).T
    return xr.DataArray(
        values, dims=("layer", "factor"),
        coords={"layer": np.arange(len(values)), "factor": list(asked)}, name="distance",
    )  # fmt: skip


def _spaces(
    states: Float[np.ndarray, "sample layer d_model"],
    fits: Sequence[Any],
    abstract: str,
    concrete: str,
    n_components: int,
    seed: int,
) -> dict[str, Subspace]:
    """Make the subspaces of either feature and of both, and their random controls."""
    mean = states.mean(0)

    def space(bases: Sequence[np.ndarray]) -> Subspace:
        return Subspace(tuple(bases), tuple(np.ones(b.shape[1]) for b in bases), mean)

    each = {abstract: 1, concrete: n_components}
    bases = {name: [f.encoders[name][:, :rank] for f in fits] for name, rank in each.items()}
    out = {name: space(basis) for name, basis in bases.items()}
    pairs = zip(bases[abstract], bases[concrete], strict=True)
    out["both"] = space([np.linalg.qr(np.hstack(pair))[0] for pair in pairs])
    for name in each:
        for match in ("rank", "variance"):
            out[f"random, {match} of {name}"] = random_subspace(
                out[name], states, match=match, seed=seed
            )
    return out


def _merged(levels: Sequence[Any], least: float = 0.05) -> list[Any]:
    """Merge rare numbers at either end into their neighbours: too few states have no mean."""
    if not all(isinstance(level, int) for level in levels):
        return list(levels)
    low, high = np.quantile(levels, [least, 1 - least]).astype(int)
    return [int(np.clip(v, low, high)) for v in levels]
