"""Linear transformers: formulas against enumeration of all masks and against the model itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tv_interp.analysis.one_vector import effective_rank
from tv_interp.errors import TrainingError, TvInterpError, UnknownName
from tv_interp.theory import closed_forms as forms
from tv_interp.theory.critical import perturb, squared_gradient
from tv_interp.theory.experiments import inseparable_model
from tv_interp.theory.families import (
    distance_to_family,
    distance_to_identity,
    make_positions,
    project_positions,
    read_arrows,
)
from tv_interp.theory.injection import (
    bijection_accuracy,
    draw_maps,
    implied_map,
    inject,
    injection_errors,
    task_vectors,
)
from tv_interp.theory.ladder import LADDER, Climber, attend, find_rung, run
from tv_interp.theory.linear import (
    Dropout,
    Layer,
    Layout,
    LinearTransformer,
    draw_masks,
    estimate_risk,
    make_columns,
    one_step_model,
    predict,
    sample_inputs,
    sample_tasks,
    scalar_layer,
)
from tv_interp.theory.redundancy import minimise_redundancy, rank_one_residual_found
from tv_interp.theory.saliency import token_saliency
from tv_interp.theory.training import (
    Schedule,
    minimise,
    mix_of,
    train_population,
    train_positions,
    train_weights,
    two_layers,
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(model: LinearTransformer, columns: torch.Tensor) -> torch.Tensor:
    """Equations 1, 2, 5 and 6, token by token, for one prompt."""
    z, d, width = columns.clone(), model.d, columns.shape[-1]
    for layer in model.layers:
        after = z.clone()
        for dest, src in itertools.product(range(width), range(width - 1)):
            score = z[:, src] @ layer.q @ z[:, dest] + layer.d[src, dest]
            after[:, dest] += layer.v @ z[:, src] * score / model.layout.n
        z = after
    return z[d:, -1]


# ----------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("kind", ["single", "pair", "triplet", "inseparable"])
def test_the_model_is_the_papers_equations_token_by_token(kind):
    layout, d = Layout(kind, 3), 2
    layers = tuple(
        Layer(
            randn(4, 4, seed=i), randn(4, 4, seed=i + 9), randn(layout.width, layout.width, seed=i)
        )
        for i in range(3)
    )
    model = LinearTransformer(layout, layers)
    columns = make_columns(layout, randn(2, d, 3), randn(2, d, 3, seed=1), randn(2, d, seed=2))
    for out, prompt in zip(predict(model, columns), columns, strict=True):
        torch.testing.assert_close(out, naive(model, prompt), rtol=1e-10, atol=1e-10)


def test_absent_weights_are_zero_weights():
    layout, d = Layout("pair", 2), 2
    v, d_, zero = randn(4, 4), randn(6, 6, seed=1), torch.zeros(4, 4, dtype=torch.float64)
    columns = make_columns(layout, randn(3, d, 2), randn(3, d, 2), randn(3, d))
    for lean, full in (
        (Layer(v, None, d_), Layer(v, zero, d_)),
        (Layer(v, randn(4, 4)), Layer(v, randn(4, 4), torch.zeros(6, 6, dtype=torch.float64))),
        (Layer(v), Layer(v, zero, torch.zeros(6, 6, dtype=torch.float64))),
    ):
        ours, theirs = (
            predict(LinearTransformer(layout, (each, each)), columns) for each in (lean, full)
        )
        torch.testing.assert_close(ours, theirs)


def test_layouts_say_where_tokens_stand():
    triplet = Layout("triplet", 2)
    assert triplet.names == ("x1", "→1", "y1", "x2", "→2", "y2", "x?", "→?", "end")
    assert triplet.arrow.tolist() == [1, 4, 7] and triplet.slots.tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert Layout("single", 2).names == ("xy1", "xy2", "x?")
    assert len(Layout("pair", 5).slots) == 10
    columns = make_columns(Layout("inseparable", 1), randn(1, 2, 1), randn(1, 2, 1), randn(1, 2))
    assert not columns[:, :2].any() and columns[:, 2:, :3].all()


def test_stand_ins_for_gaussian_tasks_have_its_second_moments():
    w = sample_tasks(40_000, 3, torch.Generator().manual_seed(0), "orthogonal").flatten(1)
    moments = w.T @ w / len(w)
    torch.testing.assert_close(moments, torch.eye(9, dtype=torch.float64), rtol=0, atol=0.04)


def test_the_risk_is_the_same_for_identity_and_gaussian_tasks():
    model = LinearTransformer(
        Layout("pair", 3),
        (
            scalar_layer(2, a=0.7, b=0.4, c=-0.3, positions=randn(8, 8)),
            scalar_layer(2, a=0.0, b=-0.2, c=1.0),
        ),
    )
    risks = [
        estimate_risk(model, 100_000, seed=0, tasks=tasks)
        for tasks in ("identity", "gaussian", "orthogonal")
    ]
    for value, error in risks[1:]:
        assert abs(value - risks[0][0]) < 4 * np.hypot(error, risks[0][1])


def test_dropped_tokens_are_never_the_query_or_the_end_and_stay_as_often_as_asked():
    layout = Layout("triplet", 4)
    masks = draw_masks(layout, 4000, 0.7, torch.Generator().manual_seed(0))[:, 0]
    assert masks[:, [layout.query, layout.end]].all()
    torch.testing.assert_close(
        masks[:, layout.slots].mean(), torch.tensor(0.7).double(), atol=0.01, rtol=0
    )


# ------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("n, d", [(5, 4), (8, 4), (3, 2)])
def test_one_layer_has_the_risk_of_the_formula_and_no_rate_beats_it(n, d):
    rate, best = forms.one_step_rate(n, d), forms.one_step_risk(n, d)
    eye = torch.eye(n, dtype=torch.float64)
    assert float(forms.mixing_risk(eye, rate / n, d)) == pytest.approx(best)
    assert all(float(forms.mixing_risk(eye, rate * s / n, d)) > best for s in (0.9, 1.1))
    value, error = estimate_risk(one_step_model(Layout("single", n), d, rate), 60_000, seed=0)
    assert abs(value - best) < 4 * error


def test_inseparable_pairs_reach_the_same_risk_by_construction():
    value, error = estimate_risk(inseparable_model(6, 3), 60_000, seed=1, tasks="gaussian")
    assert abs(value - forms.one_step_risk(6, 3)) < 4 * error


def expectation(u, v, d, keep, where):
    """Average the risk's two moments over every mask, one after the other."""
    n, tokens = u.shape
    width = tokens + (2 * n if where == "pre" else 0)
    trace, square = 0.0, 0.0
    for bits in itertools.product((0, 1), repeat=width):
        o = torch.tensor(bits, dtype=torch.float64)
        weight = keep ** sum(bits) * (1 - keep) ** (width - sum(bits))
        k = u * o[:tokens] @ v.T
        if where == "pre":
            k = o[tokens : tokens + n, None] * k * o[tokens + n :]
        trace += weight * float(k.trace())
        square += weight * float(k.trace() ** 2 + (k * k.T).sum() + d * k.square().sum())
    return trace, square


