"""Vectors: the laws of injection in every architecture, and what a planted model must show."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import KINDS, tiny_model
from random_models import ARCHITECTURES

import tv_interp as tv
from tv_interp.analysis.vectors import Vectors, extract_vectors, function_vector, inject_vectors
from tv_interp.errors import FileError, ModelError, PromptError, TvInterpError, UnknownName
from tv_interp.interventions.recording import last_logits, record_run
from tv_interp.models import planted
from tv_interp.models.adapter import Adapter
from tv_interp.prompts import make_prompts
from tv_interp.prompts.tasks import Task
from tv_interp.scores import Metric, get_metric
from tv_interp.scores.metrics import Targets

# Inputs and answers of one or two tokens, so the rows of one batch have different lengths.
RUGGED = Task.from_pairs(
    {
        (f"w{i}" if i % 2 else f"w{i} w{i + 40}"): (
            f"w{i + 20}" if i % 3 else f"w{i + 20} w{i + 30}"
        )
        for i in range(20)
    }
)
WEIGHTS = torch.randn(101, generator=torch.Generator().manual_seed(0))
ALL_LOGITS = Metric("projection", "logits", lambda out, rows, _: out @ WEIGHTS, lambda vocab: None)
"""A random projection of all logits: equal logits are equal here, and others hardly ever."""

each_model = pytest.mark.parametrize(
    ("arch", "kind"), [(arch, kind) for arch in ARCHITECTURES for kind in KINDS]
)


def rugged(model, **settings):
    settings = dict(n_demos=3, n_prompts=4, seed=0, template="{x} -> {y} :\n") | settings
    return make_prompts(model, RUGGED, **settings)


def projected(model, prompts) -> np.ndarray:
    return (last_logits(Adapter.of(model), prompts) @ WEIGHTS).numpy()


# ---------------------------------------------------------------------------------------- laws


@each_model
def test_a_runs_own_vectors_change_nothing(arch, kind):
    """Own clean state restores the clean logits: each layer, all at once, any role."""
    model = tiny_model(arch, kind)
    clean = rugged(model)
    expected = projected(model, clean)[:, None]
    for at in ("answer", "query_is", "x"):
        vectors = extract_vectors(model, clean, at=at)
        for how in ("each", "joint"):
            scores = inject_vectors(model, clean, vectors, how=how, metric=ALL_LOGITS)
            np.testing.assert_allclose(
                scores.data.values, expected + 0 * scores.data.values, atol=2e-5
            )


@each_model
def test_the_last_layer_at_query_is_gives_the_donors_logits(arch, kind):
    model = tiny_model(arch, kind)
    clean = rugged(model)
    donors = clean.other_query(seed=5)
    assert all(a != b for a, b in zip(donors.query, clean.query, strict=True))
    vectors = extract_vectors(model, donors, at="query_is")
    expected = projected(model, donors)
    for recipients in (clean, clean.zero_shot()):
        assert np.abs(projected(model, recipients) - expected).min() > 1e-2
        scores = inject_vectors(model, recipients, vectors, metric=ALL_LOGITS)
        np.testing.assert_allclose(scores.data.sel(layer=2).values, expected, atol=2e-5)
        assert np.abs(scores.data.sel(layer=0).values - expected).max() > 1e-2
        one = inject_vectors(model, recipients, vectors, layers=2, metric=ALL_LOGITS)
        np.testing.assert_allclose(one.data.values, scores.data.sel(layer=[2]).values, atol=2e-5)


@each_model
def test_adding_the_difference_is_replacing(arch, kind):
    model = tiny_model(arch, kind)
    contrast = rugged(model).corrupt("random_answers", seed=3)
    ours = extract_vectors(model, contrast.clean)
    theirs = extract_vectors(model, contrast.corrupted)
    put = inject_vectors(model, contrast.corrupted, ours, metric=ALL_LOGITS)
    change = replace(ours, data=ours.data - theirs.data)
    added = inject_vectors(model, contrast.corrupted, change, mode="add", metric=ALL_LOGITS)
    np.testing.assert_allclose(added.data.values, put.data.values, atol=1e-4)
    assert put.data.std() > 1e-2


@each_model
def test_head_vectors_add_up_to_the_attentions_output(arch, kind):
    model = tiny_model(arch, kind)
    clean = rugged(model)
    if arch == "gemma2":
        with pytest.raises(ModelError, match=r"does not add up \(a norm stands behind"):
            extract_vectors(model, clean, heads=["L1H0.z@answer"])
        return
    one, two, both = (
        extract_vectors(model, clean, heads=heads).data.values
        for heads in ([(1, 0)], [(1, 3)], [(1, 0), (1, 3)])
    )
    np.testing.assert_allclose(one + two, both, atol=1e-5)
    assert (both[:, [0, 2]] == 0).all() and np.abs(one[:, 1]).max() > 0.01
    some, rest, every = (
        extract_vectors(model, clean, heads=[(1, h) for h in heads]).data.values
        for heads in ([0, 2], [1, 3], range(4))
    )
    np.testing.assert_allclose(some + rest, every, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_layer_behind_a_norm_is_refused_too(kind):
    """There are no other heads to check it on, so its halves are held against it."""
    model = tiny_model("gemma2", kind)
    with pytest.raises(ModelError, match=r"does not add up \(a norm stands behind"):
        extract_vectors(model, rugged(model), heads=[(1, head) for head in range(4)])


def test_a_head_vector_is_the_heads_output_through_its_output_matrix():
    model = tiny_model("gpt2", KINDS[0])
    clean = rugged(model)
    z = record_run(Adapter.of(model), clean).z_at("answer")
    weight = model.blocks[1].attn.W_O.detach()
    expected = torch.einsum("pdhe,hem->pdm", z[:, 1][:, :, [0, 2]], weight[[0, 2]])
    found = extract_vectors(model, clean, heads=[(1, 0), (1, 2)]).data.sel(layer=1).values
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_a_function_vector_is_the_same_at_every_layer():
    model = tiny_model("llama", KINDS[0])
    clean = rugged(model)
    heads = [(0, 1), (2, 3)]
    vector = function_vector(model, clean, heads)
    assert vector.data.dims == ("layer", "d_model")
    expected = extract_vectors(model, clean, at="query_is", heads=heads).data.mean("prompt")
    for layer in range(3):
        np.testing.assert_allclose(vector.data.sel(layer=layer), expected.sum("layer"), atol=1e-6)
    plain = projected(model, clean.zero_shot())[:, None]
    scores = inject_vectors(model, clean.zero_shot(), vector, mode="add", metric=ALL_LOGITS)
    assert np.abs(scores.data.values - plain).min() > 1e-4


# ------------------------------------------------------------------------------------ averages


@each_model
def test_averages_of_equal_vectors_are_that_vector(arch, kind):
    model = tiny_model(arch, kind)
    vectors = extract_vectors(model, rugged(model))
    assert np.ptp(vectors.data.values, axis=2).min() > 0  # they are not equal by themselves
    one = vectors.data.isel(demo=[0])
    same = replace(vectors, data=vectors.data.copy(data=np.broadcast_to(one, vectors.data.shape)))
    np.testing.assert_allclose(same.pos_avg().data, one.isel(demo=0), atol=1e-6)
    np.testing.assert_allclose(same.pos_avg("class").data, same.data, atol=1e-6)
    row = vectors.data.isel(prompt=[1])
    same = replace(vectors, data=vectors.data.copy(data=np.broadcast_to(row, vectors.data.shape)))
    np.testing.assert_allclose(same.trial_avg().data, row.isel(prompt=0), atol=1e-6)


def test_the_average_of_a_class_is_over_demonstrations_with_the_same_answer():
    model = tiny_model("llama", KINDS[0])
    task = Task.from_pairs({f"w{i}": f"w{30 + i % 2}" for i in range(12)})
    prompts = make_prompts(model, task, n_demos=5, n_prompts=3)
    vectors = extract_vectors(model, prompts)
    mean = vectors.pos_avg("class")
    assert mean.data.dims == vectors.data.dims
    for row, demos in enumerate(prompts.demos):
        for i, (_, y) in enumerate(demos):
            members = [j for j, (_, other) in enumerate(demos) if other == y]
            expected = vectors.data[row].isel(demo=members).mean("demo")
            np.testing.assert_allclose(mean.data[row].isel(demo=i), expected, atol=1e-6)


def test_averaged_vectors_fit_other_numbers_of_demonstrations_and_prompts():
    model = tiny_model("llama", KINDS[0])
    vectors = extract_vectors(model, rugged(model, n_demos=2))
    recipients = rugged(model, n_demos=4, n_prompts=3, seed=7)
    scores = inject_vectors(model, recipients, vectors.pos_avg().trial_avg(), metric=ALL_LOGITS)
    assert scores.data.sizes == {"prompt": 3, "layer": 3}
    into_is = inject_vectors(
        model, recipients, vectors.pos_avg().trial_avg(), at="query_is", metric=ALL_LOGITS
    )
    assert into_is.attrs["taken_at"] == "answer" and into_is.attrs["at"] == "query_is"
    last = into_is.data.sel(layer=2).values
    assert np.ptp(last) < 1e-5 < np.ptp(scores.data.sel(layer=0).values)  # all get one vector


# ------------------------------------------------------------------------- several metrics, cost


@pytest.mark.parametrize("kind", KINDS)
def test_several_metrics_are_read_off_one_sweep(kind):
    model = tiny_model("llama", kind)
    clean = rugged(model)
    dummy = clean.corrupt("random_answers", seed=3).corrupted
    vectors = extract_vectors(model, clean).select(range(len(dummy)))
    for names in (("accuracy", "choice", "label_rate", "rank"), ("choice", "logit_diff")):
        for how, at in (("each", None), ("joint", None), ("each", "query_is")):
            given = vectors if at is None else vectors.pos_avg()
            settings: dict = dict(how=how, at=at)
            found = inject_vectors(model, dummy, given, metric=names, **settings)
            assert tuple(found) == names
            for name, scores in found.items():
                alone = inject_vectors(model, dummy, given, metric=name, **settings)
                np.testing.assert_array_equal(scores.data, alone.data)
                assert scores.attrs == alone.attrs and scores.unit == alone.unit
    with pytest.raises(TvInterpError, match="expected at least one metric"):
        inject_vectors(model, dummy, vectors, metric=())


def test_the_lines_to_compare_with_are_those_of_plain_runs():
    model = tv.load_model("reference")
    contrast = make_prompts(model, "country-currency", n_demos=4, n_prompts=12).dummies(seed=1)
    vectors = extract_vectors(model, contrast.clean)
    for name, scores in inject_vectors(
        model, contrast.corrupted, vectors, metric=("prob", "label_rate")
    ).items():
        readout = get_metric(name).readout
        for line, prompts in (
            ("recipient", contrast.corrupted),
            ("zero_shot", contrast.corrupted.zero_shot()),
            ("few_shot", contrast.clean),
        ):
            logits = last_logits(Adapter.of(model), prompts)
            expected = float(readout(Targets.of(prompts))(logits, torch.arange(12)).mean())
            assert scores.attrs[line] == pytest.approx(expected, abs=1e-6), (name, line)


class Counted:
    """How many tokens a model's MLPs compute while something runs."""

    def __init__(self, model) -> None:
        self.model, self.tokens = model, 0

    def __enter__(self) -> Counted:
        def count(mlp, args, out):
            self.tokens += out.shape[0] * out.shape[1]

        self.handles = [block.mlp.register_forward_hook(count) for block in self.model.blocks]
        return self

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()


