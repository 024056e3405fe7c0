"""find_heads finds exactly what was planted, and says so with the right words."""

from __future__ import annotations

import json
from functools import cache

import pytest

import tv_interp as tv
from tv_interp.analysis.find import control_sets, split_prompts
from tv_interp.errors import PromptError
from tv_interp.models import planted


@cache
def case_of(name: str) -> planted.PlantedCase:
    return planted.build(name)


@cache
def report_of(name: str) -> tv.HeadReport:
    case = case_of(name)
    return tv.find_heads(
        case.model, case.task, n_demos=4, n_prompts=24, corruptions=case.corruptions
    )


@pytest.mark.parametrize("name", planted.names())
def test_the_found_sets_are_exactly_the_planted_ones(name):
    case, report = case_of(name), report_of(name)
    for label in ("writers", "copiers", "readers", "relays"):
        found = {head.site.at for head in getattr(report, label)}
        assert found == set(getattr(case, label)), label


@pytest.mark.parametrize("name", [n for n in planted.names() if n != "nothing"])
def test_every_planted_writer_has_a_path_into_a_reader(name):
    report = report_of(name)
    assert all(head.local_vector for head in report.writers)


def test_the_corruption_decides_whether_the_writer_is_visible():
    (writer,) = report_of("write_then_read").writers
    shares = {(e.corruption, e.direction): e.recovered for e in writer.effects}
    assert shares["answers", "denoise"] == pytest.approx(0, abs=1e-4)
    assert shares["answers", "noise"] == pytest.approx(0, abs=1e-4)
    assert shares["inputs", "denoise"] == pytest.approx(1, abs=1e-4)
    assert shares["inputs", "noise"] == pytest.approx(1, abs=1e-4)


def test_redundant_writers_are_sufficient_and_joint_writers_necessary():
    assert {h.verdict for h in report_of("two_writers_or").writers} == {"sufficient"}
    assert {h.verdict for h in report_of("two_writers_and").writers} == {"necessary"}


def test_a_negative_reader_keeps_its_sign():
    readers = {h.site.at: h.best.recovered for h in report_of("negative_reader").readers}
    assert readers[2, 3] == pytest.approx(5 / 3, abs=1e-3)
    assert readers[2, 1] == pytest.approx(-2 / 3, abs=1e-3)


def test_nothing_is_found_where_nothing_is_and_the_report_says_why():
    report = report_of("nothing")
    assert report.found == () and report.joint == ()
    assert len(report.notes) == 2 and "makes no measurable difference" in report.notes[0]


def test_joint_writers_beat_the_control_heads():
    joint = [j for j in report_of("two_writers_or").joint if j.label == "writer"]
    for j in joint:
        assert j.effect.recovered == pytest.approx(1, abs=1e-3)
        assert max(map(abs, j.control)) < 1e-3


def test_sources_name_what_the_writer_carried():
    (writer,) = report_of("value_route").writers
    assert writer.sources["x"] == pytest.approx(1, abs=1e-3)
    (reader,) = report_of("value_route").readers
    assert reader.sources["answer"] == pytest.approx(1, abs=1e-3)


def test_the_table_fits_80_columns_and_names_every_head():
    text = str(report_of("write_then_read"))
    assert max(map(len, text.splitlines())) <= 80
    for name in ("L1H1", "L0H3", "L2H1", "L3H0"):
        assert name in text


def test_two_searches_with_one_seed_save_identical_bytes(tmp_path):
    case = case_of("value_route")
    for name in ("a", "b"):
        report = tv.find_heads(
            case.model, case.task, n_demos=3, n_prompts=12, corruptions=case.corruptions
        )
        report.save(tmp_path / name)
    for file in ("heads.json", "scores.nc"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    saved = json.loads((tmp_path / "a" / "heads.json").read_text())
    assert isinstance(saved["writers"], list) and isinstance(saved["readers"], list)
    loaded = tv.Scores.load(tmp_path / "a" / "scores.nc", group="inputs/denoise/answer")
    kept = report.scores["inputs/denoise/answer"]
    assert loaded.data.identical(kept.data) and loaded.attrs == dict(kept.attrs)


def test_the_halves_share_no_query_item_and_no_rule():
    case = case_of("write_then_read")
    ours, theirs = split_prompts(case.model, case.task, n_demos=4, n_prompts=24, seed=0)
    assert len(ours) == len(theirs) == 24
    assert not set(ours.query) & set(theirs.query)
    assert not {s.rule_name for s in ours.samples} & {s.rule_name for s in theirs.samples}


def test_too_few_items_are_said_instead_of_missed_in_silence():
    case = case_of("value_route")
    few = tv.find_heads(
        case.model, case.task, n_demos=3, n_prompts=4, corruptions=("inputs", "answers")
    )
    assert any("query items in the selection split" in note for note in few.notes)


def test_one_corruption_is_refused():
    case = case_of("value_route")
    with pytest.raises(tv.TvInterpError, match="at least two corruptions.*one alone hides heads"):
        tv.find_heads(case.model, case.task, corruptions=("inputs",))


def test_control_sets_match_layers_and_leave_found_heads_out():
    everything = [(layer, head) for layer in range(3) for head in range(4)]
    sets = control_sets([(0, 0), (2, 1)], everything, {(0, 0), (2, 1), (1, 1)}, seed=0)
    assert len(sets) == 9  # 3 other heads in each of the two layers: enumerated
    assert all([h[0] for h in s] == [0, 2] for s in sets)
    assert not any({(0, 0), (2, 1), (1, 1)} & set(s) for s in sets)
    assert control_sets([(0, 0)] * 9, everything, set(everything[:6]), seed=0) == []


def test_a_default_corruption_that_fits_no_prompt_is_left_out_and_told():
    model = tv.load_model("reference")
    found = tv.find_heads(model, "simple-string", n_demos=4, n_prompts=8)
    assert found.settings["corruptions"] == ["labels", "answers"]
    assert any("left out: corruption 'inputs' fits none" in note for note in found.notes)
    with pytest.raises(PromptError, match="'inputs' fits none"):
        tv.find_heads(model, "simple-string", n_prompts=8, corruptions=("labels", "inputs"))


@pytest.mark.slow
def test_the_heads_that_write_what_they_read_at_the_input_are_found_by_default():
    """In the reference model no head was planted, and those heads show under ``inputs`` alone."""
    found = tv.find_heads(tv.load_model("reference"), "country-capital", n_prompts=24)
    (joint,) = (
        j
        for j in found.joint
        if j.effect.corruption == "inputs"
        and j.effect.direction == "denoise"
        and j.label == "writer"
    )
    hidden = {e.recovered for h in found.writers for e in h.effects if e.corruption == "task"}
    assert joint.effect.recovered > 0.9 and max(hidden) < 0.1