@pytest.mark.parametrize("where", ["post", "pre"])
@pytest.mark.parametrize("n, tokens, d, keep", [(2, 5, 3, 0.8), (3, 4, 4, 0.35)])
def test_dropout_moments_equal_enumeration_of_all_masks(where, n, tokens, d, keep):
    u, v = randn(n, tokens), randn(n, tokens, seed=1)
    ours = forms.mixing_moments(u, v, d, Dropout(keep, where))
    expected = expectation(u, v, d, keep, where)
    assert [float(m) for m in ours] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n, d, keep", [(2, 3, 0.8), (3, 4, 0.5)])
def test_the_corrected_constants_of_proposition_5_equal_enumeration_and_the_printed_do_not(
    n, d, keep
):
    """The order-four term c Y O1y M O2 M^T O1x X^T of Appendix D.6, over all masks."""
    m, total = randn(n, n), 0.0
    for bits in itertools.product((0, 1), repeat=3 * n):
        o1, o2, o3 = torch.tensor(bits, dtype=torch.float64).reshape(3, n)
        k = o1[:, None] * (m * o2 @ m.T) * o3
        weight = keep ** sum(bits) * (1 - keep) ** (3 * n - sum(bits))
        total += weight * float(k.trace() ** 2 + (k * k.T).sum() + d * k.square().sum())
    whole = keep**6 * float(m.square().sum()) ** 2
    corrected = float(forms.redundancy_objective(m, keep, d))
    printed = float(forms.redundancy_objective(m, keep, d, constants="printed"))
    assert whole + corrected == pytest.approx(total, rel=1e-12)
    assert abs(whole + printed - total) > 0.01 * total