def test_both_sweeps_of_a_recipient_cost_a_third_of_a_loop_of_forwards():
    """Recording, all layers and three metrics included; time is in benchmarks/bench_vectors.py."""
    model = tv.load_model("reference")
    contrast = make_prompts(model, "country-currency", n_demos=8, n_prompts=16).dummies(seed=1)
    dummy, n_layers = contrast.corrupted, 5
    local, whole = (extract_vectors(model, contrast.clean, at=at) for at in ("answer", "query_is"))
    metrics = ("accuracy", "choice", "label_rate")
    with Counted(model) as ours:
        run = record_run(Adapter.of(model), dummy)
        for vectors in (local, whole):
            inject_vectors(model, dummy, vectors, run=run, metric=metrics)
    loop = 2 * n_layers * n_layers * int(dummy.lengths.sum())  # runs, and blocks of each
    assert ours.tokens < loop / 3
    with Counted(model) as again:
        inject_vectors(model, dummy, whole, run=run, metric=metrics)
    assert again.tokens == len(dummy) * n_layers * (n_layers - 1) / 2  # one token a layer


def test_equal_prompts_run_once_and_keep_their_places():
    model = tv.load_model("reference")
    prompts = make_prompts(model, "country-currency", n_demos=2, n_prompts=40).zero_shot()
    different = len(set(prompts.query))
    assert different < 40
    with Counted(model) as counted:
        found = last_logits(Adapter.of(model), prompts)
    assert counted.tokens == 5 * 3 * different  # layers, and <bos> x is
    whole = Adapter.of(model).run(prompts.tokens)
    np.testing.assert_allclose(found.numpy(), whole.numpy(), atol=1e-5)


