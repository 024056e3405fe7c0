"""Is a circuit enough, is it all, and is each of its nodes needed: measured by intervening.

With m(X) the mean metric when the edges X carry what their senders write and all others carry what
they write when ablated, M all edges and 0 none (Marks et al. 2024, arXiv 2403.19647; Mueller et al.
2025, arXiv 2504.13151):

* faithfulness (m(C) - m(0)) / (m(M) - m(0)): 1 is all that the model does;
* completeness: the same for the edges outside of the circuit: 0 where nothing was forgotten;
* minimality, node by node: how much faithfulness is lost without the node's edges (Wang et al.
  2022, arXiv 2211.00593, with K the whole rest of the circuit).

The ratio is one of means over prompts; intervals resample query items.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from scipy import stats
from tqdm import tqdm

from ..display import Shown, wrapped
from ..errors import ScoreError, TvInterpError
from ..files import make_directory, write_text
from ..interventions.recording import Recorded
from ..prompts import Contrast
from ..scores import Metric, Scores
from ..scores.statistics import bootstrap, cluster_ids
from .ablation import Ablation, EdgeRunner
from .circuits import Circuit, largest_edges
from .common import Experiment
from .edges import survey
from .graph import END, RoleGraph, node_of, split_edge

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Sizes of MIB's curves, as shares of all edges."""
EPSILON = 0.1
"""Win rates within one half plus or minus this count as equal (Shi et al. 2024)."""


class Interval(NamedTuple):
    """A ratio of means with its 95 % bootstrap interval."""

    value: float
    lo: float
    hi: float

    def __str__(self) -> str:
        """Write as ``0.93 [0.90, 0.97]``."""
        return f"{self.value:.2f} [{self.lo:.2f}, {self.hi:.2f}]"


@dataclass(frozen=True, eq=False, repr=False)
class CircuitReport(Shown):
    """What `evaluate_circuit` measured.

    Attributes:
        circuit: The circuit.
        faithfulness: What the circuit alone does, as a share of what the model does.
        completeness: What all that is not in the circuit does.
        size: Share of the graph's edges.
        random: Faithfulness of random circuits of the same size, matched by layer and role.
        minimality: Faithfulness lost without each node, largest first; empty where not asked for.
        win_rate: Share of prompts on which the circuit's metric is above the model's; ties, up to
            rounding, count half.
        equivalence: p-value of the hypothesis that the win rate is within .1 of one half; small
            says that circuit and model differ (Shi et al. 2024).
        settings: Provenance: model, task, corruption, ablation, metric.
        stability: Jaccard overlap with the circuits that resampled prompts give, their mean and the
            middle 95 % of them; None where it was not measured.
        contrast: The prompts it was measured on; None where they are not at hand. Not saved.
    """

    circuit: Circuit
    faithfulness: Interval
    completeness: Interval
    size: float
    random: tuple[float, ...]
    minimality: Mapping[str, Interval]
    win_rate: float
    equivalence: float
    settings: Mapping[str, Any]
    stability: Interval | None = None
    contrast: Contrast | None = None

    @property
    def random_pvalue(self) -> float:
        """Share of random circuits at least as close to 1, the circuit counted among them."""
        closer = sum(abs(1 - r) <= abs(1 - self.faithfulness.value) for r in self.random)
        return (1 + closer) / (1 + len(self.random))

    def to_dict(self) -> dict[str, Any]:
        """Write as plain values."""
        return {
            "n_edges": len(self.circuit),
            "n_edges_of_graph": len(self.circuit.graph.edges),
            "size": self.size,
            "faithfulness": self.faithfulness._asdict(),
            "completeness": self.completeness._asdict(),
            "random": list(self.random),
            "minimality": {node: i._asdict() for node, i in self.minimality.items()},
            "win_rate": self.win_rate,
            "equivalence": self.equivalence,
            "stability": None if self.stability is None else self.stability._asdict(),
            "writers": list(self.circuit.writers),
            "readers": list(self.circuit.readers),
            "settings": dict(self.settings),
        }

    def save(self, directory: str | os.PathLike) -> None:
        """Write ``circuit.json`` (the circuit) and ``report.json`` (the numbers).

        Raises:
            FileError: if they cannot be written.
        """
        where = make_directory(directory)
        self.circuit.save(where / "circuit.json")
        write_text(where / "report.json", json.dumps(self.to_dict(), indent=2) + "\n")

    def plot(self, **options: Any) -> Any:
        """Draw the circuit, with what each node is worth; see `tv_interp.show.circuit`."""
        from ..show.circuit import plot_circuit

        return plot_circuit(self.circuit, lost=self.minimality, **options)

    def __str__(self) -> str:
        """Write as a table."""
        circuit, about = self.circuit, self.settings
        lines = [
            f"Circuit of {about.get('task')} in {about.get('model')}, found by "
            f"{circuit.attrs.get('method')}, corruption {about.get('corruption')}",
            f"edges         {len(circuit)} of {len(circuit.graph.edges)} ({self.size:.1%})",
            f"faithfulness  {self.faithfulness}  ablation {about.get('ablation')}",
            f"completeness  {self.completeness}  (of all that is outside: 0 is best)",
        ]
        if self.random:
            low, high = min(self.random), max(self.random)
            lines.append(
                f"random        {np.mean(self.random):.2f}, {low:.2f} to {high:.2f} in "
                f"{len(self.random)} circuits matched by layer and role"
            )
        if self.stability is not None:
            lines.append(f"stability     {self.stability}  (Jaccard over resampled prompts)")
        lines.append(f"writers       {', '.join(circuit.writers) or 'none'}")
        lines.append(f"readers       {', '.join(circuit.readers) or 'none'}")
        for node, lost in list(self.minimality.items())[:10]:
            lines.append(f"  without {node:<20} faithfulness falls by {lost}")
        return "\n".join(wrapped(lines))


