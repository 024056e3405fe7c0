"""Edges: exact patching equals a plain loop of hooks, attribution its derivative; laws."""

from __future__ import annotations

import dataclasses
import re

import naive
import numpy as np
import pytest
import torch
from conftest import KINDS, precise, tiny_model
from random_models import ARCHITECTURES
from test_exact import TOLERANCE, a_contrast, agree, sample

import tv_interp as tv
from tv_interp.analysis.graph import RoleGraph, split_edge
from tv_interp.models.adapter import Adapter
from tv_interp.models.parts import Parts

KIND = KINDS[0]
# each architecture in one of the classes, by turns: the parts of both are tested on all models
EACH_ARCH = [
    pytest.param(arch, KINDS[i % len(KINDS)], id=f"{arch}-{KINDS[i % len(KINDS)]}")
    for i, arch in enumerate(ARCHITECTURES)
]
POST_NORM = {"gemma2"}


# ------------------------------------------------------------------- one edge, with plain hooks


def written(model, tokens, sender, arch):
    """What a sender adds to the residual stream of one prompt, ``[pos, d_model]``."""
    if sender == "embed":
        return naive.read(model, tokens, ["blocks.0.hook_resid_pre"])[0]
    layer, head = re.fullmatch(r"L(\d+)(?:H(\d+)|\.mlp)", sender).groups()
    if head is None:
        return naive.read(model, tokens, [f"blocks.{layer}.hook_mlp_out"])[0]
    names = [f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_attn_out"]
    z, out = naive.read(model, tokens, names)
    each = torch.einsum("phe,hed->phd", z, model.blocks[int(layer)].attn.W_O.detach())
    own = each[:, int(head)]
    # the norm after attention scales each feature: a head's share is its part of the sum
    return own / each.sum(1) * out if arch in POST_NORM else own


def written_instead(model, donor, i, sender, arch, ablation):
    """What a sender writes when ablated; means are over prompts of equal length and roles."""
    if ablation == "corrupted":
        return written(model, naive.tokens_of(donor, i), sender, arch)
    each = [written(model, naive.tokens_of(donor, j), sender, arch) for j in range(len(donor))]
    return torch.stack(each).mean(0) * (ablation == "mean")


def edge_effect(
    model, contrast, i, edge, arch, direction="noise", scale=1.0, x0=None, ablation="corrupted"
):
    """Effect of patching one edge in prompt i; ``x0`` replaces the embeddings of the base run."""
    base, donor, sign = naive.sides(contrast, direction)
    tokens = naive.tokens_of(base, i)
    sender, receiver = split_edge(edge)
    name, place = sender.split("@")
    here = naive.tokens_with(base, i, place)
    new = written_instead(model, donor, i, name, arch, ablation)
    change = torch.zeros_like(new)
    change[here] = scale * (new - written(model, tokens, name, arch))[here]
    start = [] if x0 is None else [("blocks.0.hook_resid_pre", lambda a: x0[None])]

    def metric(edits=()):
        return naive.logit_diff(naive.run(model, tokens, [*start, *edits]), contrast.clean, i)

    def add(activation):
        return activation + change

    if receiver == "logits":
        patch = (f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", add)
        return sign * (metric([patch]) - metric())
    layer, head, via, dest = re.fullmatch(
        r"L(\d+)(?:H(\d+))?\.(q|k|v|mlp)@(\w+)", receiver
    ).groups()
    block, there = f"blocks.{layer}", naive.tokens_with(base, i, dest)
    shifted = (f"{block}.hook_resid_pre", add)
    before = [*start, shifted]
    if layer == "0" and x0 is not None:
        before = [("blocks.0.hook_resid_pre", lambda a: x0[None] + change)]
    if via == "mlp":
        (out,) = naive.read(model, tokens, [f"{block}.hook_attn_out"], start)
        held = (f"{block}.hook_attn_out", naive.hold(out))
        (new,) = naive.read(model, tokens, [f"{block}.hook_mlp_out"], [*before, held])

        def replace(activation):
            activation[0, there] = new[there]
            return activation

        return sign * (metric([(f"{block}.hook_mlp_out", replace)]) - metric())
    (changed,) = naive.read(model, tokens, [f"{block}.attn.hook_{via}"], before)
    swap = (f"{block}.attn.hook_{via}", naive.hold(changed))
    (z,) = naive.read(model, tokens, [f"{block}.attn.hook_z"], [*start, swap])
    patch = (f"{block}.attn.hook_z", naive.put(there, int(head), z[there, int(head)]))
    return sign * (metric([patch]) - metric())


def some_edges(graph: RoleGraph, n: int, seed: int = 0) -> list[str]:
    """Draw as many edges of each kind of receiver and of sender."""
    kinds: dict[str, list[str]] = {}
    for edge in graph.edges:
        sender, receiver = split_edge(edge)
        if sender.startswith(("embed@bos", "L0H0@bos")) or "@bos" in receiver:
            continue  # nothing in front of it differs
        kind = re.sub(r"\d+", "", sender.split("@")[0] + re.sub(r"@.*", "", receiver))
        kinds.setdefault(kind, []).append(edge)
    return [e for some in kinds.values() for e in sample(some, n, seed)]


def table(model, contrast, edges, arch, **how) -> torch.Tensor:
    return torch.stack(
        [
            torch.stack([edge_effect(model, contrast, i, e, arch, **how) for e in edges])
            for i in range(len(contrast))
        ]
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_exact_edges_equal_the_plain_loop(arch, kind):
    """Every kind of sender and receiver, with words of one and of two tokens."""
    dtype, direction = torch.float64, "noise" if kind == KIND else "denoise"
    model = tiny_model(arch, kind, dtype)
    with precise(dtype):
        contrast = a_contrast(arch, kind, "rugged" if direction == "noise" else "plain")
        graph = RoleGraph.of(model, contrast.clean)
        edges = some_edges(graph, 1, seed=len(arch))
        found = tv.score_edges(model, contrast, method="exact", direction=direction, edges=edges)
        expected = table(model, contrast, edges, arch, direction=direction)
        agree("exact edges", found.data.sel(edge=edges), expected, dtype)


# bridges of these discard edits of attention scores
NO_SCORES = [pytest.param(arch, "bridge", id=f"{arch}-bridge") for arch in ("gptj", "opt")]


@pytest.mark.parametrize(("arch", "kind"), [*EACH_ARCH, *NO_SCORES])
def test_eap_is_the_derivative_of_patching_an_edge(arch, kind):
    """As if all inputs were split; grouped queries and norms included."""
    model, step = tiny_model(arch, kind, torch.float64), 1e-5
    with precise(torch.float64):
        contrast = a_contrast(arch, kind, "rugged")
        graph = RoleGraph.of(model, contrast.clean)
        edges = some_edges(graph, 1, seed=len(arch) + 1)
        found = tv.score_edges(model, contrast, method="eap").data.sel(edge=edges)
        ends = [table(model, contrast, edges, arch, scale=s) for s in (step, -step)]
        expected = (ends[0] - ends[1]) / (2 * step)
    assert expected.abs().max() > 1e-3, "nothing to compare"
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-7)


@pytest.mark.parametrize(("arch", "ablation"), [("llama", "mean"), ("gemma2", "zero")])
def test_edges_under_other_ablations(arch, ablation):
    """What an edge carries instead is its sender's mean, or nothing: exact, and its derivative."""
    model, step = tiny_model(arch, KIND, torch.float64), 1e-5
    with precise(torch.float64):
        contrast = a_contrast(arch, KIND, "plain")
        edges = some_edges(RoleGraph.of(model, contrast.clean), 1, seed=7)
        how = dict(direction="noise", ablation=ablation)
        exact = tv.score_edges(model, contrast, method="exact", edges=edges, **how)
        expected = table(model, contrast, edges, arch, **how)
        agree("exact edges", exact.data.sel(edge=edges), expected, torch.float64)
        found = tv.score_edges(model, contrast, method="eap", edges=edges, **how).data
        ends = [table(model, contrast, edges, arch, scale=s, **how) for s in (step, -step)]
        expected = (ends[0] - ends[1]) / (2 * step)
    assert expected.abs().max() > 1e-3, "nothing to compare"
    np.testing.assert_allclose(found.sel(edge=edges), expected, rtol=1e-4, atol=2e-7)
    assert exact.attrs["ablation"] == ablation


def test_the_total_is_that_of_the_ablation():
    """What is lost when nothing carries anything, and not what the corrupted run loses."""
    model = tiny_model("llama", KIND, torch.float64)
    with precise(torch.float64):
        contrast = a_contrast("llama", KIND, "plain")
        zero = tv.score_edges(model, contrast, method="eap", ablation="zero")
        for i in range(len(contrast)):
            tokens, layers = naive.tokens_of(contrast.clean, i), range(model.cfg.n_layers)
            plain = naive.logit_diff(naive.run(model, tokens), contrast.clean, i)
            names = ["blocks.0.hook_resid_pre"]
            names += [f"blocks.{la}.hook_{what}_out" for la in layers for what in ("attn", "mlp")]
            silent = [(name, torch.zeros_like) for name in names]
            none = naive.logit_diff(naive.run(model, tokens, silent), contrast.clean, i)
            assert zero.total[i] == pytest.approx(float(plain - none), abs=1e-9)


@pytest.mark.parametrize("quadrature", ["midpoint", "left"])
def test_integrated_gradients_average_over_runs_between(quadrature):
    model, step, n = tiny_model("llama", KIND, torch.float64), 1e-5, 3
    with precise(torch.float64):
        contrast = a_contrast("llama", KIND, "plain").select([0])
        edges = some_edges(RoleGraph.of(model, contrast.clean), 1)
        found = tv.score_edges(
            model, contrast, method="eap-ig", n_steps=n, quadrature=quadrature
        ).data.sel(edge=edges)
        clean, corrupted = (
            written(model, naive.tokens_of(p, 0), "embed", "llama")
            for p in (contrast.clean, contrast.corrupted)
        )
        expected = torch.zeros(1, len(edges), dtype=torch.float64)
        for k in range(n):
            at = (k + (0.5 if quadrature == "midpoint" else 0)) / n
            x0 = corrupted + at * (clean - corrupted)
            for scale in (step, -step):
                part = table(model, contrast, edges, "llama", scale=scale, x0=x0)
                expected += part / (2 * scale * n)
    assert expected.abs().max() > 1e-3, "nothing to compare"
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-7)


@pytest.mark.parametrize(("arch", "kind"), [EACH_ARCH[i] for i in (0, 3, 5)])
def test_integrated_gradients_of_the_embedding_add_up_to_the_total(arch, kind):
    """The fundamental theorem: all edges out of what is interpolated are its whole effect."""
    model = tiny_model(arch, kind, torch.float64)
    with precise(torch.float64):
        contrast = a_contrast(arch, kind, "plain").select([0])
        scores = tv.score_edges(model, contrast, method="eap-ig", n_steps=40)
    out_of = [str(e) for e in scores.data.edge.values if str(e).startswith("embed@")]
    whole = scores.data.sel(edge=out_of).sum("edge")
    np.testing.assert_allclose(whole, scores.total, rtol=2e-2, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_integrated_gradients_of_activations_add_up_to_patching_a_layer(direction):
    """All heads of a layer, or an MLP, at all tokens: what exchanging its output does."""
    model = tiny_model("gemma2", KIND, torch.float64)
    with precise(torch.float64):
        contrast = a_contrast("gemma2", KIND, "plain").select([0])
        scores = tv.score_edges(
            model, contrast, method="eap-ig-activations", n_steps=20, direction=direction
        )
        base, donor, sign = naive.sides(contrast, direction)
        for senders, what in (("L1H", "hook_attn_out"), ("L0.mlp", "hook_mlp_out")):
            name = f"blocks.{senders[1]}.{what}"
            out_of = [str(e) for e in scores.data.edge.values if str(e).startswith(senders)]
            found = scores.data.sel(edge=out_of).sum("edge").values
            for i in range(len(contrast)):
                tokens = naive.tokens_of(base, i)
                (new,) = naive.read(model, naive.tokens_of(donor, i), [name])
                patched = naive.run(model, tokens, [(name, naive.hold(new))])
                plain = naive.run(model, tokens)
                expected = naive.logit_diff(patched, contrast.clean, i)
                expected = sign * (expected - naive.logit_diff(plain, contrast.clean, i))
                assert abs(float(expected)) > 1e-2, "nothing to compare"
                assert found[i] == pytest.approx(float(expected), rel=2e-2, abs=2e-3)


def test_five_midpoints_are_closer_to_the_integral_than_five_left_ends():
    model, contrast = tiny_model("gpt2", KIND), a_contrast("gpt2", KIND, "plain")
    gold = tv.score_edges(model, contrast, method="eap-ig", n_steps=40).data.values
    error = {
        q: np.abs(
            tv.score_edges(model, contrast, method="eap-ig", quadrature=q).data.values - gold
        ).sum()
        / np.abs(gold).sum()
        for q in ("midpoint", "left")
    }
    assert error["midpoint"] < error["left"] / 2


@pytest.mark.parametrize("method", ["exact", "eap", "eap-ig-activations"])
def test_edges_do_not_depend_on_batches(method, monkeypatch):
    from tv_interp.analysis import attribution
    from tv_interp.interventions import recording

    model, contrast = tiny_model("llama", KIND), a_contrast("llama", KIND, "plain", 5)
    edges = some_edges(RoleGraph.of(model, contrast.clean), 2)
    some = dict(edges=edges, n_steps=2)
    whole = tv.score_edges(model, contrast, method=method, **some).data.values
    monkeypatch.setattr(recording, "MOST_ROWS", 3)
    monkeypatch.setattr(
        attribution, "few_rows", lambda adapter, tape, *a: torch.arange(tape.n_rows).split(2)
    )
    parts = tv.score_edges(model, contrast, method=method, **some).data.values
    assert np.abs(whole).max() > 1e-2
    np.testing.assert_allclose(parts, whole, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_norm_in_front_of_attention_is_known(arch, kind):
    """Its Jacobian in closed form, and one by autograd where it is of no known kind."""
    model = tiny_model(arch, kind, torch.float64)
    with precise(torch.float64):
        adapter = Adapter.of(model)
        tape = adapter.tape(a_contrast(arch, kind, "plain").clean.tokens)
        parts = Parts.of(adapter, tape)
        assert parts.kind == ("layer" if arch in ("gpt2", "gpt_neox", "phi") else "rms")
        generator = torch.Generator().manual_seed(3)
        x = tape.resid[1]
        change = torch.randn(*x.shape[:2], 3, x.shape[2], generator=generator, dtype=x.dtype)
        expected = torch.stack(
            [
                torch.autograd.functional.jvp(
                    lambda at: parts.norm(1, at, gradients="on"), x, change[:, :, i]
                )[1]
                for i in range(3)
            ],
            2,
        )
        for one in (parts, dataclasses.replace(parts, kind="other")):
            found = one.through_norm(1, x, change)
            torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_an_unknown_norm_gives_the_same_scores(monkeypatch):
    """Where the closed form is not the norm's, it is seen, and the norm is differentiated."""
    model, contrast = tiny_model("gpt2", KIND), a_contrast("gpt2", KIND, "plain")
    known = tv.score_edges(model, contrast, method="eap").data.values
    gain = Parts._gain
    monkeypatch.setattr(Parts, "_gain", lambda self, layer: 1.001 * gain(self, layer))
    adapter = Adapter.of(model)
    assert Parts.of(adapter, adapter.tape(contrast.clean.tokens)).kind == "other"
    unknown = tv.score_edges(model, contrast, method="eap").data.values
    np.testing.assert_allclose(unknown, known, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_keys_are_reached_from_scores_as_from_z(arch, monkeypatch, kind):
    """Scores are the shorter way, taken where edits of them take effect."""
    model, contrast = tiny_model(arch, kind), a_contrast(arch, kind, "rugged")
    adapter = Adapter.of(model)
    tape = adapter.tape(contrast.clean.tokens[:1, : int(contrast.clean.lengths[0])])
    assert Parts.of(adapter, tape).takes_scores
    shorter = tv.score_edges(model, contrast, method="eap").data
    monkeypatch.setattr(Parts, "_takes_scores", lambda self, tape: False)
    longer = tv.score_edges(model, contrast, method="eap").data
    np.testing.assert_allclose(shorter, longer, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_eap_makes_the_first_run_once(direction, monkeypatch, kind):
    """With its gradients; the same as from recorded runs, and where a model cannot stop early."""
    model, contrast = tiny_model("llama", kind), a_contrast("llama", kind, "rugged")
    recorded = tv.record(model, contrast)
    how = dict(method="eap", direction=direction)
    expected = tv.score_edges(model, contrast, recorded=recorded, **how)
    ran = []
    tape, embed = Adapter.tape, Adapter.embed
    monkeypatch.setattr(Adapter, "tape", lambda self, t: ran.append(t) or tape(self, t))
    found = tv.score_edges(model, contrast, **how)
    donor = contrast.corrupted if direction == "noise" else contrast.clean
    assert sum(map(len, ran)) == len(contrast), "the first run was recorded"
    assert all((t == donor.tokens[:, : t.shape[1]]).all(1).any() for t in ran)

    def fails(self, tokens):
        raise TypeError("unexpected keyword argument 'stop_at_layer'")

    monkeypatch.setattr(Adapter, "embed", fails)
    without = tv.score_edges(model, contrast, **how)
    assert sum(map(len, ran)) == 3 * len(contrast)
    wrong = lambda self, tokens: embed(self, tokens) + 1e-3  # noqa: E731
    monkeypatch.setattr(Adapter, "embed", wrong)
    for scores in (found, without, tv.score_edges(model, contrast, **how)):
        for ours, theirs in ((scores.data, expected.data), (scores.total, expected.total)):
            np.testing.assert_allclose(ours, theirs, atol=TOLERANCE[torch.float32])


def test_eap_where_the_query_alone_differs():
    """Tokens in front of the first that differs do not change, so what they send scores 0."""
    model, step = tiny_model("gpt2", KIND, torch.float64), 1e-5
    with precise(torch.float64):
        contrast = a_contrast("gpt2", KIND, "rugged").clean.corrupt("query")
        graph = RoleGraph.of(model, contrast.clean)
        sent = [e for e in graph.edges if re.search(r"@query_\w+->", e)]
        edges = sample(sent, 20)
        scores = tv.score_edges(model, contrast, method="eap").data
        ends = [table(model, contrast, edges, "gpt2", scale=s) for s in (step, -step)]
        expected = (ends[0] - ends[1]) / (2 * step)
    assert expected.abs().max() > 1e-3, "nothing to compare"
    np.testing.assert_allclose(scores.sel(edge=edges), expected, rtol=1e-4, atol=2e-7)
    others = [e for e in graph.edges if e not in set(sent)]
    assert not scores.sel(edge=others).any()


def test_demonstrations_one_by_one_have_edges_of_their_own():
    model, contrast = tiny_model("gpt2", KIND), a_contrast("gpt2", KIND, "plain")
    joint = tv.score_edges(model, contrast, method="eap").data
    each = tv.score_edges(model, contrast, method="eap", demos="each").data
    parts = [f"L0H1@answer[{i}]->L2H3.v@query_is" for i in range(3)]
    whole = joint.sel(edge="L0H1@answer->L2H3.v@query_is")
    np.testing.assert_allclose(each.sel(edge=parts).sum("edge"), whole, atol=1e-5)
    assert "L0H1@answer[2]->L2H3.v@x[1]" not in each.edge.values  # it comes later


def test_what_edges_cannot_do_is_refused():
    model, contrast = tiny_model("gpt2", KIND), a_contrast("gpt2", KIND, "plain")
    for settings, message in (
        (dict(method="eep"), "unknown method 'eep': did you mean 'eap'"),
        (dict(quadrature="right"), "unknown quadrature 'right'"),
        (dict(ablation="zeros"), "unknown ablation 'zeros': did you mean 'zero'"),
        (
            dict(ablation="mean", direction="denoise"),
            "so direction must be \"noise\", got 'denoise'",
        ),
        (dict(n_steps=0), "expected n_steps of 1 or more, got 0"),
        (dict(metric="accuracy"), "metric 'accuracy' is not differentiable"),
        (
            dict(edges=["L0H1@anwser->logits"]),
            "unknown node 'L0H1@anwser': did you mean 'L0H1@answer'",
        ),
        (dict(edges=["L0H1@answer"]), "expected an edge such as 'L0H1@answer->L2H1.v@query_is'"),
        (dict(edges=["L0H1@answer->logits"]), "no edge leads from L0H1@answer to logits"),
        (dict(demos="some"), "unknown demos 'some'"),
    ):
        with pytest.raises(tv.TvInterpError, match=message):
            tv.score_edges(model, contrast, **settings)
    graph = RoleGraph.of(model, contrast.clean)
    with pytest.raises(tv.TvInterpError, match="no path between the chosen senders and receivers"):
        graph.between(["L2H1@query_is"], ["L1H0@query_is"])
    with pytest.raises(tv.TvInterpError, match="unknown node 'L1H9@query_is'"):
        graph.between(receivers=["L1H9@query_is"])
    assert graph.between(["embed@query_is"], ["logits"]) == ("embed@query_is->logits",)


def name_of(node) -> str:
    """Our name of TransformerLens's node, without its place."""
    if node.kind in ("embed", "logits"):
        return node.kind
    head = "" if node.head is None else f"H{node.head}"
    return f"L{node.layer}{head}" + {
        "attn_head_out": "", "mlp_out": ".mlp", "mlp_in": ".mlp",
        "q_input": ".q", "k_input": ".k", "v_input": ".v",
    }[node.kind]  # fmt: skip


@pytest.mark.parametrize("arch", ["gpt2", "gpt_neox"])
def test_eap_equals_that_of_transformer_lens(arch):
    """Theirs is by token, one prompt at a time, and has one edge for all places that read a key."""
    theirs = pytest.importorskip(
        "transformer_lens.tools.analysis.attribution_patching", reason="TransformerLens 4.3 has it"
    )
    model = tiny_model(arch, "bridge")
    contrast = a_contrast(arch, "bridge", "rugged").select([0])
    clean, corrupted = (naive.tokens_of(p, 0) for p in (contrast.clean, contrast.corrupted))
    try:
        config = theirs.EdgeAttributionConfig(granularity="edge")
    except NotImplementedError:
        pytest.skip("TransformerLens 4.3 has edges")
    gold = theirs.attribution_patch(
        model,
        clean,
        corrupted,
        lambda logits: naive.logit_diff(
            logits.reshape(-1, logits.shape[-1])[-1], contrast.clean, 0
        ),
        config,
    )
    expected: dict[tuple[str, str, str], float] = {}
    for (writer, reader), score in gold.edge_scores.items():
        place = naive.ROLES[contrast.clean.role_ids[0, writer.position]]
        key = name_of(writer), place, name_of(reader)
        expected[key] = expected.get(key, 0.0) + float(score)
    found: dict[tuple[str, str, str], float] = {}
    scores = tv.score_edges(model, contrast, method="eap", direction="denoise").data[0]
    for edge, score in zip(scores.edge.values, scores.values, strict=True):
        sender, receiver = split_edge(str(edge))
        key = (*sender.split("@"), receiver.split("@")[0])
        found[key] = found.get(key, 0.0) + float(score)
    assert max(map(abs, found.values())) > 0.1
    for key, score in found.items():
        assert score == pytest.approx(expected.pop(key), abs=2e-5), key
    assert max(map(abs, expected.values()), default=0) < 1e-6  # what reaches nothing


def direct_paths(model, contrast, sender, place, via):
    """TransformerLens's own exact edges: effects on all later heads, ``[prompt, layer, head]``.

    It exchanges a sender at all tokens, so outside of the place the clean cache is the corrupted.
    Up to 3.9 it divides by the norm's old scale, which is exact where there is no norm: 1 here.
    """
    from transformer_lens.tools.analysis import get_act_patch_direct_path

    layer, head = sender
    z, scales = naive.z_name(layer), [f"blocks.{la}.ln1.hook_scale" for la in range(9)]
    found = []
    for i in range(len(contrast)):
        clean, corrupted = (naive.tokens_of(p, i) for p in (contrast.clean, contrast.corrupted))
        (new,), (old,) = (naive.read(model, tokens, [z]) for tokens in (clean, corrupted))
        at = naive.tokens_with(contrast.clean, i, place)
        mixed = old.clone()
        mixed[at] = new[at]
        ones = dict.fromkeys(scales, torch.ones(1, len(old), 1))
        patched = get_act_patch_direct_path(
            model,
            corrupted,
            {z: mixed[None]},
            {z: old[None], **ones},
            lambda logits, i=i: naive.logit_diff(logits[0, -1], contrast.clean, i),
            layer,
            head,
            via,
            verbose=False,
        )
        patched = patched - naive.logit_diff(naive.run(model, corrupted), contrast.clean, i)
        found.append(patched[layer + 1 :])
    return torch.stack(found)


def agrees_with_direct_paths(model, contrast, sender, places, via, dest=None):
    """Ours and theirs, for a sender at some places; theirs into keys has no place of its own."""
    largest, layers = 0.0, range(sender[0] + 1, model.cfg.n_layers)
    layers = layers if dest is None else layers[-1:]
    for place in places:
        theirs = direct_paths(model, contrast, sender, place, via)[:, -len(layers) :]
        name = f"L{sender[0]}H{sender[1]}@{place}"
        edges = [
            f"{name}->L{la}H{h}.{via}@{dest or place}"
            for la in layers
            for h in range(model.cfg.n_heads)
            if la < model.cfg.n_layers - 1 or (dest or place) == "query_is"
        ]
        kept = theirs.flatten(1)[:, : len(edges)] if dest is None else theirs.flatten(1)
        ours = tv.score_edges(
            model, contrast, method="exact", direction="denoise", edges=edges
        ).data.sel(edge=edges)
        largest = max(largest, float(abs(ours).max()))
        np.testing.assert_allclose(ours, kept, atol=1e-5)
    assert largest > 1e-2, "nothing to compare"


def direct_path_is_exact() -> bool:
    import inspect

    from transformer_lens.tools.analysis import get_act_patch_direct_path

    return "linear" not in (inspect.getdoc(get_act_patch_direct_path) or "")


@pytest.mark.parametrize("arch", ["gpt2", "gpt_neox", "llama"])
def test_exact_edges_equal_the_direct_paths_of_transformer_lens(arch):
    """Queries everywhere; keys and values where one place alone reads them: in the last layer."""
    if not direct_path_is_exact():
        pytest.skip("up to 3.9 TransformerLens keeps the norm's old scale: a linear estimate")
    model = tiny_model(arch, "bridge")
    contrast = a_contrast(arch, "bridge", "rugged").select([0, 1])
    agrees_with_direct_paths(model, contrast, (0, 1), ("answer", "query_is"), "q")
    for via in () if arch == "llama" else ("k", "v"):  # they refuse keys that heads share
        agrees_with_direct_paths(model, contrast, (0, 2), ("answer",), via, dest="query_is")


def test_exact_edges_equal_the_direct_paths_of_transformer_lens_where_there_is_no_norm():
    if direct_path_is_exact():
        pytest.skip("TransformerLens 4.3 splits inputs, which a native bridge's attention cannot")
    case = tv.planted_circuit(seed=2, writers=3, readers=2, relays=2, layers=5)
    prompts = tv.make_prompts(case.model, case.task, n_demos=2, n_prompts=4)
    contrast = prompts.corrupt("inputs").select([0, 1])
    read = sorted(e for e in case.truths["inputs"].edges if e.endswith(".v@query_is"))
    writer = next(e for e in read if e.split("->")[0] in case.nodes("writer")).split("->")[0]
    layer, head = map(int, re.findall(r"\d+", writer.split("@")[0]))
    agrees_with_direct_paths(case.model, contrast, (layer, head), ("answer",), "v", "query_is")
