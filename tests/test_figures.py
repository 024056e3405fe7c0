"""Figures on paper are those on the screen; a circuit's picture knows paths and intervals."""

from __future__ import annotations

import functools
import re
from types import SimpleNamespace

import networkx
import numpy as np
import plotly.graph_objects as go
import pytest
from test_scores import scores

import tv_interp as tv
from tv_interp.models import planted
from tv_interp.prompts import make_prompts
from tv_interp.show import paper, plots
from tv_interp.show.circuit import plot_circuit

matplotlib = pytest.importorskip("matplotlib")


@functools.cache
def case() -> SimpleNamespace:
    built = planted.build("write_then_read")
    prompts = make_prompts(built.model, built.task, n_demos=3, n_prompts=12)
    contrast = prompts.corrupt("inputs")
    edges = tv.score_edges(built.model, contrast, method="eap")
    circuit = tv.discover_circuit(built.model, contrast, scores=edges, n_edges=30)
    return SimpleNamespace(
        model=built.model, prompts=prompts, contrast=contrast, edges=edges, circuit=circuit
    )


def test_edges_carry_the_intervals_of_their_scores(tmp_path):
    circuit, table = case().circuit, case().edges.ci("mean")
    for edge, (low, high) in circuit.intervals.items():
        at = table.sel(edge=edge)
        assert (low, high) == pytest.approx((float(at["lo"]), float(at["hi"])))
        assert low <= circuit.edges[edge] <= high
    assert set(circuit.intervals) == set(circuit.edges)
    circuit.save(tmp_path / "c.json")
    assert tv.Circuit.load(tmp_path / "c.json").intervals == circuit.intervals
    some = circuit & circuit
    assert some.intervals == circuit.intervals
    assert not (circuit - circuit).intervals
    assert (circuit | some).intervals == circuit.intervals
    lines = [t for t in circuit.plot().data if t.mode == "lines"]
    for line in lines:
        low, high = circuit.intervals[line.customdata[0]]
        assert f"95 % interval {low:+.3g} to {high:+.3g}" in line.text[0]


def test_a_node_or_an_edge_is_left_with_the_paths_through_it():
    figure = case().circuit.plot()
    lines = [t.customdata[0] for t in figure.data if t.mode == "lines"]
    graph = networkx.MultiDiGraph()
    for edge in lines:
        start, end = edge.split("->")
        graph.add_edge(start, re.sub(r"\.(q|k|v)@", "@", end), key=edge)
    whole = [
        path
        for first in graph
        if not graph.in_degree(first)
        for path in networkx.all_simple_edge_paths(graph, first, "logits")
    ]
    paths = figure.layout.meta["paths"]
    assert set(paths) == {*graph, *lines}
    for name, kept in paths.items():
        wanted = {key for path in whole for _, _, key in path if any(name in e for e in path)}
        assert {lines[i] for i in kept} == wanted
    writer = min(graph, key=lambda name: len(paths[name]))
    (menu,) = figure.layout.updatemenus
    button = next(b for b in menu.buttons if b.label == f"through {writer}")
    look, which = button.args
    shown = {lines[i] for i, o in zip(which, look["opacity"], strict=True) if o > plots.FADED}
    assert shown == {lines[i] for i in paths[writer]}
    assert "plotly_click" in plots.fragment(figure, "c")
    assert "plotly_click" not in plots.fragment(scores().plot(), "s")


def test_hovering_a_node_tells_what_is_lost_without_it():
    report = tv.evaluate_circuit(case().model, case().contrast, case().circuit, n_random=2)
    texts = [t for trace in report.plot().data if trace.mode != "lines" for t in trace.hovertext]
    node, lost = next(iter(report.minimality.items()))
    assert f"{node}<br>without it faithfulness falls by {lost}" in texts
    assert not any("without" in t for t in plot_circuit(report.circuit).data[-1].hovertext)


def test_flow_is_drawn_by_layer_and_pair_of_roles():
    flow = tv.saliency_flow(case().model, case().prompts)
    (trace,) = plots.plot_flow(flow).data
    mean = flow.mean().sum("head")
    for col, pair in enumerate(trace.x):
        src, dest = pair.split(" → ")
        drawn = np.array(trace.z)[:, col].astype(float)
        np.testing.assert_allclose(drawn, mean.sel(src=src, dest=dest), rtol=1e-4, atol=1e-6)
    left_out = float(abs(mean).sum()) - float(np.abs(np.array(trace.z, dtype=float)).sum())
    assert abs(left_out) < 1e-4
    with pytest.raises(tv.TvInterpError, match="make them with saliency_flow"):
        plots.plot_flow(scores())