@pytest.mark.parametrize("where", ["post", "pre"])
def test_dropout_risk_equals_the_model_with_dropped_tokens(where):
    layout, d = Layout("triplet", 3), 2
    positions = randn(layout.width, layout.width) * 2
    positions[:, layout.query] = 0  # the families of the closed form
    positions[:, layout.end] = 0
    positions[layout.query] = 0
    positions[layout.query, layout.end] = layout.n
    model = two_layers(layout, d, positions, -0.3)
    x, y = mix_of(model)
    dropped = Dropout(0.7, where)
    expected = forms.dropout_risk(forms.mixing_moments(y, x, d, dropped), d, -0.3 / layout.n)
    value, error = estimate_risk(model, 200_000, seed=0, dropout=dropped)
    assert abs(value - float(expected)) < 4 * error


def test_a_tight_frame_reaches_the_best_risk_under_dropout_and_nothing_found_beats_it():
    n, d, keep = 3, 3, 0.7
    for kind in ("pair", "triplet"):
        layout = Layout(kind, n)
        best = forms.best_dropout_risk(n, d, keep, len(layout.slots))
        losses = train_population(
            layout, d, Schedule(steps=800, rate=2e-2), seed=0, dropout=Dropout(keep)
        ).losses
        assert best - 1e-9 < losses[-1] < best + 1e-5


def test_more_tokens_help_only_under_dropout():
    assert forms.best_dropout_risk(8, 4, 0.8, 25) < forms.best_dropout_risk(8, 4, 0.8, 16)
    for tokens in (16, 25):
        assert forms.best_dropout_risk(8, 4, 1.0, tokens) == pytest.approx(
            forms.one_step_risk(8, 4)
        )


def test_the_risk_of_appendix_d5():
    n, d, a, b, m = 3, 2, -0.1, -0.05, randn(3, 4)
    t1, t2 = float(m.square().sum()), float((m @ m.T).square().sum())
    expected = (
        a**2 * n * (n + 1 + d) + 1 + 2 * a * n + (2 * a * b * (n + 1 + d) + 2 * b) * t1
        + b**2 * t1**2 + b**2 * (1 + d) * t2
    )  # fmt: skip
    assert forms.one_step_risk_of_arrows(m, a, b, d) == pytest.approx(d * expected)


def test_no_rank_one_map_does_better_than_one_minus_cosine():
    rng = np.random.default_rng(0)
    for _ in range(3):
        x, y = rng.normal(size=(2, 4))
        x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
        formula = forms.rank_one_residual(torch.tensor(x), torch.tensor(y))
        assert rank_one_residual_found(x, y) == pytest.approx(formula, abs=1e-6)
    assert forms.rank_one_residual(torch.tensor(x), torch.tensor(-x)) == pytest.approx(0)


# ---------------------------------------------------------------------------------------- families


def member(layout: Layout) -> torch.Tensor:
    k = layout.stride
    arrows = randn(layout.n + 1, layout.n + 1, seed=3) if layout.kind == "triplet" else None
    return make_positions(
        layout, demo=randn(k, k), query=randn(k, k, seed=1), centre=0.5, arrows=arrows,
        alpha=(0.8, -1.7),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["pair", "triplet", "inseparable"])
def test_members_of_the_predicted_family_are_at_distance_0_and_others_are_not(kind):
    layout = Layout(kind, 3)
    positions = member(layout)
    assert distance_to_family(positions, layout) < 1e-12
    moved = positions.clone()
    moved[layout.x[0], layout.y[1]] += 1
    assert distance_to_family(moved, layout) > 0.05
    projected = project_positions(moved, layout)
    assert distance_to_family(projected, layout) < 1e-12
    # rows of empty tokens count for nothing
    moved = positions.clone()
    moved[layout.end] += 5
    assert distance_to_family(moved, layout) < 1e-12


def test_the_projection_is_the_nearest_member():
    layout = Layout("triplet", 2)
    given = randn(layout.width, layout.width)
    best = distance_to_family(given, layout) * given[[0, 2, 3, 5, 6]].norm()
    for seed in range(5):
        step = 0.05 * randn(3, 3, seed=seed)
        arrows = read_arrows(given, layout)
        other = project_positions(given, layout) + make_positions(layout, demo=step, query=step)
        other = other + make_positions(
            layout, demo=0 * step, query=0 * step, arrows=0.05 * randn(3, 3, seed=seed),
            alpha=arrows.alpha,
        )  # fmt: skip
        assert float((other - given)[[0, 2, 3, 5, 6]].norm()) > best


