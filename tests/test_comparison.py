"""Local against global vectors: where each works in a planted model, and what donors are."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import tv_interp as tv
from tv_interp.analysis import comparison
from tv_interp.analysis.comparison import attention_by_distance, compare_vectors
from tv_interp.errors import PromptError, TvInterpError
from tv_interp.models import planted
from tv_interp.prompts import get_task, list_tasks, make_prompts

FAMILIES = ("knowledge", "categorization", "bijection", "lookup")


@functools.cache
def reference():
    return tv.load_model("reference")


@functools.cache
def planted_report():
    """The copier puts the answer's word in its place in layer 0, the writer the key in layer 1."""
    case = planted.build("write_then_read")
    return compare_vectors(case.model, case.task, n_demos=5, n_prompts=20)


def curve(report, site):
    return report.scores["test/accuracy"].mean().sel(site=site).values.round(2).tolist()


def test_the_planted_local_vector_works_until_it_is_read_and_its_controls_do_not():
    report = planted_report()
    base = round(float(report.run("dummy").mean()), 2)  # right by chance
    assert base < 0.3
    for site in ("dummy: local", "dummy: local, other query"):
        assert curve(report, site) == pytest.approx([1, 1, base, base], abs=0.01)
    assert report.row("dummy: local").layer == 0 and report.row("dummy: local").lo == 1
    assert report.row("dummy: local").effect > 0.7
    for site in [*report.controls("dummy"), "dummy: at x", "dummy: at is"]:
        assert max(curve(report, site)) < 0.4, site
    assert report.run("few-shot").mean() == 1
    assert "'one-class donors': only categorization has classes" in " ".join(report.notes)


def test_a_global_vector_that_carries_an_answer_works_for_its_own_query_alone():
    report = planted_report()
    own = curve(report, "zero-shot: global")  # found in layer 2, written in layer 3
    assert own[2:] == [1, 1] and max(own[:2]) < 0.3
    assert max(curve(report, "zero-shot: global, other query")[2:]) == 0
    assert max(curve(report, "zero-shot: global, Trial Avg")) < 0.3


def test_the_layer_is_chosen_on_dev_and_reported_on_test():
    report = planted_report()
    dev, test = (report.scores[f"{half}/accuracy"] for half in ("dev", "test"))
    assert not set(dev.clusters) & set(test.clusters)
    for row in report.rows:
        site = f"{row.recipient}: {row.name}"
        assert row.layer == int(dev.mean().sel(site=site).values.argmax())
        at_best = report.at_best(site)
        assert row.value == pytest.approx(at_best.mean())
        assert row.effect == pytest.approx((at_best - report.run(row.recipient)).mean())
        assert 0 <= row.lo <= row.value <= row.hi <= 1
        assert row.metrics["accuracy"] == pytest.approx(row.value)


