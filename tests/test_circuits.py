"""Circuits: all edges are the model, none is the ablated run, and what lies between."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import naive
import numpy as np
import pytest
import torch
from conftest import KINDS, precise, tiny_model
from random_models import ARCHITECTURES
from test_edges import some_edges, table
from test_exact import a_contrast, sample

import tv_interp as tv
from tv_interp.analysis.ablation import ABLATIONS, EdgeRunner
from tv_interp.analysis.circuits import choose_edges
from tv_interp.analysis.common import Experiment
from tv_interp.analysis.edges import survey
from tv_interp.analysis.faithfulness import (
    equivalence_pvalue,
    match_randomly,
    measure_curve,
    measure_stability,
    touching,
)
from tv_interp.models import planted

KIND = KINDS[0]


def runner_of(model, contrast, ablation="corrupted", demos="joint"):
    run = Experiment(model, contrast, None, "noise", "logit_diff", "query_is")
    parts, graph, masks = survey(run, demos)
    runs = run.base, run.donor
    return run, graph, EdgeRunner(graph, parts, runs, masks, run.readout, ablation)


# --------------------------------------------------------------------------- runs with some edges


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_edges_are_the_model_and_none_the_corrupted_run(arch, kind):
    model = tiny_model(arch, kind, torch.float64)
    with precise(torch.float64):
        contrast = a_contrast(arch, kind, "rugged")
        run, graph, runner = runner_of(model, contrast)
        full = np.ones(len(graph.edges), dtype=bool)
        whole, none = runner.run(full), runner.run(~full)
    assert run.total.abs().max() > 1e-2
    torch.testing.assert_close(whole, run.base_value, atol=1e-9, rtol=0)
    torch.testing.assert_close(none, run.base_value - run.total, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("arch", "demos"),
    [("gpt2", "each"), ("gpt_neox", "joint"), ("gemma2", "joint"), ("llama", "each")],
)
def test_all_edges_but_one_are_that_edge_patched(arch, demos):
    """Two computations of the same: the engine's, and one from all senders, layer by layer."""
    model = tiny_model(arch, KIND, torch.float64)
    with precise(torch.float64):
        contrast = a_contrast(arch, KIND, "plain")
        run, graph, runner = runner_of(model, contrast, demos=demos)
        edges = some_edges(graph, 1, seed=3)
        scores = tv.score_edges(model, contrast, method="exact", edges=edges, demos=demos)
        for edge in edges:
            fallen = run.base_value - runner.run(~graph.select([edge]))
            np.testing.assert_allclose(fallen, scores.data.sel(edge=edge), atol=1e-9)
    assert abs(scores.data).max() > 1e-3


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_no_edges_are_what_senders_write_when_ablated(ablation):
    model = tiny_model("gpt2", KIND, torch.float64)
    contrast = a_contrast("gpt2", KIND, "plain", 5)
    run, graph, runner = runner_of(model, contrast, ablation)
    full = np.ones(len(graph.edges), dtype=bool)
    torch.testing.assert_close(runner.run(full), run.base_value, atol=1e-9, rtol=0)
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    resid = torch.stack(
        [naive.read(model, naive.tokens_of(contrast.corrupted, i), [last])[0][-1] for i in range(5)]
    )
    if ablation == "mean":
        resid = resid.mean(0).expand_as(resid)
    if ablation == "zero":  # biases of attention are no sender's
        resid = sum(b.attn.b_O.detach() for b in model.blocks).expand_as(resid)
    with torch.no_grad():
        logits = model.unembed(model.ln_final(resid[:, None]))[:, 0]
    expected = torch.stack(
        [naive.logit_diff(logits[i], contrast.clean, i) for i in range(len(contrast))]
    )
    torch.testing.assert_close(runner.run(~full), expected, atol=1e-9, rtol=0)