# ---------------------------------------------------------------------------------- known truth


@pytest.mark.parametrize("kind", KINDS)
def test_the_planted_local_vector_works_at_its_layer_and_nowhere_else(kind):
    """The writer puts the word there in layer 1, the reader takes it in layer 2."""
    case = planted.build("value_route", backend=kind)
    clean = make_prompts(case.model, case.task, n_demos=4, n_prompts=24)
    contrast = clean.corrupt("inputs", seed=1)
    local = extract_vectors(case.model, contrast.clean)
    scores = inject_vectors(case.model, contrast.corrupted, local)
    assert scores.mean().values.tolist() == [0, 1, 0, 0]
    assert scores.attrs["recipient"] == 0 and scores.attrs["few_shot"] == 1
    for role in ("x", "is"):
        elsewhere = extract_vectors(case.model, contrast.clean, at=role)
        found = inject_vectors(case.model, contrast.corrupted, elsewhere)
        # the inputs themselves are different words, so x works before the writer reads it
        assert found.mean().values.tolist() == ([1, 0, 0, 0] if role == "x" else [0, 0, 0, 0])
    writer = extract_vectors(case.model, contrast.clean, heads=case.writers)
    base = extract_vectors(case.model, contrast.corrupted, heads=case.writers)
    change = replace(writer, data=writer.data - base.data)
    added = inject_vectors(case.model, contrast.corrupted, change, mode="add")
    assert added.mean().values.tolist() == [0, 1, 0, 0]


