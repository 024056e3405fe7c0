"""Geometry: planted factors are found, distances are scipy's, ablation is what it says."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from conftest import KINDS, tiny_model
from scipy.linalg import subspace_angles
from scipy.spatial.distance import mahalanobis as of_scipy

import tv_interp as tv
from tv_interp.analysis.features import CONCRETE, N_BLOCKS, _States, measure_geometry
from tv_interp.analysis.geometry import (
    Subspace,
    ablate_subspaces,
    demix,
    ledoit_wolf,
    mahalanobis,
    random_subspace,
)
from tv_interp.analysis.vectors import extract_vectors, inject_vectors
from tv_interp.errors import ScoreError, TvInterpError
from tv_interp.prompts import make_prompts
from tv_interp.prompts.tasks import Task

PLAIN = Task.from_pairs({f"w{i}": f"w{i + 20} w{i + 30}" for i in range(20)})


@functools.cache
def planted_states(n: int = 4000, noise: float = 0.3, seed: int = 0):
    """Two factors of two and four levels on planted axes, an interaction, and noise of 40 dims."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((40, 6)))[0].T
    a, b = rng.integers(2, size=n), rng.choice(4, size=n, p=[0.1, 0.2, 0.3, 0.4])
    curve = np.array([[-1.5, 0.6], [-0.5, -0.6], [0.5, -0.6], [1.5, 0.6]])
    x = np.outer(2.0 * a - 1, axes[0]) + curve[b] @ axes[1:3]
    x += np.outer((2.0 * a - 1) * np.array([1, -1, 1, -1])[b] * 0.7, axes[3])
    # correlated noise, strongest along the mean of the factors' axes
    x += noise * rng.standard_normal((n, 40))
    x += np.outer(noise * rng.standard_normal(n), axes[0] + axes[4])
    return x, {"a": a, "b": b}, {"a": axes[:1], "b": axes[1:3], "a:b": axes[3:4]}


def angle(found: np.ndarray, planted: np.ndarray) -> float:
    return float(np.degrees(subspace_angles(found, planted.T).max()))


@pytest.mark.parametrize("noise", ["none", "pooled"])
def test_demixing_finds_planted_factors(noise):
    states, factors, axes = planted_states()
    found = demix(states, factors, noise=noise)
    for name, planted in axes.items():
        basis = found.encoders[name][:, : len(planted)]
        assert angle(basis, planted) < 5, name
        np.testing.assert_allclose(basis.T @ basis, np.eye(len(planted)), atol=1e-8)
    planted = {"a": 1.0, "b": 1.61, "a:b": 0.49}  # mean squares of what was planted
    expected = {name: size / 3.1 for name, size in planted.items()}
    assert found.shares == pytest.approx(expected, abs=0.03)
    assert sum(found.shares.values()) == pytest.approx(1)


def test_without_noise_the_components_are_those_of_the_published_formula():
    """U of the SVD of X_phi pinv(X) X, and D = U' X_phi pinv(X), as in dPCA 1.0.5 unregularized."""
    states, factors, _ = planted_states()
    found = demix(states, factors, noise="none", n_components=2)
    a, b = factors["a"], factors["b"]
    means = np.array([[states[(a == i) & (b == j)].mean(0) for j in range(4)] for i in range(2)])
    centred = means - means.mean((0, 1))
    X = centred.reshape(8, -1).T
    P = np.repeat(centred.mean(0)[None], 2, 0).reshape(8, -1).T
    C = P @ np.linalg.pinv(X, rcond=1e-8)
    U = np.linalg.svd(C @ X, full_matrices=False)[0][:, :2]
    np.testing.assert_allclose(abs(U.T @ found.encoders["b"]), np.eye(2), atol=1e-6)
    D = (U.T @ C).T
    signs = np.sign((U * found.encoders["b"]).sum(0))
    np.testing.assert_allclose(D * signs, found.decoders["b"], atol=1e-6)
    Z = X - np.outer(U[:, 0], D[:, 0] @ X)
    assert found.explained["b"][0] == pytest.approx(1 - (Z**2).sum() / (X**2).sum())


def test_a_decoder_reads_its_factor_and_not_the_other():
    states, factors, _ = planted_states()
    found = demix(states, factors)
    read = (states - found.mean) @ found.decoders["b"][:, 0]
    of_b = np.array([read[factors["b"] == j].mean() for j in range(4)]).std()
    gap = read[factors["a"] == 1].mean() - read[factors["a"] == 0].mean()
    assert of_b > 0.5 and abs(gap) < 0.1 * of_b


def test_demixing_refuses_what_it_cannot_split():
    states, factors, _ = planted_states()
    with pytest.raises(TvInterpError, match=r"expected two factors, got \['a'\]"):
        demix(states, {"a": factors["a"]})
    broken = np.where((factors["a"] == 1) & (factors["b"] == 2), 3, factors["b"])
    with pytest.raises(TvInterpError, match="no state with a 1 and b 2: every pair of levels has"):
        demix(states, {"a": factors["a"], "b": broken})


# ---------------------------------------------------------------------------------- distance