def test_runs_do_not_depend_on_batches(monkeypatch):
    from tv_interp.analysis import ablation

    model, contrast = tiny_model("llama", KIND), a_contrast("llama", KIND, "plain", 5)
    _, graph, runner = runner_of(model, contrast)
    kept = np.random.default_rng(0).random(len(graph.edges)) < 0.5
    whole = runner.run(kept)
    monkeypatch.setattr(ablation, "few_rows", lambda *a: torch.arange(5).split(2))
    torch.testing.assert_close(runner_of(model, contrast)[2].run(kept), whole, atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------- circuits as values


@pytest.fixture(scope="module")
def a_case():
    case = planted.build("write_then_read")
    clean = tv.make_prompts(case.model, case.task, n_demos=3, n_prompts=24, template="{x} is {y} ")
    contrast = clean.select(range(12)).corrupt("inputs")
    fresh = clean.select(range(12, 24)).corrupt("inputs")
    scores = tv.score_edges(case.model, contrast, method="exact")
    return case, contrast, fresh, scores


def test_a_planted_circuit_is_found_and_is_all_there_is(a_case):
    """Few edges, faithful and complete on fresh prompts; random ones of the same kinds are not."""
    case, contrast, fresh, scores = a_case
    circuit = tv.discover_circuit(case.model, contrast, scores=scores, threshold=0.1)
    report = tv.evaluate_circuit(case.model, fresh, circuit)
    assert report.size < 0.05
    assert report.faithfulness.value == pytest.approx(1, abs=0.05)
    assert report.completeness.value == pytest.approx(0, abs=0.05)
    assert max(report.random) < 0.5 and report.random_pvalue == pytest.approx(1 / 21)
    heads = case.writers | case.readers
    found = {tuple(map(int, n.split("@")[0][1:].split("H"))) for n in circuit.nodes if "H" in n}
    assert heads <= found
    needed = {node for node, lost in report.minimality.items() if lost.lo > 0.5}
    assert {f"L{la}H{h}" for la, h in heads} <= {node.split("@")[0] for node in needed}
    assert "faithfulness" in str(report) and report.to_dict()["n_edges"] == len(circuit)


def test_each_claimed_edge_is_needed_on_fresh_prompts_when_a_plain_hook_cuts_it(a_case):
    case, contrast, fresh, scores = a_case
    circuit = tv.discover_circuit(case.model, contrast, scores=scores, threshold=0.5)
    interval = scores.ci()
    strong = [e for e in sample(circuit.edges, 8) if abs(circuit.edges[e]) > 0.5]
    cut = table(case.model.to(torch.float64), fresh, strong, "planted").mean(0)
    case.model.to(torch.float32)
    for edge, effect in zip(strong, cut, strict=True):
        low, high = (float(interval[end].sel(edge=edge)) for end in ("lo", "hi"))
        assert low - 0.5 <= float(effect) <= high + 0.5, edge
        assert np.sign(float(effect)) == np.sign(circuit.edges[edge])


def test_circuits_are_saved_read_and_combined(a_case, tmp_path):
    case, contrast, _, scores = a_case
    graph = tv.RoleGraph.of(case.model, contrast.clean)
    large = choose_edges(graph, scores, threshold=0.05)
    small = replace(large, edges=dict(list(large.edges.items())[:2]))
    assert 0 < len(small) < len(large) and (small & large) == small and (small | large) == large
    rest = large - small
    assert len(rest) + len(small) == len(large) and not set(rest.edges) & set(small.edges)
    large.save(tmp_path / "circuit.json")
    again = tv.Circuit.load(tmp_path / "circuit.json")
    assert again == large and dict(again.edges) == dict(large.edges)
    assert dict(again.attrs) == dict(large.attrs)
    frame, network = large.to_pandas(), large.to_networkx()
    assert len(frame) == len(large) == network.number_of_edges()
    assert set(frame["via"]) <= {"q", "k", "v", "mlp", "logits"}
    assert set(network.nodes) == large.nodes
    assert all("@answer" in w for w in large.writers) and large.readers


def test_pruning_keeps_what_lies_between_embedding_and_logits(a_case):
    case, contrast, _, _ = a_case
    graph = tv.RoleGraph.of(case.model, contrast.clean)
    way = ["embed@answer->L0H1.v@answer", "L0H1@answer->L2H0.v@query_is", "L2H0@query_is->logits"]
    loose = ["embed@x->L1H0.k@is", "L1H2@query_is->logits"]
    kept = graph.prune(graph.select([*way, *loose]))
    assert [graph.edges[i] for i in np.flatnonzero(kept)] == [e for e in graph.edges if e in way]
    assert not graph.prune(graph.select(way[1:])).any()


def test_random_circuits_have_as_many_edges_of_each_kind():
    model, contrast = tiny_model("gpt2", KIND), a_contrast("gpt2", KIND, "plain")
    circuit = tv.discover_circuit(model, contrast, method="eap", n_edges=200)
    drawn = match_randomly(circuit, np.random.default_rng(0))
    edges = np.array(circuit.graph.edges)

    def kinds(mask):
        return sorted(re.sub(r"H\d", "H", edge) for edge in edges[mask])

    assert kinds(drawn) == kinds(circuit.mask) and (drawn != circuit.mask).any()
    node = next(n for n in circuit.nodes if "H" in n)
    assert all(node.split("@")[0] in e for e in edges[touching(circuit.graph, node)])


def test_a_circuit_is_scored_by_the_ablation_that_it_is_evaluated_with(monkeypatch):
    model, contrast = tiny_model("gpt2", KIND), a_contrast("gpt2", KIND, "plain")
    scores = tv.score_edges(model, contrast, method="eap", ablation="zero")
    found = tv.discover_circuit(model, contrast, method="eap", ablation="zero", n_edges=200)
    same = tv.discover_circuit(model, contrast, scores=scores, n_edges=200)
    other = tv.discover_circuit(model, contrast, method="eap", n_edges=200)
    assert found == same and found != other

    asked = []
    monkeypatch.setattr(
        "tv_interp.analysis.discovery.score_edges",
        lambda *args, ablation, **how: (
            asked.append(ablation) or tv.score_edges(*args, ablation=ablation, **how)
        ),
    )
    settings = dict(n_demos=3, n_prompts=8, n_edges=200, n_random=1, method="eap")
    tv.find_circuit(tv.load_model("reference"), "verb-past", ablation="mean", **settings)
    assert asked == ["mean"]


def test_curves_end_at_the_whole_model_and_stability_counts_resamples(a_case):
    case, contrast, fresh, scores = a_case
    curve = measure_curve(case.model, fresh, scores, shares=(0.002, 0.02, 1.0))
    assert curve.faithfulness.values[-1] == pytest.approx(1, abs=1e-5)
    assert curve.n_edges.values[-1] == scores.data.sizes["edge"]
    value = curve.faithfulness.values
    area = sum(
        (a + b) / 2 * w for a, b, w in zip(value[:-1], value[1:], (0.018, 0.98), strict=True)
    )
    assert curve.attrs["CPR"] == pytest.approx(area)
    graph = tv.RoleGraph.of(case.model, contrast.clean)
    found = measure_stability(scores, graph, n_edges=50, n_boot=20)
    assert found.inclusion.max() == pytest.approx(1) and 0.5 < found.jaccard.mean() <= 1


def test_the_test_of_equivalence_is_the_binomial_one():
    assert equivalence_pvalue(5, 10) == pytest.approx(1)
    assert equivalence_pvalue(10, 10) == pytest.approx(0.4**10 + 0.6**10)
    assert equivalence_pvalue(60, 100) > 0.3  # the edge of the tolerance
    assert equivalence_pvalue(90, 100) < 1e-8


# ------------------------------------------------------------------------------------- bad input


def test_what_circuits_cannot_do_is_refused(a_case, tmp_path):
    case, contrast, fresh, scores = a_case
    discover = tv.discover_circuit
    for settings, message in (
        (dict(n_edges=3, threshold=1.0), "expected n_edges or threshold, got both"),
        (dict(n_edges=0), "expected n_edges of 1 or more, got 0"),
        (dict(threshold=1e9), "no edges of that size connect the embedding with the logits"),
        (dict(method="acdd"), "unknown method 'acdd'"),
        (dict(method="eap", metric="choice"), "metric 'choice' is not differentiable"),
    ):
        given = {} if "method" in settings else {"scores": scores}
        with pytest.raises(tv.TvInterpError, match=message):
            discover(case.model, contrast, **given, **settings)
    circuit = discover(case.model, contrast, scores=scores, threshold=0.1)
    some = tv.score_edges(case.model, contrast, method="eap", edges=list(circuit.edges))
    with pytest.raises(tv.TvInterpError, match="expected scores of all .* edges of the graph"):
        discover(case.model, contrast, scores=some)
    with pytest.raises(tv.TvInterpError, match="unknown ablation 'meen': did you mean 'mean'"):
        tv.evaluate_circuit(case.model, fresh, circuit, ablation="meen")
    other = tiny_model("gpt2", KIND)
    with pytest.raises(tv.TvInterpError, match="this circuit is of model 'planted', got"):
        tv.evaluate_circuit(other, a_contrast("gpt2", KIND, "plain"), circuit)
    each = discover(case.model, contrast, method="exact", demos="each")
    fewer = fresh.clean.keep_demos([0, 1]).corrupt("inputs")
    with pytest.raises(tv.TvInterpError, match="use prompts with the same roles"):
        tv.evaluate_circuit(case.model, fewer, each)

    path = tmp_path / "circuit.json"
    circuit.save(path)
    content = json.loads(path.read_text())
    edges = {"L0H0@answr->logits": 1.0}
    path.write_text(json.dumps(content | {"edges": edges}))
    with pytest.raises(tv.TvInterpError, match="unknown node 'L0H0@answr': did you mean"):
        tv.Circuit.load(path)
    path.write_text("{}")
    with pytest.raises(tv.TvInterpError, match="is no circuit file of tv_interp"):
        tv.Circuit.load(path)
    with pytest.raises(tv.TvInterpError, match="cannot read"):
        tv.Circuit.load(tmp_path / "none.json")
    with pytest.raises(tv.TvInterpError, match="circuits of different graphs cannot be combined"):
        circuit | each


def test_a_circuit_is_drawn_with_its_largest_edges_signs_and_roles():
    model, contrast = tiny_model("gpt2", KIND), a_contrast("gpt2", KIND, "plain")
    circuit = tv.discover_circuit(model, contrast, method="eap", n_edges=200)
    figure = circuit.plot(top=10)
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    table = circuit.to_pandas()
    largest = table.reindex(table.weight.abs().sort_values(ascending=False).index).head(10)
    assert len(lines) == 10
    drawn = {line.text[0].split("<br>")[0]: line for line in lines}
    assert set(drawn) == set(largest.edge)
    for row in largest.to_dict("records"):
        line = drawn[row["edge"]]
        assert line.line.color == ("#0072B2" if row["weight"] > 0 else "#D55E00")
        assert f"{row['weight']:+.3g}" in line.text[0]
    widths = [line.line.width for line in lines]
    assert widths == sorted(widths) and widths[-1] == 7  # the largest is drawn last
    nodes = [name for trace in figure.data if trace.mode != "lines" for name in trace.customdata]
    assert set(nodes) == {*largest.sender, *largest.receiver}
    assert list(figure.layout.xaxis.ticktext) == [
        place for place in circuit.graph.places if place in {*largest.src, *largest.dest}
    ]
    assert f"10 largest of {len(circuit)} edges" in figure.layout.title.text
    assert len(circuit.plot(top=None).data) > len(figure.data)
    with pytest.raises(tv.TvInterpError, match="expected top of 1 or more, got 0"):
        circuit.plot(top=0)


def test_each_claimed_edge_of_the_reference_model_holds_on_fresh_prompts_with_a_plain_hook():
    """Found and scored on some query items, cut on others by the hooks of `test_edges`."""
    model = tv.load_model("reference", backend=KIND)
    clean = tv.make_prompts(model, "country-capital", n_demos=3, n_prompts=48, seed=4)
    items = np.unique(clean.query)
    is_first = np.isin(clean.query, items[: len(items) // 2])
    first, fresh = (
        clean.select(np.flatnonzero(s)[:n]).corrupt("task")
        for s, n in ((is_first, 20), (~is_first, 10))
    )
    circuit = tv.discover_circuit(model, first, n_edges=60)
    largest = sorted(circuit.edges, key=lambda e: -abs(circuit.edges[e]))[:10]
    claimed = sample(largest, 5)
    scores = tv.score_edges(model, first, method="exact", edges=claimed)
    interval = scores.ci()
    cut = table(model, fresh, claimed, "reference").mean(0)
    # the mean of fresh prompts varies too, and more than that of twice as many
    for edge, effect in zip(claimed, cut.tolist(), strict=True):
        value, low, high = (float(interval[k].sel(edge=edge)) for k in ("value", "lo", "hi"))
        wide = [value + (1 + len(first) / len(fresh)) ** 0.5 * (end - value) for end in (low, high)]
        assert wide[0] <= effect <= wide[1], (edge, wide, effect)
        assert np.sign(value) == np.sign(effect) and abs(value) > 0.1
