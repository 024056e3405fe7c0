"""Heads alone: planted heads carry all of a vector, others nothing, and parts add up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import KINDS, tiny_model

from tv_interp.analysis.convergence import share_of
from tv_interp.analysis.find import split_prompts
from tv_interp.analysis.head_vectors import _in_the_run, head_vectors, measure_head_shares
from tv_interp.analysis.heads import patch_heads
from tv_interp.analysis.vectors import TODD_CLASSES, extract_vectors, inject_vectors
from tv_interp.errors import ModelError, TvInterpError
from tv_interp.interventions.sites import Site
from tv_interp.models import planted
from tv_interp.prompts import make_prompts
from tv_interp.prompts.roles import parse_role
from tv_interp.prompts.tasks import Task

PLAIN = Task.from_pairs({f"w{i}": f"w{i + 20} w{i + 30}" for i in range(20)})


def plain(arch, kind):
    model = tiny_model(arch, kind)
    return model, make_prompts(
        model, PLAIN, n_demos=3, n_prompts=5, seed=1, template="{x} -> {y} :\n"
    )


# ----------------------------------------------------------------------------------- given heads


@pytest.mark.parametrize("kind", KINDS)
def test_the_planted_writer_carries_all_of_the_local_vector_and_its_controls_nothing(kind):
    case = planted.build("value_route", backend=kind)
    contrast = make_prompts(case.model, case.task, n_demos=4, n_prompts=16).corrupt("inputs")
    found = head_vectors(case.model, contrast, case.writers)
    mean = found.scores.mean()
    assert mean.sel(site="vector").values.round(3).tolist() == [0, 4, 0, 0]
    assert mean.sel(site="heads").values.round(3).tolist() == [0, 4, 0, 0]
    names = [str(s) for s in mean["site"].values if str(s).startswith("control")]
    assert len(found.controls) == 3  # the other heads of layer 1
    assert names == ["control 0", "control 1", "control 2", "controls"]
    assert all((mean.sel(site=name) == 0).all() for name in names)
    share = share_of(found.scores, "heads", "vector")
    assert float(share["value"][1]) == pytest.approx(1) and np.isnan(share["value"].values[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", ["answer", "query_is"])
def test_what_a_set_adds_is_what_its_heads_up_to_that_layer_write(kind, at):
    model, prompts = plain("llama", kind)
    contrast = prompts.corrupt("inputs", seed=2)
    heads = [(0, 1), (1, 0), (1, 3)]
    found = head_vectors(model, contrast, heads, at=at, taken=[(0, 2)])
    ours, theirs = (
        extract_vectors(model, p, at=at, heads=heads) for p in (contrast.clean, contrast.corrupted)
    )
    change = (ours.data - theirs.data.values).cumsum("layer").assign_coords(ours.data.coords)
    dummy = replace(contrast.corrupted, answer=contrast.answer, foil=contrast.foil)
    put = inject_vectors(model, dummy, replace(ours, data=change), mode="add", metric="logit_diff")
    plain_value = put.data.values - found.scores.data.sel(site="heads").values
    np.testing.assert_allclose(np.ptp(plain_value, axis=1), 0, atol=2e-5)  # the dummies as they are
    assert np.abs(found.scores.data.sel(site="heads")).max() > 1e-4
    assert not any((0, 2) in control or set(heads) & set(control) for control in found.controls)
    mean = np.mean(
        [found.scores.data.sel(site=f"control {i}") for i in range(len(found.controls))], 0
    )
    np.testing.assert_allclose(found.scores.data.sel(site="controls"), mean, atol=1e-6)


def test_heads_behind_a_norm_are_refused():
    model, prompts = plain("gemma2", KINDS[0])
    with pytest.raises(ModelError, match="does not add up"):
        head_vectors(model, prompts.corrupt("inputs"), [(0, 0)])


def test_bad_heads_are_refused():
    model, prompts = plain("llama", KINDS[0])
    contrast = prompts.corrupt("inputs")
    with pytest.raises(TvInterpError, match="head L7H0 is outside of"):
        head_vectors(model, contrast, [(7, 0)])
    with pytest.raises(TvInterpError, match="expected at least one head"):
        head_vectors(model, contrast, [])
    with pytest.raises(TvInterpError, match="head L0H9 is outside of"):
        head_vectors(model, contrast, [(0, 0)], taken=[(0, 9)])


def test_all_heads_and_nothing_else_make_the_vector_of_a_model_without_mlps():
    case = planted.build("write_then_read")
    contrast = make_prompts(case.model, case.task, n_demos=4, n_prompts=6).corrupt("answers")
    found = head_vectors(case.model, contrast, [(1, 1)]).scores.data
    whole, heads = found.sel(site="vector"), found.sel(site="all heads")
    assert whole.values[:, 1].mean() > 1
    # the answers' own words differ too, and no head wrote those: but nobody reads them
    np.testing.assert_allclose(heads.values, whole.values, atol=1e-4)


# ----------------------------------------------------------------------------------- found heads


def test_the_found_writers_carry_the_local_and_the_found_readers_the_global_vector():
    case = planted.build("value_route")
    found = measure_head_shares(
        case.model, case.task, n_demos=4, n_prompts=16, corruptions=case.corruptions
    )
    rows = [row for row in found.rows if row.corruption == "inputs"]  # these hide no head here
    assert [(r.label, r.through, r.layer) for r in rows] == [
        ("writer", "alone", 1), ("writer", "run", 1), ("reader", "alone", 2), ("reader", "run", 2)
    ]  # fmt: skip
    for row in rows:
        planted_heads = case.writers if row.label == "writer" else case.readers
        assert [h.at for h in row.heads] == list(planted_heads)
        assert row.vector == pytest.approx(4)
        assert (row.share, row.lo, row.hi, row.above) == pytest.approx((1, 1, 1, 1))
        assert row.controls == pytest.approx((0, 0, 0)) and row.every == pytest.approx(1)
    text = str(found)
    assert max(map(len, text.splitlines())) <= 80
    assert "alone heads 1.00 [1.00, 1.00], all 1.00, random 0.00 (0.00 to 0.00)" in text
    assert len(found.to_pandas()) == len(found.rows)


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_run_heads_up_to_the_vectors_layer_are_exchanged(kind):
    model, prompts = plain("llama", kind)
    contrast = prompts.corrupt("inputs", seed=2)
    heads = [Site(0, 1, "z", "answer"), Site(2, 0, "z", "answer")]
    sets = head_vectors(model, contrast, heads)
    found = _in_the_run(model, contrast, heads, sets, 1, "answer").data
    one = patch_heads(model, contrast, at="answer").data.sel(layer=0, head=1)
    np.testing.assert_allclose(found.sel(site="heads"), one, atol=2e-5)
    vector = sets.scores.data.sel(layer=1, site="vector")
    np.testing.assert_allclose(found.sel(site="vector"), vector, atol=1e-6)
    assert np.abs(one).max() > 1e-4 and len(sets.controls) > 1


def test_shares_come_from_the_half_that_did_not_choose_the_heads():
    case = planted.build("value_route")
    settings: dict = dict(n_demos=4, n_prompts=16, seed=3)
    found = measure_head_shares(case.model, case.task, corruptions=case.corruptions, **settings)
    chose, test = split_prompts(case.model, case.task, **settings)
    reported = set(found.scores["inputs/answer/run"].clusters)
    assert reported <= set(test.query) and not reported & set(chose.query)
    assert set(found.found.prompts.query) == set(test.query)


def test_where_nothing_is_found_there_are_no_shares():
    case = planted.build("nothing")
    found = measure_head_shares(
        case.model, case.task, n_demos=4, n_prompts=16, corruptions=case.corruptions
    )
    assert found.rows == () and str(found).count(": none found") == 2


# ------------------------------------------------------------------------------ function vectors


def test_the_token_classes_of_function_vectors_are_roles():
    """The ten names are those of the published code of arXiv 2310.15213."""
    sides = ["demonstration", "label", "separator", "predictive", "structural", "end_of_example"]
    query = [f"query_{name}" for name in ("demonstration", "structural", "separator", "predictive")]
    assert list(TODD_CLASSES) == sides + query
    _, prompts = plain("llama", KINDS[0])  # its template has a separator
    for name, role in TODD_CLASSES.items():
        parse_role(role)
        if role != "other":
            positions = prompts.positions(role)
            inside = not name.startswith("query_")
            assert tuple(positions.shape) == ((5, 3) if inside else (5,)), name
