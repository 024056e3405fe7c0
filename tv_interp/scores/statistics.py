"""Intervals, permutation tests and false discovery rate, over prompts clustered by query item.

Prompts that share a query are not independent, so the unit that is resampled and flipped is the
cluster, not the prompt. Everything works on ``values [prompt, cell]`` and is deterministic by seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from ..errors import ScoreError, check_seed

N_BOOT = 4000
MAX_EXACT = 14
"""With this many clusters or fewer all sign flips are enumerated."""


def cluster_ids(labels: Sequence[str]) -> Int[np.ndarray, " prompt"]:
    """Number the clusters of prompts with equal labels, in order of appearance."""
    seen: dict[str, int] = {}
    return np.array([seen.setdefault(label, len(seen)) for label in labels])


def cluster_sums(
    values: Float[np.ndarray, "prompt cell"], clusters: Int[np.ndarray, " prompt"]
) -> tuple[Float[np.ndarray, "cluster cell"], Float[np.ndarray, " cluster"]]:
    """Sum values over the prompts of each cluster; also return the clusters' sizes."""
    n = int(clusters.max()) + 1
    sums = np.zeros((n, values.shape[1]))
    np.add.at(sums, clusters, values)
    return sums, np.bincount(clusters, minlength=n).astype(float)


def bootstrap(
    values: Float[np.ndarray, "prompt cell"],
    clusters: Int[np.ndarray, " prompt"],
    *,
    level: float = 0.95,
    seed: int = 0,
    over: Float[np.ndarray, " prompt"] | None = None,
) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
    """Bootstrap the mean, or the ratio of means ``values / over``, resampling clusters.

    Bootstrap-t (Hall 1988, Annals of Statistics 16:927) on the jackknife's pseudo-values, one a
    cluster, each end at least as far out as Student's t: percentile intervals cover too little with
    few clusters, of unequal size, of skewed effects (91 to 93 % in our simulations; this: 94 to
    97 %).

    Args:
        values: One row a prompt.
        clusters: Cluster of each prompt.
        level: Coverage.
        seed: Decides the resamples; equal seeds resample equal prompts, so ratios are paired.
        over: Denominator of a ratio, one value a prompt.

    Returns:
        Lower and upper ends. Both are infinite where there are fewer than two clusters.

    Raises:
        ScoreError: if the level is not between 0 and 1.
    """
    check_seed(seed)
    if not 0 < level < 1:
        raise ScoreError(f"expected a level between 0 and 1, got {level}")
    sums, sizes = cluster_sums(values, clusters)
    n = len(sizes)
    if n < 2:
        infinite = np.full(values.shape[1], np.inf)
        return -infinite, infinite
    below = sizes if over is None else cluster_sums(over[:, None], clusters)[0][:, 0]
    value = sums.sum(0) / below.sum()
    without = (sums.sum(0) - sums) / (below.sum() - below)[:, None]
    pseudo = (n - 1) * (without.mean(0) - without)  # centred
    error = np.sqrt((pseudo**2).sum(0) / (n * (n - 1)))
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=N_BOOT) / n
    shift = weights @ pseudo
    spread = np.sqrt(np.maximum(weights @ pseudo**2 - shift**2, 0) / (n - 1))
    spread = np.maximum(spread, error / 5)  # of resamples that miss every cluster with an effect
    t = np.divide(shift, spread, out=np.zeros_like(shift), where=spread > 0)
    tail = (1 - level) / 2
    low, high = np.quantile(t, [tail, 1 - tail], axis=0)
    least = stats.t.ppf(1 - tail, n - 1)
    return value - np.maximum(high, least) * error, value - np.minimum(low, -least) * error


def jackknife(
    value: float, without: Sequence[float], *, level: float = 0.95
) -> tuple[float, float, float]:
    """Make an interval for a statistic that is no mean, from its values without each block.

    Delete-a-block jackknife with Student's t (Shao and Wu 1989, Annals of Statistics 17:1176).

    Args:
        value: The statistic of all data.
        without: The statistic without each block of equal size; two or more.
        level: Coverage.

    Returns:
        The value, lower and upper end.
    """
    left = np.asarray(without, dtype=float)
    n = len(left)
    error = np.sqrt((n - 1) / n * ((left - left.mean()) ** 2).sum())
    reach = float(stats.t.ppf((1 + level) / 2, n - 1) * error)
    return value, value - reach, value + reach


def sign_flip_pvalues(
    values: Float[np.ndarray, "prompt cell"],
    clusters: Int[np.ndarray, " prompt"],
    *,
    seed: int = 0,
    n_flips: int | None = None,
    smallest: float | None = None,
) -> Float[np.ndarray, " cell"]:
    """Test each mean against 0 by flipping the signs of clusters, two-sided.

    Args:
        values: One row a prompt.
        clusters: Cluster of each prompt.
        seed: Decides the flips.
        n_flips: Number of random flips; None for enough to reach ``smallest``. With few clusters
            all flips are enumerated instead.
        smallest: p-value that must be reachable; None for .05 over the number of cells.

    Returns:
        p-values; 1 where every value is 0.
    """
    check_seed(seed)
    sums, _ = cluster_sums(values, clusters)
    n = len(sums)
    observed = np.abs(sums.sum(0))
    scale = np.abs(sums).sum(0)
    threshold = observed * (1 - 1e-9) - 1e-12 * scale
    if n <= MAX_EXACT:
        grid = (np.arange(2 ** (n - 1))[:, None] >> np.arange(n - 1)) & 1
        signs = np.concatenate([np.ones((len(grid), 1)), 1.0 - 2.0 * grid], 1)
        hits = (np.abs(signs @ sums) >= threshold).mean(0)
        return np.where(scale == 0, 1.0, hits)
    if n_flips is None:
        needed = smallest or 0.05 / values.shape[1]
        n_flips = int(min(200_000, max(2_000, np.ceil(4 / needed))))
    rng = np.random.default_rng(seed)
    hits = np.zeros(values.shape[1])
    for start in range(0, n_flips, 4_096):
        size = min(4_096, n_flips - start)
        signs = 1.0 - 2.0 * rng.integers(0, 2, size=(size, n), dtype=np.int8)
        hits += (np.abs(signs @ sums) >= threshold).sum(0)
    return np.where(scale == 0, 1.0, (hits + 1) / (n_flips + 1))


def adjust(pvalues: Float[np.ndarray, " cell"]) -> Float[np.ndarray, " cell"]:
    """Adjust p-values after Benjamini and Hochberg: found at rate q is what is <= q."""
    return np.asarray(stats.false_discovery_control(pvalues, method="bh"))
