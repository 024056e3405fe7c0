"""Generated circuits: what is true has an effect, what is not has none, seen by hooks alone."""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import KINDS
from edges_by_hand import EdgesByHand

import tv_interp as tv
from tv_interp.analysis.ablation import EdgeRunner
from tv_interp.analysis.common import Experiment
from tv_interp.analysis.edges import survey
from tv_interp.errors import ModelError, UnknownName
from tv_interp.models.generator import draw_circuit, planted_circuit
from tv_interp.models.superposition import COHERENCE

ALONE = {  # settings of circuits whose edges act alone
    "one strand": dict(writers=1, decoys=4),
    "two writers and readers": dict(writers=2, readers=2, cancellers=1, decoys=4),
    "long": dict(writers=2, readers=1, relays=3, mlp_steps=2, layers=7, superposed="rotated"),
    "keys": dict(routes=("key",), readers=2, relays=2, decoys=4, superposed="compressed"),
    "both routes": dict(
        routes=("key", "value"), writers=3, readers=2, mlp_steps=1, layers=6, decoys=4
    ),
    "under LayerNorm": dict(
        routes=("key", "value"), relays=2, cancellers=1, mlp_steps=1, layers=6,
        superposed="rotated", normalization="LN",
    ),
    "compressed under LayerNorm": dict(
        writers=3, readers=2, relays=2, superposed="compressed", normalization="LN"
    ),
}  # fmt: skip
JOINED = {
    (redundancy, gated): dict(
        redundancy=redundancy, gated=gated, relays=1, seed=seed, **{gated: n + (gated == "writers")}
    )
    | ({"readers": 2} if gated == "writers" else {"writers": 1})
    for seed, ((redundancy, n), gated) in enumerate(
        itertools.product((("or", 2), ("and", 2), ("majority", 3)), ("writers", "readers"))
    )
}
N_PROMPTS, N_DEMOS = 8, 3
MATTERS, NOTHING = 0.02, 2e-3  # in parts of the total


@functools.cache
def case_of(name):
    return (
        planted_circuit(seed=1, **ALONE[name]) if name in ALONE else planted_circuit(**JOINED[name])
    )


def prompts_of(case, n_prompts=N_PROMPTS, n_demos=N_DEMOS):
    return tv.make_prompts(case.model, case.task, n_demos=n_demos, n_prompts=n_prompts, seed=5)


def edges_of(case, corruption, direction):
    return EdgesByHand(case.model, prompts_of(case).corrupt(corruption), direction)


def other_edges(case, corruption, n, seed=0):
    """Edges at random that are not true, between any two nodes that follow each other."""
    rng, cfg = np.random.default_rng(seed), case.model.cfg
    true = {edge for edge in case.truths[corruption].edges}
    roles = ("x", "is", "answer", "query_is")
    found = set()
    while len(found) < n:
        low, high = sorted(int(i) for i in rng.integers(0, cfg.n_layers, 2))
        role, to = (roles[i] for i in sorted(rng.integers(0, 4, 2)))
        sender = [f"L{low}H{rng.integers(cfg.n_heads)}", f"L{low}.mlp", "embed"][rng.integers(3)]
        via = "qkv"[rng.integers(3)]
        receiver = f"L{high}H{rng.integers(cfg.n_heads)}.{via}@{role if via == 'q' else to}"
        if rng.random() < 0.2:
            receiver = f"L{high}.mlp@{role}"
        if (sender == "embed" or low < high) and not (
            high == cfg.n_layers - 1 and to != "query_is"
        ):
            found.add(f"{sender}@{role}->{receiver}")
        found -= true
    return sorted(found)


def head_effects(case, corruption, direction):
    """Mean effect of every head at every role, in parts of the total."""
    contrast = prompts_of(case).corrupt(corruption)
    found = tv.patch_positions(case.model, contrast, direction=direction)
    mean = (found.mean() / found.total.mean()).to_series()
    return {f"L{la}H{h}@{role}": value for (la, h, role), value in mean.items()}


