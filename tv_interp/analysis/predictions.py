"""The predictions of arXiv 2506.09048, asked of a transformer: effect, interval, verdict.

The theory is of linear attention (`tv_interp.theory`). Each prediction is asked only where it could
fail: where one vector does nothing, where one demonstration is as good as all, or where there is no
room above the baseline, the verdict is *undecided*, and the reason says that there is no power.
"""

from __future__ import annotations

import itertools
import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr

from ..display import WIDTH, Shown, wrapped
from ..errors import TvInterpError, unknown
from ..files import make_directory, write_text
from ..models.adapter import Adapter
from ..prompts import get_task, make_prompts
from ..scores import Scores
from ..scores.scores import save_groups
from .claims import HURTS, LEAST, Side, Verdict, judge
from .many_vectors import combine_demonstrations, inject_many_vectors, leave_one_out
from .one_vector import (
    PLACES,
    OneVector,
    Place,
    compare_bijection,
    demonstrations,
    difference,
    implied_ranks,
    inject_into_union,
    inject_one_vector,
)

HALF = 0.5
"""Halfway: between one demonstration and all, between rank one and that in context, of variance."""
FULL = 0.98
"""A baseline above this leaves no room to be better."""

BIJECTION = ("country-capital", "verb-past")
"""A one-to-one relation, and an unrelated one to unite it with."""
UNIONS = (
    ("country-language", "verb-past"),
    ("country-capital", "verb-past"),
    ("country-capital", "adjective-comparative"),
    ("verb-past", "letter-upper"),
)
"""Relations to unite: one demonstration shows one of the two, and the query may ask the other.
Chosen by few-shot accuracy of the reference models alone: low with one demonstration, high with
six."""
DOUBTFUL = ("number-next", "digit")
"""Tasks on which one demonstration may leave doubt: a shared answer set, and a categorization."""
COMBINED = (
    "country-capital", "country-language", "letter-upper", "letter-next", "number-parity",
    "verb-past",
)  # fmt: skip
CATEGORIES = {
    "knowledge": "country-neighbour-language",
    "algorithmic": "number-next",
    "linguistic": "adjective-comparative",
    "bijection": "letter-upper-bijection",
    "categorization": "digit",
}
"""Four of the paper's five; in place of translation, which the shipped models know nothing of, the
categories of 2406.16007."""


@dataclass(frozen=True)
class Prediction:
    """One prediction, asked of one model on one task.

    Attributes:
        text: The prediction.
        source: Where the paper makes it.
        model: Name of the model.
        at: Where vectors are put.
        task: What it was asked on.
        effect: What decides; NaN where it could not be measured.
        lo: Lower end of its 95 % interval.
        hi: Upper end.
        least: What the interval is held against.
        side: On which side of it the prediction says that the effect is.
        verdict: Whether it appears.
        reason: Why it is undecided; empty otherwise.
        numbers: The means behind it.
    """

    text: str
    source: str
    model: str
    at: str
    task: str
    effect: float
    lo: float
    hi: float
    least: float
    side: Side
    verdict: Verdict
    reason: str
    numbers: Mapping[str, float]


@dataclass(frozen=True, repr=False)
class Predictions(Shown):
    """What `check_predictions` found.

    Attributes:
        rows: One for each prediction, place and task.
        scores: What they rest on, by name: ``bijection/answer/both ways`` and so on.
        settings: Model, tasks, numbers of prompts and demonstrations, seed.
    """

    rows: tuple[Prediction, ...]
    scores: Mapping[str, Scores]
    settings: Mapping[str, Any]

    def to_pandas(self) -> Any:
        """Write one row a prediction, place and task."""
        import pandas as pd

        return pd.DataFrame([vars(row) for row in self.rows])

    def to_dict(self) -> dict[str, Any]:
        """Write as plain values; numbers that could not be measured are None."""

        def plain(value: Any) -> Any:
            return None if isinstance(value, float) and not np.isfinite(value) else value

        rows = [{k: plain(v) for k, v in vars(row).items()} for row in self.rows]
        return {"settings": dict(self.settings), "predictions": rows}

    def save(self, directory: str | os.PathLike) -> tuple[Path, Path]:
        """Write ``predictions.json`` and ``scores.nc``; the same seed gives the same bytes.

        Raises:
            FileError: if the directory cannot be written.
        """
        directory = make_directory(directory)
        paths = directory / "predictions.json", directory / "scores.nc"
        write_text(paths[0], json.dumps(self.to_dict(), indent=2) + "\n")
        save_groups({name: s._to_dataset() for name, s in self.scores.items()}, paths[1])
        return paths

    def __str__(self) -> str:
        """A table at 80 columns, grouped by prediction."""
        title = f"Predictions of arXiv 2506.09048 on {self.settings['model']}"
        lines = wrapped([f"{title}: effect [95 % interval]."])
        for text, rows in itertools.groupby(self.rows, key=lambda row: row.text):
            members = list(rows)
            sign = ">" if members[0].side == "above" else "<"
            least = f"effect {sign} {members[0].least:g}"
            lines += ["", *wrapped([f"{text} ({members[0].source}; {least})"])]
            for r in members:
                number = "not measured"
                if np.isfinite(r.effect):
                    number = f"{r.effect:+.2f} [{r.lo:+.2f},{r.hi:+.2f}]"
                task, *more = textwrap.wrap(r.task, 37)
                lines.append(f"  {r.at:<9}{task:<38}{number:<22}{r.verdict}".rstrip())
                lines += [f"{'':<11}{line}" for line in more]
                numbers = ", ".join(f"{name} {value:.2f}" for name, value in r.numbers.items())
                text = f"{r.reason}; {numbers}" if r.reason else numbers
                indent = " " * 11
                lines += textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)
        return "\n".join(lines)


