"""Figures, views and the report: what is drawn is what was measured, and nothing else happens."""

from __future__ import annotations

import functools
import html
import itertools
import json
import math
import os
import re
import urllib.request
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from markupsafe import escape

from tv_interp.analysis.circuits import Circuit, discover_circuit
from tv_interp.analysis.comparison import compare_vectors
from tv_interp.analysis.faithfulness import CircuitReport, evaluate_circuit
from tv_interp.analysis.features import Geometry
from tv_interp.analysis.find import HeadReport, find_heads
from tv_interp.analysis.graph import RoleGraph
from tv_interp.analysis.heads import patch_heads
from tv_interp.analysis.saliency import saliency_flow
from tv_interp.display import readable
from tv_interp.errors import FileError, ScoreError, TvInterpError, UnknownName
from tv_interp.models import planted
from tv_interp.prompts import Contrast, make_prompts
from tv_interp.scores import Scores
from tv_interp.show import plots, views
from tv_interp.show.report import effects_by_demo, write_report

EVIL = '<img/src="x"/onerror="window.pwned=1">'
TOKENS = [
    "<bos>",
    "</s>",
    EVIL,
    "a\nb",
    "\t",
    " two  words",
    "🦊",
    "שלום",
    "</script>",
    "&amp;",
    "",
]
LAYER_FACTOR = ("layer", "factor")
MANY = 108  # tokens of 4 heads that are too many for circuitsvis


@functools.cache
def found() -> HeadReport:
    case = planted.build("write_then_read")
    return find_heads(case.model, case.task, n_demos=5, n_prompts=16, corruptions=case.corruptions)


@functools.cache
def nothing() -> HeadReport:
    case = planted.build("nothing")
    return find_heads(case.model, case.task, n_demos=3, n_prompts=8, corruptions=case.corruptions)


@functools.cache
def circuit_report() -> CircuitReport:
    case = planted.build("write_then_read")
    prompts = make_prompts(case.model, case.task, n_demos=3, n_prompts=16)
    first, second = (prompts.select(half).corrupt("inputs") for half in (range(8), range(8, 16)))
    circuit = discover_circuit(case.model, first, method="eap", n_edges=30)
    return evaluate_circuit(case.model, second, circuit, n_random=5)


def evil_circuit() -> CircuitReport:
    report = circuit_report()
    tokenizer = EvilTokenizer(report.contrast.clean.tokenizer)
    sides = (report.contrast.clean, report.contrast.corrupted)
    contrast = Contrast(*(replace(side, tokenizer=tokenizer) for side in sides), EVIL)
    attrs = {**report.circuit.attrs, "model": EVIL, "method": EVIL}
    return replace(
        report,
        circuit=replace(report.circuit, attrs=attrs),
        contrast=contrast,
        settings={**report.settings, "task": EVIL, "corruption": EVIL, "model": EVIL},
    )