def evaluate_circuit(
    model: Any,
    contrast: Contrast,
    circuit: Circuit,
    *,
    ablation: Ablation = "corrupted",
    metric: str | Metric = "logit_diff",
    n_random: int = 20,
    minimality: Literal["nodes", "none"] = "nodes",
    seed: int = 0,
    recorded: Recorded | None = None,
    progress: bool = False,
) -> CircuitReport:
    """Measure faithfulness, completeness and minimality of a circuit by ablating edges.

    Args:
        model: The model that the circuit is of.
        contrast: Clean and corrupted prompts; others than those it was found on.
        circuit: The circuit.
        ablation: What edges carry that are not kept: what their sender writes in the
            ``"corrupted"`` run, its ``"mean"`` over prompts (by role, demonstration and place in
            the word), or nothing (``"zero"``).
        metric: Any metric.
        n_random: Random circuits with as many edges of each kind: equal layers and roles of both
            ends, and equal input.
        minimality: ``"nodes"`` leaves each node out in turn, one run each.
        seed: Decides random circuits and resamples.
        recorded: The two runs, where they have been recorded.
        progress: Whether to show a bar.

    Returns:
        The report.

    Raises:
        TvInterpError: if the circuit is of another model, or of a graph that these prompts do not
            make.
        UnknownName: for an unknown ablation or metric.
        ScoreError: if ablating all edges makes no measurable difference.
    """
    run = Experiment(model, contrast, recorded, "noise", metric, END)
    runner = make_runner(run, circuit.graph, circuit, ablation)
    clusters = cluster_ids(contrast.clean.query)
    rng = np.random.default_rng(seed)
    nodes = sorted(circuit.nodes - {"logits"}) if minimality == "nodes" else []
    controls = [match_randomly(circuit, rng) for _ in range(n_random)]
    bar = tqdm(
        total=4 + len(controls) + len(nodes), desc="circuit", disable=not progress, leave=False
    )

    def measure(kept: Bool[np.ndarray, " edge"]) -> Float[np.ndarray, " prompt"]:
        bar.update()
        return runner.run(kept).numpy().astype(float)

    with bar:
        whole, none = (measure(np.full(circuit.mask.shape, on)) for on in (True, False))
        alone, outside = measure(circuit.mask), measure(~circuit.mask)
        total = whole - none
        check_total(total, clusters, run, ablation)
        random = [float((measure(c) - none).mean() / total.mean()) for c in controls]
        lost = {}
        for node in nodes:
            without = circuit.mask & ~touching(circuit.graph, node)
            lost[node] = _ratio(alone - measure(without), total, clusters, seed)
    wins = count_wins(alone, whole, rounding(total))
    settings = run.scores(np.zeros((len(contrast), 0)), ("edge",), {"edge": []}).attrs
    settings = {k: v for k, v in settings.items() if k not in ("direction", "at")}
    return CircuitReport(
        circuit,
        _ratio(alone - none, total, clusters, seed),
        _ratio(outside - none, total, clusters, seed),
        len(circuit) / len(circuit.graph.edges),
        tuple(random),
        dict(sorted(lost.items(), key=lambda item: -item[1].value)),
        wins / len(contrast),
        equivalence_pvalue(wins, len(contrast)),
        settings | {"ablation": ablation, "seed": seed},
        contrast=contrast,
    )