def test_task_vectors_are_read_from_positions():
    layout, weights = Layout("triplet", 3), randn(4, 4)
    alpha = (0.6, 0.8)
    zero = torch.zeros(3, 3, dtype=torch.float64)
    arrows = read_arrows(
        make_positions(layout, demo=zero, query=zero, arrows=weights, alpha=alpha), layout
    )
    torch.testing.assert_close(arrows.weights, weights)
    assert arrows.alpha == pytest.approx(alpha) and arrows.cosine == pytest.approx(1)
    orthogonal = torch.linalg.qr(randn(4, 4)).Q
    orthogonal[-1] = 0
    arrows = read_arrows(
        make_positions(layout, demo=zero, query=zero, arrows=orthogonal, alpha=alpha), layout
    )
    assert arrows.gram_off_diagonal < 1e-12 and arrows.last_row < 1e-12


def test_distance_to_multiples_of_the_identity():
    assert distance_to_identity(-3 * torch.eye(4)) == 0
    assert distance_to_identity(torch.tensor([[1.0, 0], [0, -1.0]])) == pytest.approx(1)


def test_the_squared_gradient_is_that_of_a_known_gradient():
    """One step of gradient descent: 0 at the best rate, known elsewhere."""
    n, d = 4, 2
    layout = Layout("single", n)
    best = squared_gradient(one_step_model(layout, d, forms.one_step_rate(n, d)), 200_000, seed=0)
    assert abs(best.value) < 4 * best.error
    # d risk/d by b I and c I: the blocks B and C are each d entries of it
    rate, step = -1.0, 1e-4
    eye = torch.eye(n, dtype=torch.float64)
    slope = [forms.mixing_risk(eye, (rate + s) / n, d) for s in (step, -step)]
    slope = float(slope[0] - slope[1]) / (2 * step)
    expected = d * (slope / d) ** 2 * (1 + rate**2)
    found = squared_gradient(one_step_model(layout, d, rate), 200_000, seed=0)
    assert found.value == pytest.approx(expected, abs=4 * found.error)


def test_a_perturbation_has_the_size_that_was_asked():
    model = two_layers(Layout("pair", 2), 2, randn(6, 6), -0.5)
    moved = perturb(model, 0.05, seed=0)
    for before, after in zip(model.layers, moved.layers, strict=True):
        change = after.v[2:, 2:] - before.v[2:, 2:]
        assert float(change.norm() / before.v[2:, 2:].norm()) == pytest.approx(0.05)
        assert not after.v[2:, :2].any()
    change = moved.layers[0].d - model.layers[0].d
    assert float(change.norm() / model.layers[0].d.norm()) == pytest.approx(0.05)


# --------------------------------------------------------------------------------------- injection


def exact_model(n: int = 6, d: int = 4) -> LinearTransformer:
    """A member of S_P written by hand, with orthonormal arrows."""
    layout = Layout("triplet", n)
    arrows = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    arrows[:n] = torch.linalg.qr(randn(n + 1, n + 1)).Q[:n]
    demo = torch.tensor([[0.0, 0, 1], [0, 0, 0], [1, 0, 0]], dtype=torch.float64)
    query = torch.tensor([[0.0, 0, 1], [0, 0, 0], [0, 0, 0]], dtype=torch.float64)
    positions = n * make_positions(layout, demo=demo, query=query, arrows=arrows)
    return two_layers(layout, d, positions, forms.one_step_rate(n, d) / 3)


def test_one_vector_is_the_outer_product_of_its_halves():
    model = exact_model()
    x, query = sample_inputs(5, 4, 6, torch.Generator().manual_seed(0))
    w = randn(5, 4, 4)
    z = task_vectors(model, x, w @ x)[..., -1:]
    torch.testing.assert_close(z.norm(dim=1), torch.ones(5, 1, dtype=torch.float64))
    maps = implied_map(lambda q: inject(model, z, q), query)
    outer = z[:, 4:] @ z[:, :4].mT
    ratio = (maps / outer).flatten(1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand(-1, 16))
    assert (ratio[:, 0] > 0).all()
    assert effective_rank(maps).max() < 1.0001