class EvilTokenizer:
    """The planted tokenizer, but its tokens read like markup."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, *args, **kwargs):
        return self.inner(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def decode(self, ids, **kwargs):
        return TOKENS[ids[0] % len(TOKENS)]


def evil() -> HeadReport:
    report = found()
    prompts = replace(
        report.prompts,
        tokenizer=EvilTokenizer(report.prompts.tokenizer),
        texts=(EVIL,) * len(report.prompts),
    )
    settings = {**report.settings, "task": EVIL, "planted heads": [EVIL]}
    return replace(report, prompts=prompts, settings=settings, notes=(EVIL, "</script>"))


def scores(total: float | None = 4.0, n: int = 12, **sizes) -> Scores:
    rng = np.random.default_rng(0)
    shape = {d: size if isinstance(size, int) else len(size) for d, size in sizes.items()}
    coords = {d: np.arange(s) if isinstance(s, int) else s for d, s in sizes.items()}
    data = xr.DataArray(
        rng.normal(0.5, 1, (n, *shape.values())), dims=("prompt", *shape), coords=coords
    )
    whole = None if total is None else xr.DataArray(np.full(n, total), dims=("prompt",))
    attrs = {"task": "t<b>", "model": "m", "corruption": "task", "direction": "denoise"}
    return Scores(data, "logits", whole, tuple(map(str, range(n))), attrs | {"at": "answer"})


def close(ours, theirs) -> None:
    np.testing.assert_allclose(np.array(ours, dtype=float), np.array(theirs), rtol=1e-5, atol=1e-9)


# ------------------------------------------------------------------------------------------ plots


@pytest.mark.parametrize("total, of", [(4.0, "recovered"), (None, "mean")])
def test_a_heatmap_holds_the_scores_and_marks_what_is_significant(total, of):
    s = scores(total, layer=3, head=5)
    figure = s.plot()
    (trace,) = figure.data
    close(trace.z, getattr(s, of)().values)
    ci = s.ci(of)
    close(np.array(trace.customdata)[..., 0], ci["lo"].values)
    close(np.array(trace.customdata)[..., 1], ci["hi"].values)
    assert (np.array(trace.text) == "•").tolist() == s.significant().values.tolist()
    assert trace.zmid == 0 and trace.zmax == -trace.zmin
    assert figure.layout.yaxis.autorange == "reversed", "layer 0 at the top"
    assert figure.layout.width is None
    assert ("share of total" if total else "logits") in trace.hovertemplate
    for word in ("answer", "task", "denoise", "t&lt;b&gt; on m"):
        assert word in figure.layout.title.text


def test_no_figure_offers_to_send_data_away():
    assert "sendChartToCloud" in scores(layer=2, head=2).plot().layout.modebar.remove
    assert '"showSendToCloud":false' in plots.fragment(scores(layer=2, head=2).plot(), "f")


def test_effects_by_demonstration_are_lines_of_the_strongest_heads():
    s = scores(layer=2, head=3, demo=4)
    figure = s.plot(top=2)
    assert len(figure.data) == 2
    value = s.recovered()
    strongest = np.argsort(-abs(value.values).max(-1).ravel())[:2]
    for trace, flat in zip(figure.data, strongest, strict=True):
        layer, head = divmod(int(flat), 3)
        assert trace.name == f"L{layer}H{head}"
        close(trace.y, value.values[layer, head])
        lo = np.array(trace.y) - np.array(trace.error_y.arrayminus)
        np.testing.assert_allclose(lo, s.ci("recovered")["lo"].values[layer, head], atol=1e-5)
    assert {t.line.dash for t in figure.data} == {"solid", "dash"}, "told apart without colour"


def test_sources_are_bars_by_role_with_a_panel_for_each_head():
    s = scores(
        role=["x", "answer"], part=["value", "both"], site=["L0H0.z@answer", "L1H1.z@answer"]
    )
    figure = s.plot()
    assert len(figure.data) == 4
    value = s.recovered()
    titles = [a.text for a in figure.layout.annotations]
    assert set(titles) == set(value.site.values)
    for i, trace in enumerate(figure.data):
        close(trace.y, value.sel(site=titles[i // 2], part=trace.name).values)
        assert list(trace.x) == ["x", "answer"]


def test_paths_are_a_heatmap_with_a_panel_for_each_input():
    s = scores(sender=["a", "b"], receiver=["c"], via=["k", "v"])
    figure = s.plot(marked=None)
    for i, trace in enumerate(figure.data):
        close(trace.z, s.recovered().values[:, :, i])
    assert [a.text for a in figure.layout.annotations] == ["via k", "via v"]


def test_other_shapes_are_drawn_or_refused():
    close(scores(layer=4).plot().data[0].y, scores(layer=4).recovered().values)
    close(scores(site=["a", "b"]).plot().data[0].y, scores(site=["a", "b"]).recovered().values)
    with pytest.raises(ScoreError, match=r"cannot draw axes .*select or average"):
        scores(layer=2, head=2, role=["x"], part=["both"]).plot()
    with pytest.raises(ScoreError, match="cannot draw axes none"):
        scores().plot()
    with pytest.raises(UnknownName, match="recovered"):
        scores(layer=2, head=2).plot(of="recoverd")


def test_maps_of_a_report_hold_its_scores_and_outline_its_heads():
    report = found()
    figure = plots.plot_heads(report)
    assert len(figure.data) == len(report.scores) == 8
    for trace, (key, s) in zip(figure.data, report.scores.items(), strict=True):
        close(trace.z, s.recovered().values)
        letters = {
            (i, j): letter
            for i, row in enumerate(trace.text)
            for j, letter in enumerate(row)
            if letter
        }
        at = key.split("/")[2]
        assert letters == {
            h.site.at: plots.LETTERS[h.label] for h in report.found if h.site.role == at
        }
    dashes = [shape.line.dash for shape in figure.layout.shapes]
    assert dashes.count("dot") == 4, "writer and copier, each hidden by one corruption"
    assert len(dashes) == 16
    one = plots.plot_heads(report, corruption="inputs", direction="noise", at="answer")
    assert len(one.data) == 1 and one.data[0].zmax == figure.data[0].zmax
    with pytest.raises(UnknownName, match="inputs"):
        plots.plot_heads(report, corruption="input")


def test_sources_and_joint_effects_of_a_report_are_drawn_as_they_are():
    report = found()
    (trace,) = plots.plot_sources(report).data
    for row, head in zip(trace.z, report.found, strict=True):
        assert {r: v for r, v in zip(trace.x, row, strict=True) if v is not None} == pytest.approx(
            head.sources
        )
    figure = plots.plot_joint(report)
    for name, wanted in (
        ("found heads", [j.effect.recovered for j in report.joint if j.control]),
        ("all heads at the role", [j.effect.recovered for j in report.joint if not j.control]),
    ):
        close([t.x[0] for t in figure.data if t.name == name], wanted)
    ranges = [list(t.x) for t in figure.data if t.name == "range of control sets"]
    close(ranges, [[min(j.control), max(j.control)] for j in report.joint if j.control])


def geometry() -> Geometry:
    """What measure_geometry would return, of three layers, with invented numbers."""
    rng = np.random.default_rng(1)
    layers = {"layer": np.arange(3)}
    parts = ["label", "value", "label:value"]
    shares = xr.DataArray(rng.dirichlet(np.ones(3), 3), {**layers, "factor": parts}, LAYER_FACTOR)
    factors = ["label", "value", "label, shuffled", "value, shuffled"]
    blocks = xr.DataArray(
        rng.normal(5, 0.1, (20, 3, 4)), {**layers, "factor": factors}, ("part", *LAYER_FACTOR)
    )
    sites = ["none", "label", "value", "both", "random, rank of label"]
    ablated = scores(None, layer=3, site=sites)
    names = {"abstract": "label", "concrete": "value", "metric": "choice", "task": "t<b>"}
    return Geometry(shares, blocks.mean("part"), blocks, ablated, names | {"model": "m"})


def test_geometry_is_drawn_with_its_intervals_and_its_controls_in_grey():
    found = geometry()
    figure = plots.plot_geometry(found)
    drawn = {(t.yaxis, t.hovertemplate.split(", layer")[0]): t for t in figure.data}
    assert len(drawn) == 3 + 4 + 5
    close(drawn["y", "label:value"].y, found.shares.sel(factor="label:value").values)
    for factor in found.distance.factor.values:
        trace = drawn["y2", factor]
        for layer in range(3):
            cell = {"layer": layer, "factor": factor}
            wanted = found.interval(lambda d, cell=cell: float(d.sel(cell)))
            close((trace.y[layer], *trace.customdata[layer]), wanted)
    table = found.ablated.ci("mean")
    for site in table.site.values:
        trace = drawn["y3", site]
        close(trace.y, table["value"].sel(site=site).values)
        close(np.array(trace.customdata)[:, 0], table["lo"].sel(site=site).values)
    grey = {name for (_, name), trace in drawn.items() if trace.line.color == "#999999"}
    assert grey == {"label, shuffled", "value, shuffled", "random, rank of label"}
    assert "t&lt;b&gt; on m" in figure.layout.title.text


def test_figures_of_a_report_without_heads_say_so():
    for draw in (plots.plot_heads, plots.plot_sources, plots.plot_joint):
        figure = draw(nothing())
        assert not figure.data and figure.layout.annotations[0].text.startswith("No ")


# ------------------------------------------------------------------------------------------ views


def props(view: views.View) -> dict:
    match = re.search(r"CircuitsVis\.render\([^,]+,CircuitsVis\.\w+,(\{.*\})\)\}else", view.html)
    assert match is not None
    return json.loads(match[1])


@pytest.mark.parametrize("token", TOKENS)
def test_tokens_are_shown_as_they_are_and_never_as_markup(token):
    wanted = token.replace("\n", "↵").replace("\t", "⇥") or "∅"
    on_canvas = views.attention_view(np.ones((1, 1, 1)), [token], ["1.1"])
    assert props(on_canvas)["tokens"] == [wanted]
    as_html = views.token_view([token], [1.0])
    assert html.unescape(props(as_html)["tokens"][0]) == wanted
    assert "<" not in props(as_html)["tokens"][0]
    for view in (on_canvas, as_html):
        assert view.html.count("<script") == view.html.count("</script") == 1
        assert EVIL not in view.html


def test_a_view_is_a_closed_element_with_rounded_data_and_no_bundle():
    view = views.attention_view(np.full((2, 3, 3), 1 / 3), list("abc"), ["1.1", "2.0"])
    assert props(view)["attention"] == np.full((2, 3, 3), 0.333).tolist()
    assert props(view)["attentionHeadNames"] == ["1.1", "2.0"]
    assert "/>" not in view.html and view.html.count("<div") == view.html.count("</div>") == 1
    assert len(view.html) < 2000 and "http" not in view.html and view.needs == "circuitsvis"
    assert view == views.attention_view(np.full((2, 3, 3), 1 / 3), list("abc"), ["1.1", "2.0"])


def test_a_notebook_gets_the_bundle_and_nobody_is_asked(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    view = views.token_view(["a"], [1])
    first, second = view._repr_html_(), view._repr_html_()
    assert first.count("globalThis.CircuitsVis=CircuitsVis") == 1
    assert first != second, "one view shown twice has two ids"
    assert first.count("</script") == 2 and "<!--" not in first
    assert "sourceMappingURL" not in first


def test_large_patterns_become_a_heatmap_with_a_choice_of_heads():
    rng = np.random.default_rng(0)
    pattern = np.tril(rng.random((4, MANY, MANY)))
    names = ["0.0", "0.1", "0.2", EVIL]
    view = views.attention_view(pattern, [f"t{i}" for i in range(MANY)], names, name="big")
    assert view.needs == "plotly" and EVIL not in view.html
    match = re.search(r"Plotly\.newPlot\((.*)\);</script>", view.html)
    _, data, layout, config = json.loads(f"[{match[1]}]")
    for ours, trace in zip(pattern, data, strict=True):
        shown = np.array([[0 if v is None else v for v in row] for row in trace["z"]])
        np.testing.assert_allclose(shown, ours, atol=5.1e-4)
    assert [b["label"] for b in layout["updatemenus"][0]["buttons"]][:3] == names[:3]
    assert config["showSendToCloud"] is False
    small = views.attention_view(pattern[:3], [f"t{i}" for i in range(MANY)], names[:3])
    assert small.needs == "circuitsvis"


def test_predictions_are_those_of_the_logits_and_their_words_do_nothing():
    logits = np.random.default_rng(0).normal(0, 3, (4, len(TOKENS)))
    ids = [0, 2, 1, 8, 5]
    shown = props(views.logits_view(ids, logits, lambda token: TOKENS[token], top=3))
    likely = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert [html.unescape(text) for text in shown["prompt"]] == [readable(TOKENS[i]) for i in ids]
    for pos, wanted in enumerate(ids[1:]):
        order = np.argsort(-likely[pos])
        assert shown["correctTokenRank"][pos] == list(order).index(wanted)
        assert shown["correctTokenLogProb"][pos] == pytest.approx(likely[pos, wanted], abs=6e-4)
        assert shown["topKLogProbs"][pos] == pytest.approx(likely[pos, order[:3]], abs=6e-4)
        words = [html.unescape(text) for text in shown["topKTokens"][pos]]
        assert words == [readable(TOKENS[i]) for i in order[:3]]
    assert "<" not in json.dumps(shown)


def test_views_refuse_what_they_cannot_show():
    with pytest.raises(TvInterpError, match="a row for each of 2 tokens but the last.*got 2"):
        views.logits_view([0, 1], np.ones((2, 3)), str)
    with pytest.raises(TvInterpError, match="tokens from 0 to 2 and top from 1 to 3.*got 3 and 1"):
        views.logits_view([0, 3], np.ones((1, 3)), str, top=1)
    with pytest.raises(TvInterpError, match="got 1 and 5"):
        views.logits_view([0, 1], np.ones((1, 3)), str)
    with pytest.raises(TvInterpError, match="not finite"):
        views.logits_view([0, 1], np.full((1, 9), np.inf), str)
    with pytest.raises(TvInterpError, match=r"expected patterns .*\(1, 2, 2\).*got \(1, 3, 3\)"):
        views.attention_view(np.ones((1, 3, 3)), ["a", "b"], ["h"])
    with pytest.raises(TvInterpError, match="3 axes, got 2"):
        views.attention_view(np.ones((3, 3)), ["a"], ["h"])
    with pytest.raises(TvInterpError, match="not finite"):
        views.token_view(["a"], [float("nan")])
    with pytest.raises(TvInterpError, match="one value for each of 2 tokens"):
        views.token_view(["a", "b"], [1.0])
    with pytest.raises(TvInterpError, match="letters, digits and dashes"):
        views.token_view(["a"], [1.0], name='"><script>')


def test_another_output_of_circuitsvis_is_a_clear_error(monkeypatch):
    import circuitsvis.tokens
    from circuitsvis.utils.render import RenderedHTML

    changed = RenderedHTML("", "<div></div><script>show({})</script>")
    monkeypatch.setattr(circuitsvis.tokens, "colored_tokens", lambda **kwargs: changed)
    with pytest.raises(TvInterpError, match=r"another form .*install circuitsvis 1\.43\.3"):
        views.token_view(["a"], [1.0])


# ----------------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    write_report(folder / "found.html", found(), None, command=f"tv-interp {EVIL}")
    write_report(folder / "nothing.html", nothing())
    write_report(folder / "evil.html", evil(), scores(layer=2, head=2))
    write_report(folder / "circuit.html", circuit_report())
    write_report(folder / "evil-circuit.html", evil_circuit())
    write_report(folder / "both.html", found(), scores(layer=2, head=2), circuit_report())
    return {path.stem: path for path in folder.iterdir()}


class Elements(HTMLParser):
    """Every element of a page with its attributes; what stands in scripts is no element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def without_bundles(text: str) -> str:
    return re.sub(r"<script>.{500000,}?</script>", "", text, flags=re.DOTALL)