def test_the_report_fits_80_columns_and_its_files_have_one_seed_one_byte(tmp_path):
    report = planted_report()
    assert max(map(len, str(report).splitlines())) <= 80
    assert "CONTROLS" in str(report) and "PROBES" in str(report)
    for name in ("a", "b"):
        report.save(tmp_path / name)
    for name in ("vectors.json", "scores.nc"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    back = tv.Scores.load(tmp_path / "a" / "scores.nc", "test/accuracy")
    assert back.data.identical(report.scores["test/accuracy"].data)
    runs = tv.Scores.load(tmp_path / "a" / "scores.nc", "test/accuracy/runs")
    assert runs.data.identical(report.runs["test/accuracy"].data)
    with pytest.raises(TvInterpError, match="no curve 'dummy: lokal': there are"):
        report.row("dummy: lokal")


def test_dummies_of_a_relation_have_answers_of_other_relations():
    clean = make_prompts(reference(), "country-capital", n_demos=6, n_prompts=8)
    contrast = clean.dummies(seed=3)
    own = set(clean.task.answers)
    for ours, theirs in zip(contrast.clean.demos, contrast.corrupted.demos, strict=True):
        assert [x for x, _ in ours] == [x for x, _ in theirs]
        assert not own & {y for _, y in theirs}
    assert torch.equal(contrast.clean.foil, clean.foil[: len(contrast)])
    assert clean.dummies(seed=3).corrupted.texts == contrast.corrupted.texts
    digit = make_prompts(reference(), "digit", n_demos=6, n_prompts=8)
    assert (
        digit.dummies(seed=3).corrupted.texts
        == digit.corrupt("random_answers", seed=3).corrupted.texts
    )


def test_donors_are_what_their_names_say():
    clean = make_prompts(reference(), "digit", n_demos=6, n_prompts=12, seed=2)
    for name, make in comparison._DONORS.items():
        rows, donors = make(clean, 1)
        assert len(rows) == len(donors) >= 9
        for row, sample in zip(rows, donors.samples, strict=True):
            ours = clean.samples[row]
            words, labels = zip(*sample.demos, strict=True)
            before, right = zip(*ours.demos, strict=True)
            assert sample.query == ours.query
            if name in ("random-answer donors", "shuffled donors", "same x, other rule"):
                assert words == before
            if name == "shuffled donors":
                assert sum(a != b for a, b in zip(labels, right, strict=True)) in (2, 3)
            if name == "same x, other rule":
                assert all(a != b for a, b in zip(labels, right, strict=True))
            if name == "same rule, other x":
                assert labels == right and not set(words) & set(before)
                assert all(ours.rule(x) == y for x, y in sample.demos)
            if name == "one-class donors":
                assert len(set(labels)) == 1 and all(ours.rule(x) == y for x, y in sample.demos)


def test_noise_is_as_long_as_what_it_stands_for():
    case = planted.build("write_then_read")
    clean = make_prompts(case.model, case.task, n_demos=4, n_prompts=6)
    side = comparison._Side(case.model, clean, 0, [])
    base = tv.extract_vectors(case.model, side.dummy).data
    noise, random = side._noise(side.local.data, base)
    for made, expected in ((noise - base, side.local.data - base), (random, side.local.data)):
        length, wanted = (np.linalg.norm(v.values, axis=-1) for v in (made, expected))
        np.testing.assert_allclose(length, wanted, rtol=1e-4, atol=1e-5)


def test_attention_by_distance_is_the_rank_correlation_in_each_prompt():
    prompts = make_prompts(reference(), "digit", n_demos=6, n_prompts=3)
    scores = attention_by_distance(reference(), prompts)
    pattern = []
    with torch.no_grad():
        reference().run_with_hooks(
            prompts.tokens[1:2],
            fwd_hooks=[("blocks.2.attn.hook_pattern", lambda a, hook: pattern.append(a[0, 3, -1]))],
        )
    attention = pattern[0][prompts.positions("answer")[1]]
    near = [-abs(int(x) - int(prompts.query[1])) for x, _ in prompts.demos[1]]
    expected = spearmanr(near, attention.numpy()).statistic
    assert float(scores.data.sel(prompt=1, layer=2, head=3)) == pytest.approx(expected)
    assert comparison._distance("3 4", "1 9") == 7 and comparison._distance("a b c", "q") == 2
    with pytest.raises(PromptError, match="expected three demonstrations or more, got 2"):
        attention_by_distance(reference(), make_prompts(reference(), "digit", n_demos=2))


@pytest.mark.slow
@pytest.mark.parametrize("name", [list_tasks(f)[0] for f in FAMILIES])
def test_every_family_of_tasks_can_be_compared(name):
    report = compare_vectors(reference(), name, n_demos=4, n_prompts=6)
    expected = {"dummy: local", "zero-shot: global, Trial Avg", "zero-shot: global, other query"}
    assert expected <= {f"{r.recipient}: {r.name}" for r in report.rows}
    assert report.settings["select"] == (
        "choice" if get_task(name).family == "categorization" else "accuracy"
    )
    assert {f"dummy: {c}" for c in comparison._CONTROLS} <= set(report.controls("dummy"))