def heads_of(nodes):
    return {node for node in nodes if re.match(r"L\d+H", node)}


# ------------------------------------------------------------------------------------- the truth


@pytest.mark.parametrize("name", ALONE)
def test_every_true_edge_acts_alone_and_no_other_does(name):
    case = case_of(name)
    for corruption, truth in case.truths.items():
        assert truth.corruption == corruption and truth.ablation == "corrupted"
        hand = edges_of(case, corruption, "denoise" if corruption == "inputs" else "noise")
        assert hand.total > 1
        effects = {edge: hand.effect(edge) for edge in truth.edges}
        weak = {edge: effect for edge, effect in effects.items() if abs(effect) < MATTERS}
        assert not weak
        others = {edge: hand.effect(edge) for edge in other_edges(case, corruption, 8)}
        assert {edge: x for edge, x in others.items() if abs(x) > NOTHING} == {}


@pytest.mark.parametrize("name", ALONE)
def test_the_heads_that_matter_are_those_of_the_truth(name):
    case = case_of(name)
    for corruption, truth in case.truths.items():
        effects = head_effects(case, corruption, "noise" if corruption == "inputs" else "denoise")
        strong = {node for node, effect in effects.items() if abs(effect) > MATTERS}
        assert strong == heads_of(truth.nodes)
        assert max(abs(effects[node]) for node in effects.keys() - strong) < NOTHING


@pytest.mark.parametrize("joined", JOINED, ids=" ".join)
def test_joined_parts_act_in_one_direction_or_in_pairs(joined):
    redundancy, gated = joined
    case = case_of(joined)
    truth, label = case.truths["inputs"], gated.removesuffix("s")
    hands = {way: edges_of(case, "inputs", way) for way in ("denoise", "noise")}
    (gate,) = case.nodes("gate")
    into_gate = sorted(edge for edge in truth.edges if edge.endswith(f"->{gate}"))
    assert len(into_gate) == (3 if redundancy == "majority" else 2)
    silent = {"or": ["noise"], "and": ["denoise"], "majority": ["denoise", "noise"]}[redundancy]
    share = hands["noise"].effect(*into_gate)
    assert share > 0.2
    for way, hand in hands.items():
        alone = [hand.effect(edge) for edge in into_gate]
        assert alone == pytest.approx([0 if way in silent else share] * len(alone), abs=1e-3)
        pairs = [hand.effect(*two) for two in itertools.combinations(into_gate, 2)]
        assert pairs == pytest.approx([share] * len(pairs), abs=1e-3)
    rest = truth.edges - set(into_gate)
    if redundancy != "majority":  # there what is before and behind the gated parts is as silent
        assert all(max(abs(h.effect(edge)) for h in hands.values()) > MATTERS for edge in rest)
    assert {node for node in case.nodes(label) if node in truth.nodes} == case.nodes(label)
    for edge in other_edges(case, "inputs", 5):
        assert max(abs(hand.effect(edge)) for hand in hands.values()) < NOTHING


@pytest.mark.parametrize("gated", ["writers", "readers"])
def test_pairs_reveal_the_heads_of_a_majority_that_single_heads_hide(gated):
    case = case_of(("majority", gated))
    at = "answer" if gated == "writers" else "query_is"
    (gate,) = case.nodes("gate")
    edges = case.truths["inputs"].edges
    joined = {edge.split("->")[0] for edge in edges if edge.endswith(f"->{gate}")}
    assert joined <= heads_of(case.labels)
    contrast = prompts_of(case).corrupt("inputs")
    for direction in ("denoise", "noise"):
        effects = head_effects(case, "inputs", direction)
        assert max(abs(effects[node]) for node in joined) < NOTHING
        every = list(itertools.product(range(case.model.cfg.n_layers), range(4)))
        found = tv.patch_interactions(
            case.model, contrast, heads=every, at=at, direction=direction
        ).mean()
        pairs = {str(pair) for pair in found.site.values[np.abs(found.values) > 0.1]}
        names = {frozenset(re.sub(r"\.z", "", pair).split(" + ")) for pair in pairs}
        assert names == {frozenset(two) for two in itertools.combinations(joined, 2)}