def test_the_vector_is_the_arrow_of_the_running_model():
    """Injected into a prompt without demonstrations whose arrow it overwrites, by hand."""
    model = exact_model(n=3)
    x, query = sample_inputs(2, 4, 3, torch.Generator().manual_seed(0))
    z = task_vectors(model, x, x)[..., -1:]
    rows = slice(9, 12)
    short = [Layer(m.v, m.q, None if m.d is None else m.d[rows, rows]) for m in model.layers]
    columns = torch.zeros(2, 8, 3, dtype=torch.float64)
    columns[:, :4, 0] = query
    first = columns[..., :-1] @ short[0].d[:-1] / 3
    columns = columns + short[0].v @ first
    columns[..., 1] = z[..., 0]
    scores = columns[..., :-1].mT @ short[1].q @ columns[..., -1:]
    by_hand = (short[1].v @ (columns[..., :-1] @ scores) / 3)[:, 4:, 0] + columns[:, 4:, -1]
    torch.testing.assert_close(inject(model, z, query), by_hand)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_errors_meet_their_floors_on_the_exact_construction(rank):
    model = exact_model()
    fit = injection_errors(model, rank, vectors=(1, 2), n_tasks=400)
    assert float(fit.mean().sel(part="1 vector")) == pytest.approx(
        forms.rank_floor(rank, 4), abs=1e-9
    )
    assert float(fit.mean().sel(part="2 vectors")) >= forms.residual_floor(2, rank, 4) - 1e-9
    for measure in ("columns", "readout"):
        found = injection_errors(model, rank, vectors=(1, 2, 4), n_tasks=50, measure=measure)
        for k in (1, 2, 4):
            part = f"{k} vector" + "s" * (k > 1)
            floor = forms.residual_floor(k, rank, 4)
            assert float(found.mean().sel(part=part)) == pytest.approx(floor, abs=1e-6)


def test_drawn_maps_have_equal_singular_values_and_their_row_space():
    w, basis = draw_maps(10, 4, 2, torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(w)
    torch.testing.assert_close(values[:, :2], torch.ones(10, 2, dtype=torch.float64))
    assert values[:, 2:].max() < 1e-12
    torch.testing.assert_close(w @ basis @ basis.mT, w)


def test_one_vector_fails_on_bijections_alone():
    model = exact_model(n=8)
    settings = {"n_tasks": 1000, "vectors": (1, 8)}
    both = bijection_accuracy(model, "both ways", **settings).mean()
    assert float(both.sel(part="1 vector")) == pytest.approx(0.5, abs=0.06)
    assert float(both.sel(part="8 vectors")) > 0.97 and float(both.sel(part="in context")) > 0.97
    signed = bijection_accuracy(model, "both ways", scorer="signed", **settings).mean()
    assert float(signed.sel(part="1 vector")) == pytest.approx(0.75, abs=0.06)
    for task in ("x to y", "y to x", "copy", "negate"):
        assert bijection_accuracy(model, task, **settings).mean().min() == 1


def test_results_are_scores_with_intervals():
    scores = injection_errors(exact_model(), 3, n_tasks=60, vectors=(1,))
    table = scores.ci()
    assert scores.data.dims == ("prompt", "part") and scores.attrs["rank"] == 3
    assert (table["lo"] <= table["value"]).all() and (table["value"] <= table["hi"]).all()


# ------------------------------------------------------------------------------------- the ladder


def test_the_first_rung_is_the_linear_transformer():
    n, d = 3, 2
    layout = Layout("triplet", n)
    a, b, c = randn(3, 2, 1)
    positions = randn(2, 1, layout.width, layout.width)
    rung = Climber(LADDER[0], layout, d, a, b, c, positions)
    layers = tuple(
        scalar_layer(d, a=a[i, 0], b=b[i, 0], c=c[i, 0], positions=n * positions[i, 0])
        for i in range(2)
    )
    columns = make_columns(layout, randn(4, d, n), randn(4, d, n, seed=1), randn(4, d, seed=2))
    torch.testing.assert_close(
        run(rung, columns), predict(LinearTransformer(layout, layers), columns)
    )


def test_rungs_do_what_their_names_say():
    n, d = 3, 2
    layout = Layout("triplet", n)
    columns = make_columns(layout, randn(2, d, n), randn(2, d, n, seed=1), randn(2, d, seed=2))

    def first(name: str, given: torch.Tensor) -> torch.Tensor:
        rung = find_rung(name)
        shape = (2, rung.heads)
        positions = randn(*shape, layout.width, layout.width)
        one = torch.ones(*shape, dtype=torch.float64)
        return attend(Climber(rung, layout, d, one, one, one, positions), given, 0)

    later = columns.clone()
    later[..., 5] += 1
    for rung in LADDER:
        moved = (first(rung.name, later) - first(rung.name, columns))[..., :5].abs().max()
        assert (moved > 1e-6) == (rung.mask == "none"), rung.name
    equal = torch.ones_like(columns)
    assert torch.allclose(first("+ softmax", equal), equal + 1)  # weights sum to 1
    assert torch.allclose(first("+ LayerNorm", 7 * columns) - 7 * columns,
                          first("+ LayerNorm", columns) - columns, atol=1e-3)  # fmt: skip


# --------------------------------------------------------------------------------------- training


def test_the_same_seed_gives_the_same_model_and_the_global_state_is_left_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = (
        train_positions(Layout("triplet", 2), 2, Schedule(steps=20), seed=3).losses
        for _ in range(2)
    )
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)