def test_the_demonstrations_do_not_see_the_query():
    """So local vectors of the same demonstrations behind another query are the same."""
    model = tv.load_model("reference")
    clean = make_prompts(model, "digit", n_demos=4, n_prompts=6)
    ours, theirs = (extract_vectors(model, p).data for p in (clean, clean.other_query()))
    np.testing.assert_allclose(ours.values, theirs.values, atol=1e-5)


# ----------------------------------------------------------------------------- prompts of donors


def test_another_query_keeps_the_demonstrations_and_asks_by_the_same_rule():
    model = tv.load_model("reference")
    for name in ("country-capital", "digit", "lookup"):
        clean = make_prompts(model, name, n_demos=4, n_prompts=12, seed=3)
        other = clean.other_query(seed=2)
        assert other.demos == clean.demos
        for before, after in zip(clean.samples, other.samples, strict=True):
            assert before.query != after.query and after.answer == before.rule(after.query)
            assert after.foil != after.answer and after.rule_name == before.rule_name
            if name == "digit":
                assert {after.answer, after.foil} == {before.answer, before.foil}
        assert clean.other_query(seed=2).texts == other.texts != clean.other_query(seed=4).texts


def test_fewer_demonstrations_are_kept_in_the_order_given():
    model = tv.load_model("reference")
    clean = make_prompts(model, "country-capital", n_demos=4, n_prompts=3)
    kept = clean.keep_demos([2, 0])
    assert kept.demos == tuple((d[2], d[0]) for d in clean.demos) and kept.query == clean.query
    assert kept.n_demos == 2
    with pytest.raises(PromptError, match="demonstration 4 does not exist: these prompts have 4"):
        clean.keep_demos([4])


def test_rows_that_cannot_be_built_are_an_error_so_that_rows_always_match():
    model = tv.load_model("reference")
    clean = make_prompts(model, "country-capital", n_demos=2, n_prompts=2)
    broken = [clean.samples[0], clean.samples[1]._replace(foil=clean.samples[1].answer)]
    with pytest.raises(PromptError, match="1 of 2 prompts cannot be built, first number 1: answer"):
        clean.with_samples(broken)


def test_a_task_without_rules_has_no_other_query():
    case = planted.build("value_route")
    clean = make_prompts(case.model, case.task, n_demos=4, n_prompts=2)
    with pytest.raises(PromptError, match="carry no rule"):
        clean.other_query()


