"""Is a circuit equivalent, independent of what is left out, and minimal: tests with p-values.

After Shi et al. 2024 (arXiv 2410.13032), with three differences. The statistic of equivalence is
the win rate, as in the paper; their code takes a difference of means. What is outside of the
circuit counts by what it adds to the fully ablated run, for a corrupted run shares its query with
the clean one and would depend on it by that alone. And the p-values of minimality are adjusted
over edges by Benjamini and Hochberg.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats
from tqdm import tqdm

from ..interventions.recording import Recorded
from ..prompts import Contrast
from ..scores import Metric
from ..scores.statistics import cluster_ids
from .ablation import Ablation
from .circuits import Circuit
from .common import Experiment
from .faithfulness import check_total, count_wins, equivalence_pvalue, make_runner, rounding
from .graph import END, RoleGraph

QUANTILE = 0.9
"""A needed edge matters more than this share of random ones."""
SIDE_BY_SIDE = 8


@dataclass(frozen=True)
class CircuitTests:
    """What `check_circuit` found.

    Attributes:
        win_rate: Share of prompts on which the circuit's metric is above the model's; ties, up to
            rounding, count half.
        equivalence: p-value of the hypothesis that the win rate is within .1 of one half.
        independence: p-value of the hypothesis that what is outside of the circuit, alone, does not
            tell what the model does (HSIC, by permutation).
        minimality: By edge, p-value of the hypothesis that its knock-out changes the metric more
            than that of 90 % of random edges, adjusted.
        alpha: Level at which a hypothesis is rejected.
    """

    win_rate: float
    equivalence: float
    independence: float
    minimality: Mapping[str, float]
    alpha: float

    @property
    def is_equivalent(self) -> bool:
        """Whether the circuit cannot be told from the model."""
        return self.equivalence >= self.alpha

    @property
    def is_independent(self) -> bool:
        """Whether what is outside tells nothing about the model."""
        return self.independence >= self.alpha

    @property
    def superfluous(self) -> tuple[str, ...]:
        """Edges that matter no more than random ones; none where the circuit is minimal."""
        return tuple(edge for edge, p in self.minimality.items() if p < self.alpha)

    def __str__(self) -> str:
        """Write as three lines."""
        n, n_bad = len(self.minimality), len(self.superfluous)
        verdict = {True: "not rejected", False: "rejected"}
        return "\n".join(
            [
                f"equivalence   {verdict[self.is_equivalent]}  win rate {self.win_rate:.2f}, "
                f"p {self.equivalence:.2g}",
                f"independence  {verdict[self.is_independent]}  p {self.independence:.2g}",
                f"minimality    rejected for {n_bad} of {n} edges",
            ]
        )


def check_circuit(
    model: Any,
    contrast: Contrast,
    circuit: Circuit,
    *,
    ablation: Ablation = "corrupted",
    metric: str | Metric = "logit_diff",
    n_random: int = 100,
    n_permutations: int = 1000,
    alpha: float = 0.05,
    seed: int = 0,
    recorded: Recorded | None = None,
    progress: bool = False,
) -> CircuitTests:
    """Test equivalence, independence and minimality of a circuit.

    Args:
        model: The model that the circuit is of.
        contrast: Clean and corrupted prompts; others than those it was found on.
        circuit: The circuit.
        ablation: As in `evaluate_circuit`.
        metric: As in `evaluate_circuit`.
        n_random: Circuits with a random path more, of which a random edge is knocked out.
        n_permutations: Of prompts.
        alpha: Level at which a hypothesis is rejected.
        seed: Decides random paths and permutations.
        recorded: As in `evaluate_circuit`.
        progress: Whether to show a bar.

    Returns:
        The p-values. A good circuit has large ones.

    Raises:
        TvInterpError: if the circuit is of another model or other prompts.
        UnknownName: for an unknown ablation or metric.
        ScoreError: if ablating all edges makes no measurable difference.
    """
    run = Experiment(model, contrast, recorded, "noise", metric, END)
    runner = make_runner(run, circuit.graph, circuit, ablation)
    rng = np.random.default_rng(seed)
    every = np.ones_like(circuit.mask)
    edges = np.flatnonzero(circuit.mask)
    inflated = [add_path(circuit, rng) for _ in range(n_random)]
    sets = [every, ~every, circuit.mask, ~circuit.mask]
    sets += [_without(circuit.mask, int(edge)) for edge in edges]
    sets += [more for mask, edge in inflated for more in (mask, _without(mask, edge))]
    values = []
    for i in tqdm(range(0, len(sets), SIDE_BY_SIDE), "tests", disable=not progress, leave=False):
        values.append(runner.run(np.stack(sets[i : i + SIDE_BY_SIDE])).numpy().astype(float))
    whole, none, alone, outside, *others = np.concatenate(values)
    check_total(whole - none, cluster_ids(contrast.clean.query), run, ablation)
    least = rounding(whole - none)
    wins = count_wins(alone, whole, least)
    added = np.where(abs(outside - none) < least, 0, outside - none)
    changes = np.array([abs(alone - one).mean() for one in others[: len(edges)]])
    rest = others[len(edges) :]
    random = np.array([abs(a - b).mean() for a, b in zip(rest[::2], rest[1::2], strict=True)])
    pvalues = minimality_pvalues(changes, random, least)
    return CircuitTests(
        wins / len(whole),
        equivalence_pvalue(wins, len(whole)),
        independence_pvalue(added, whole, n_permutations, rng),
        {circuit.graph.edges[i]: float(p) for i, p in zip(edges, pvalues, strict=True)},
        alpha,
    )


def minimality_pvalues(
    changes: Float[np.ndarray, " edge"], random: Float[np.ndarray, " random"], least: float
) -> Float[np.ndarray, " edge"]:
    """Test by a one-sided binomial test whether changes are larger than most random ones.

    Args:
        changes: Mean absolute change of the metric by knocking out each edge of the circuit.
        random: The same of random edges that were added to it.
        least: Changes below it count as none.

    Returns:
        Adjusted p-values of the hypothesis that a change is larger than `QUANTILE` of the random
        ones; a small one says that the edge is not needed.
    """
    larger = (changes[:, None] > np.maximum(random, least)).sum(1)
    pvalues = stats.binom.cdf(larger, len(random), QUANTILE)
    return stats.false_discovery_control(pvalues)


def independence_pvalue(
    a: Float[np.ndarray, " prompt"],
    b: Float[np.ndarray, " prompt"],
    n_permutations: int,
    rng: np.random.Generator,
) -> float:
    """Test independence by the Hilbert-Schmidt criterion (Gretton et al. 2007) and permutation.

    Kernels are Gaussian, as wide as the median distance. If either is constant the p-value is 1.
    """
    kernels = [_kernel(a), _kernel(b)]

    def criterion(order: np.ndarray) -> float:
        return float((kernels[0] * kernels[1][order][:, order]).sum())

    found = criterion(np.arange(len(a)))
    as_large = sum(
        criterion(rng.permutation(len(a))) >= found - 1e-12 * abs(found)
        for _ in range(n_permutations)
    )
    return (1 + as_large) / (1 + n_permutations)


def _kernel(values: Float[np.ndarray, " prompt"]) -> Float[np.ndarray, "prompt prompt"]:
    """Compute a centred Gaussian kernel."""
    square = (values[:, None] - values) ** 2
    width = np.median(square[square > 0]) if square.any() else 1.0
    kernel = np.exp(-square / width)
    kernel = kernel - kernel.mean(0)
    return kernel - kernel.mean(1, keepdims=True)


def add_path(circuit: Circuit, rng: np.random.Generator) -> tuple[Bool[np.ndarray, " edge"], int]:
    """Add a random edge, and what connects it with the circuit, the embedding or the logits.

    Returns:
        The edges, and the number of the random one.
    """
    graph = circuit.graph
    source, target = graph.ends
    mask = circuit.mask.copy()
    edge = int(rng.choice(np.flatnonzero(~mask)))
    for ends, here, walk in ((source, target, "back"), (target, source, "on")):
        node = ends[edge]
        while not _is_joined(graph, circuit, node, walk):
            some = np.flatnonzero(here == node)
            if not len(some):
                break
            step = int(rng.choice(some))
            mask[step] = True
            node = ends[step]
    mask[edge] = True
    return mask, edge


def _is_joined(graph: RoleGraph, circuit: Circuit, node: int, walk: str) -> bool:
    name = graph.nodes[node]
    end = name.startswith("embed@") if walk == "back" else name == "logits"
    return end or name in circuit.nodes


def _without(mask: Bool[np.ndarray, " edge"], edge: int) -> Bool[np.ndarray, " edge"]:
    mask = mask.copy()
    mask[edge] = False
    return mask
