"""Intervals cover what they say, p-values are p-values, and the false discovery rate holds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tv_interp.errors import ScoreError
from tv_interp.scores import statistics
from tv_interp.scores.statistics import (
    adjust,
    bootstrap,
    cluster_ids,
    jackknife,
    sign_flip_pvalues,
)

SHAPES = ("normal", "skewed")


def draw(rng, n_prompts: int, n_cells: int, shape: str, clusters=None, share: float = 0.7):
    """Effects of mean 1 and standard deviation 1; prompts of a cluster correlate by share squared.

    Skewed: gamma of shape 2, skewness 1.4, as of heads that matter on a few items.
    """

    def noise(n):
        if shape == "normal":
            return rng.standard_normal((n, n_cells))
        return (rng.gamma(2.0, 1.0, (n, n_cells)) - 2) / np.sqrt(2)

    if clusters is None:
        return 1 + noise(n_prompts)
    own = np.sqrt(1 - share**2) * noise(n_prompts)
    return 1 + own + share * noise(clusters.max() + 1)[clusters]


def clusters_of(rng, n_prompts: int, kind: str) -> np.ndarray:
    """All distinct, or 2 to 4 prompts to a query item."""
    if kind == "distinct":
        return np.arange(n_prompts)
    return np.repeat(np.arange(n_prompts), rng.integers(2, 5, n_prompts))[:n_prompts]


# ------------------------------------------------------------------------------------ intervals


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["distinct", "clustered"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_prompts", [24, 48, 64])
def test_intervals_cover_what_they_say(n_prompts, shape, kind, monkeypatch):
    """95 % intervals cover 93 to 97 %: of 1500 means, and of 1000 ratios.

    500 resamples instead of 4000, so that this is quick; that costs less than half a percent.
    """
    monkeypatch.setattr(statistics, "N_BOOT", 500)
    rng = np.random.default_rng([n_prompts, SHAPES.index(shape), kind == "distinct"])
    hits = []
    for seed in range(5):  # several sets of clusters and of resamples
        clusters = clusters_of(rng, n_prompts, kind)
        values = draw(rng, n_prompts, 300, shape, None if kind == "distinct" else clusters)
        low, high = bootstrap(values, clusters, seed=seed)
        hits += list((low <= 1) & (high >= 1))
    assert len(hits) == 1500
    covered = np.mean(hits)
    assert 0.93 <= covered <= 0.97, f"means: {covered:.3f}"
    hits = []
    for seed in range(1000):
        clusters = clusters_of(rng, n_prompts, kind)
        both = draw(rng, n_prompts, 2, shape, None if kind == "distinct" else clusters)
        total = 2 + 2 * both[:, 0]  # mean 4; half of it is recovered, prompt by prompt with noise
        low, high = bootstrap(
            (0.5 * total + 0.5 * (both[:, 1] - 1))[:, None], clusters, over=total, seed=seed
        )
        hits.append(low[0] <= 0.5 <= high[0])
    covered = np.mean(hits)
    assert 0.93 <= covered <= 0.97, f"ratios: {covered:.3f}"


def test_clusters_matter(monkeypatch):
    """The same values as if all were independent: intervals are too narrow."""
    monkeypatch.setattr(statistics, "N_BOOT", 400)
    rng = np.random.default_rng(5)
    clusters = np.repeat(np.arange(16), 4)
    values = draw(rng, 64, 1000, "normal", clusters, share=0.9)
    inside = []
    for ids in (clusters, np.arange(64)):
        low, high = bootstrap(values, ids)
        inside.append(((low <= 1) & (high >= 1)).mean())
    assert inside[0] > 0.93 and inside[1] < 0.8


def test_level():
    values = np.random.default_rng(0).standard_normal((40, 500))
    for level in (0.5, 0.8, 0.99):
        low, high = bootstrap(values, np.arange(40), level=level)
        covered = ((low <= 0) & (high >= 0)).mean()
        assert abs(covered - level) < 3.5 * np.sqrt(level * (1 - level) / 500) + 0.01
    for level in (0, 1, -1, 95):
        with pytest.raises(ScoreError, match=f"expected a level between 0 and 1, got {level}"):
            bootstrap(values, np.arange(40), level=level)


def test_intervals_of_few_and_of_degenerate_clusters():
    values = np.array([[1.0, 0.0, 2.0], [2.0, 0.0, 2.0], [4.0, 0.0, 2.0]])
    low, high = bootstrap(values, np.zeros(3, int))
    assert (low == -np.inf).all() and (high == np.inf).all()
    low, high = bootstrap(values, np.arange(3))
    assert low[0] < values[:, 0].mean() < high[0]
    np.testing.assert_allclose([low[1:], high[1:]], [[0, 2], [0, 2]])  # nothing varies
    sparse = np.zeros((24, 1))
    sparse[3] = 1  # one item in 24: the interval is finite and does not exclude 0
    low, high = bootstrap(sparse, np.arange(24))
    assert -1 < low[0] < 0 < high[0] < 1


def test_intervals_are_decided_by_the_seed():
    values = np.random.default_rng(1).standard_normal((20, 3))
    ids = np.arange(20)
    first, again, other = (bootstrap(values, ids, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first[0] != other[0]).all()
    before = np.random.get_state()[1].tolist()
    bootstrap(values, ids)
    sign_flip_pvalues(values, ids)
    assert np.random.get_state()[1].tolist() == before


def test_intervals_shift_and_scale():
    """Laws: the interval of a + b x is a + b times that of x; of -x it is mirrored."""
    rng = np.random.default_rng(2)
    values, ids = rng.gamma(2, 1, (30, 4)), np.repeat(np.arange(15), 2)
    low, high = bootstrap(values, ids)
    for a, b in ((3.0, 2.0), (0.0, -1.0), (-1.0, -0.5)):
        ends = sorted([a + b * low, a + b * high], key=lambda end: end.sum())
        np.testing.assert_allclose(bootstrap(a + b * values, ids), ends, atol=1e-6)
    order = rng.permutation(4)
    np.testing.assert_allclose(bootstrap(values[:, order], ids)[0], low[order])


def test_order_of_appearance():
    assert cluster_ids(["b", "a", "b", "c"]).tolist() == [0, 1, 0, 2]


# ------------------------------------------------------------------------------------- p-values


@pytest.mark.parametrize("n_prompts", [10, 40])
def test_pvalues_are_uniform_under_the_null(n_prompts):
    """Exact with 10, random flips with 40: each level is reached as often as it says."""
    rng = np.random.default_rng(n_prompts)
    values = rng.standard_normal((n_prompts, 3000)) * rng.gamma(1, 1, (n_prompts, 1))
    pvalues = sign_flip_pvalues(values, np.arange(n_prompts), n_flips=999)
    for level in (0.01, 0.05, 0.1, 0.25, 0.5, 0.9):
        error = 4 * np.sqrt(level * (1 - level) / 3000) + 0.004  # 0.004: steps of 2 in 512
        assert abs((pvalues <= level).mean() - level) < error, level


def test_few_clusters_are_enumerated():
    """All signs of all clusters, by brute force."""
    rng = np.random.default_rng(3)
    values = rng.standard_normal((9, 5)) + 0.5
    ids = np.array([0, 0, 1, 2, 2, 2, 3, 4, 5])
    sums = np.array([values[ids == c].sum(0) for c in range(6)])
    flips = np.array([np.array(s) @ sums for s in itertools.product((-1, 1), repeat=6)])
    expected = (np.abs(flips) >= np.abs(sums.sum(0)) - 1e-9).mean(0)
    np.testing.assert_allclose(sign_flip_pvalues(values, ids), expected)
    np.testing.assert_array_equal(
        sign_flip_pvalues(values, ids, seed=1), sign_flip_pvalues(values, ids, seed=2)
    )


def test_random_flips_estimate_the_enumeration(monkeypatch):
    values = np.random.default_rng(4).standard_normal((12, 40)) + 0.4
    exact = sign_flip_pvalues(values, np.arange(12))
    monkeypatch.setattr(statistics, "MAX_EXACT", 0)
    random = sign_flip_pvalues(values, np.arange(12), n_flips=20_000)
    assert np.abs(random - exact).max() < 0.02
    assert (random > 0).all()  # the observed signs count as one of them


def test_zeros_are_never_significant():
    for n in (5, 30):
        values = np.zeros((n, 3))
        values[:, 1] = 1 + np.random.default_rng(0).random(n)
        pvalues = sign_flip_pvalues(values, np.arange(n))
        assert pvalues[0] == pvalues[2] == 1 and pvalues[1] < 0.07


def test_prompts_of_one_item_flip_together():
    """Forty prompts of four items are four observations: no p-value is below 2 in 16."""
    values = np.ones((40, 1)) + 0.1 * np.random.default_rng(0).random((40, 1))
    assert sign_flip_pvalues(values, np.repeat(np.arange(4), 10))[0] == 2 / 16
    assert sign_flip_pvalues(values, np.arange(40))[0] < 0.001
    assert sign_flip_pvalues(values, np.zeros(40, int))[0] == 1


def test_ties_of_rounding_count():
    """Flips that give the observed sum again, but for rounding, are as extreme."""
    values = np.array([[0.1], [0.2], [-0.3], [0.3]])
    sums = [sum(s * v for s, v in zip(signs, values[:, 0], strict=True))
            for signs in itertools.product((1, -1), repeat=4)]  # fmt: skip
    expected = np.mean(np.round(np.abs(sums), 9) >= round(abs(values.sum()), 9))
    assert sign_flip_pvalues(values, np.arange(4))[0] == expected


def test_sign_and_scale_do_not_matter():
    values = np.random.default_rng(6).standard_normal((30, 6)) + 0.3
    pvalues = sign_flip_pvalues(values, np.arange(30))
    np.testing.assert_array_equal(sign_flip_pvalues(-1000 * values, np.arange(30)), pvalues)
    np.testing.assert_array_equal(sign_flip_pvalues(values, np.arange(30), seed=0), pvalues)
    assert (sign_flip_pvalues(values, np.arange(30), seed=1) != pvalues).any()


@pytest.mark.slow
def test_smallest_pvalue_can_be_reached():
    """One strong cell among many nulls is found at q / m: there are flips enough for it."""
    rng = np.random.default_rng(7)
    for n_cells in (1, 144, 2000):
        values = rng.standard_normal((40, n_cells))
        values[:, 0] += 5
        pvalues = sign_flip_pvalues(values, np.arange(40))
        assert pvalues[0] <= 0.05 / n_cells and adjust(pvalues)[0] <= 0.05
        assert sign_flip_pvalues(values, np.arange(40), smallest=1e-4)[0] <= 1e-4


# ------------------------------------------------------------------------- false discovery rate


def test_adjust():
    """Benjamini and Hochberg by their definition."""
    pvalues = np.array([0.01, 0.04, 0.03, 0.2, 1.0])
    order = np.sort(pvalues)
    for q in (0.04, 0.05, 0.07, 0.25):
        passing = [k for k in range(5) if order[k] <= q * (k + 1) / 5]
        bar = order[max(passing)] if passing else -1
        np.testing.assert_array_equal(adjust(pvalues) <= q, pvalues <= bar)


@pytest.mark.parametrize("shape", SHAPES)
def test_false_discovery_rate_holds(shape):
    """200 simulations of 60 cells of which 12 are real; all share a part of each prompt's noise."""
    rng = np.random.default_rng([1, SHAPES.index(shape)])
    real = np.arange(60) < 12
    false_share, power = [], []
    for seed in range(200):
        clusters = clusters_of(rng, 48, "clustered" if seed % 2 else "distinct")
        grouped = clusters if seed % 2 else None
        shared = draw(rng, 48, 1, "normal", grouped) - 1
        values = 0.8 * (draw(rng, 48, 60, "normal", grouped) - 1) + 0.6 * shared
        if shape == "skewed":  # symmetric under the null and of unequal size, as z-changes are
            values *= np.exp(0.5 * rng.standard_normal((48, 1)))
        values[:, real] += 1.0
        found = adjust(sign_flip_pvalues(values, clusters, seed=seed, n_flips=2000)) <= 0.05
        false_share.append((found & ~real).sum() / max(1, found.sum()))
        power.append(found[real].mean())
    assert np.mean(false_share) <= 0.05 and np.mean(power) > 0.7