@pytest.mark.parametrize("name", [*ALONE, *JOINED], ids=str)
def test_the_true_edges_alone_are_the_model_and_without_them_it_is_corrupted(name):
    case = case_of(name)
    for corruption, truth in case.truths.items():
        contrast = prompts_of(case).corrupt(corruption)
        run = Experiment(case.model, contrast, None, "noise", "logit_diff", "query_is")
        parts, graph, masks = survey(run)
        runner = EdgeRunner(graph, parts, (run.base, run.donor), masks, run.readout)
        kept = graph.select(truth.edges)
        total = run.total.mean()
        faithful = (runner.run(kept) - run.base_value).mean() / total + 1
        left = (runner.run(~kept) - run.base_value).mean() / total + 1
        assert faithful.item() == pytest.approx(1, abs=NOTHING)
        assert left.item() == pytest.approx(0, abs=NOTHING)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "redundancy"), [(0, "none"), (1, "and"), (2, "majority")])
def test_exact_methods_recover_circuits_drawn_at_random(seed, redundancy, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from bench_recovery import Contest, judge

    case = draw_circuit(seed)
    assert case.settings["redundancy"] == redundancy
    methods = ("exact, noise", "exact, both and pairs")
    one_way, both = judge(Contest(case, "inputs"), methods).values()
    least = 0.99 if redundancy == "none" else 0.95
    assert min(both["nodes AUC"], both["edges AUC"]) >= least
    assert both["edges AP"] > 0.95
    if redundancy == "none":
        assert min(one_way["nodes AUC"], one_way["edges AUC"]) >= least
    if redundancy == "majority":
        assert one_way["edges AP"] < 0.7


# ------------------------------------------------------------------------------------ the models


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("n_demos", [2, 4, 10])
def test_the_model_solves_its_task(name, n_demos):
    case = case_of(name)
    prompts = prompts_of(case, 64, n_demos)
    with torch.no_grad():
        logits = case.model(prompts.tokens)[:, -1]
    assert torch.equal(logits.argmax(-1), prompts.answer)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_a_circuit_drawn_at_random_solves_its_task_by_its_true_heads(seed):
    case = draw_circuit(seed)
    prompts = prompts_of(case, 64, 4)
    with torch.no_grad():
        logits = case.model(prompts.tokens)[:, -1]
    assert torch.equal(logits.argmax(-1), prompts.answer)
    for corruption, truth in case.truths.items():
        found = set()
        for direction in ("denoise", "noise"):
            effects = head_effects(case, corruption, direction)
            found |= {node for node, effect in effects.items() if abs(effect) > NOTHING}
        assert found <= heads_of(truth.nodes)
        if case.settings["redundancy"] != "majority":
            assert found == heads_of(truth.nodes)
        assert truth.nodes == {end for edge in truth.edges for end in ends(edge)} - {"logits"}


def ends(edge):
    return (re.sub(r"\.[qkv]@", "@", end) for end in edge.split("->"))


@pytest.mark.skipif(len(KINDS) < 2, reason="this TransformerLens has one class")
@pytest.mark.parametrize("name", ["long", "both routes", "compressed under LayerNorm"])
def test_both_classes_have_equal_logits(name):
    hooked, bridge = (
        planted_circuit(seed=1, backend=kind, dtype=torch.float64, **ALONE[name]) for kind in KINDS
    )
    assert type(hooked.model).__name__ == "HookedTransformer"
    assert type(bridge.model).__name__ == "TransformerBridge"
    tokens = prompts_of(hooked).tokens
    with torch.no_grad():
        one, other = hooked.model(tokens), bridge.model(tokens)
    assert one.std() > 0.1
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_the_seed_decides_all_of_it():
    one, again, other = (draw_circuit(seed) for seed in (5, 5, 6))
    assert one.settings == again.settings and one.truths == again.truths
    weights = [dict(case.model.named_parameters()) for case in (one, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert one.settings != other.settings
    same = [planted_circuit(seed=seed, decoys=4) for seed in (0, 1)]
    assert same[0].labels != same[1].labels


def test_randomness_stays_as_it_was():
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    draw_circuit(0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002


def test_compressed_words_are_more_than_their_dimensions():
    models = {
        kind: planted_circuit(superposed=kind).model for kind in ("none", "rotated", "compressed")
    }
    inputs = {kind: model.W_E[3:31].double() for kind, model in models.items()}
    inputs = {kind: words / words.norm(dim=-1, keepdim=True) for kind, words in inputs.items()}
    cosines = {kind: words @ words.T - torch.eye(28) for kind, words in inputs.items()}
    assert cosines["none"].abs().max() < 1e-6 and cosines["rotated"].abs().max() < 1e-6
    assert 0.1 < cosines["compressed"].abs().max() <= COHERENCE + 1e-6
    assert torch.linalg.matrix_rank(inputs["compressed"], atol=1e-4) == 14
    assert models["compressed"].cfg.d_model < 0.6 * models["none"].cfg.d_model
    on_axes = {kind: (words.abs() > 1e-6).sum(-1).max() for kind, words in inputs.items()}
    assert on_axes["none"] == 1 and on_axes["rotated"] > 100


def test_decoys_attend_and_write_like_the_others():
    case = planted_circuit(seed=3, decoys=4, layers=5)
    decoys = case.nodes("decoy")
    assert len(decoys) == 4 and not decoys & case.truths["inputs"].nodes
    prompts = prompts_of(case)
    _, cache = case.model.run_with_cache(prompts.tokens)
    for node in decoys:
        layer, head = map(int, re.findall(r"\d+", node))
        rows = torch.arange(len(prompts))
        at = prompts.positions(node.split("@")[1]).reshape(len(prompts), -1)[:, -1]
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][rows, head, at]
        assert (pattern[:, 1:].amax(-1) > 0.99).all()
        assert (cache[f"blocks.{layer}.attn.hook_z"][rows, at, head].norm(dim=-1) > 0.5).all()


# ------------------------------------------------------------------------------------- bad input

BAD = [
    (dict(routes=("values",)), UnknownName, "unknown route 'values': did you mean 'value'"),
    (dict(routes=()), UnknownName, "unknown route ''"),
    (dict(redundancy="xor"), UnknownName, "unknown redundancy 'xor'"),
    (dict(superposed="yes"), UnknownName, "unknown superposed 'yes'"),
    (dict(normalization="RMS"), UnknownName, "unknown normalization 'RMS'"),
    (dict(backend="hf"), UnknownName, "unknown backend 'hf'"),
    (dict(writers=0), ModelError, "expected writers of 1 or more, got 0"),
    (dict(decoys=-1), ModelError, "expected decoys of 0 or more, got -1"),
    (dict(decoys=20), ModelError, "expected at most 20 heads in 5 layers of 4 heads, got 23"),
    (dict(layers=2, mlp_steps=2), ModelError, "0 relays and 2 MLP steps do not fit into 2 layers"),
    (dict(relays=9), ModelError, "9 relays and 0 MLP steps do not fit into 5 layers"),
    (dict(layers=2, decoys=5), ModelError, "found no place for 8 heads and 0 MLPs in 2 layers"),
    (dict(width=100), ModelError, r"expected width of \d+ or more for 8 slots of 28 words"),
    (dict(redundancy="majority"), ModelError, "'majority' joins 3 writers, got 2"),
    (dict(redundancy="or", gated="readers", readers=2), ModelError, "read the first writer alone"),
    (dict(redundancy="or", routes=("key",)), ModelError, r"needs routes=\('value',\)"),
    (dict(routes=("key",), writers=3, readers=2), ModelError, "a reader of its own, got writers=3"),
    (dict(routes=("key", "value"), writers=1), ModelError, "both routes need 2 writers"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD)
def test_bad_input_is_refused(bad, error, message):
    with pytest.raises(error, match=message) as caught:
        planted_circuit(**bad)
    assert "\n" not in str(caught.value)