def cells(text: str, pattern: str) -> list[tuple[float, ...]]:
    attributes = r'data-value="([^"]*)" data-lo="([^"]*)" data-hi="([^"]*)"'
    return [
        tuple(float(v) for v in match)
        for row in re.findall(pattern, text, flags=re.DOTALL)
        for match in re.findall(attributes, row)
    ]


def test_the_report_has_the_numbers_of_the_report(pages):
    text = pages["found"].read_text("utf-8")
    report = found().to_dict()
    embedded = re.search(r'id="heads-json">(.*?)</script>', text, flags=re.DOTALL)
    assert embedded is not None and json.loads(embedded[1]) == json.loads(json.dumps(report))
    for name in ("writers", "copiers", "readers", "relays"):
        (table,) = re.findall(
            rf'<table class="sortable" data-group="{name}">.*?</table>', text, re.S
        )
        (head,) = report[name]
        wanted = [(e["recovered"], e["lo"], e["hi"]) for e in head["effects"]]
        assert cells(table, r"<tr data-site.*?</tr>") == wanted
        assert f'data-site="{head["site"]}"' in table and head["verdict"] in table
    joint = [
        (j["effect"]["recovered"], j["effect"]["lo"], j["effect"]["hi"]) for j in report["joint"]
    ]
    (table,) = re.findall(r'<table class="sortable" id="joint-table">.*?</table>', text, re.S)
    assert cells(table, "<tr>.*?</tr>") == joint
    for run in report["accuracy"].values():
        assert all(f'data-value="{value}"' in text for value in run.values())
    for words in ("100% of the test prompts", "L1H1", "L0H3", "L2H1", "L3H0", "local task vector"):
        assert words in text.split('id="summary-text"')[1].split("</p>")[0]