def test_a_heatmap_on_paper_has_the_numbers_marks_and_labels_of_the_screen():
    figure = scores().plot()
    with matplotlib.rc_context(paper._STYLE):
        drawn = paper._Drawing(figure.to_dict(), 6.5).figure
    ax, bar = drawn.axes
    mesh = ax.collections[0]
    np.testing.assert_allclose(mesh.get_array().reshape(2, 3), np.array(figure.data[0].z))
    assert mesh.get_clim() == (figure.data[0].zmin, figure.data[0].zmax)
    marks = {(round(t.get_position()[1]), round(t.get_position()[0])) for t in ax.texts}
    assert marks == {tuple(map(int, at)) for at in np.argwhere(scores().significant().values)}
    assert ax.get_xlabel() == "head" and ax.get_ylabel().startswith("layer")
    assert ax.yaxis_inverted() and bar.get_ylabel() == "share of total"
    strongest = np.unravel_index(np.argmin(figure.data[0].z), (2, 3))
    red, _, blue, _ = mesh.to_rgba(np.array(figure.data[0].z)[strongest])
    assert red > blue, "against the task is red"
    title = paper.plain(figure.layout.title.text)
    assert title in " ".join(t.get_text() for t in drawn.texts)


def test_lines_bars_and_circuits_are_drawn_with_their_intervals():
    lines = scores(np.random.default_rng(0).normal(1, 1, (24, 4)), dims=("layer",)).plot()
    with matplotlib.rc_context(paper._STYLE):
        (ax,) = paper._Drawing(lines.to_dict(), 5).figure.axes
        circuit = paper._Drawing(case().circuit.plot().to_dict(), 5).figure
    np.testing.assert_allclose(ax.lines[0].get_ydata(), lines.data[0].y)
    bars = ax.collections[0].get_segments()
    low = np.array(lines.data[0].y) - np.array(lines.data[0].error_y.arrayminus)
    np.testing.assert_allclose([bar[0][1] for bar in bars], low)
    traces = case().circuit.plot().data
    assert len(circuit.axes[0].lines) >= len(traces)
    (heads,) = (t for t in traces if t.mode == "markers+text" and any(t.text))
    inside = {(*a.xy, a.get_text()) for a in circuit.axes[0].texts if a.xyann == (0, 0)}
    assert {*zip(heads.x, heads.y, heads.text, strict=True)} <= inside
    labels = {text.get_text() for text in circuit.legends[0].get_texts()}
    assert labels == {trace.name for trace in traces}


@pytest.mark.parametrize("kind", ["svg", "pdf", "png"])
def test_one_figure_gives_the_same_bytes_twice(tmp_path, kind):
    figure = case().circuit.plot(title="a $price$ <br>&lt;b&gt;")
    for name in "ab":
        tv.save_figure(figure, tmp_path / f"{name}.{kind}")
    first = (tmp_path / f"a.{kind}").read_bytes()
    assert first == (tmp_path / f"b.{kind}").read_bytes() and len(first) > 5000
    if kind == "svg":
        text = first.decode()
        assert "a $price$" in text and "&lt;b&gt;" in text and "query_is" in text


def test_save_figure_refuses_what_it_cannot_draw(tmp_path, monkeypatch):
    figure = scores().plot()
    with pytest.raises(tv.TvInterpError, match=r"ends in \.svg, \.pdf or \.png, got 'f\.jpg'"):
        tv.save_figure(figure, tmp_path / "f.jpg")
    with pytest.raises(tv.TvInterpError, match="got a trace 'pie': save_figure draws the figures"):
        tv.save_figure(go.Figure(go.Pie(values=[1, 2])), tmp_path / "f.svg")
    with pytest.raises(tv.TvInterpError, match="cannot write"):
        tv.save_figure(figure, tmp_path / "none" / "f.svg")
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(tv.TvInterpError, match=r"pip install 'tv-interp\[paper\]'"):
        tv.save_figure(figure, tmp_path / "f.svg")