# -------------------------------------------------------------------------------- files, errors


def test_vectors_come_back_from_a_file_and_one_seed_gives_one_file(tmp_path):
    model = tiny_model("llama", KINDS[0])
    vectors = extract_vectors(model, rugged(model))
    for name in ("a.nc", "b.nc"):
        vectors.save(tmp_path / name)
    assert (tmp_path / "a.nc").read_bytes() == (tmp_path / "b.nc").read_bytes()
    back = Vectors.load(tmp_path / "a.nc")
    assert back.data.identical(vectors.data) and back.attrs == vectors.attrs
    assert (back.role, back.model) == (vectors.role, vectors.model)
    np.testing.assert_array_equal(back.pos_avg("class").data, vectors.pos_avg("class").data)
    inject_vectors(model, rugged(model), back, layers=[0, 1])
    with pytest.raises(FileError, match="there is no such file"):
        Vectors.load(tmp_path / "none.nc")
    scores = inject_vectors(model, rugged(model), back, layers=1)
    scores.save(tmp_path / "scores.nc")
    assert tv.Scores.load(tmp_path / "scores.nc").attrs == scores.attrs
    with pytest.raises(FileError, match="is no vectors file of tv_interp"):
        Vectors.load(tmp_path / "scores.nc")


def test_bad_input_is_one_line_that_says_what_would_fit():
    model, other = tiny_model("llama", KINDS[0]), tiny_model("gpt2", KINDS[0])
    clean = rugged(model)
    vectors = extract_vectors(model, clean)

    def refuse(error, message, *args, **settings):
        with pytest.raises(error, match=message) as caught:
            inject_vectors(*args, **settings)
        assert "\n" not in str(caught.value)

    refuse(
        TvInterpError, "layer 3 is outside of .*: expected 0 to 2", model, clean, vectors, layers=3
    )
    refuse(TvInterpError, "layer -1 is outside", model, clean, vectors, layers=[0, -1])
    refuse(TvInterpError, "at least one layer", model, clean, vectors, layers=[])
    refuse(UnknownName, "unknown layers 'last'", model, clean, vectors, layers="last")
    refuse(UnknownName, "unknown role 'anser': did you mean", model, clean, vectors, at="anser")
    refuse(UnknownName, "unknown mode", model, clean, vectors, mode="multiply")
    refuse(UnknownName, "unknown how", model, clean, vectors, how="all")
    refuse(UnknownName, "unknown metric", model, clean, vectors, metric="acuracy")
    refuse(
        PromptError, r"donors have 3 demonstrations, the recipients 2: use donors of 2 ",
        model, rugged(model, n_demos=2), vectors,
    )  # fmt: skip
    refuse(PromptError, r"average them with pos_avg\(\)", model, clean, vectors, at="query_is")
    refuse(
        PromptError, r"vectors of 4 prompts and 3 recipients.*trial_avg\(\)",
        model, clean.select([0, 1, 2]), vectors,
    )  # fmt: skip
    refuse(
        TvInterpError, "have 3 layers of d_model 60, .* has 3 of 64: extract them from the same",
        other, rugged(other), vectors,
    )  # fmt: skip
    stranger = replace(vectors, model="another")
    refuse(TvInterpError, "vectors of another do not fit", model, clean, stranger)
    with pytest.raises(UnknownName, match="unknown role 'anwser'"):
        extract_vectors(model, clean, at="anwser")
    with pytest.raises(TvInterpError, match="outside of"):
        extract_vectors(model, clean, heads=[(0, 9)])
    with pytest.raises(PromptError, match="not every prompt has"):
        extract_vectors(model, clean.zero_shot(), at="answer")
    with pytest.raises(UnknownName, match="unknown average 'label'"):
        vectors.pos_avg("label")
    with pytest.raises(TvInterpError, match="no demonstrations to average over"):
        extract_vectors(model, clean, at="query_is").pos_avg()
    with pytest.raises(TvInterpError, match="an average over prompts already"):
        vectors.trial_avg().trial_avg()
    with pytest.raises(TvInterpError, match="classes differ from prompt to prompt"):
        vectors.trial_avg().pos_avg("class")
    with pytest.raises(TvInterpError, match="expected dims in the order of"):
        replace(vectors, data=vectors.data.transpose("layer", "prompt", "demo", "d_model"))