def measure_curve(
    model: Any,
    contrast: Contrast,
    scores: Scores,
    *,
    ablation: Ablation = "corrupted",
    metric: str | Metric = "logit_diff",
    rank: Literal["absolute", "signed"] = "absolute",
    shares: tuple[float, ...] = SHARES,
    seed: int = 0,
    recorded: Recorded | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """Measure the faithfulness of circuits of growing size, and the areas that MIB reports.

    Args:
        model: The model.
        contrast: Clean and corrupted prompts; others than those the scores are from.
        scores: Scores of all edges, from `score_edges`.
        ablation: As in `evaluate_circuit`.
        metric: As in `evaluate_circuit`.
        rank: Edges with the largest ``"absolute"`` mean score first, as for CMD, or the largest
            ``"signed"`` one, as for CPR.
        shares: Nominal sizes, as shares of all edges; what is not connected is then taken away.
        seed: Decides resamples.
        recorded: As in `evaluate_circuit`.
        progress: As in `evaluate_circuit`.

    Returns:
        Dataset over ``share``: ``faithfulness`` with ``lo`` and ``hi``, ``n_edges``; and in
        ``attrs`` ``CPR`` (area under faithfulness) and ``CMD`` (area between it and 1), by the
        trapezoid over linear shares (Mueller et al. 2025, arXiv 2504.13151).

    Raises:
        TvInterpError: if the scores are not of all edges of the model's graph.
        ScoreError: if ablating all edges makes no measurable difference.
        UnknownName: for an unknown ablation or metric.
    """
    run = Experiment(model, contrast, recorded, "noise", metric, END)
    parts, graph, _ = survey(run, scores.attrs.get("demos", "joint"))
    if tuple(scores.data.edge.values) != graph.edges:
        raise TvInterpError(
            f"expected scores of all {len(graph.edges)} edges of the graph, got "
            f"{scores.data.sizes['edge']}: make them with score_edges on the same kind of prompts"
        )
    runner = make_runner(run, graph, None, ablation)
    clusters = cluster_ids(contrast.clean.query)
    mean = scores.data.mean("prompt").values
    order = np.argsort(-(abs(mean) if rank == "absolute" else mean), kind="stable")
    whole, none = (runner.run(np.full(len(mean), on)).numpy() for on in (True, False))
    total = (whole - none).astype(float)
    check_total(total, clusters, run, ablation)
    rows, sizes = [], []
    for share in tqdm(shares, "sizes", disable=not progress, leave=False):
        mask = np.zeros(len(mean), dtype=bool)
        mask[order[: int(share * len(mean))]] = True
        mask = graph.prune(mask)
        sizes.append(int(mask.sum()))
        rows.append(_ratio(runner.run(mask).numpy() - none, total, clusters, seed))
    value, lo, hi = np.array(rows).T
    over = ("share",)
    return xr.Dataset(
        {
            "faithfulness": (over, value),
            "lo": (over, lo),
            "hi": (over, hi),
            "n_edges": (over, sizes),
        },
        coords={"share": list(shares)},
        attrs={
            "CPR": float(np.trapezoid(value, shares)),
            "CMD": float(np.trapezoid(abs(1 - value), shares)),
            "rank": rank,
            "ablation": ablation,
        },
    )


def measure_stability(
    scores: Scores,
    graph: RoleGraph,
    *,
    n_edges: int | None = None,
    threshold: float | None = None,
    n_boot: int = 200,
    seed: int = 0,
) -> xr.Dataset:
    """Choose the edges again on resampled prompts: how often is each among them?

    Args:
        scores: Scores of all edges of the graph.
        graph: The graph.
        n_edges: As in `discover_circuit`.
        threshold: As in `discover_circuit`.
        n_boot: Resamples of query items.
        seed: Decides them.

    Returns:
        Dataset with ``inclusion`` over ``edge``, the share of resamples with the edge, and
        ``jaccard`` over ``resample``: overlap with the edges chosen on all prompts.

    Raises:
        ScoreError: if there are fewer than two query items.
    """
    clusters = cluster_ids(scores.clusters)
    n = int(clusters.max()) + 1
    if n < 2:
        raise ScoreError("stability needs two query items or more, got 1")
    values = scores.data.values.astype(float)
    sums = np.zeros((n, values.shape[1]))
    np.add.at(sums, clusters, values)
    sizes = np.bincount(clusters)
    rng = np.random.default_rng(seed)

    def choose(weights: Float[np.ndarray, " cluster"]) -> Bool[np.ndarray, " edge"]:
        mean = weights @ sums / (weights @ sizes)
        return graph.prune(largest_edges(mean, n_edges, threshold))

    first = choose(np.ones(n))
    inclusion, jaccard = np.zeros(values.shape[1]), []
    for _ in range(n_boot):
        again = choose(rng.multinomial(n, np.full(n, 1 / n)).astype(float))
        inclusion += again / n_boot
        jaccard.append((first & again).sum() / max(1, (first | again).sum()))
    return xr.Dataset(
        {"inclusion": ("edge", inclusion), "jaccard": ("resample", jaccard)},
        coords={"edge": list(graph.edges)},
        attrs={"n_edges": n_edges, "threshold": threshold, "seed": seed},
    )


def compare_circuits(circuits: Sequence[Circuit]) -> tuple[dict[str, float], np.ndarray]:
    """Compare circuits that were found with several seeds, or on several samples of prompts.

    Args:
        circuits: Two or more, of one graph.

    Returns:
        Share of the circuits with each edge that some have, and the Jaccard overlap of each pair.

    Raises:
        TvInterpError: if they are of different graphs.
    """
    whole = circuits[0]
    for circuit in circuits[1:]:
        whole = whole | circuit
    inclusion = {edge: float(np.mean([edge in c for c in circuits])) for edge in whole.edges}
    overlap = [
        len(a & b) / max(1, len(a | b)) for i, a in enumerate(circuits) for b in circuits[i + 1 :]
    ]
    return inclusion, np.array(overlap)


def match_randomly(circuit: Circuit, rng: np.random.Generator) -> Bool[np.ndarray, " edge"]:
    """Draw as many edges of each kind as a circuit has: layers, roles and input are the same."""
    graph = circuit.graph
    kinds: dict[str, list[int]] = defaultdict(list)
    for i, edge in enumerate(graph.edges):
        kinds[re.sub(r"H\d+", "H", edge)].append(i)
    mask = np.zeros(len(graph.edges), dtype=bool)
    for members in kinds.values():
        n = int(circuit.mask[members].sum())
        if n:
            mask[rng.choice(members, n, replace=False)] = True
    return mask


def touching(graph: RoleGraph, node: str) -> Bool[np.ndarray, " edge"]:
    """Mark the edges from and to a node.

    Raises:
        UnknownName: if the graph does not have it, with the nearest names.
    """
    graph.check_node(node)
    return np.array([node in (s, node_of(r)) for s, r in map(split_edge, graph.edges)])


def rounding(total: Float[np.ndarray, " prompt"]) -> float:
    """Get the least change that counts: a ten-thousandth of what ablating everything does."""
    return 1e-4 * abs(float(total.mean()))


def count_wins(
    ours: Float[np.ndarray, " prompt"], theirs: Float[np.ndarray, " prompt"], least: float
) -> float:
    """Count the prompts on which the first is larger; differences below ``least`` count half."""
    difference = ours - theirs
    return float((difference > least).sum() + (abs(difference) <= least).sum() / 2)


def equivalence_pvalue(wins: float, n: int, epsilon: float = EPSILON) -> float:
    """Test whether circuit and model win equally often (Shi et al. 2024, arXiv 2410.13032).

    The null hypothesis is that the win rate is within ``epsilon`` of one half; the p-value is that
    of a rate at least as far from one half under its edge, 1/2 + epsilon.

    Args:
        wins: Prompts on which the circuit's metric is above the model's; ties count half.
        n: Prompts.
        epsilon: Tolerance.
    """
    counts = np.arange(n + 1)
    far = abs(counts / n - 0.5) >= abs(wins / n - 0.5) - 1e-12
    return float(stats.binom.pmf(counts[far], n, 0.5 + epsilon).sum())


def make_runner(
    run: Experiment, graph: RoleGraph, circuit: Circuit | None, ablation: Ablation
) -> EdgeRunner:
    """Get ready to run prompts with some edges of a graph, or of the one that a circuit is of.

    Raises:
        TvInterpError: if the circuit is of another model or other prompts.
    """
    demos = "each" if any("[" in place for place in graph.places) else "joint"
    parts, own, masks = survey(run, demos)
    if circuit is not None:
        circuit.check_model(run.adapter, own)
    return EdgeRunner(own, parts, (run.base, run.donor), masks, run.readout, ablation)


def check_total(
    total: Float[np.ndarray, " prompt"],
    clusters: np.ndarray,
    run: Experiment,
    ablation: Ablation,
) -> None:
    """Refuse a total that could be 0.

    Raises:
        ScoreError: if its interval contains 0.
    """
    low, high = bootstrap(total[:, None], clusters)
    if not (low[0] > 0 or high[0] < 0):
        raise ScoreError(
            f"ablating every edge ({ablation}) changes {run.metric.name} by {total.mean():.3g}, "
            "whose interval contains 0: a share of it means nothing; use another corruption, "
            "ablation, or more prompts"
        )


def _ratio(
    part: Float[np.ndarray, " prompt"],
    total: Float[np.ndarray, " prompt"],
    clusters: np.ndarray,
    seed: int,
) -> Interval:
    low, high = bootstrap(part[:, None].astype(float), clusters, seed=seed, over=total)
    return Interval(float(part.mean() / total.mean()), float(low[0]), float(high[0]))