def test_distance_is_that_of_scipy_on_well_conditioned_data():
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((6, 6))
    classes = np.repeat(["a", "b", "c"], [80, 120, 100])
    states = (
        rng.standard_normal((300, 6)) @ mix
        + np.array([{"a": 0, "b": 1, "c": -2}[c] for c in classes])[:, None]
    )
    means = {c: states[classes == c].mean(0) for c in "abc"}
    within = states - np.array([means[c] for c in classes])
    inverse = np.linalg.inv(within.T @ within / (300 - 3))
    pairs = [of_scipy(means[p], means[q], inverse) for p, q in ("ab", "ac", "bc")]
    assert mahalanobis(states, classes, shrinkage=0) == pytest.approx(np.mean(pairs))
    assert mahalanobis(states @ mix, classes, shrinkage=0) == pytest.approx(np.mean(pairs))
    whole = mahalanobis(states, classes, shrinkage=1)
    euclid = [np.linalg.norm(means[p] - means[q]) for p, q in ("ab", "ac", "bc")]
    size = np.sqrt(np.trace(within.T @ within / 297) / 6)
    assert whole == pytest.approx(np.mean(euclid) / size)


def test_the_shrinkage_is_near_the_one_that_is_nearest_to_the_true_covariance():
    rng = np.random.default_rng(1)
    truth = np.diag(np.linspace(0.2, 3, 20))
    grid = np.linspace(0, 1, 101)
    for n in (40, 100, 400):
        chosen, errors = [], np.zeros(101)
        for _ in range(60):
            x = rng.standard_normal((n, 20)) @ np.sqrt(truth)
            S = x.T @ x / n
            target = np.trace(S) / 20 * np.eye(20)
            errors += [(((1 - s) * S + s * target - truth) ** 2).sum() for s in grid]
            chosen.append(ledoit_wolf(x))
        assert np.mean(chosen) == pytest.approx(grid[errors.argmin()], abs=0.06), n


def test_too_few_states_for_a_covariance_are_refused():
    states = np.random.default_rng(0).standard_normal((12, 20))
    classes = [0, 1] * 6
    assert mahalanobis(states, classes) > 0
    with pytest.raises(
        ScoreError, match="12 states in 2 classes are too few for a covariance of 2"
    ):
        mahalanobis(states, classes, shrinkage=0)
    with pytest.raises(ScoreError, match="2 states in 2 classes are too few"):
        mahalanobis(states[:2], [0, 1])
    with pytest.raises(ScoreError, match="expected two classes or more, got 1"):
        mahalanobis(states, [0] * 12)
    with pytest.raises(ScoreError, match="expected a shrinkage from 0 to 1 or 'auto', got 2"):
        mahalanobis(states, classes, shrinkage=2)


# ---------------------------------------------------------------------------------- ablation


def space(mean: np.ndarray, rank: int, seed: int = 0) -> Subspace:
    rng = np.random.default_rng(seed)
    d = mean.shape[1]
    bases = tuple(np.linalg.qr(rng.standard_normal((d, rank)))[0] for _ in mean)
    return Subspace(bases, tuple(np.ones(rank) for _ in mean), mean)


def test_random_subspaces_match_in_rank_or_in_removed_variance():
    rng = np.random.default_rng(0)
    states = rng.standard_normal((200, 3, 24)) * np.linspace(0.1, 3, 24)
    top = [np.linalg.svd(states[:, la] - states[:, la].mean(0))[2][:2].T for la in range(3)]
    like = Subspace(tuple(top), (np.ones(2),) * 3, states.mean(0))
    same_rank = random_subspace(like, states, match="rank")
    assert [b.shape for b in same_rank.bases] == [(24, 2)] * 3
    assert (same_rank.removed(states) < 0.6 * like.removed(states)).all()
    same_variance = random_subspace(like, states, match="variance", seed=4)
    np.testing.assert_allclose(same_variance.removed(states), like.removed(states), rtol=1e-6)
    assert all(b.shape[1] > 2 for b in same_variance.bases)
    with pytest.raises(TvInterpError, match="expected match='rank' or match='variance'"):
        random_subspace(like, states, match="size")


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("kind", KINDS)
def test_taking_out_everything_is_putting_the_mean_in(arch, kind):
    model = tiny_model(arch, kind)
    prompts = make_prompts(model, PLAIN, n_demos=3, n_prompts=4, seed=1, template="{x} -> {y} :\n")
    vectors = extract_vectors(model, prompts)
    mean = vectors.data.values.astype(float).mean((0, 2))
    d = mean.shape[1]
    nothing = Subspace((np.zeros((d, 1)),) * 3, (np.ones(1),) * 3, mean)
    spaces = {"everything": space(mean, d), "nothing": nothing, "some": space(mean, 5)}
    scores = ablate_subspaces(model, prompts, spaces, metric="logit_diff")
    plain = scores.data.sel(site="none").values
    np.testing.assert_allclose(scores.data.sel(site="nothing").values, plain, atol=1e-6)
    whole = vectors.pos_avg().trial_avg()
    for start in range(3):
        expected = inject_vectors(
            model, prompts, whole, layers=range(start, 3), how="joint", metric="logit_diff"
        ).data.values[:, 0]
        found = scores.data.sel(layer=start, site="everything").values
        np.testing.assert_allclose(found, expected, atol=2e-5)
    each = ablate_subspaces(model, prompts, spaces, layers="each", metric="logit_diff")
    expected = inject_vectors(model, prompts, whole, metric="logit_diff").data.values
    np.testing.assert_allclose(each.data.sel(site="everything").values, expected, atol=2e-5)
    some = scores.data.sel(site="some").values
    assert np.abs(some - plain)[:, :2].max() > 1e-3  # the last block's answers reach nothing
    np.testing.assert_allclose(some[:, 2], plain[:, 2], atol=1e-5)


