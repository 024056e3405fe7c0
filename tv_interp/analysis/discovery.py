"""A circuit from a task in one call: found on some prompts, measured on others."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import TvInterpError
from ..interventions.recording import record
from ..prompts import Task, get_task
from ..prompts.corruptions import default_corruptions
from ..scores import Metric
from .ablation import Ablation
from .circuits import check_pruning, discover_circuit
from .common import Direction
from .edges import Method, score_edges
from .faithfulness import (
    SHARES,
    CircuitReport,
    Interval,
    evaluate_circuit,
    measure_curve,
    measure_stability,
)
from .find import split_prompts
from .pruning import PRUNINGS, Pruning, prune_edges

MOST = 0.1
"""Largest size that is tried, as a share of all edges."""
CLOSE = 0.05
"""Faithfulness this close to 1 ends the search for a size."""


def find_circuit(
    model: Any,
    task: str | Task,
    *,
    n_demos: int = 8,
    n_prompts: int = 64,
    seed: int = 0,
    corruption: str | None = None,
    template: str | None = None,
    method: Method | Pruning = "eap-ig",
    n_edges: int | None = None,
    threshold: float | None = None,
    direction: Direction = "noise",
    metric: str | Metric = "logit_diff",
    ablation: Ablation = "corrupted",
    n_random: int = 20,
    cache: str | os.PathLike | None = None,
    progress: bool = False,
) -> CircuitReport:
    """Find a task's circuit on one half of the prompts and evaluate it on the other.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        task: A task or its name.
        n_demos: Demonstrations in each prompt.
        n_prompts: Prompts in each of the two halves; they share no query item.
        seed: Decides prompts, halves, random circuits and resamples.
        corruption: As in `Prompts.corrupt`; None for the first that fits the task's family.
        template: Text with {x} and {y}; None for the model's own.
        method: As in `discover_circuit`.
        n_edges: As in `discover_circuit`; None for the smallest of MIB's sizes up to 10 % of all
            edges whose faithfulness on the first half is within .05 of 1, else the closest.
        threshold: As in `discover_circuit`, instead of a number.
        direction: As in `score_edges`.
        metric: As in `score_edges`.
        ablation: As in `evaluate_circuit`; edges are scored by the same.
        n_random: As in `evaluate_circuit`.
        cache: As in `score_edges`.
        progress: Whether to show bars.

    Returns:
        The report on the second half.

    Raises:
        PromptError: if prompts or corruption cannot be made.
        UnknownName: for an unknown task, corruption, method, metric or ablation.
        ScoreError: if the corruption makes no measurable difference.
        TvInterpError: if no circuit connects the embedding with the logits, or as
            `discover_circuit`.
    """
    if method in PRUNINGS:
        check_pruning(method, n_edges, threshold, direction)
    chosen = get_task(task) if isinstance(task, str) else task
    kind = corruption or default_corruptions(chosen)[0]
    halves = split_prompts(
        model, chosen, n_demos=n_demos, n_prompts=n_prompts, seed=seed, template=template
    )
    first, second = (half.corrupt(kind, seed=seed + 1) for half in halves)
    recorded = record(model, first)
    how: dict[str, Any] = {"metric": metric, "recorded": recorded, "progress": progress}
    if method == "acdc" or method == "nodes":
        least = check_pruning(method, n_edges, threshold, direction)
        scores = prune_edges(model, first, threshold=least, method=method, ablation=ablation, **how)
    else:
        scores = score_edges(
            model, first, method=method, direction=direction, ablation=ablation, cache=cache, **how
        )
    if n_edges is None and threshold is None:
        shares = tuple(share for share in SHARES if share <= MOST)
        curve = measure_curve(
            model, first, scores, ablation=ablation, shares=shares, seed=seed, **how
        )
        n_edges = int(_smallest(curve) * scores.data.sizes["edge"])
    circuit = discover_circuit(model, first, scores=scores, n_edges=n_edges, threshold=threshold)
    report = evaluate_circuit(
        model,
        second,
        circuit,
        ablation=ablation,
        metric=metric,
        n_random=n_random,
        seed=seed,
        progress=progress,
    )
    if method in PRUNINGS:  # its scores depend on what was taken away before
        return report
    again = measure_stability(
        scores, circuit.graph, n_edges=n_edges, threshold=threshold, seed=seed
    ).jaccard.values
    low, high = np.percentile(again, (2.5, 97.5))
    return replace(report, stability=Interval(float(again.mean()), float(low), float(high)))


def _smallest(curve: Any) -> float:
    """Choose the smallest share that is faithful enough, or the one nearest to it."""
    far = np.where(curve.n_edges.values > 0, abs(1 - curve.faithfulness.values), np.inf)
    if not np.isfinite(far).any():
        raise TvInterpError(
            "no circuit of up to 10 % of the edges connects the embedding with the logits: name "
            "n_edges"
        )
    enough = np.flatnonzero(far <= CLOSE)
    return float(curve.share.values[enough[0] if len(enough) else far.argmin()])
