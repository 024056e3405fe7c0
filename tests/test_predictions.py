"""Predictions of 2506.09048: what is measured equals what models written by hand must give."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import KINDS, precise, tiny_model

import tv_interp as tv
from tv_interp.analysis import one_vector as one_module
from tv_interp.analysis.find import split_prompts
from tv_interp.analysis.many_vectors import (
    combine_demonstrations,
    fit_weights,
    inject_many_vectors,
    leave_one_out,
)
from tv_interp.analysis.one_vector import (
    OneVector,
    compare_bijection,
    difference,
    effective_rank,
    implied_maps,
    implied_ranks,
    inject_into_union,
    inject_one_vector,
    take_vectors,
)
from tv_interp.analysis.predictions import Predictions, _Asked, check_predictions
from tv_interp.analysis.vectors import inject_vectors
from tv_interp.cli import main
from tv_interp.errors import PromptError, TvInterpError, UnknownName
from tv_interp.models import planted
from tv_interp.models.adapter import Adapter
from tv_interp.prompts import Task, make_prompts
from tv_interp.prompts.tasks.base import RuledSample
from tv_interp.prompts.tasks.bijection import Union
from tv_interp.scores import Scores

SAME = {word: word for word in planted.FILLERS}


class Majority(Task):
    """The answer is the filler that most demonstrations have: one of them can mislead."""

    name, family = "majority", "user"

    @property
    def answers(self):
        return planted.FILLERS

    def sample(self, rng, n_demos):
        inputs = [str(x) for x in rng.permutation(planted.INPUTS)[: n_demos + 1]]
        often, seldom = (str(y) for y in rng.permutation(planted.FILLERS)[:2])
        most = n_demos // 2 + 1
        answers = rng.permutation([often] * most + [seldom] * (n_demos - most)).tolist()
        demos = list(zip(inputs[:-1], answers, strict=True))
        rule = dict.fromkeys(planted.INPUTS, often).__getitem__
        return RuledSample(demos, inputs[-1], often, seldom, rule=rule, rule_name="majority")

    def other_queries(self, rng, sample):
        used = {sample.query, *(x for x, _ in sample.demos)}
        return (str(x) for x in rng.permutation(planted.INPUTS) if x not in used)


@functools.cache
def reference():
    return tv.load_model("reference")


@functools.cache
def averaging(slot: str = "logits", kind: str = KINDS[0]):
    """A model whose first head averages the fillers of all tokens; nothing knows positions."""
    heads = {(0, 0): planted.Head("reader", planted.Back(0), f"token -> {slot}", carries=SAME)}
    if slot == "token":  # what counts there is said one layer later
        route = planted.Head("relay", planted.Back(0), "token -> logits", carries=SAME)
        heads[1, 0] = route
    model = planted.assemble("averaging", planted.Circuit("last", heads), backend=kind).model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            block = ".0." in name.replace("_original_component.", "")
            if block and any(part in name for part in ("W_Q", "b_Q", ".q.")):
                parameter.zero_()
            if "pos" in name and slot == "logits":
                parameter.zero_()
    return model


def column(one: OneVector, part: str) -> np.ndarray:
    return one.scores.data.sel(part=part).values


# ------------------------------------------------------------------------------------ one vector


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_that_holds_all_demonstrations_is_worth_all_of_them(kind):
    one = inject_one_vector(averaging(kind=kind), Majority(), n_demos=5, shots=(1, 3), n_prompts=24)
    assert (column(one, "5 demonstrations") == 1).all() and (column(one, "one vector") == 1).all()
    first = column(one, "1 demonstration")
    last = [sample.demos[-1][1] == sample.answer for sample in one.donors.clean.samples]
    np.testing.assert_array_equal(first, last)
    assert 0.2 < first.mean() < 0.9 and column(one, "random answers").mean() < 0.3


def test_a_vector_of_one_demonstration_is_that_demonstration_prompt_by_prompt():
    task = Majority()
    task.sample = lambda rng, n: _first_of(Majority().sample(rng, 5), n)  # type: ignore[method-assign]
    one = inject_one_vector(averaging(), task, n_demos=1, shots=(1,), n_prompts=24)
    np.testing.assert_array_equal(column(one, "one vector"), column(one, "1 demonstration"))
    assert 0.2 < column(one, "one vector").mean() < 0.9


def _first_of(sample, n):
    demos, query, answer, foil = sample
    return RuledSample(demos[:n], query, answer, foil, rule=sample.rule, rule_name="majority")


def test_the_layer_comes_from_dev_and_what_is_reported_from_prompts_with_other_queries():
    settings = {"n_demos": 3, "n_prompts": 12, "seed": 0}
    one = inject_one_vector(reference(), "letter-upper", at="answer", shots=(1,), **settings)
    assert one.layer == int(np.argmax(one.dev.values)) and np.ptp(one.dev.values) > 0.3
    dev, test = split_prompts(reference(), tv.get_task("letter-upper"), **settings)
    assert set(one.scores.clusters) <= set(test.query) and not set(dev.query) & set(test.query)
    again = inject_vectors(
        reference(), one.donors.recipients, one.donors.vector, at="answer", layers=one.layer
    )
    np.testing.assert_array_equal(column(one, "one vector"), again.data.values[:, 0])


def scores_of(**parts: np.ndarray) -> Scores:
    n = len(next(iter(parts.values())))
    names = [name.replace("_", " ").replace("d1", "1 demonstration") for name in parts]
    names = [name.replace("d5", "5 demonstrations") for name in names]
    data = xr.DataArray(
        np.stack(list(parts.values()), 1).astype(float), dims=("prompt", "part"),
        coords={"prompt": np.arange(n), "part": names},
    )  # fmt: skip
    return Scores(data, "fraction", None, tuple(f"q{i}" for i in range(n)), {})


@pytest.mark.parametrize(
    ("vector", "first", "verdict", "reason"),
    [
        (0.5, 0.5, "appears", ""),
        (1.0, 0.5, "does not", ""),
        (1.0, 1.0, "undecided", "no power: one demonstration is not clearly worse than all"),
        (0.0, 0.5, "undecided", "no power: the vector does not work"),
    ],
)
def test_one_vector_is_judged_only_where_one_demonstration_leaves_doubt(
    vector, first, verdict, reason
):
    n = 40
    model = averaging()
    one = inject_one_vector(model, Majority(), n_demos=5, shots=(1,), n_prompts=8)
    made = scores_of(
        nothing=np.zeros(n), one_vector=np.arange(n) < vector * n, random_answers=np.zeros(n),
        d1=np.arange(n) < first * n, d5=np.ones(n),
    )  # fmt: skip
    asked = _Asked(model, 5, n, 0)
    asked.worth("query_is", replace(one, scores=made))
    row = asked.rows[0]
    assert (row.verdict, row.reason) == (verdict, reason)
    assert row.numbers["one vector"] == vector and row.numbers["1 demonstration"] == first


def test_the_difference_of_two_means_has_the_interval_of_independent_samples():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, 1, 200), rng.normal(0.2, 2, 100)

    def made(values):
        data = xr.DataArray(values, dims=("prompt",), coords={"prompt": np.arange(len(values))})
        return Scores(data, "logits", None, tuple(f"{id(values)} {v}" for v in values), {})

    found = difference(made(a), made(b)).ci()
    error = 1.96 * np.sqrt(a.var() / 200 + b.var() / 100)
    assert float(found["value"]) == pytest.approx(a.mean() - b.mean())
    assert float(found["hi"] - found["lo"]) == pytest.approx(2 * error, rel=0.08)


# ------------------------------------------------------------------------- bijections and unions


def test_a_union_mixes_two_relations_and_no_word_is_both():
    union = Union("u", {"a": "b", "c": "d", "e": "f"}, {"p": "q", "r": "s", "t": "u"})
    kinds = set()
    for seed in range(30):
        demos, query, answer, foil = sample = union.sample(np.random.default_rng(seed), 2)
        assert union.pairs[query] == answer == sample.rule(query) != foil
        assert len({x for x, _ in [*demos, (query, answer)]}) == 3
        kinds.add("".join("AB"[x in "prt"] for x, _ in demos))
        assert query not in union.other_queries(np.random.default_rng(0), sample)
    assert kinds == {"AA", "AB", "BA", "BB"}
    with pytest.raises(PromptError, match="two relations without a common word, both have 'b'"):
        Union("u", {"a": "b", "c": "d"}, {"b": "x", "y": "z"})
    with pytest.raises(PromptError, match="inputs for at most 2 demonstrations"):
        union.sample(np.random.default_rng(0), 3)


def test_the_kinds_of_a_bijection_have_equal_numbers_of_pairs(monkeypatch):
    seen = {}

    def note(model, task, *, pool, **settings):
        seen[task.name] = task
        assert not set(pool) & {w for pair in task.pairs.items() for w in pair}
        return task

    monkeypatch.setattr(one_module, "inject_one_vector", note)
    kinds = compare_bijection(None, "country-capital", "verb-past")
    forward, back, both, union, every = kinds.values()
    assert len(forward.pairs) == len(back.pairs) == 22
    assert back.pairs == {y: x for x, y in forward.pairs.items()}
    assert both.pairs == forward.pairs | back.pairs and len(every.pairs) == 45
    assert len(union.pairs) == 22 + 22 and forward.pairs.items() < union.pairs.items()
    again = compare_bijection(None, "country-capital", "verb-past", seed=1)
    assert again["x to y"].pairs != forward.pairs


# ---------------------------------------------------------------------------------- implied maps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_the_jacobian_is_a_finite_difference(arch, kind):
    model = tiny_model(arch, kind, torch.float64)
    adapter = Adapter.of(model)
    tokens = torch.tensor([[3, 5, 7, 9], [4, 6, 8, 2]])
    where, outputs = torch.tensor([1, 2]), torch.tensor([10, 20, 30])
    flags = [p.requires_grad for p in model.parameters()]
    with precise(torch.float64):  # some norms compute in float32 whatever they are given
        found = adapter.jacobian(tokens, where, outputs)
    for axis in (0, 5):

        def moved(step, axis=axis):
            def edit(x):
                x = x.clone()
                x[torch.arange(2), where, axis] += step
                return x

            return adapter.run(tokens, {("resid_pre", 0): edit})[:, outputs]

        with precise(torch.float64):
            expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
        torch.testing.assert_close(found[..., axis], expected, rtol=1e-5, atol=1e-8)
    assert all(p.grad is None for p in model.parameters())
    assert flags == [p.requires_grad for p in model.parameters()]


def test_the_map_of_a_model_that_answers_by_the_query_alone_is_known():
    """Each query names its home: one singular value an answer, all equal, less the mean of logits.

    A word is read as a token and, one layer later, as an input: two dimensions a word, hence the
    root of two.
    """
    case = planted.build("nothing")
    pairs = Task.from_pairs(planted.HOME)
    one = inject_one_vector(case.model, pairs, n_demos=3, shots=(1,), n_prompts=10)
    maps = implied_maps(case.model, one)
    n = len(set(one.donors.clean.answer.tolist()))
    assert n > 3
    for part in ("in context", "nothing"):
        values = torch.linalg.svdvals(maps[part])
        expected = torch.full((n - 1,), planted.LOGIT * 2**0.5, dtype=torch.float64)
        torch.testing.assert_close(values[0, : n - 1], expected)
        assert effective_rank(maps[part])[0] == pytest.approx(n - 1)
    ranks = implied_ranks(case.model, one)
    assert float(ranks.mean().sel(part="in context")) == pytest.approx(n - 1)
    added = maps["in context"] - maps["nothing"]
    assert added.abs().max() < 1e-4  # demonstrations add nothing


def test_effective_rank_counts_equal_singular_values():
    eye = torch.eye(4, dtype=torch.float64)
    maps = torch.stack([eye, torch.diag(torch.tensor([1.0, 1, 0, 0]).double()), 0 * eye])
    torch.testing.assert_close(effective_rank(maps), torch.tensor([4.0, 2, 0]).double())


# --------------------------------------------------------------------------- several vectors


def test_vectors_of_the_same_prompt_in_every_place_change_nothing():
    found = inject_many_vectors(
        reference(), "letter-upper", at="answer", shots=3, n_demos=3, n_prompts=8
    )
    baseline, same = (found.data.sel(part=p).values for p in ("baseline", "TaskV-MS"))
    np.testing.assert_array_equal(baseline, same)
    assert set(found.attrs["layers"]) == set(found.attrs["best"]) == set(found.data.part.values[1:])


def test_many_vectors_are_those_of_the_last_demonstrations_at_the_layer_chosen_on_dev():
    settings = {"n_demos": 4, "n_prompts": 16, "seed": 0}
    found = inject_many_vectors(reference(), "digit", at="answer", shots=2, **settings)
    half = split_prompts(reference(), tv.get_task("digit"), **settings)[1]
    donors = take_vectors(reference(), half, at="answer", seed=10)
    few = donors.clean.keep_demos([2, 3])
    assert few.query == found.clusters
    own = tv.extract_vectors(reference(), donors.clean)
    for part, vectors in (
        ("TaskV-MS", replace(own, data=own.data.isel(demo=slice(2, 4)))),
        ("random answers", donors.control),
    ):
        at = {"at": "answer", "layers": found.attrs["layers"][part]}
        expected = inject_vectors(reference(), few, vectors, **at).data.values[:, 0]
        np.testing.assert_array_equal(found.data.sel(part=part).values, expected)
    values = [found.data.sel(part=p).values for p in ("baseline", "TaskV-MS", "random answers")]
    assert len({v.tobytes() for v in values}) > 1


def test_with_one_place_one_vector_is_many():
    found = inject_many_vectors(
        reference(), "number-next", at="answer", shots=1, n_demos=4, n_prompts=12
    )
    one, many = (found.data.sel(part=p).values for p in ("TaskV", "TaskV-M"))
    np.testing.assert_array_equal(one, many)


def test_one_vector_of_all_and_vectors_in_every_place_beat_a_misleading_demonstration():
    """The averaging model at ``query_is``: the last place decides alone, whatever is elsewhere."""
    found = inject_many_vectors(averaging(), Majority(), shots=1, n_demos=5, n_prompts=16)
    means = found.mean()
    assert float(means.sel(part="baseline")) < 0.9
    for part in ("TaskV", "TaskV-M", "TaskV-MS"):
        assert float(means.sel(part=part)) == 1 == found.attrs["best"][part]
    assert float(means.sel(part="random answers")) < 0.4


# ----------------------------------------------------------------- combination, leaving one out


def test_weights_are_found_again_and_other_donors_do_not_fit():
    rng = np.random.default_rng(0)
    local = rng.normal(size=(50, 2, 3, 8)) + rng.normal(size=(1, 2, 3, 8))
    weights = np.array([[0.2, 0.5, 0.3], [0.0, -1.0, 2.0]])
    vector = 7 + np.einsum("ln,plnd->pld", weights, local)
    found, mean, centre = fit_weights(local, vector)
    np.testing.assert_allclose(found, weights, atol=1e-10)
    rebuilt = mean + np.einsum("ln,plnd->pld", found, local - centre)
    np.testing.assert_allclose(rebuilt, vector, atol=1e-10)
    assert np.abs(fit_weights(local[rng.permutation(50)], vector)[0]).max() < 0.5


def test_a_vector_that_is_the_mean_of_demonstrations_is_their_combination_with_known_weights():
    """Locals are e_j + mean of e_1 to e_j over the tokens so far, the global is that of all."""
    n = 3
    words = iter(planted.INPUTS)
    tasks = [
        Task.from_pairs({next(words): planted.FILLERS[(i + 6 * k) % 12] for i in range(14)}, name=k)
        for k in (0, 1)
    ]
    for k, task in enumerate(tasks):
        task.name = f"fillers {k}"
    model = averaging("token")
    found = combine_demonstrations(model, tasks, n_demos=n, n_prompts=16)
    so_far = np.array([3 * (j + 1) + 1 for j in range(n)])
    mixing = np.eye(n) + np.tril(np.ones((n, n))) / so_far[:, None]
    expected = np.linalg.solve(mixing.T, np.full(n, 1 / (3 * n + 3)))
    np.testing.assert_allclose(found.weights.values[0], expected, atol=1e-5)
    explained = found.explained.mean()
    assert float(explained.sel(layer=0, part="own")) == pytest.approx(1, abs=1e-6)
    for part in ("same task", "another task"):
        assert float(explained.sel(layer=0, part=part)) < 0.5
    np.testing.assert_array_equal(
        found.injected.data.sel(part="vector"), found.injected.data.sel(part="own")
    )


def test_leaving_one_out_of_a_mean_moves_it_as_arithmetic_says():
    n = 4
    pairs = dict(zip(planted.INPUTS, planted.FILLERS, strict=False))  # all answers differ
    prompts = make_prompts(averaging(), Task.from_pairs(pairs), n_demos=n, n_prompts=5)
    found = leave_one_out(averaging(), prompts)
    t = 3 * n + 3
    moved = np.sqrt(1 / t**2 + (n - 1) * (1 / (t - 3) - 1 / t) ** 2)
    np.testing.assert_allclose(found.data.values, moved / (np.sqrt(n) / t), rtol=1e-5)
    assert found.data.dims == ("prompt", "layer", "demo")


# ---------------------------------------------------------------------------------- all of them


@functools.cache
def small_predictions() -> Predictions:
    return check_predictions(
        reference(), at=("answer",), bijection=("letter-upper", "noun-plural"),
        unions=(("country-capital", "verb-past"),), doubtful=(), n_demos=4, n_prompts=10,
        combined=("verb-past", "letter-upper"), categories={"algorithmic": "number-next"},
    )  # fmt: skip


@pytest.mark.slow
def test_every_prediction_has_a_row_an_interval_and_its_numbers(tmp_path):
    found = small_predictions()
    assert len({row.text for row in found.rows}) == 10
    for row in found.rows:
        assert row.numbers and row.verdict in ("appears", "does not", "undecided")
        if np.isfinite(row.effect):
            assert row.lo <= row.effect <= row.hi
        assert row.verdict == "undecided" or not row.reason
        told = " ".join(str(found).split())
        assert row.text in told and row.task in told
    assert max(map(len, str(found).splitlines())) <= 80
    assert len(found.to_pandas()) == len(found.rows)
    first, second = found.save(tmp_path / "a"), found.save(tmp_path / "b")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    again = Scores.load(first[1], "many/answer/algorithmic")
    xr.testing.assert_allclose(again.data, found.scores["many/answer/algorithmic"].data)


def test_one_averaged_vector_of_the_reference_model_does_what_all_demonstrations_do():
    """Where one demonstration shows one of two relations, and the query may ask the other."""
    one = inject_into_union(
        reference(), "verb-past", "country-capital", at="answer", n_demos=6, shots=(1,),
        n_prompts=48,
    )  # fmt: skip
    means = {str(name): column(one, str(name)).mean() for name in one.scores.data["part"].values}
    assert means["1 demonstration"] < 0.8 and means["6 demonstrations"] > 0.9
    assert means["one vector"] > means["1 demonstration"] + 0.15
    assert means["random answers"] < 0.6


def test_bad_input_is_one_line_that_says_what_would_fit():
    model = averaging()
    for wrong, error, text in (
        (lambda: inject_one_vector(model, Majority(), at="end"), UnknownName, "unknown place"),
        (
            lambda: inject_one_vector(model, Majority(), n_demos=3, shots=(4,)),
            TvInterpError, r"expected shots between 1 and n_demos \(3\), got 4",
        ),
        (
            lambda: inject_many_vectors(model, Majority(), n_demos=3, shots=0),
            TvInterpError, r"expected shots between 1 and n_demos \(3\), got 0",
        ),
        (
            lambda: inject_many_vectors(model, Majority(), at="nowhere"),
            UnknownName, "unknown place 'nowhere'",
        ),
        (
            lambda: compare_bijection(model, "country-continent", "verb-past"),
            TvInterpError, "one to one, 'country-continent' is not",
        ),
        (
            lambda: compare_bijection(model, "digit", "verb-past"),
            TvInterpError, "expected a relation of pairs, got 'digit'",
        ),
        (
            lambda: inject_into_union(model, "country-capital", "capital-country"),
            PromptError, "without a common word",
        ),
        (
            lambda: combine_demonstrations(model, ["verb-past"]),
            TvInterpError, "expected at least two tasks, got 1",
        ),
        (
            lambda: leave_one_out(model, make_prompts(model, Majority(), n_demos=1, n_prompts=4)),
            PromptError, "expected two demonstrations or more, got 1",
        ),
        (
            lambda: check_predictions(model, at=()),
            TvInterpError, "expected a place of",
        ),
        (
            lambda: check_predictions(model, doubtful=["digits"]),
            UnknownName, "did you mean 'digit'",
        ),
    ):  # fmt: skip
        with pytest.raises(error, match=text):
            wrong()


@pytest.mark.slow
def test_the_command_prints_the_table_and_writes_what_it_rests_on(monkeypatch, capsys, tmp_path):
    given = {}

    def found(model, **settings):
        given.update(settings)
        return small_predictions()

    monkeypatch.setattr("tv_interp.analysis.predictions.check_predictions", found)
    main(["predictions", "--n-demos", "4", "--seed", "3", "--out", str(tmp_path)])
    assert given == {"n_demos": 4, "n_prompts": 64, "seed": 3, "progress": "none"}
    out = capsys.readouterr().out
    assert str(small_predictions()) in out and "scores.nc" in out
    assert {p.name for p in tmp_path.iterdir()} == {"predictions.json", "scores.nc"}
    with pytest.raises(SystemExit) as stopped:
        main(["predictions", "--n-demos", "1", "--out", str(tmp_path / "no")])
    assert stopped.value.code == 2 and not (tmp_path / "no").exists()
    assert "expected n_demos of 2 or more, got 1" in capsys.readouterr().err
