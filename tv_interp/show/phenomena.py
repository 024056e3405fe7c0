"""Which phenomena a shipped model has, for its card.

What arXiv 2406.16007 and 2506.09048 are about, measured where the card reports it: each vector at
the layer that was best on dev prompts, its value on test prompts that share no query with them, and
what the same prompts answer without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xarray as xr

from ..analysis.convergence import ablate_demos
from ..analysis.find import split_prompts
from ..analysis.vectors import extract_vectors, inject_vectors
from ..interventions.recording import last_logits
from ..models.adapter import Adapter
from ..prompts import Prompts, Task, get_task, list_tasks
from ..scores import Scores, get_metric
from ..scores.metrics import Targets

KINDS = {
    "local": "local vectors at the answers of prompts with random answers",
    "separator": "the same with the vectors of the separators, at the separators",
    "global": "global vector at `is` of zero-shot prompts, donor with another query",
    "global, Trial Avg": "the same, mean over the prompts of the other half",
}
WITHOUT = "without answers"
"""Kind of the rows that take answers away."""
ABLATED = ("country-currency", "country-capital", "simple-string", "digit")

CATEGORIES = ("simple-string", "digit", "2d-data")
BIJECTIONS = ("country-capital-bijection", "verb-past-bijection")
CLEAR = 0.5
"""Gain by the global vector from which on the card counts a relation."""


def card_tasks() -> list[str]:
    """Name the tasks of a card: every relation that ships, none picked for its result."""
    return [*list_tasks("knowledge"), *CATEGORIES, *BIJECTIONS]


def measure_phenomena(
    model: Any,
    tasks: Sequence[str | Task] | None = None,
    *,
    n_demos: int = 8,
    n_prompts: int = 200,
    seed: int = 0,
    ablated: Sequence[str] = ABLATED,
) -> list[dict[str, Any]]:
    """Put vectors into prompts layer by layer, and take answers away.

    Args:
        model: A model that knows the tasks' words.
        tasks: Tasks or names of shipped ones; `card_tasks` if not given.
        n_demos: Demonstrations.
        n_prompts: Prompts of each half, dev and test.
        seed: Decides prompts, halves and donors.
        ablated: Names of those of the tasks whose answers are taken away.

    Returns:
        One row a task and kind (see `KINDS`; separators where there are any): metric (``choice``
        for categorization, ``accuracy`` for the rest), layer (best on dev, past block 0), value
        with lo and hi (95 %), gain over the recipients as they are (gain_value, gain_lo, gain_hi),
        label_rate at that layer, few_shot, recipient, by_layer (test), n. Rows of kind `WITHOUT`
        have values over k of ``n_demos`` answers that no other token may attend to, with lo and hi.
    """
    rows = []
    for each in card_tasks() if tasks is None else tasks:
        task = get_task(each)
        halves = split_prompts(model, task, n_demos=n_demos, n_prompts=n_prompts, seed=seed)
        metric = "choice" if task.family == "categorization" else "accuracy"
        about = {"task": task.name, "family": task.family, "metric": metric}
        sides = [_Side(model, half, seed) for half in halves]
        for kind in KINDS:
            if kind.partition(", ")[0] in sides[0].vectors:
                rows.append({"kind": kind} | about | _at_best(model, sides, kind, metric, seed))
        if task.name in ablated:
            scores = ablate_demos(model, halves[1], how=["knockout"], metric=metric, seed=seed)
            table = scores.ci(seed=seed).isel(part=0).clip(0, 1)
            values = {name: _rounded(table[name]) for name in ("value", "lo", "hi")}
            rows.append({"kind": WITHOUT} | about | values | {"n": len(halves[1])})
    return rows


class _Side:
    """One half of the prompts: donors and recipients."""

    def __init__(self, model: Any, prompts: Prompts, seed: int) -> None:
        contrast = prompts.dummies(seed=seed + 1)
        clean = contrast.clean
        asked = clean.other_query(seed=seed + 2)
        self.recipients = {"local": contrast.corrupted, "global": clean.zero_shot()}
        self.vectors = {
            "local": extract_vectors(model, clean),
            "global": extract_vectors(model, asked, at="query_is"),
        }
        if clean.mask("end").any():
            self.recipients["separator"] = contrast.corrupted
            self.vectors["separator"] = extract_vectors(model, clean, at="end")


def _at_best(
    model: Any, sides: Sequence[_Side], kind: str, metric: str, seed: int
) -> dict[str, Any]:
    """Choose the layer on the first side and measure it on the second."""
    at, _, averaged = kind.partition(", ")

    def inject(side: int, metric: str, layers: Any = "all") -> Scores:
        vectors = sides[1 - side].vectors[at].trial_avg() if averaged else sides[side].vectors[at]
        recipients = sides[side].recipients[at]
        return inject_vectors(model, recipients, vectors, layers=layers, metric=metric)

    layer = 1 + int(inject(0, metric).mean().values[1:].argmax())
    scores = inject(1, metric)
    at_best = replace(scores, data=scores.data.sel(layer=layer, drop=True))
    recipients = sides[1].recipients[at]
    logits = last_logits(Adapter.of(model), recipients)
    before = get_metric(metric).readout(Targets.of(recipients))(logits, torch.arange(len(logits)))
    gain = replace(at_best, data=at_best.data - before.numpy())
    found = {"layer": layer, "n": len(recipients)}
    for name, of, least in (("", at_best, 0), ("gain_", gain, -1)):
        table = of.ci(seed=seed).clip(least, 1)
        found |= {name + key: _rounded(table[key]) for key in ("value", "lo", "hi")}
    found["label_rate"] = _rounded(inject(1, "label_rate", layer).mean())[0]
    found |= {key: round(scores.attrs[key], 4) for key in ("few_shot", "recipient")}
    return found | {"by_layer": _rounded(scores.mean())}


def _rounded(values: xr.DataArray) -> Any:
    return np.round(values.values.astype(float), 4).tolist()


def phenomena_section(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Write the card's section from `measure_phenomena`, as lines of Markdown."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_kind.setdefault(row["kind"], []).append(row)
    smallest = min(row["n"] for row in rows)
    lines = [
        "## Phenomena",
        "",
        f"8 demonstrations, {smallest} or more test prompts a cell, 95 % intervals over queries. "
        "The layer is the best on dev prompts with other queries, among the blocks past block 0; "
        "gain is over the same prompts without the vector. Categorization: choice between the two "
        "labels (chance .5); the rest: exact answers. Measured by `python -m "
        "tv_interp.show.card --parts phenomena`; all layers are in `phenomena.json`.",
    ]
    for kind, title in KINDS.items():
        if kind not in by_kind:
            continue
        lines += [
            "",
            f"{kind[0].upper()}{kind[1:]}: {title}.",
            "",
            "| task | few-shot | without | block | with the vector | gain | label rate |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['task']} | {r['few_shot']:.2f} | {r['recipient']:.2f} | {r['layer']} | "
            f"{_interval(r)} | {_interval(r, 'gain_')} | {r['label_rate']:.2f} |"
            for r in by_kind[kind]
        ]
        if known := [r for r in by_kind[kind] if r["family"] == "knowledge"]:
            lines += ["", _count(known)]
    ablated = by_kind.get(WITHOUT, [])
    n_demos = len(ablated[0]["value"]) - 1 if ablated else 0
    lines += [
        "",
        "Answers that no other token may attend to, in any layer; mean over four random orders:",
        "",
        "| task | " + " | ".join(f"{k} of {n_demos}" for k in range(n_demos + 1)) + " |",
        "|---|" + "---|" * (n_demos + 1),
        *(f"| {r['task']} | " + " | ".join(f"{v:.2f}" for v in r["value"]) + " |" for r in ablated),
        "",
    ]
    return lines


def _count(rows: Sequence[dict[str, Any]]) -> str:
    """Say in how many relations a vector adds much, and in how many surely something."""
    much = sum(r["gain_value"] >= CLEAR for r in rows)
    sure = sum(r["gain_lo"] > 0 for r in rows)
    return (
        f"Of {len(rows)} relations, {much} gain {CLEAR:g} or more; in {sure} the interval of the "
        "gain is above 0."
    )


def _interval(row: dict[str, Any], of: str = "") -> str:
    return f"{row[of + 'value']:.2f} [{row[of + 'lo']:.2f}, {row[of + 'hi']:.2f}]"