def test_nothing_is_found_where_nothing_is():
    """With no real cell, any finding is false: it happens in at most q of all simulations."""
    rng = np.random.default_rng(8)
    any_found = []
    for seed in range(200):
        shared = rng.standard_normal((32, 1))
        values = 0.7 * rng.standard_normal((32, 40)) + 0.7 * shared
        pvalues = sign_flip_pvalues(values, np.arange(32), seed=seed, n_flips=2000)
        any_found.append((adjust(pvalues) <= 0.1).any())
    assert np.mean(any_found) <= 0.1 + 2 * np.sqrt(0.1 * 0.9 / 200)


def test_the_jackknife_covers_a_statistic_that_is_no_mean():
    """95 % intervals of a ratio of standard deviations, 60 prompts in 20 blocks, 400 times."""
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(400):
        a, b = rng.standard_normal((2, 60)) * [[2.0], [1.0]]
        block = np.arange(60) % 20

        def ratio(kept, a=a, b=b):
            return float(a[kept].std() / b[kept].std())

        value, lo, hi = jackknife(ratio(block >= 0), [ratio(block != i) for i in range(20)])
        assert lo < value < hi
        hits.append(lo <= 2 <= hi)
    assert 0.92 < np.mean(hits) < 0.98
    assert jackknife(1.0, [1.0, 1.0]) == (1.0, 1.0, 1.0)