def test_bad_ablations_are_refused():
    model = tiny_model("llama", KINDS[0])
    prompts = make_prompts(model, PLAIN, n_demos=2, n_prompts=2, template="{x} -> {y} :\n")
    with pytest.raises(
        TvInterpError, match="has 3 layers of d_model 64, .* has 3 of 60: fit it on"
    ):
        ablate_subspaces(model, prompts, {"other": space(np.zeros((3, 64)), 2)})
    with pytest.raises(TvInterpError, match="expected layers='each' or 'from', got 'all'"):
        ablate_subspaces(model, prompts, {}, layers="all")
    with pytest.raises(TvInterpError, match="expected a task of simple-string, .*, got 'lookup'"):
        measure_geometry(model, "lookup")


# ---------------------------------------------------------------------------------- features


@functools.cache
def measured(task: str):
    return measure_geometry(tv.load_model("reference"), task, n_prompts=12)


EACH_TASK = [
    pytest.param(name, marks=() if name == "country-capital" else pytest.mark.slow)
    for name in CONCRETE
]


@pytest.mark.parametrize("task", EACH_TASK)
def test_the_question_is_asked_on_three_tasks_of_each_family(task):
    found = measured(task)
    concrete = CONCRETE[task][0]
    abstract = "label" if tv.get_task(task).family == "categorization" else "relation"
    np.testing.assert_allclose(found.shares.sum("factor"), 1)
    names = [abstract, concrete]
    assert list(found.shares["factor"].values) == [*names, ":".join(names)]
    assert (found.distance > 0).all() and found.blocks.sizes["part"] == N_BLOCKS
    controls = [f"{name}, shuffled" for name in names]
    extra = ["label, random answers"] if abstract == "label" else []
    assert list(found.distance["factor"].values) == [*names, *controls, *extra]
    last = found.distance.isel(layer=-1)
    for name in names:  # the factors are there, and shuffled ones are not
        assert last.sel(factor=name) > 1.5 * last.sel(factor=f"{name}, shuffled")
    sites = list(found.ablated.data["site"].values)
    assert sites[:4] == ["none", *names, "both"] and len(sites) == 8
    assert max(map(len, str(found).splitlines())) <= 80
    plain = found.ablated.data.sel(site="none")
    assert (plain == plain.isel(layer=0)).all() and float(plain.mean()) > 0.6


def test_a_relation_is_told_by_the_pair_where_its_answers_do_not_tell_it():
    """A neighbour's capital is a capital too, and inputs are the same: only the pair tells."""
    found = measured("country-capital")
    assert found.settings["abstract"] == "relation" and found.ablated.attrs["metric"] == "choice"
    ours, theirs = tv.get_task("country-capital"), tv.get_task("country-neighbour-capital")
    assert set(theirs.answers) <= set(ours.answers) and ours.partner == theirs.name
    value, lo, hi = found.interval(lambda table: float(table.sel(factor="relation")[-1]))
    assert 2 < lo < value == float(found.distance.sel(factor="relation")[-1]) < hi


def test_states_of_twins_are_joined_prompt_by_prompt_and_levels_are_those_of_inputs():
    model = tv.load_model("reference")
    prompts = make_prompts(model, "number-next", n_demos=3, n_prompts=4)
    contrast = prompts.corrupt("task")
    level = CONCRETE["number-next"][1]
    ours, theirs = (
        _States.at_answers(model, p, level, name)
        for p, name in ((contrast.clean, "next"), (contrast.corrupted, "previous"))
    )
    held = ours.and_(theirs)
    assert held.abstract == ["next"] * 12 + ["previous"] * 12
    assert held.row.tolist() == np.tile(np.repeat(range(4), 3), 2).tolist()
    expected = [int(x) // 20 for demos in contrast.clean.demos for x, _ in demos]
    assert held.concrete == expected * 2
    vectors = extract_vectors(model, contrast.corrupted).data.values
    np.testing.assert_array_equal(held.states[12 + 3 * 2 + 1], vectors[2, :, 1])
    digit = make_prompts(model, "digit", n_demos=3, n_prompts=4)
    labels = _States.at_answers(model, digit, CONCRETE["digit"][1], None).abstract
    assert labels == [y for demos in digit.demos for _, y in demos]
