"""The experiments as a user runs them: quick preset, thresholds, files, figures, command."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from tv_interp import cli
from tv_interp.errors import TvInterpError, UnknownName
from tv_interp.show.linear import FIGURES, linear_figures, plot_linear, write_linear_page
from tv_interp.theory import experiments
from tv_interp.theory.experiments import PRESETS, SECTIONS, run_linear
from tv_interp.theory.report import Check, Finding, LinearReport, Section

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report() -> LinearReport:
    return run_linear("quick", seed=0)


def tiny() -> LinearReport:
    checks = (Check("one", 1.0, "relative", 0.01, 1.005), Check("<two>", 3.0, "below", 2.0))
    section = Section(checks, (Finding("three", 0.5, "beyond & more"),))
    return LinearReport({"only": section}, {"preset": "quick", "seed": 0})


def test_every_threshold_of_the_quick_preset_is_met(report):
    assert [str(c) for c in report.checks if not c.passed] == []
    assert report.passed and len(report.checks) > 40


def test_the_table_fits_80_columns(report):
    long = "a name that is much longer than what a column of forty-four can hold"
    check = Check(long, 3.0, "absolute", 0.01, 2.0)
    finding = Finding(long, 0.5, "a comment of many words, " * 6)
    missed = LinearReport({long * 2: Section((check,), (finding,))}, {"preset": "quick"})
    for shown in (report, missed):
        assert max(map(len, str(shown).splitlines())) <= 80
    told = " ".join(str(missed).split())
    assert told.count("MISSED") == 1 and "0 of 1 thresholds met" in told
    assert "column of forty-four can hold 3.0000 2.0000 within 0.01" in told


def test_every_section_runs_in_some_preset_and_the_full_one_has_all():
    assert set(PRESETS["full"].sections) == set(SECTIONS)
    assert set(PRESETS["quick"].sections) < set(SECTIONS)


def test_all_figures_are_drawn_from_the_report_with_labels(report):
    names = linear_figures(report)
    assert set(names) == set(FIGURES)
    for name in names:
        figure = plot_linear(report, name)
        assert figure.data and figure.layout.title.text
        for trace in figure.data:
            if trace.type == "heatmap":
                assert trace.zmid == 0 and trace.zmin == -trace.zmax and trace.zmax > 0


def test_figures_show_the_numbers_of_the_report(report):
    figure = plot_linear(report, "error against rank")
    shown = next(t for t in figure.data if t.name == "1 vector")
    expected = report.data["error against rank"].sel(part="1 vector", bound="value").values
    np.testing.assert_allclose(shown.y, expected, rtol=1e-5, atol=1e-9)
    bars = plot_linear(report, "bijections")
    shown = next(t for t in bars.data if t.name == "1 vector")
    assert dict(zip(shown.x, shown.y, strict=True))["both ways"] == pytest.approx(0.5, abs=0.03)


def test_saliency_is_strongest_within_demonstrations_and_into_the_end(report):
    found = report.data["saliency"]
    first = found.sel(layer=1)
    assert float(first.sel(src="x1", dest="y1")) > 5 * float(first.sel(src="x1", dest="y2"))
    assert float(found.sel(layer=2, dest="end").sum()) == pytest.approx(
        float(found.sel(layer=2).sum())
    )


def test_one_seed_gives_identical_files_that_hold_every_number(report, tmp_path):
    first = report.save(tmp_path / "a").read_bytes()
    again = report.save(tmp_path / "b").read_bytes()
    assert first == again
    found = json.loads(first)
    assert found["passed"] and found["settings"]["preset"] == "quick"
    checks = [c for s in found["sections"].values() for c in s["checks"]]
    assert [c["value"] for c in checks] == [c.value for c in report.checks]
    assert all(c["threshold"] for c in checks)


def test_a_section_gives_the_same_numbers_again(report):
    sizes = replace(PRESETS["quick"], sections=("one layer",))
    again = experiments.one_layer(experiments._Lab(sizes, 0))
    assert again.checks == report.sections["one layer"].checks


def test_the_page_says_what_was_missed_and_escapes_names(tmp_path):
    write_linear_page(tmp_path / "page.html", tiny())
    text = (tmp_path / "page.html").read_text("utf-8")
    assert "1 of 2 thresholds met; missed: &lt;two&gt;" in text and "<two>" not in text
    assert "beyond &amp; more" in text
    with pytest.raises(TvInterpError, match="expected a LinearReport .*got dict"):
        write_linear_page(tmp_path / "page.html", {})  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="unknown figure 'D'"):
        plot_linear(tiny(), "D")


def test_checks_know_whether_they_passed():
    assert Check("", 1.019, "relative", 0.02, 1.0).passed
    assert not Check("", 1.03, "relative", 0.02, 1.0).passed
    assert Check("", 0.51, "absolute", 0.02, 0.5).passed
    assert not Check("", 0.47, "absolute", 0.02, 0.5).passed
    assert Check("", 0.9, "below", 1).passed and not Check("", 1.0, "below", 1).passed
    assert Check("", 1.1, "above", 1).passed and not Check("", float("nan"), "above", 1).passed
    assert not Check("", float("nan"), "relative", 1, 1.0).passed


def test_the_command_writes_both_files_and_exits_1_when_a_threshold_is_missed(
    report, monkeypatch, tmp_path, capsys
):
    for given, code in ((report, 0), (tiny(), 1)):
        monkeypatch.setattr(experiments, "run_linear", lambda *a, given=given, **k: given)
        try:
            cli.main(["linear", "--preset", "quick", "--out", str(tmp_path / str(code))])
            found = 0
        except SystemExit as stop:
            found = stop.code
        assert found == code
        assert sorted(p.name for p in (tmp_path / str(code)).iterdir()) == [
            "linear.html",
            "linear.json",
        ]
        out = capsys.readouterr().out
        assert "thresholds met" in out and ("MISSED" in out) == (code == 1)
    with pytest.raises(SystemExit):
        cli.main(["linear", "--json"])
    assert json.loads(capsys.readouterr().out)["passed"] is False


def test_the_command_refuses_an_unknown_preset(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["linear", "--preset", "fast"])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
