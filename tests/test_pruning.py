"""Pruning: each effect equals that of a run of its own, and what is left is the planted truth."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import KINDS, tiny_model
from test_circuits import runner_of
from test_exact import a_contrast

import tv_interp as tv
from tv_interp.analysis.circuits import choose_edges
from tv_interp.analysis.graph import split_edge
from tv_interp.analysis.pruning import prune_edges

KIND = KINDS[0]


def a_planted_case(seed, corruption=None):
    case = tv.draw_circuit(seed)
    truth = case.truths[corruption or case.corruptions[0]]
    prompts = tv.make_prompts(case.model, case.task, n_demos=2, n_prompts=6)
    return case, truth, prompts.corrupt(truth.corruption)


@pytest.mark.parametrize(("seed", "corruption"), [(0, "inputs"), (3, "answers"), (4, "inputs")])
def test_acdc_finds_a_planted_circuit_edge_by_edge(seed, corruption):
    """Decoys, relays, MLP steps, keys and values; two parts of which both are needed (seed 4)."""
    case, truth, contrast = a_planted_case(seed, corruption)
    found = tv.discover_circuit(case.model, contrast, method="acdc", threshold=0.02)
    assert set(found.edges) == truth.edges
    assert found.attrs["method"] == "acdc" and found.attrs["threshold"] == 0.02


def test_acdc_keeps_one_of_two_parts_of_which_one_suffices():
    case = tv.planted_circuit(seed=1, writers=2, redundancy="or")
    truth = case.truths["inputs"]
    prompts = tv.make_prompts(case.model, case.task, n_demos=2, n_prompts=8)
    found = tv.discover_circuit(
        case.model, prompts.corrupt("inputs"), method="acdc", threshold=0.02
    )
    writers = case.nodes("writer")
    assert set(found.edges) < truth.edges
    assert len(writers & found.nodes) == 1 and len(writers) == 2


@pytest.mark.parametrize("seed", [0, 3, 5])
def test_pruned_nodes_are_those_of_a_planted_circuit_with_all_edges_between_them(seed):
    case, truth, contrast = a_planted_case(seed)
    scores = prune_edges(case.model, contrast, threshold=0.02, method="nodes")
    graph = tv.RoleGraph.of(case.model, contrast.clean)
    found = choose_edges(graph, scores, threshold=0.02)
    assert found.nodes - {"logits"} == truth.nodes and truth.edges <= set(found.edges)
    labels = {case.labels.get(node) for node in found.nodes}
    assert "decoy" not in labels
    # an edge is scored by the weaker of its ends
    mean = dict(zip(graph.edges, scores.mean().values.tolist(), strict=True))
    out = {}
    for edge, value in mean.items():
        out.setdefault(split_edge(edge)[0], []).append(abs(value))
    for edge, value in mean.items():
        assert abs(value) <= max(out[split_edge(edge)[0]]) + 1e-9


@pytest.mark.parametrize(("arch", "kind"), [("gpt2", KINDS[0]), ("llama", KINDS[-1])])
def test_pruning_is_one_edge_after_the_other(arch, kind, monkeypatch):
    """Against a loop of whole runs with one edge less; chunks and shortcuts change nothing."""
    from tv_interp.analysis import pruning

    model = tiny_model(arch, kind, n_layers=2)
    contrast = a_contrast(arch, kind, "plain").select([0, 1])
    threshold = {"gpt2": 0.05, "llama": 0.2}[arch]
    scores = prune_edges(model, contrast, threshold=threshold)
    _, graph, runner = runner_of(model, contrast)
    kept = np.ones(len(graph.edges), dtype=bool)
    value = runner.run(kept).numpy()
    order = [i for group in pruning._Prune(graph, runner, 1.0)._receivers() for i in group.sets]
    checked = 0
    for number in np.concatenate(order)[:140]:
        without = kept.copy()
        without[number] = False
        new = runner.run(without).numpy()
        effect = value - new
        np.testing.assert_allclose(scores.data.values[:, number], effect, atol=2e-5)
        if abs(effect.mean()) < threshold:
            kept, value = without, new
        else:
            checked += 1
    assert 1 < checked < 130
    if arch == "llama":
        return
    monkeypatch.setattr(pruning, "MOST", 3)
    again = prune_edges(model, contrast, threshold=threshold)
    np.testing.assert_allclose(again.data, scores.data, atol=2e-5)


def test_runs_side_by_side_equal_runs_one_by_one_from_any_layer():
    model, contrast = tiny_model("gemma2", KIND), a_contrast("gemma2", KIND, "plain", 3)
    _, graph, runner = runner_of(model, contrast)
    rng = np.random.default_rng(0)
    below = np.zeros(len(graph.edges), dtype=bool)
    for (_, layer), table in graph.numbers.items():
        below[table[table >= 0]] = layer < 2
    kept = below | (rng.random((3, len(graph.edges))) < 0.5)
    whole = np.stack([runner.run(k).numpy() for k in kept])
    assert np.ptp(whole, axis=0).max() > 1e-2
    np.testing.assert_allclose(runner.run(kept, first=2), whole, atol=1e-5)


def test_what_pruning_cannot_do_is_refused():
    model, contrast = tiny_model("gpt2", KIND), a_contrast("gpt2", KIND, "plain")
    for settings, message in (
        (dict(method="acdc"), "method='acdc' needs threshold, the least change of the metric"),
        (dict(method="nodes", n_edges=5), "method='nodes' cannot be told n_edges: what stays is"),
        (
            dict(method="acdc", threshold=0.1, direction="denoise"),
            "starts from the whole model and takes away, so it has direction='noise' only",
        ),
        (dict(method="acdc", threshold=-0.1), "expected threshold of more than 0, got -0.1"),
        (dict(method="nodes", threshold=1e9), "no edges of that size connect the embedding"),
    ):
        with pytest.raises(tv.TvInterpError, match=message):
            tv.discover_circuit(model, contrast, **settings)
    with pytest.raises(tv.TvInterpError, match="method='acdc' needs threshold"):
        tv.find_circuit(model, "country-capital", method="acdc")
    with pytest.raises(tv.TvInterpError, match="unknown method 'acdd': did you mean 'acdc'"):
        prune_edges(model, contrast, threshold=1.0, method="acdd")
