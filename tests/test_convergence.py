"""Convergence, k of n, and heads alone: what planted models show, and plain loops of hooks."""

from __future__ import annotations

from dataclasses import replace

import naive
import numpy as np
import pytest
import torch
import xarray as xr
from conftest import KINDS, precise, tiny_model

import tv_interp as tv
from tv_interp.analysis.convergence import (
    ablate_demos,
    contradict,
    convergence_boundary,
    cross_vectors,
    linear_cka,
    measure_convergence,
    share_lost,
    similarity,
)
from tv_interp.analysis.vectors import Vectors, extract_vectors, inject_vectors
from tv_interp.errors import ModelError, PromptError, TvInterpError, UnknownName
from tv_interp.models import planted
from tv_interp.prompts import make_prompts
from tv_interp.prompts.tasks import Task
from tv_interp.prompts.tasks.categorization import hybrid_task

PLAIN = Task.from_pairs({f"w{i}": f"w{i + 20} w{i + 30}" for i in range(20)})


def plain(arch, kind, **settings):
    model = tiny_model(arch, kind)
    settings = dict(n_demos=3, n_prompts=5, seed=1, template="{x} -> {y} :\n") | settings
    return model, make_prompts(model, PLAIN, **settings)


def numbers(table: xr.Dataset) -> list[float]:
    return table["value"].values.round(4).tolist()


# -------------------------------------------------------------------------------------- k of n