def check_predictions(
    model: Any,
    *,
    at: Sequence[Place] = PLACES,
    bijection: tuple[str, str] = BIJECTION,
    unions: Sequence[tuple[str, str]] = UNIONS,
    doubtful: Sequence[str] = DOUBTFUL,
    combined: Sequence[str] = COMBINED,
    categories: Mapping[str, str] = CATEGORIES,
    n_demos: int = 6,
    n_prompts: int = 64,
    seed: int = 0,
    progress: Literal["bar", "none"] = "none",
) -> Predictions:
    """Ask the predictions of arXiv 2506.09048 of a transformer.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        at: Where vectors are put; see `one_vector`.
        bijection: A one-to-one relation, and an unrelated one to unite it with.
        unions: Pairs of relations to unite, on which one demonstration leaves doubt.
        doubtful: Tasks on which one demonstration may leave doubt.
        combined: Tasks whose global vectors are rebuilt from demonstrations.
        categories: Tasks of TaskV-M, by category.
        n_demos: Demonstrations.
        n_prompts: Prompts in each half.
        seed: Decides everything that is drawn.
        progress: Whether to show a bar on stderr.

    Returns:
        One row for each prediction, place and task.

    Raises:
        UnknownName: for an unknown task or place.
        TvInterpError: if there are no places, or fewer than two demonstrations.
        PromptError: if the prompts cannot be built.
        ModelError: if the model cannot be measured exactly.
    """
    from tqdm import tqdm

    for place in at:
        if place not in PLACES:
            raise unknown("place", place, PLACES)
    if not at or n_demos < 2:
        raise TvInterpError(
            f"expected a place of {PLACES} and two demonstrations or more, got {list(at)} and "
            f"{n_demos}"
        )
    both = itertools.chain(bijection, *unions)
    for name in (*both, *doubtful, *combined, *categories.values()):
        get_task(name)
    asked = _Asked(model, n_demos, n_prompts, seed)
    steps = [
        *((f"one vector at {p}", asked.one_vector, (p, bijection, unions, doubtful)) for p in at),
        ("combination", asked.combination, (combined,)),
        *((f"several vectors at {p}", asked.many_vectors, (p, categories)) for p in at),
        ("leaving one out", asked.leaving_out, (combined,)),
    ]
    with tqdm(steps, disable=progress == "none", unit="question") as bar:
        for label, ask, arguments in bar:
            bar.set_description(label)
            ask(*arguments)
    texts = list(dict.fromkeys(row.text for row in asked.rows))
    settings = {
        "model": asked.name, "at": list(at), "bijection": list(bijection),
        "unions": [list(pair) for pair in unions], "doubtful": list(doubtful),
        "combined": list(combined), "categories": dict(categories), **asked.settings,
    }  # fmt: skip
    rows = sorted(asked.rows, key=lambda row: texts.index(row.text))
    return Predictions(tuple(rows), asked.scores, settings)