@pytest.mark.parametrize("name", ["circuit", "both"])
def test_a_circuits_section_has_the_numbers_of_the_saved_files(pages, name, tmp_path):
    report = circuit_report()
    report.save(tmp_path)
    saved = json.loads((tmp_path / "report.json").read_text("utf-8"))
    text = pages[name].read_text("utf-8")
    if name == "circuit":
        embedded = re.search(r'id="report-json">(.*?)</script>', text, flags=re.DOTALL)
        assert embedded is not None and json.loads(embedded[1]) == saved
        assert str(escape("tv.find_circuit(tv.load_model(")) in text
        rows = [re.sub(r"<[^>]+>", " ", row) for row in re.findall('<div class="tokens".*', text)]
        assert len(rows) == 6 and "query_is" in rows[0]
    (table,) = re.findall(r'<table class="evaluation">.*?</table>', text, re.S)
    wanted = [tuple(saved[k].values()) for k in ("faithfulness", "completeness")]
    assert cells(table, "<tr>.*?</tr>") == wanted
    one = float(re.search(r'class="n random" data-value="([^"]*)"', table)[1])
    assert one == pytest.approx(np.mean(saved["random"]))
    assert f'class="n size" data-value="{saved["size"]}"' in table
    (table,) = re.findall(r'<table class="sortable minimality">.*?</table>', text, re.S)
    assert cells(table, "<tr>.*?</tr>") == [tuple(i.values()) for i in saved["minimality"].values()]
    edges = json.loads((tmp_path / "circuit.json").read_text("utf-8"))["edges"]
    (table,) = re.findall(r'<table class="sortable edges">.*?</table>', text, re.S)
    found = [
        (html.unescape(f"{sender}->{into}"), float(weight))
        for sender, into, weight in re.findall(
            r'<td class="w">(.*?)</td><td class="w">(.*?)</td><td class="n" data-value="(.*?)">',
            table,
        )
    ]
    assert dict(found) == edges
    assert [abs(w) for _, w in found] == sorted(map(abs, edges.values()), reverse=True)


@pytest.mark.parametrize("name", ["found", "nothing", "evil", "circuit", "both", "evil-circuit"])
def test_a_report_is_one_small_file_that_names_no_place_to_load_from(pages, name):
    text = pages[name].read_text("utf-8")
    assert len(text.encode()) < 8_000_000
    rest = without_bundles(text)
    assert len(rest) < 300_000
    page = Elements(rest)
    assert {tag for tag, _ in page.seen}.isdisjoint({"img", "link", "iframe", "object", "base"})
    places = [attrs[k] for _, attrs in page.seen for k in ("src", "href", "action") if k in attrs]
    assert len(places) > 8 and all(place.startswith("#") for place in places)
    assert not re.search(r"@import|\bfetch\(|\bimport\(|url\(|XMLHttp|https?:", rest)
    (policy,) = [attrs["content"] for _, attrs in page.seen if "http-equiv" in attrs]
    assert "default-src 'none'" in policy and "connect-src 'none'" in policy
    assert EVIL not in rest
    ids = [attrs["id"] for _, attrs in page.seen if "id" in attrs]
    assert len(ids) == len(set(ids)) and {place[1:] for place in places} <= set(ids)