def orders(n: int, draws: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng([seed, 7])
    return [rng.permutation(n).tolist() for _ in range(draws)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_look_up_is_lost_with_its_own_demonstration(kind):
    case = planted.build("write_then_read", backend=kind)
    prompts = make_prompts(case.model, case.task, n_demos=4, n_prompts=16)
    if kind == "bridge":  # of native models, which take no edit of attention scores
        with pytest.raises(ModelError, match="discards edits of attention scores"):
            ablate_demos(case.model, prompts, how=["knockout"])
        return
    scores = ablate_demos(case.model, prompts, how=["knockout"], draws=2)
    mine = [[x for x, _ in s.demos].index(s.query) for s in prompts.samples]
    expected = [
        [np.mean([i not in order[:k] for order in orders(4, 2)]) for k in range(5)] for i in mine
    ]
    np.testing.assert_allclose(scores.data.values[:, :, 0], expected)
    lost = share_lost(scores)["value"].sel(part="knockout")
    assert float(lost[0]) == 0 and float(lost[4]) == 1 and (np.diff(lost) >= 0).all()


def test_a_planted_value_is_lost_with_the_last_demonstration_alone():
    case = planted.build("value_route")
    prompts = make_prompts(case.model, case.task, n_demos=4, n_prompts=8)
    means = ablate_demos(case.model, prompts, how=["resample", "mean"], draws=1).mean()
    gone = orders(4, 1)[0].index(3) + 1
    expected = [float(k < gone) for k in range(5)]
    assert means.sel(part="resample").values.tolist() == expected
    mean = means.sel(part="mean").values  # of eight words: one of them may win
    assert (mean[:gone] == 1).all() and (mean[gone:] < 0.5).all()


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_ablations_are_those_of_plain_hooks(arch, kind):
    model, prompts = plain(arch, kind)
    k, row, n_layers = 2, 3, 3
    gone = orders(3, 1)[0][:k]
    scores = ablate_demos(model, prompts, draws=1, metric="logit_diff")
    positions = [naive.last_tokens(prompts, i, "answer") for i in range(len(prompts))]
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(n_layers)]
    states = [
        torch.stack(naive.read(model, naive.tokens_of(prompts, i), names))[:, positions[i]]
        for i in range(len(prompts))
    ]  # [layer, demo, d_model] each
    others = {"mean": torch.stack(states).mean(0), "resample": states[row - len(prompts) // 2]}

    def put(layer, value):
        def edit(activation):
            activation[0, [positions[row][d] for d in gone]] = value[layer, gone]
            return activation

        return edit

    def cut(scores):
        tokens = naive.tokens_with(prompts, row, "answer")
        out = [p for p in tokens if int(prompts.demo_ids[row, p]) in gone]
        seeing = [p for p in range(scores.shape[-1]) if p not in out]
        for p in seeing:
            scores[:, :, p, out] = float("-inf")
        return scores

    edits = {
        part: [(name, put(layer, value)) for layer, name in enumerate(names)]
        for part, value in others.items()
    }
    edits["knockout"] = [
        (f"blocks.{layer}.attn.hook_attn_scores", cut) for layer in range(n_layers)
    ]
    for part, changes in edits.items():
        logits = naive.run(model, naive.tokens_of(prompts, row), changes)
        expected = float(naive.logit_diff(logits, prompts, row))
        found = float(scores.data.sel(prompt=row, demo=k, part=part))
        assert found == pytest.approx(expected, abs=2e-5), part
    spread = [float(scores.data.sel(prompt=row, demo=k, part=p)) for p in edits]
    assert np.ptp(spread) > 1e-3


def test_bad_ablations_are_refused():
    model, prompts = plain("llama", KINDS[0])
    with pytest.raises(UnknownName, match="unknown ablation 'zero'"):
        ablate_demos(model, prompts, how=["zero"])
    with pytest.raises(PromptError, match="expected a role of demonstrations, got 'query_is'"):
        ablate_demos(model, prompts, at="query_is")
    with pytest.raises(PromptError, match="expected two prompts or more"):
        ablate_demos(model, prompts.select([0]))
    with pytest.raises(TvInterpError, match="expected draws of 1 or more, got 0"):
        ablate_demos(model, prompts, draws=0)
    with pytest.raises(TvInterpError, match=r"expected counts of 0 to 3 .*, got \[1, 4\]"):
        ablate_demos(model, prompts, counts=[1, 4])


def test_some_counts_are_those_of_all_counts_and_each_set_runs_once():
    with precise(torch.float64):
        model = tiny_model("llama", KINDS[0], torch.float64)
        _, prompts = plain("llama", KINDS[0])
        every = ablate_demos(model, prompts, metric="logit_diff", draws=3)
        some = ablate_demos(model, prompts, metric="logit_diff", draws=3, counts=[0, 2, 3])
        np.testing.assert_allclose(some.data, every.data.sel(demo=[0, 2, 3]), atol=1e-10)
        one = ablate_demos(model, prompts, metric="logit_diff", draws=1, counts=[3])
        np.testing.assert_allclose(one.data, every.data.sel(demo=[3]), atol=1e-10)


# --------------------------------------------------------------------------------- convergence


def made(data: np.ndarray, answers: list[list[str]]) -> Vectors:
    array = xr.DataArray(
        data,
        dims=("prompt", "layer", "demo", "d_model"),
        coords={"answer": (("prompt", "demo"), np.array(answers, dtype=object))},
    ).assign_coords(layer=np.arange(data.shape[1]))
    return Vectors(array, "answer", "none", {})


def test_similarity_tells_one_vector_from_one_a_class_and_from_unrelated_ones():
    rng = np.random.default_rng(0)
    n, demos, d = 40, 4, 64
    of_prompt, of_class = rng.standard_normal((n, 1, d)), rng.standard_normal((n, 2, d))
    layers = [
        np.broadcast_to(of_prompt, (n, demos, d)),
        np.concatenate([of_class, of_class], 1),
        rng.standard_normal((n, demos, d)),
    ]
    local = made(np.stack(layers, 1), [["a", "b", "a", "b"]] * n)
    whole = replace(local, data=local.data.isel(demo=0, drop=True))
    found = {part: value.mean(0) for part, value in similarity(local, whole).items()}
    np.testing.assert_allclose(found["centred"][[0]], 1, atol=1e-6)
    np.testing.assert_allclose(found["same answer"][:2], 1, atol=1e-6)
    assert found["global"][0] == pytest.approx(1, abs=0.05)
    assert abs(found["other answers"][1]) < 0.1 and abs(found["centred"][2]) < 0.1
    cka = linear_cka(local).values
    assert cka[0] == pytest.approx(1) and 0.4 < cka[2] < cka[1] < 0.9
    shifted = replace(local, data=local.data + 100)
    assert similarity(shifted, whole)["raw"].min() > 0.99
    np.testing.assert_allclose(
        similarity(shifted, whole)["centred"].mean(0), found["centred"], atol=1e-6
    )


def test_planted_local_vectors_of_a_look_up_do_not_converge():
    case = planted.build("write_then_read")
    found = measure_convergence(case.model, case.task, n_demos=4, n_prompts=16)
    means = found.scores.mean()
    assert means.sel(site="all").values[:2].tolist() == [1, 1]
    assert (means.sel(site="one").values[:2] < 0.5).all()  # each is right for one query in four
    ratio = found.ratio()
    assert (ratio["hi"].values[:2] < 0.6).all()
    assert np.isnan(found.effect_ratio()["value"].values[2:]).all()  # read before: no effect
    assert max(map(len, str(found).splitlines())) <= 80 and "ratio" in str(found)
    with pytest.raises(PromptError, match="expected two demonstrations or more to compare, got 1"):
        measure_convergence(case.model, case.task, n_demos=1)


def test_contradicting_demonstrations_are_so_many_and_nested():
    model = tv.load_model("reference")
    prompts = make_prompts(model, "country-capital", n_demos=6, n_prompts=5)
    before: list[set[int]] = [set()] * 5
    for k in range(7):
        donors = contradict(prompts, k, seed=3)
        wrong = [
            {i for i, (x, y) in enumerate(s.demos) if prompts.task.pairs[x] != y}
            for s in donors.samples
        ]
        assert all(len(w) == k and b <= w for w, b in zip(wrong, before, strict=True))
        before = wrong
    with pytest.raises(PromptError, match="expected k of 0 to 6 demonstrations, got 7"):
        contradict(prompts, 7)
    scores = convergence_boundary(model, prompts, layer=0)
    assert scores.data.sizes == {"prompt": 5, "demo": 7, "site": 4}
    some = convergence_boundary(model, prompts, layer=0, counts=[0, 3])
    np.testing.assert_array_equal(some.data, scores.data.sel(demo=[0, 3]))
    local = extract_vectors(model, contradict(prompts.dummies(seed=1).clean, 2, seed=1))
    again = inject_vectors(model, prompts.dummies(seed=1).corrupted, local, layers=0)
    np.testing.assert_array_equal(
        scores.data.sel(demo=2, site="all").values, again.data.values[:, 0]
    )


def test_two_by_two_has_the_single_injections_and_their_interaction():
    case = planted.build("write_then_read")
    contrast = make_prompts(case.model, case.task, n_demos=4, n_prompts=10).dummies()
    scores = cross_vectors(
        case.model, contrast, local_layer=1, global_layer=3, metric="accuracy",
        donors=contrast.clean,
    )  # fmt: skip
    mean = scores.mean()
    assert float(mean.sel(site="local")) == float(mean.sel(site="global")) == 1
    none = float(mean.sel(site="none"))
    assert float(mean.sel(site="interaction")) == pytest.approx(none - 1)  # one replaces the other
    other = cross_vectors(
        case.model, contrast, local_layer=1, global_layer=3, metric="accuracy"
    ).mean()
    assert float(other.sel(site="both")) == 0  # another query's answer overwrites what was read
    with pytest.raises(TvInterpError, match="layer 4 is outside of .*: expected 0 to 3"):
        cross_vectors(case.model, contrast, local_layer=0, global_layer=4)


def test_the_hybrid_task_labels_by_what_is_known():
    task = hybrid_task()
    continents = tv.get_task("country-continent").pairs
    seen = set()
    for i in range(30):
        sample = task.sample(np.random.default_rng(i), 6)
        kind, label = sample.rule_name, {}
        for x, y in [*sample.demos, (sample.query, sample.answer)]:
            assert label.setdefault(continents[x] == kind, y) == y
        assert len(label) == 2 and sample.foil in label.values()
        seen.add(kind)
    assert len(seen) > 1
    with pytest.raises(PromptError, match="expected the name of a shipped relation, got 'rivers'"):
        hybrid_task("rivers")
    with pytest.raises(PromptError, match="has no answer that a fifth of its inputs share"):
        hybrid_task("country-capital")