class _Asked:
    """What has been asked of one model so far."""

    def __init__(self, model: Any, n_demos: int, n_prompts: int, seed: int) -> None:
        self.model, self.name = model, Adapter.of(model).name
        self.settings: dict[str, Any] = {"n_demos": n_demos, "n_prompts": n_prompts, "seed": seed}
        self.n_demos = n_demos
        self.rows: list[Prediction] = []
        self.scores: dict[str, Scores] = {}

    def add(
        self,
        text: str,
        source: str,
        at: str,
        task: str,
        effect: Scores,
        least: float,
        numbers: Mapping[str, float],
        *,
        side: Side = "above",
        no_power: str = "",
    ) -> None:
        """Judge an effect; where there is no power the numbers stay and the verdict does not."""
        value, lo, hi, verdict, reason = judge(effect, least, side=side, over=effect.total)
        if no_power:
            verdict, reason = "undecided", f"no power: {no_power}"
        self.rows.append(
            Prediction(
                text, source, self.name, at, task, value, lo, hi, least, side, verdict, reason,
                dict(numbers),
            )
        )  # fmt: skip

    # ------------------------------------------------------------------------------- one vector

    def one_vector(
        self,
        at: Place,
        bijection: tuple[str, str],
        unions: Sequence[tuple[str, str]],
        doubtful: Sequence[str],
    ) -> None:
        """Ask one vector of bijections, of its rank, and what it is worth."""
        kinds = compare_bijection(self.model, *bijection, at=at, shots=(1,), **self.settings)
        self.scores |= {f"bijection/{at}/{kind}": one.scores for kind, one in kinds.items()}
        self.bijections(at, kinds)
        for kind in ("x to y", "both ways"):
            self.ranks(at, kinds[kind], kind)
        settings = {"at": at, "shots": self.shots, **self.settings}
        found = [inject_into_union(self.model, *pair, **settings) for pair in unions]
        found += [inject_one_vector(self.model, task, **settings) for task in doubtful]
        for one in found:
            self.scores[f"worth/{at}/{one.donors.clean.task.name}"] = one.scores
            self.worth(at, one)

    @property
    def shots(self) -> list[int]:
        """The numbers of demonstrations to compare with."""
        return [k for k in (1, 2, 4) if k < self.n_demos]

    def bijections(self, at: Place, kinds: Mapping[str, OneVector]) -> None:
        """Hold what one vector loses of the accuracy in context against the two directions."""
        every = demonstrations(self.n_demos)
        lost = {k: one.effect(every, "one vector") for k, one in kinds.items()}
        forward, back = lost["x to y"], lost["y to x"]
        works = [self.works(kinds[k]) for k in ("x to y", "y to x")]
        no_power = "" if "appears" in works else "one vector does not work one way either"
        one_way = replace(
            forward,
            data=xr.concat([forward.data, back.data], "prompt"),
            clusters=forward.clusters + back.clusters,
        )
        for text, kind in (
            ("one vector loses more on a bijection than one way", "both ways"),
            ("... than one way, on a union of one-way relations too (a mixture)", "union"),
            ("... than one way, on as many pairs one way too (rank)", "one way, all pairs"),
        ):
            numbers = self.means(kinds[kind].scores, "one vector", "random answers", every)
            if kind == "both ways":
                numbers |= self.by_direction(kinds[kind])
            for name in ("x to y", "y to x"):
                numbers[name] = float(kinds[name].scores.mean().sel(part="one vector"))
            effect = difference(lost[kind], one_way)
            name = kinds[kind].donors.clean.task.name
            self.add(text, "Prop. 4", at, name, effect, HURTS, numbers, no_power=no_power)

    def by_direction(self, one: OneVector) -> dict[str, float]:
        """Average one vector's values over the queries of each direction."""
        inputs = {x for x, _ in one.donors.clean.task.forward}  # type: ignore[attr-defined]
        forward = np.array([query in inputs for query in one.scores.clusters])
        values = one.scores.data.sel(part="one vector").values
        return {
            name: float(values[rows].mean())
            for name, rows in (("mixed x to y", forward), ("mixed y to x", ~forward))
            if rows.any()
        }

    def works(self, one: OneVector) -> Verdict:
        """Judge whether the vector does part of what demonstrations do, beyond its control."""
        every = demonstrations(self.n_demos)
        means = one.scores.mean()
        base = max(("nothing", "random answers"), key=lambda name: float(means.sel(part=name)))
        effect = one.effect("one vector", base, every)
        return judge(effect, LEAST, over=effect.total)[3]

    def ranks(self, at: Place, one: OneVector, kind: str) -> None:
        """Hold the rank of what one vector adds against that in context, both less one."""
        ranks = implied_ranks(self.model, one)
        self.scores[f"rank/{at}/{kind}"] = ranks
        parts = ("added by one vector", "added in context")
        above, whole = (ranks.data.sel(part=p, drop=True) - 1 for p in parts)
        self.add(
            "the map that one vector adds has rank one (0), less than in context (1)", "eq. 10",
            at, one.donors.clean.task.name, replace(ranks, data=above, total=whole), HALF,
            self.means(ranks, *map(str, ranks.data["part"].values)), side="below",
            no_power="" if self.works(one) == "appears" else "the vector does not work",
        )  # fmt: skip

    def worth(self, at: Place, one: OneVector) -> None:
        """Place one vector between one demonstration (0) and all of them (1)."""
        first, every = demonstrations(1), demonstrations(self.n_demos)
        effect = one.effect("one vector", first, every)
        assert effect.total is not None
        no_power = ""
        if self.works(one) != "appears":
            no_power = "the vector does not work"
        elif judge(replace(effect, data=effect.total, total=None), HURTS)[3] != "appears":
            no_power = "one demonstration is not clearly worse than all"
        names = [str(name) for name in one.scores.data["part"].values]
        self.add(
            "one vector is worth one demonstration (0), not all (1)", "conjecture", at,
            one.donors.clean.task.name, effect, HALF, self.means(one.scores, *names), side="below",
            no_power=no_power,
        )  # fmt: skip

    # --------------------------------------------------------------------------- several vectors

    def combination(self, tasks: Sequence[str]) -> None:
        """Rebuild global vectors from demonstrations, and put the rebuilt ones in."""
        found = combine_demonstrations(self.model, tasks, **self.settings)
        self.scores |= {
            "combination/explained": found.explained, "combination/injected": found.injected
        }  # fmt: skip
        label = f"{len(tasks)} tasks, layer {found.layer}"
        r2 = found.explained.data.sel(layer=found.layer, drop=True)
        own = replace(found.explained, data=r2.sel(part="own", drop=True))
        numbers = self.means(replace(found.explained, data=r2), "own", "same task", "another task")
        self.add(
            "the vector is one fixed combination of its demonstrations (R²)", "conjecture",
            "query_is", label, own, HALF, numbers,
        )  # fmt: skip
        data = found.injected.data
        names = [str(name) for name in data["part"].values]
        means = self.means(found.injected, *names)
        effect = replace(
            found.injected,
            data=data.sel(part="own", drop=True) - data.sel(part="another task", drop=True),
        )
        best = max(means["vector"], means["own"])
        no_power = "" if best > means["nothing"] else "neither it nor the vector works"
        self.add(
            "that combination works when injected, beyond another task's", "conjecture",
            "query_is", label, effect, HURTS, means, no_power=no_power,
        )  # fmt: skip

    def many_vectors(self, at: Place, categories: Mapping[str, str]) -> None:
        """Hold TaskV-M against TaskV, and both against the prompts as they are."""
        for category, task in categories.items():
            found = inject_many_vectors(
                self.model, task, at=at, shots=1 + (at == "answer"), **self.settings
            )
            self.scores[f"many/{at}/{category}"] = found
            names = [str(name) for name in found.data["part"].values]
            numbers = self.means(found, *names)
            numbers |= {
                f"{k}, best on dev": v for k, v in found.attrs["best"].items() if "answers" not in k
            }
            for text, ours, theirs in (
                ("TaskV is better than the few-shot prompt", "TaskV", "baseline"),
                ("TaskV-M is better than TaskV", "TaskV-M", "TaskV"),
            ):
                no_power = ""
                if numbers[theirs] > FULL:
                    no_power = f"{theirs} leaves no room"
                elif max(numbers["TaskV"], numbers["TaskV-M"]) < HURTS and theirs == "TaskV":
                    no_power = "neither works"
                pair = (found.data.sel(part=p, drop=True) for p in (ours, theirs))
                effect = replace(found, data=next(pair) - next(pair))
                self.add(
                    text, "Table 2", at, f"{category}: {task}", effect, 0.0, numbers,
                    no_power=no_power,
                )  # fmt: skip

    def leaving_out(self, tasks: Sequence[str]) -> None:
        """Compare what the last and the first third of demonstrations move, over layers."""
        third = max(1, self.n_demos // 3)
        for task in tasks:
            prompts = make_prompts(self.model, task, **self.settings)
            found = leave_one_out(self.model, prompts)
            self.scores[f"left out/{task}"] = found
            by_demo = found.data.mean("layer")
            late, early = (
                by_demo.isel(demo=d).mean("demo") for d in (slice(-third, None), slice(third))
            )
            means = by_demo.mean("prompt").values
            self.add(
                "later demonstrations move the vector more", "Prop. 5, causal", "query_is", task,
                replace(found, data=late - early), 0.0,
                {f"demonstration {i + 1}": float(v) for i, v in enumerate(means)},
            )  # fmt: skip

    def means(self, scores: Scores, *parts: str) -> dict[str, float]:
        """Average some parts over prompts."""
        found = scores.mean()
        return {part: float(found.sel(part=part)) for part in parts}