def test_the_same_inputs_give_the_same_bytes(pages, tmp_path):
    write_report(tmp_path / "again.html", found(), None, command=f"tv-interp {EVIL}")
    assert (tmp_path / "again.html").read_bytes() == pages["found"].read_bytes()


def test_a_report_without_heads_says_so(pages):
    text = pages["nothing"].read_text("utf-8")
    assert "No head was found" in text and text.count("None found.") == 4
    assert all(str(escape(note)) in text for note in nothing().notes)
    assert "CircuitsVis" not in text, "the bundle is there only where it is used"
    assert "tv.find_heads(tv.load_model" in text


@pytest.mark.parametrize("share, told", [(1.0, 0), (1.09, 1)])
def test_a_share_above_the_whole_is_explained_below_it(tmp_path, share, told):
    report = found()
    joint = [
        replace(j, effect=replace(j.effect, recovered=share)) if j.label == "reader" else j
        for j in report.joint
    ]
    write_report(tmp_path / "h.html", replace(report, joint=tuple(joint), model=None))
    circuit = circuit_report()
    faithful = circuit.faithfulness._replace(value=share)
    write_report(tmp_path / "c.html", replace(circuit, faithfulness=faithful))
    for name in "hc":
        text = (tmp_path / f"{name}.html").read_text("utf-8")
        said = text.split('id="summary-text"')[1].split("</p>")[0]
        assert said.count("A share may exceed 100%") == told and f"{share:.0%}" in said


def test_settings_that_the_report_does_not_know_are_caveats(pages):
    notes = pages["evil"].read_text("utf-8").split('id="notes"')[1]
    assert "planted heads" in notes and str(escape(json.dumps([EVIL]))) in notes


def test_a_report_that_was_loaded_without_its_model_is_still_written(tmp_path):
    write_report(tmp_path / "r.html", replace(found(), model=None))
    text = (tmp_path / "r.html").read_text("utf-8")
    assert "Not computed" in text and "Not shown" in text


def test_effects_by_demonstration_are_those_of_patch_heads():
    report = found()
    ours = effects_by_demo(report, n_prompts=4)
    best = report.writers[0].best
    contrast = report.prompts.select(range(4)).corrupt(best.corruption, seed=2)
    theirs = patch_heads(report.model, contrast, direction=best.direction, demos="each")
    layer, head = report.writers[0].site.at
    np.testing.assert_array_equal(ours.data.values[..., 0], theirs.data.values[:, layer, head])
    assert effects_by_demo(nothing()) is None


def test_write_report_refuses_what_it_cannot_show(tmp_path):
    with pytest.raises(TvInterpError, match=r"expected a HeadReport .*got dict"):
        write_report(tmp_path / "r.html", {})
    with pytest.raises(TvInterpError, match="cannot show a str after a HeadReport"):
        write_report(tmp_path / "r.html", found(), "flow")
    with pytest.raises(TvInterpError, match="cannot show a Scores after a CircuitReport"):
        write_report(tmp_path / "r.html", circuit_report(), scores(layer=2, head=2))
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileError, match="cannot write"):
        write_report(tmp_path / "missing" / "r.html", nothing())


# ---------------------------------------------------------------------------------------- browser


DRAWN = """() => [...document.querySelectorAll('.tv-plot')].every(plot => plot.querySelector(
  '.heatmaplayer image, .scatterlayer .trace, .barlayer .trace'))
  && document.querySelectorAll('#attention canvas').length >= HEADS"""
DRAWN_ALL = """() => [...document.querySelectorAll('.tv-plot')].every(plot => plot.querySelector(
  '.heatmaplayer image, .scatterlayer .trace, .barlayer .trace'))
  && [...document.querySelectorAll('.tv-view')].every(view => view.children.length)
  && document.querySelectorAll('.tv-view canvas').length >= 3"""
NUMBER = r"[+-]?\d[\d.]*"
INTERVAL = rf"\[{NUMBER}, {NUMBER}\]|interval {NUMBER} to {NUMBER}"
BLANK = """() => [...document.querySelectorAll('canvas')].filter(canvas => {
  if (!canvas.width) return false;
  const copy = Object.assign(document.createElement('canvas'), {width: 200, height: 200});
  const pen = copy.getContext('2d', {willReadFrequently: true});
  pen.drawImage(canvas, 0, 0, 200, 200);
  const pixels = pen.getImageData(0, 0, 200, 200).data;
  return !pixels.some(value => value);
}).length"""
WIDE = """() => [...document.querySelectorAll('body *')].filter(element =>
  element.getBoundingClientRect().right > innerWidth + 1 && !element.closest('.scroll, .paper, svg')
).map(element => element.outerHTML.slice(0, 80))"""


SCROLLED = """() => [...document.querySelectorAll('.scroll:has(table)')]
  .filter(box => box.clientWidth && box.scrollWidth > box.clientWidth + 1).map(box => {
  const edge = element => element.getBoundingClientRect();
  const row = [...box.querySelectorAll('tbody tr')].at(-1).cells;
  const look = () => ({hint: getComputedStyle(box, '::before').content,
    shade: getComputedStyle(box).boxShadow, focus: box.tabIndex,
    name: edge(row[0]).left - edge(box).left,
    end: edge(row[row.length - 1]).right - edge(box).right});
  const before = look();
  box.scrollLeft = 1e6;
  box.dispatchEvent(new Event('scroll'));
  const after = look();
  box.scrollLeft = 0;
  return {before, after};
})"""


def assert_tables_scroll_visibly(page, *, narrow: bool) -> None:
    """A table that is too wide says so, and keeps its first column in sight."""
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    page.wait_for_timeout(300)
    boxes = page.evaluate(SCROLLED)
    assert len(boxes) >= 2 * narrow
    for box in boxes:
        before, after = box["before"], box["after"]
        assert "scroll sideways" in before["hint"] and before["focus"] == 0
        assert before["end"] > 1 and before["shade"] != "none"
        assert after["end"] < 2 and after["shade"] == "none"
        assert abs(after["name"]) < 2