def test_saliency_is_zero_where_the_model_does_not_look():
    found = token_saliency(exact_model(), n_prompts=50, seed=0)
    assert (
        found.sel(layer=1, src="x1", dest="y2") == 0 and found.sel(layer=1, src="x1", dest="y1") > 0
    )
    assert (found.sel(src="end") == 0).all() and (
        found.sel(layer=2).drop_sel(dest="end") == 0
    ).all()


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Layout("pair", 0), "expected n of 1 demonstration or more, got 0"),
        (lambda: Layout("pairs", 2), "unknown prompt format 'pairs': did you mean 'pair'"),
        (lambda: LinearTransformer(Layout("pair", 1), ()), "expected L of 1 layer or more, got 0"),
        (
            lambda: train_weights(Layout("pair", 2), 0, 2, Schedule(), seed=0),
            "expected L of 1 layer or more, got 0",
        ),
        (lambda: Dropout(0.0), r"expected a keep probability in \(0, 1\], got 0.0"),
        (lambda: Dropout(1.2), r"expected a keep probability in \(0, 1\], got 1.2"),
        (lambda: Dropout(0.5, "before"), "unknown place of dropout 'before'"),
        (lambda: forms.best_dropout_risk(8, 4, 0, 3), "expected a keep probability"),
        (lambda: minimise_redundancy(4, -1, 4), "expected a keep probability"),
        (lambda: minimise_redundancy(0, 0.5, 4), "expected n of 1 demonstration or more, got 0"),
        (lambda: minimise_redundancy(2, 0.5, 4, mask="upper"), "unknown mask 'upper'"),
        (lambda: forms.redundancy_coefficients(0.5, 4, constants="p"), "unknown set of constants"),
        (lambda: forms.rank_floor(5, 4), "expected a rank from 1 to the dimension 4, got 5"),
        (lambda: injection_errors(exact_model(), 5), "expected a rank from 1 to the dimension 4"),
        (lambda: injection_errors(exact_model(), 2, vectors=(9,)), "expected 1 to 7 vectors"),
        (lambda: injection_errors(exact_model(), 2, inputs="all"), "unknown inputs 'all'"),
        (lambda: bijection_accuracy(exact_model(), "both"), "did you mean 'both ways'"),
        (lambda: read_arrows(randn(6, 6), Layout("pair", 2)), "expected a triplet layout"),
        (lambda: project_positions(randn(3, 3), Layout("single", 2)), "got 'single'"),
        (lambda: Schedule(steps=0), "expected steps of 1 or more, got 0"),
        (lambda: find_rung("softmax"), r"did you mean '\+ softmax'"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(TvInterpError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_vectors_need_arrows():
    with pytest.raises(TvInterpError, match="only arrows hold task vectors"):
        task_vectors(one_step_model(Layout("single", 2), 2, 0.1), randn(1, 2, 2), randn(1, 2, 2))


def test_divergence_says_the_step_and_the_last_finite_loss():
    with pytest.raises(TrainingError, match=r"diverged at step \d+; the last finite loss was \d"):
        train_positions(
            Layout("triplet", 4), 3, Schedule(steps=200, rate=1e80, warm_up=1, clip=1e300), seed=0
        )
    at = torch.tensor(0.0, requires_grad=True)
    with pytest.raises(TrainingError, match="diverged at step 0; the last finite loss was none"):
        minimise(lambda: at / 0 * 0, {"at": at}, Schedule(steps=3))


def test_an_unknown_preset_is_refused():
    from tv_interp.theory.experiments import run_linear

    with pytest.raises(UnknownName, match="unknown preset 'fast'"):
        run_linear("fast")
