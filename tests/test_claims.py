"""Claims: verdicts follow from intervals, and a planted model gets those that were planted."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from conftest import KINDS

from tv_interp import cli
from tv_interp.analysis.claims import GLOBAL, _Asked, check_claims
from tv_interp.analysis.comparison import VectorReport, compare_vectors
from tv_interp.analysis.verdicts import Claims, judge, verdict_of
from tv_interp.errors import FileError, TvInterpError, UnknownName
from tv_interp.models import planted
from tv_interp.models.load import load_model, reference_directory
from tv_interp.prompts.tasks.categorization import hybrid_task
from tv_interp.scores import Scores
from tv_interp.show.card import claim_tasks
from tv_interp.show.claims import VERDICTS, plot_claims
from tv_interp.show.plots import plot_vectors
from tv_interp.show.report import write_vector_page


@functools.cache
def report():
    case = planted.build("write_then_read")
    return compare_vectors(case.model, case.task, n_demos=4, n_prompts=12)


@functools.cache
def claims() -> Claims:
    case = planted.build("write_then_read", backend="auto")
    return check_claims(case.model, [case.task], n_demos=4, n_prompts=32)


def scores(values) -> Scores:
    data = xr.DataArray(np.asarray(values, dtype=float), dims=("prompt",))
    return Scores(data, "fraction", None, tuple(map(str, range(len(data)))), {})


def test_a_verdict_is_which_side_of_the_least_the_interval_is_on():
    assert verdict_of(0.3, 0.5, 0.25) == "appears" and verdict_of(-0.1, 0.2, 0.25) == "does not"
    assert verdict_of(0.2, 0.3, 0.25) == "undecided" == verdict_of(np.nan, np.nan, 0.25)
    assert verdict_of(0.3, 0.5, 0.25, "below") == "does not"
    assert verdict_of(0.1, 0.2, 0.25, "below") == "appears"


def test_a_share_of_nothing_is_undecided():
    rng = np.random.default_rng(0)
    effect, gap = scores(rng.normal(0.6, 0.2, 40)), xr.DataArray(np.ones(40), dims=("prompt",))
    value, lo, hi, verdict, _ = judge(effect, 0.25, over=gap)
    assert lo < value < hi and verdict == "appears" and value == pytest.approx(0.6, abs=0.1)
    noise = xr.DataArray(rng.normal(0, 1, 40), dims=("prompt",))
    value, *_, verdict, reason = judge(effect, 0.25, over=noise)
    assert np.isnan(value) and verdict == "undecided" and reason == "no gap"


def test_the_planted_look_up_gets_the_verdicts_that_were_planted():
    """Local vectors work and stay apart; the global one holds an answer, no rule."""
    found = {row.text: row for row in claims().rows}
    verdicts = {text: row.verdict for text, row in found.items()}
    assert verdicts["local vectors work in dummy prompts"] == "appears"
    assert verdicts["a global vector works in zero-shot prompts, one trial"] != "appears"
    assert verdicts["Pos Avg fails where all local vectors work"] == "appears"
    assert (
        verdicts["local vectors converge in later layers: one does the work of all"] == "does not"
    )
    order = found["local vectors act at lower layers than the global one (in layers)"]
    assert (order.verdict, order.reason) == ("undecided", "no global vector")
    redundant = "answers are redundant: all but one can be taken away"
    if KINDS[0] == "bridge":  # of native models, whose attention cannot be cut
        assert redundant not in verdicts
        return
    assert verdicts[redundant] == "does not"
    assert verdicts["accuracy falls gradually: half of the answers cost some"] == "appears"
    assert all(row.control for row in claims().rows)


def test_the_table_fits_80_columns_and_names_every_control():
    text = str(claims())
    assert max(map(len, text.splitlines())) <= 80
    for row in claims().rows:
        assert row.verdict in text and row.control.split()[0] in text
    assert len(claims().to_pandas()) == len(claims().rows)
    with pytest.raises(TvInterpError, match="expected at least one task"):
        check_claims(planted.build("nothing").model, [])


def test_claims_come_back_from_a_file_and_make_a_table_for_a_card(tmp_path):
    for name in ("a.json", "b.json"):
        claims().save(tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    back = Claims.load(tmp_path / "a.json")
    assert str(back) == str(claims()) and back.to_markdown() == claims().to_markdown()
    lines = back.to_markdown().splitlines()
    assert len(lines) == 2 + len({row.text for row in claims().rows})
    assert {line.count("|") for line in lines} == {4}  # claim, one task, control
    assert all(row.control.split(";")[0] in back.to_markdown() for row in back.rows)
    with pytest.raises(FileError, match="expected a file of claims, got .*: No such file"):
        Claims.load(tmp_path / "none.json")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(FileError, match="is no claims file of tv_interp"):
        Claims.load(tmp_path / "a.json")


def test_the_picture_of_claims_has_a_cell_for_each_and_a_colour_for_each_verdict():
    figure = plot_claims([claims()]).data[0]
    names = list(VERDICTS)
    drawn = {y.replace("<br>", " "): (z[0], t[0]) for y, z, t in
             zip(figure.y, figure.z, figure.text, strict=True)}  # fmt: skip
    for row in claims().rows:
        number = f"{row.effect:.2f}" if np.isfinite(row.effect) else ""
        assert drawn[row.text] == (names.index(row.verdict), number)
    both = [claims(), replace(claims(), rows=(replace(claims().rows[0], model="other"),))]
    wide = plot_claims(both).data[0]
    assert len(wide.x) == 2 and np.isnan(wide.z[1][1]) and wide.customdata[1][1] == "not asked"
    with pytest.raises(TvInterpError, match="expected at least one claim"):
        plot_claims([])


@pytest.mark.parametrize("name", ["reference", "reference-natural"])
def test_a_card_has_the_table_of_its_claims_and_verdicts_follow_from_intervals(name):
    directory = reference_directory(name)
    assert directory is not None
    held = Claims.load(directory / "claims.json")
    assert held.settings["n_prompts"] >= 200
    assert held.to_markdown() in (directory / "README.md").read_text("utf-8")
    tasks = [t if isinstance(t, str) else t.name for t in claim_tasks()]
    assert set(tasks) == {row.task for row in held.rows}
    for row in held.rows:
        assert row.control and row.model == name
        decided = verdict_of(row.lo, row.hi, row.least, row.side)
        assert row.verdict == (decided if not row.reason else "undecided"), row


def asked() -> _Asked:
    """Curves that we draw: the local vector works in layer 0 alone, the global one in layer 2."""
    n, sites = 40, ["dummy: local", "dummy: random-answer donors", "zero-shot: global, other query",
                    "zero-shot: global, Trial Avg", "zero-shot: random-answer donors"]  # fmt: skip
    rng = np.random.default_rng(0)
    data = np.zeros((n, 4, 5))
    data[:, 0, 0], data[:, 2, 2] = rng.random((2, n)) < [[0.9], [0.7]]
    coords = {"layer": np.arange(4), "site": sites}
    array = xr.DataArray(data, dims=("prompt", "layer", "site"), coords=coords)
    made = Scores(array, "fraction", None, tuple(map(str, range(n))), {})
    settings = {"select": "accuracy", "model": "m", "task": "t", "family": "knowledge"}
    drawn = {"dev/accuracy": made, "test/accuracy": made}
    return _Asked(VectorReport(drawn, {}, (), settings, ()))


def test_the_order_of_layers_is_that_of_the_curves_and_needs_both_vectors():
    single, averaged = "zero-shot: global, other query", "zero-shot: global, Trial Avg"
    curves = asked()
    curves.local_works = "appears"
    works = curves.claim(GLOBAL, "knowledge", 0.25, "noise", (1, 1, 1, "appears", ""))
    found = curves._order(single, averaged, [works])
    assert found.effect == found.lo == found.hi == 2 and found.verdict == "appears"
    fails = replace(works, verdict="does not")
    assert curves._order(single, averaged, [fails]).reason == "no global vector"
    curves.local_works = "does not"
    assert curves._order(single, averaged, [works]).reason == "no local vectors"


@pytest.mark.slow
def test_what_the_paper_does_not_ask_is_asked_too():
    model = load_model("reference")
    rows = check_claims(model, ["country-currency", hybrid_task()], n_demos=4, n_prompts=12).rows
    ours = {(row.text.split()[1], row.task) for row in rows if row.source == "ours"}
    tasks = ("country-currency", "hybrid-country-continent")
    assert ours == {
        ("familiar", tasks[0]), ("demonstrations", tasks[0]), *(("global", t) for t in tasks)
    }  # fmt: skip
    separate = [row for row in rows if "stays separated" in row.text]
    assert [row.task for row in separate] == [tasks[0]] and separate[0].verdict == "appears"
    assert separate[0].control == "relations shuffled"


def test_the_figure_has_what_was_measured():
    figure = plot_vectors(report())
    drawn = [t for t in figure.data if t.name == "local" and t.mode == "lines+markers"]
    mean = report().scores["test/accuracy"].mean().sel(site="dummy: local")
    np.testing.assert_allclose(drawn[0].y, mean.values, rtol=1e-5)
    grey = [t for t in figure.data if t.name == "controls"]
    assert len(grey) == len(report().controls("dummy")) + len(report().controls("zero-shot"))
    levels = {t.name: t.y[0] for t in figure.data if t.mode == "lines"}
    assert levels["few-shot"] == 1
    with pytest.raises(UnknownName, match="unknown metric 'prob'"):
        plot_vectors(report(), metric="prob")


def test_the_page_asks_no_network_and_escapes_what_it_shows(tmp_path):
    for name in ("a.html", "b.html"):
        write_vector_page(tmp_path / name, report(), command="<b>run</b>")
    text = (tmp_path / "a.html").read_text("utf-8")
    assert (tmp_path / "b.html").read_text("utf-8") == text
    assert "&lt;b&gt;run" in text and "<b>run" not in text
    assert text.count("Plotly.newPlot(") == 3 and "default-src 'none'" in text
    assert "CONTROLS into dummy" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "digits"], "unknown task 'digits': did you mean 'digit'"),
        (["--template", "{x} foo"], "expected a template with {x} and then {y}"),
        (["--n-prompts", "2"], "expected n_prompts of 4 or more, got 2"),
        (["--n-demos", "60"], "has inputs for at most 44 demonstrations"),
    ],
)
def test_bad_input_is_one_line_before_a_model_is_loaded(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("tv_interp.models.load.load_model", None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["vectors", *arguments])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and len(err.strip().splitlines()) == 1
    assert message in err


@pytest.mark.slow
def test_the_command_writes_its_files(capsys, tmp_path):
    cli.main(["vectors", "--task", "digit", "--n-prompts", "4", "--n-demos", "4", "--out",
              str(tmp_path), "--json"])  # fmt: skip
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told == json.loads((tmp_path / "vectors.json").read_text("utf-8"))
    assert {row["group"] for row in told["curves"]} == {"vector", "control", "probe"}
    assert told["settings"]["select"] == "choice" and "test/accuracy" in told["lines"]
    assert {p.name for p in tmp_path.iterdir()} == {"vectors.json", "scores.nc", "report.html"}
    assert "Wrote" in err
