"""Tests of circuits: what is planted passes, what lacks an edge or has one too many does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import KINDS, tiny_model
from test_exact import a_contrast

import tv_interp as tv
from tv_interp.analysis.faithfulness import touching
from tv_interp.analysis.hypotheses import add_path, independence_pvalue, minimality_pvalues

KIND = KINDS[0]


@pytest.fixture(scope="module")
def planted():
    """A planted circuit of two strands with its truth; words differ in how loud they are."""
    case = tv.planted_circuit(seed=1, writers=2, readers=2, decoys=2, layers=3, heads=3)
    loudness = 1 + torch.rand(case.model.cfg.d_vocab, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for weight in case.model.unembed.parameters():
            at = weight.shape.index(len(loudness))
            weight *= loudness if at == weight.ndim - 1 else loudness[:, None]
    prompts = tv.make_prompts(case.model, case.task, n_demos=2, n_prompts=24)
    contrast = prompts.corrupt("inputs")
    graph = tv.RoleGraph.of(case.model, contrast.clean)
    true = sorted(case.truths["inputs"].edges, key=graph.number_of.__getitem__)
    return case, contrast, tv.Circuit(graph, dict.fromkeys(true, 1.0), {})


def test_a_true_circuit_passes_all_tests(planted):
    case, contrast, circuit = planted
    found = tv.check_circuit(case.model, contrast, circuit, n_random=10, n_permutations=100)
    assert found.is_equivalent and found.is_independent and not found.superfluous
    assert found.win_rate == 0.5 and set(found.minimality) == set(circuit.edges)
    assert "equivalence   not rejected" in str(found)
    report = tv.evaluate_circuit(case.model, contrast, circuit, minimality="none", n_random=0)
    assert report.win_rate == 0.5 and report.equivalence > 0.9


def test_a_circuit_without_one_edge_is_not_equivalent(planted):
    case, contrast, circuit = planted
    last = [e for e in circuit.edges if e.endswith("->logits")][-1]
    less = replace(circuit, edges={e: w for e, w in circuit.edges.items() if e != last})
    found = tv.check_circuit(case.model, contrast, less, n_random=10, n_permutations=100)
    assert not found.is_equivalent and found.win_rate < 0.1


def test_a_circuit_without_a_strand_is_not_independent_of_what_is_left_out(planted):
    """One edge alone is not enough: what is outside carries nothing without the rest of its way."""
    case, contrast, circuit = planted
    writer = min(case.nodes("writer"))
    mask = circuit.graph.prune(circuit.mask & ~touching(circuit.graph, writer))
    edges = {e: 1.0 for e in circuit.edges if mask[circuit.graph.number_of[e]]}
    assert 0 < len(edges) < len(circuit)
    found = tv.check_circuit(
        case.model, contrast, replace(circuit, edges=edges), n_random=10, n_permutations=200
    )
    assert not found.is_independent and not found.is_equivalent


def test_a_useless_edge_is_superfluous(planted):
    case, contrast, circuit = planted
    rng = np.random.default_rng(0)
    mask, edge = add_path(circuit, rng)
    graph = circuit.graph
    more = replace(circuit, edges={graph.edges[i]: 1.0 for i in np.flatnonzero(mask)})
    found = tv.check_circuit(case.model, contrast, more, n_random=10, n_permutations=100)
    assert set(found.superfluous) == set(more.edges) - set(circuit.edges)
    assert graph.edges[edge] in found.superfluous and found.is_equivalent


def test_random_paths_connect_with_the_circuit(planted):
    _, _, circuit = planted
    rng = np.random.default_rng(1)
    for _ in range(20):
        mask, edge = add_path(circuit, rng)
        assert mask[edge] and not circuit.mask[edge] and mask[circuit.mask].all()
        assert (circuit.graph.prune(mask) == mask).all(), "a path with a loose end"


def test_independence_is_calibrated_and_sees_what_correlation_does_not():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(60, 40))
    rejected = np.mean([independence_pvalue(x, rng.normal(size=40), 99, rng) <= 0.05 for x in a])
    assert rejected <= 0.15
    x = rng.normal(size=60)
    assert independence_pvalue(x, x**2 + 0.1 * rng.normal(size=60), 200, rng) < 0.01
    assert independence_pvalue(x, np.ones(60), 200, rng) == 1


def test_minimality_is_the_binomial_test_against_random_edges():
    random = np.linspace(0, 1, 100)
    p = minimality_pvalues(np.array([0.0, 0.5, 0.95, 2.0]), random, 1e-6)
    assert p[0] < 1e-20 and p[1] < 1e-10 and p[2] > 0.5 and p[3] == pytest.approx(1)


def test_circuits_of_several_seeds_are_compared_edge_by_edge(planted):
    _, _, circuit = planted
    edges = list(circuit.edges)
    some = [
        replace(circuit, edges=dict.fromkeys(kept, 1.0))
        for kept in (edges[:4], edges[:4], edges[2:6])
    ]
    inclusion, jaccard = tv.compare_circuits(some)
    assert [inclusion[e] for e in edges[:6]] == pytest.approx([2 / 3, 2 / 3, 1, 1, 1 / 3, 1 / 3])
    assert jaccard.tolist() == pytest.approx([1, 1 / 3, 1 / 3])
    with pytest.raises(tv.TvInterpError, match="circuits of different graphs"):
        tv.compare_circuits([circuit, replace(circuit, graph=_other_graph(circuit))])


def _other_graph(circuit):
    return replace(circuit.graph, n_layers=circuit.graph.n_layers + 1)


# ------------------------------------------------------------------------- runs that were killed

SCRIPT = """
import sys, warnings; warnings.simplefilter("ignore"); sys.path.insert(0, {tests!r})
import torch; torch.set_num_threads(1)
from test_hypotheses import exact
exact({cache!r})
"""


def exact(cache, **settings):
    model, contrast = tiny_model("gpt2", KIND), a_contrast("gpt2", KIND, "plain", 3)
    settings = dict(edges=tv.RoleGraph.of(model, contrast.clean).edges[::9]) | settings
    return tv.score_edges(model, contrast, method="exact", cache=cache, **settings)


def test_a_killed_run_of_exact_edges_loses_nothing_that_had_finished(tmp_path, monkeypatch):
    from tv_interp.analysis import edges

    cache = tmp_path / "kept"
    code = SCRIPT.format(tests=os.path.dirname(__file__), cache=str(cache))
    process = subprocess.Popen([sys.executable, "-c", code])
    end = time.monotonic() + 120
    while len(list(cache.glob("*/*.npz"))) < 4:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    pieces = sorted(cache.glob("*/*.npz"))
    kept = {piece: piece.stat().st_mtime_ns for piece in pieces}
    asked = []
    plain = edges._Exact._variants

    def note(self, layer, sender):
        asked.append(f"L{layer}-{sender}.npz")
        return plain(self, layer, sender)

    monkeypatch.setattr(edges._Exact, "_variants", note)
    again = exact(cache)
    assert asked and not {piece.name for piece in pieces} & set(asked)
    assert {piece: piece.stat().st_mtime_ns for piece in pieces} == kept
    n_asked = len(asked)
    fresh = exact(None)
    assert len(asked) == 2 * n_asked + len(pieces)
    np.testing.assert_array_equal(again.data, fresh.data)
    pieces[0].write_bytes(b"spoilt")  # not by us: whole or not there
    np.testing.assert_array_equal(exact(cache).data, fresh.data)
    other = exact(cache, direction="denoise")
    assert abs(other.data - fresh.data).max() > 1e-3, "another run's pieces"
    with pytest.raises(tv.TvInterpError, match="cache keeps pieces of method='exact', got"):
        tv.score_edges(tiny_model("gpt2", KIND), a_contrast("gpt2", KIND, "plain", 3), cache=cache)