def assert_circuit_is_alive(page) -> None:
    """Point at an edge and at a node, and leave the paths through a node by a click."""
    plot = page.locator(".tv-plot:has(.updatemenu-container)").first
    plot.scroll_into_view_if_needed()
    look = "plot => plot.data.filter(t => t.mode === 'lines').map(t => t.opacity)"
    before = plot.evaluate(look)
    box, at = plot.bounding_box(), plot.evaluate(
        """plot => {
        const edge = plot.data.filter(t => t.mode === 'lines').at(-1), l = plot._fullLayout;
        const node = plot.data.find(t => t.name === 'logits');
        const place = (t, i) => [l.xaxis.l2p(t.x[i]) + l.xaxis._offset,
                                 l.yaxis.l2p(t.y[i]) + l.yaxis._offset];
        return {edge: place(edge, 8), node: place(node, 0)}; }"""
    )  # fmt: skip
    page.mouse.move(box["x"] + at["edge"][0], box["y"] + at["edge"][1])
    page.wait_for_selector(".hoverlayer .hovertext")
    hover = page.locator(".hoverlayer .hovertext").first.text_content()
    assert "->" in hover or "@" in hover
    page.mouse.move(box["x"] + at["node"][0], box["y"] + at["node"][1])
    page.wait_for_timeout(300)
    assert "logits" in page.locator(".hoverlayer .hovertext").first.text_content()
    names = plot.evaluate("plot => plot.layout.meta.paths")
    name = min(names, key=lambda each: len(names[each]))
    plot.evaluate(
        f"plot => plot.emit('plotly_click', {{points: [{{customdata: {json.dumps(name)}}}]}})"
    )
    page.wait_for_timeout(300)
    faded = plot.evaluate(look)
    assert [i for i, o in enumerate(faded) if o > plots.FADED] == names[name]
    plot.evaluate(
        f"plot => plot.emit('plotly_click', {{points: [{{customdata: {json.dumps(name)}}}]}})"
    )
    page.wait_for_timeout(300)
    assert plot.evaluate(look) == before


@pytest.mark.browser
@pytest.mark.parametrize("name, heads", [("evil", 3), ("nothing", 0), ("evil-circuit", 0)])
def test_the_report_opens_with_the_network_off(browser, pages, tmp_path, name, heads):
    context = browser.new_context(
        offline=True, viewport={"width": 400, "height": 900}, color_scheme="dark"
    )
    context.set_default_timeout(240_000)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[name].as_uri())
    for width, scheme in ((400, "dark"), (1400, "light"), (400, "light"), (1400, "dark")):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(500)
        page.wait_for_function(DRAWN.replace("HEADS", str(heads)))
        assert page.evaluate(WIDE) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(BLANK) == 0
        page.screenshot(path=tmp_path / f"{name}-{width}-{scheme}.png", full_page=True)
        assert_tables_scroll_visibly(page, narrow=width == 400 and name == "evil")
        dark = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert (dark == "rgb(255, 255, 255)") == (scheme == "light")
    assert page.evaluate("window.pwned") is None
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    assert page.locator(".modebar-btn[data-title*=Share]").count() == 0
    if name == "evil-circuit":
        assert_circuit_is_alive(page)
        assert EVIL in " ".join(page.locator(".tokens").all_inner_texts())
    if name == "evil":
        shown = " ".join(page.locator(".tokens").all_inner_texts())
        assert all(token in shown for token in (EVIL, "</s>", "</script>", "שלום", "a↵b"))
        assert EVIL in page.locator("#look-0").inner_text().replace("\xa0", " ")
        button = page.locator("[data-group=writers] th button").nth(2)
        order = "[...document.querySelectorAll('[data-group=writers] tbody td.w:nth-child(2)')]"
        for wanted in (["answers", "inputs"], ["inputs", "answers"]):  # effects 0 and 1
            button.click()
            assert page.evaluate(order + ".map(cell => cell.textContent)") == wanted
    assert said == []
    assert asked == [pages[name].as_uri()]
    context.close()


@pytest.mark.browser
def test_a_figure_shown_by_plotly_itself_has_no_share_button(browser, tmp_path):
    scores(layer=2, head=2).plot().write_html(tmp_path / "figure.html")
    page = browser.new_page()
    page.set_default_timeout(240_000)
    page.goto((tmp_path / "figure.html").as_uri())
    page.wait_for_selector(".modebar-btn", state="attached")
    assert page.locator(".modebar-btn[data-title*=Download]").count() == 1
    assert page.locator(".modebar-btn[data-title*=Share]").count() == 0
    page.close()


