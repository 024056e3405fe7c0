"""Where the methods fail, and what goes with it: model-task pairs side by side.

Open question 2 of arXiv 2406.16007. Each pair gets outcomes (does a vector, do the found heads do
the work?), the information map and the geometry of the found heads; then pairs where a method works
are held against pairs where it fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from ..errors import TvInterpError
from ..scores.statistics import adjust

if TYPE_CHECKING:
    import pandas as pd

OUTCOMES = {
    "global": "share of few-shot over zero-shot that the vector at query_is gives, best layer",
    "local": "share of few-shot over dummies that all local vectors give, best layer",
    "pos_avg": "the same by their mean over demonstrations at every answer",
    "writers": "share of the total that the found writers recover together",
    "readers": "share of the total that the found readers recover together",
}
WORKS = 0.5
"""A method works on a pair where its share is at least so large."""


def measure_pair(
    model: Any, task: Any, *, n_demos: int = 8, n_prompts: int = 64, seed: int = 0
) -> dict[str, Any]:
    """Measure one model and task: outcomes, information map and geometry of the found heads.

    Layers of vectors are chosen on one half of the prompts and read on the other.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        task: A task or its name; it needs another rule, see `tv_interp.prompts.crossing.cross`.
        n_demos: Demonstrations.
        n_prompts: Prompts of each half, and of the map.
        seed: Decides prompts.

    Returns:
        Plain values: ``model``, ``task``, ``family``, ``few_shot``; the keys of `OUTCOMES`, None
        where there is nothing to share (``writers`` and ``readers``: the joint effect of all found
        heads, denoising, under the corruption where it is largest); features named ``map: ...``
        (largest share of its total that a role holds over layers, or the relative depth where
        ``query_is`` first holds half of the answer) and ``writers: ...``, ``readers: ...`` (gap to
        the controls).

    Raises:
        TvInterpError: as `information_map` and `find_heads`.
    """
    import tv_interp as tv

    task = tv.get_task(task)
    prompts = tv.make_prompts(model, task, n_demos=n_demos, n_prompts=n_prompts, seed=seed)
    found_map = tv.information_map(model, prompts, seed=seed + 1)
    row: dict[str, Any] = {"model": found_map.settings["model"], "task": task.name}
    row |= {"family": task.family, "other": found_map.settings["other"]}
    row |= _vectors(model, task, n_demos, n_prompts, seed)
    report = tv.find_heads(model, task, n_demos=n_demos, n_prompts=n_prompts, seed=seed)
    for label in ("writer", "reader"):
        shares = [
            j.effect.recovered
            for j in report.joint
            if j.label == label and j.effect.direction == "denoise"
        ]
        row[f"{label}s"] = _number(max(shares)) if shares else None
    row |= {f"n_{name}": len(getattr(report, name)) for name in ("writers", "readers", "relays")}
    row |= _features(found_map)
    kind = str(report.settings["corruptions"][0])
    contrast = prompts.corrupt(kind, seed=seed + 1)
    for name, at in (("writers", "answer"), ("readers", "query_is")):
        heads = [head.site for head in getattr(report, name)]
        if heads:
            shape = tv.head_geometry(model, contrast, heads, at=at, seed=seed)
            row |= {f"{name}: {r.measure}": _number(r.gap) for r in shape.rows}
    return row


def explain_failures(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Hold the pairs where a method works against those where it fails.

    A correlation over pairs of few models, which share weights and word lists: it can say what goes
    with a failure, never why.

    Args:
        rows: From `measure_pair`.

    Returns:
        One row for each outcome and feature with three or more pairs on both sides: how many
        ``n_works`` and ``n_fails``, the feature's mean where it ``works`` and ``fails``, ``p``
        (rank sums, two-sided) and ``q`` (Benjamini and Hochberg over all rows).

    Raises:
        TvInterpError: if no outcome has three or more pairs on both sides.
    """
    import pandas as pd

    features = sorted({name for row in rows for name in row if ": " in name})
    out = []
    for outcome in OUTCOMES:
        for feature in features:
            known = [r for r in rows if None not in (r.get(outcome), r.get(feature))]
            works, fails = (
                np.array([r[feature] for r in known if (r[outcome] >= WORKS) is side])
                for side in (True, False)
            )
            if min(len(works), len(fails)) >= 3:
                p = float(stats.mannwhitneyu(works, fails).pvalue)
                out.append(
                    (outcome, feature, len(works), len(fails), works.mean(), fails.mean(), p)
                )
    if not out:
        raise TvInterpError(
            f"of {len(rows)} pairs no outcome has three where it works and three where it fails: "
            "measure more models or tasks"
        )
    columns = ["outcome", "feature", "n_works", "n_fails", "works", "fails", "p"]
    table = pd.DataFrame(out, columns=columns)
    return table.assign(q=adjust(table.p.fillna(1.0).to_numpy()))


def _vectors(model: Any, task: Any, n_demos: int, n_prompts: int, seed: int) -> dict[str, Any]:
    """Measure what vectors give, as shares of what the demonstrations give."""
    import tv_interp as tv

    metric = "choice" if task.family == "categorization" else "accuracy"
    drawn = tv.make_prompts(model, task, n_demos=n_demos, n_prompts=2 * n_prompts, seed=seed + 1)
    dummies = drawn.dummies(seed=seed + 2)
    clean, dummy = dummies.clean, dummies.corrupted
    half = np.arange(len(clean)) % 2 == 0
    local = tv.extract_vectors(model, clean)
    above = tv.extract_vectors(model, clean.other_query(seed=seed + 3), at="query_is")
    few = float(tv.extract_vectors(model, clean).attrs["few_shot"][metric])
    found: dict[str, Any] = {"few_shot": _number(few)}
    for name, recipient, vectors in (
        ("global", clean.zero_shot(), above),
        ("local", dummy, local),
        ("pos_avg", dummy, local.pos_avg()),
    ):
        scores = tv.inject_vectors(model, recipient, vectors, metric=metric)
        base = float(scores.attrs["recipient"])
        best = int(scores.data.values[half].mean(0).argmax())
        value = float(scores.data.values[~half, best].mean())
        found[name] = _number((value - base) / (few - base)) if few - base >= 0.1 else None
    return found


def _features(found: Any) -> dict[str, Any]:
    """Reduce a map to numbers that other models have too."""
    from ..prompts.roles import ROLE_NAMES

    out: dict[str, Any] = {}
    for role in found.held["rule"].data["role"].values.tolist():
        if role in ROLE_NAMES and role != "bos":
            share = found.share("rule").sel(role=role)
            out[f"map: rule at {role}"] = _number(float(share.max()))
    answer, query = (found.share(what).sel(role="query_is") for what in ("answer", "query"))
    held = np.flatnonzero(answer.values >= 0.5)
    n = answer.sizes["layer"]
    out["map: depth of the answer"] = _number((held[0] + 0.5) / n) if len(held) else None
    out["map: query at query_is"] = _number(float(query.max()))
    return out


def _number(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), 4)