@pytest.mark.browser
@pytest.mark.parametrize("words", [4, 20, 40])
def test_a_title_of_any_length_stands_between_the_top_and_the_plot(browser, words):
    page = browser.new_page(viewport={"width": 1000, "height": 600})
    page.set_default_timeout(240_000)
    figure = scores(layer=2, head=2).plot(title="some words " * (words // 2))
    page.set_content("<!doctype html>" + plots.plotly_script() + plots.fragment(figure, "figure"))
    page.wait_for_selector(".gtitle")
    box = "document.querySelector('{}').getBoundingClientRect()"
    top = page.evaluate(box.format("#figure") + ".top")
    title = page.evaluate(box.format(".gtitle") + ".toJSON()")
    assert title["top"] >= top + 3
    assert title["bottom"] <= page.evaluate(box.format(".heatmaplayer image") + ".top")
    page.close()


@pytest.mark.browser
def test_pointing_at_a_cell_tells_its_interval(browser, tmp_path):
    s = scores(layer=2, head=3)
    page = browser.new_page(viewport={"width": 800, "height": 600})
    page.set_default_timeout(240_000)
    page.set_content("<!doctype html>" + plots.plotly_script() + plots.fragment(s.plot(), "f"))
    cell = page.locator(".heatmaplayer image").bounding_box()
    page.mouse.move(cell["x"] + cell["width"] / 6, cell["y"] + cell["height"] / 4)
    page.wait_for_selector(".hoverlayer .hovertext")
    told = page.locator(".hoverlayer .hovertext").text_content()
    ci = s.ci("recovered")
    assert "L0H0" in told
    numbers = re.findall(r"[+-]\d+\.\d+", told.replace("−", "-"))
    wanted = [float(ci[k][0, 0]) for k in ("value", "lo", "hi")]
    assert [float(n) for n in numbers] == pytest.approx(wanted, rel=1e-3)
    page.close()


def crowded_circuit() -> Circuit:
    """All roles, and as many heads at one of them as a row, two rows and six rows can hold."""
    places = ("bos", "x", "is", "answer", "end", "query_x", "query_is", "other")
    sees = frozenset(itertools.product(places, places))
    graph = RoleGraph(3, 12, True, "serial", places, sees)
    edges = {f"L1H{h}@query_is->logits": 0.5 + h / 10 for h in range(12)}
    edges |= {f"L0H{h}@answer->L1H{h}.k@query_is": 0.3 for h in range(12)}
    edges |= {f"L0H{h}@end->L1H{h}.v@query_is": -0.3 for h in range(11)}
    edges |= {f"L0H{h}@{p}->L1.mlp@query_is": 0.2 for p in places[-2:-1] for h in (0, 11)}
    edges |= {f"L0H{h}@{p}->L1H0.k@query_is": 0.2 for p in places[:3] for h in (0, 5, 11)}
    edges |= {f"L0H{h}@{p}->L1H0.k@query_is": 0.2 for p in ("query_x",) for h in (0, 11)}
    edges |= {f"L0H{h}@other->L1H0.k@other": 0.2 for h in (10, 11)}
    return Circuit(graph, edges, {})


HEADS = """() => [...document.querySelectorAll('.tv-plot')].map(plot => {
  const box = e => {
    const b = e.getBoundingClientRect();
    return [b.left, b.top, b.right, b.bottom];
  };
  const traces = [...plot.querySelectorAll('.scatterlayer .trace')];
  const heads = traces.find(t => t.querySelector('text'));
  return {
    labels: [...heads.querySelectorAll('text')].map(t => ({text: t.textContent, box: box(t),
      size: parseFloat(getComputedStyle(t).fontSize), ink: getComputedStyle(t).fill})),
    circles: [...heads.querySelectorAll('.point')].map(p => ({box: box(p),
      ground: getComputedStyle(p).fill})),
    nodes: [...plot.querySelectorAll('.scatterlayer .point')].map(box),
    frame: box(plot.querySelector('.main-svg'))};
})"""


def inside(inner, outer, slack: float = 0.0) -> bool:
    left, top = inner[0] >= outer[0] - slack, inner[1] >= outer[1] - slack
    return left and top and inner[2] <= outer[2] + slack and inner[3] <= outer[3] + slack


def apart(one, other, slack: float) -> bool:
    """Whether two circles, or what stands for them, overlap by less than some pixels."""
    (x, y), (u, v) = (((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in (one, other))
    return math.hypot(x - u, y - v) >= (one[2] - one[0] + other[2] - other[0]) / 2 - slack


@pytest.mark.browser
def test_every_head_of_a_circuit_has_its_number_in_a_circle_of_its_own(browser, tmp_path):
    style = re.search(
        r"<style>.*?</style>", plots.read_asset("tv_interp.show", "base.html.j2"), re.S
    )
    assert style is not None
    circuits = crowded_circuit(), circuit_report().circuit
    page, said, asked = watched(browser, 400, "dark")
    page.set_content(
        f"<!doctype html>{style[0]}<body>{plots.plotly_script()}"
        + "".join(plots.fragment(c.plot(title=""), f"c-{i}") for i, c in enumerate(circuits))
    )
    page.wait_for_function("document.querySelectorAll('.tv-plot .textpoint').length > 40")
    for width, scheme in ((400, "dark"), (1400, "light"), (400, "light"), (1400, "dark")):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(500)
        page.screenshot(path=tmp_path / f"{width}-{scheme}.png", full_page=True)
        for circuit, drawn in zip(circuits, page.evaluate(HEADS), strict=True):
            names = [re.search(r"H(\d+)@", node) for node in circuit.nodes]
            assert sorted(d["text"] for d in drawn["labels"]) == sorted(n[1] for n in names if n)
            for label, circle in zip(drawn["labels"], drawn["circles"], strict=True):
                assert inside(label["box"], circle["box"], slack=1) and label["size"] >= 10
                assert inside(circle["box"], drawn["frame"])
                assert (
                    label["ink"] == "rgb(34, 34, 34)" and circle["ground"] == "rgb(255, 255, 255)"
                )
            for one, other in itertools.combinations(drawn["nodes"], 2):
                assert apart(one, other, slack=1.5), "their borders may touch"
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert said == [] and asked == []
    page.context.close()


def test_a_circuit_too_wide_for_a_small_screen_scrolls_and_stays_legible():
    places = tuple(f"answer[{i}]" for i in range(20)) + ("query_is",)
    graph = RoleGraph(1, 4, False, "serial", places, frozenset((p, "query_is") for p in places))
    edges = {f"embed@{p}->L0H{h}.k@query_is": 1.0 for p in places for h in range(4)}
    circuit = Circuit(graph, edges | {f"L0H{h}@query_is->logits": 1.0 for h in range(4)}, {})
    text = plots.fragment(circuit.plot(top=None), "wide")
    least = re.match(r'<div class="scroll".*?min-width:(\d+)px', text)
    assert least is not None and 21 * 2 * 17 < int(least[1]) < 1000
    assert "scroll" not in plots.fragment(scores(layer=2, head=2).plot(), "plain")


def shown_views(n: int) -> list[views.View]:
    """Attention, coloured tokens (write, read, saliency) and predictions, in turn."""
    rng = np.random.default_rng(0)
    size = len(TOKENS)
    pattern = np.tril(rng.random((2, size, size)))
    makers = (
        lambda i: views.attention_view(pattern, TOKENS, ["0.0", "1.1"], name=f"view-{i}"),
        lambda i: views.token_view(TOKENS, rng.normal(size=size), name=f"view-{i}"),
        lambda i: views.logits_view(
            [*range(size), 0], rng.normal(size=(size, size)), TOKENS.__getitem__, name=f"view-{i}"
        ),
    )
    return [makers[i % 3](i) for i in range(n)]


def test_twenty_views_of_circuitsvis_make_a_small_page():
    text = views.bundle_script() + "".join(view.html for view in shown_views(20))
    assert len(text.encode()) < 3_000_000


@functools.cache
def shown_figures() -> dict[str, str]:
    """One of each kind of figure, as a fragment of a page."""
    case = planted.build("write_then_read")
    prompts = make_prompts(case.model, case.task, n_demos=3, n_prompts=8)
    vectors = compare_vectors(case.model, case.task, n_demos=3, n_prompts=16)
    rng = np.random.default_rng(0)
    pattern = np.tril(rng.random((4, MANY, MANY)))
    figures = {
        "effects": scores(layer=3, head=5).plot(),
        "heads": plots.plot_heads(found(), corruption="inputs", direction="denoise"),
        "circuit": circuit_report().plot(),
        "flow": plots.plot_flow(saliency_flow(case.model, prompts)),
        "demos": plots.plot_scores(effects_by_demo(found(), n_prompts=4)),
        "layers": scores(layer=4).plot(),
        "vectors": plots.plot_vectors(vectors),
        "geometry": plots.plot_geometry(geometry()),
        "parts": scores(role=["x", "answer"], part=["value", "both"], site=["L0H0"]).plot(),
        "joint": plots.plot_joint(found()),
        "paths": scores(sender=["a", "b"], receiver=["c"], via=["k", "v"]).plot(),
    }
    tokens = [f"t{i}" for i in range(MANY)]
    large = views.attention_view(pattern, tokens, ["0.0", "0.1", "0.2", "1.0"], name="attention")
    out = {name: plots.fragment(figure, name) for name, figure in figures.items()}
    return out | {large._name: large.html}


POINT = """name => {
  const plot = document.getElementById(name), layout = plot._fullLayout;
  const trace = plot._fullData.findLast(t => t.visible === true && t.hoverinfo !== 'skip' &&
    (t.type !== 'scatter' || t.customdata || t.hovertemplate.includes('[')));
  const axis = letter => layout[letter + 'axis' + (trace[letter + 'axis'] || '').slice(1)];
  const [x, y] = [axis('x'), axis('y')], i = trace.mode === 'lines' ? 8 : 0;
  const at = letter => trace[letter] ? trace[letter][i] : i;
  const bar = trace.type === 'bar';
  const box = plot.getBoundingClientRect();
  return [box.left + x._offset + x.d2p(at('x')) + (bar ? 10 : 0),
          box.top + y._offset + y.d2p(bar ? at('y') / 2 : at('y'))];
}"""


@pytest.mark.browser
@pytest.mark.parametrize("width, scheme", [(400, "dark"), (1400, "light")])
def test_twenty_figures_of_every_kind_stand_in_one_page(browser, tmp_path, width, scheme):
    figures = shown_figures()
    shown = shown_views(20 - len(figures))
    assert len(shown) == 8
    style = re.search(
        r"<style>.*</style>", plots.read_asset("tv_interp.show", "base.html.j2"), re.S
    )
    assert style is not None
    head = f"<!doctype html><meta charset=utf-8>{style[0]}" + plots.plotly_script()
    body = [f'<div class="paper">{view.html}</div>' for view in shown] + list(figures.values())
    text = head + views.bundle_script() + "".join(body) + "<p id=end>end"
    assert len(text.encode()) < 8_000_000
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    page, said, asked = watched(browser, width, scheme)
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_function(DRAWN_ALL)
    page.wait_for_timeout(500)
    assert page.locator(".tv-plot").count() == len(figures)
    assert page.evaluate(BLANK) == 0 and page.locator("#end").is_visible()
    page.screenshot(path=tmp_path / f"page-{width}.png", full_page=True)
    for name in figures:
        page.locator(f"#{name}").scroll_into_view_if_needed()
        page.mouse.move(*page.evaluate(POINT, name))
        page.wait_for_selector(f"#{name} .hoverlayer .hovertext", timeout=20_000)
        told = page.locator(f"#{name} .hoverlayer .hovertext").first.text_content()
        wanted = r"from t\d+ to t\d+" if name == "attention" else INTERVAL
        assert re.search(wanted, told.replace("−", "-")), f"{name}: {told}"
        page.mouse.move(0, 0)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("window.pwned") is None
    assert said == [] and asked == [(tmp_path / "page.html").as_uri()]
    page.context.close()


def watched(browser, width: int, scheme: str):
    """Open a page without a network, and note what it says and asks for."""
    context = browser.new_context(
        offline=True, viewport={"width": width, "height": 900}, color_scheme=scheme
    )
    context.set_default_timeout(240_000)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    return page, said, asked


BUILT = Path(__file__).parent.parent / "docs" / "_build" / "tutorials"


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("width, scheme", [(400, "dark"), (1400, "light")])
@pytest.mark.parametrize("number", range(1, 6))
def test_a_tutorials_page_draws_every_figure_and_asks_nobody(browser, number, width, scheme):
    found = sorted(BUILT.glob(f"0{number}_*.html"))
    if not found and os.environ.get("TV_INTERP_REQUIRE_BROWSER") != "1":
        pytest.skip("there is no docs/_build: make docs")
    (path,) = found
    page, said, asked = watched(browser, width, scheme)
    page.goto(path.as_uri())
    page.wait_for_function(
        "[...document.querySelectorAll('.tv-plot')].every(plot => plot.querySelector("
        "'.heatmaplayer image, .scatterlayer .trace, .barlayer .trace'))"
    )
    assert page.locator(".tv-plot").count() >= 1
    assert page.evaluate(BLANK) == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert said == []
    assert [url for url in asked if not url.startswith(("file://", "data:", "blob:"))] == []
    page.context.close()
