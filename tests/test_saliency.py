"""Saliency equals a finite difference of the metric, on every architecture, with frozen weights."""

from __future__ import annotations

import naive
import numpy as np
import pytest
import torch
from conftest import KINDS, precise, tiny_model
from test_edges import EACH_ARCH
from test_exact import a_contrast

import tv_interp as tv
from tv_interp.analysis.graph import place_masks

STEP = 1e-4


def finite_difference(model, prompts, i, layer, head, dest, src, metric=naive.logit_diff):
    """A * dm/dA at one pair of tokens: the weight is scaled by 1 +- STEP, nothing renormalised."""
    values = []
    for scale in (1 + STEP, 1 - STEP):

        def scaled(pattern, scale=scale):
            pattern[0, head, dest, src] *= scale
            return pattern

        edits = [(f"blocks.{layer}.attn.hook_pattern", scaled)]
        values.append(metric(naive.run(model, naive.tokens_of(prompts, i), edits), prompts, i))
    return float(values[0] - values[1]) / (2 * STEP)


@pytest.mark.parametrize(("arch", "kind"), EACH_ARCH)
def test_saliency_equals_a_finite_difference(arch, kind):
    """In pairs of roles with several tokens, of prompts of different length."""
    model = tiny_model(arch, kind, torch.float64)
    with precise(torch.float64):
        prompts = a_contrast(arch, kind, "rugged").clean
        flow = tv.saliency_flow(model, prompts)
        for i, layer, head, dest, src in (
            (0, 1, 2, "query_is", "answer"),
            (1, 0, 3, "answer", "x"),
        ):
            expected = sum(
                finite_difference(model, prompts, i, layer, head, d, s)
                for d in naive.tokens_with(prompts, i, dest)
                for s in naive.tokens_with(prompts, i, src)
                if s <= d
            )
            found = float(flow.data[i].sel(layer=layer, head=head, dest=dest, src=src))
            assert abs(expected) > 1e-6, "nothing to compare"
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_demonstrations_add_up_and_parameters_may_be_frozen(kind):
    model, prompts = tiny_model("llama", kind), a_contrast("llama", kind, "plain").clean
    wanted = [p.requires_grad for p in model.parameters()]
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        joint = tv.saliency_flow(model, prompts).data
        each = tv.saliency_flow(model, prompts, demos="each").data
    finally:
        for parameter, want in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(want)
    answers = [f"answer[{i}]" for i in range(prompts.n_demos)]
    whole = joint.sel(dest="query_is", src="answer")
    parts = each.sel(dest="query_is", src=answers).sum("src")
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-6)
    assert float(abs(joint.sel(dest="answer", src="query_is")).max()) == 0  # nobody looks ahead


def token_saliency(model, prompts, i, metric="loss"):
    """``[layer, head, dest, src]`` of one prompt, each token a place of its own."""
    n = int(prompts.lengths[i])
    found = torch.zeros(model.cfg.n_layers, model.cfg.n_heads, n, n, dtype=torch.float64)
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            for dest in range(n):
                for src in range(dest + 1):
                    found[layer, head, dest, src] = finite_difference(
                        model, prompts, i, layer, head, dest, src, metric
                    )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("convention", ["wang", "dong"])
def test_flows_of_label_words_follow_their_definition(convention):
    """S_wp, S_pq and S_ww from a token-by-token saliency, with the papers' normalisers."""
    kind = KINDS[0]
    model = tiny_model("gpt2", kind, torch.float64, n_layers=2)
    with precise(torch.float64):
        prompts = a_contrast("gpt2", kind, "plain").clean.select([0])

        def loss(logits, prompts, i):
            return -logits.log_softmax(-1)[prompts.answer[i]]

        flow = token_saliency(model, prompts, 0, loss)
        heads = flow.sum(1).abs() if convention == "wang" else flow.abs().sum(1)
        found = tv.label_flow(model, prompts, convention=convention).data[0]
    labels, last = prompts.positions("answer")[0].tolist(), int(prompts.lengths[0]) - 1
    for layer in range(2):
        inflow = sum(heads[layer, p, j] for p in labels for j in range(p)) / sum(labels)
        outflow = sum(heads[layer, last, p] for p in labels) / len(labels)
        rest = sum(heads[layer, i, j] for i in range(last + 1) for j in range(i))
        rest -= inflow * sum(labels) + outflow * len(labels)
        rest /= (last + 1) * last / 2 - sum(labels) - len(labels)
        got = found.sel(layer=layer, part=["S_wp", "S_pq", "S_ww"]).values
        np.testing.assert_allclose(got, [inflow, outflow, rest], rtol=1e-4)


def test_batches_of_prompts_change_nothing(monkeypatch):
    from tv_interp.analysis import saliency

    kind = KINDS[0]
    model, prompts = tiny_model("gpt2", kind), a_contrast("gpt2", kind, "plain", 5).clean
    whole = tv.saliency_flow(model, prompts).data.values
    monkeypatch.setattr(saliency, "few_rows", lambda *a: torch.arange(5).split(2))
    np.testing.assert_allclose(tv.saliency_flow(model, prompts).data.values, whole, atol=1e-5)


def test_what_saliency_cannot_do_is_refused():
    kind = KINDS[0]
    model, prompts = tiny_model("gpt2", kind), a_contrast("gpt2", kind, "plain").clean
    with pytest.raises(tv.TvInterpError, match="metric 'accuracy' is not differentiable"):
        tv.saliency_flow(model, prompts, metric="accuracy")
    with pytest.raises(tv.TvInterpError, match="unknown convention 'wong'.*'wang'"):
        tv.label_flow(model, prompts, convention="wong")
    with pytest.raises(tv.TvInterpError, match="label words are in demonstrations"):
        tv.label_flow(model, prompts.zero_shot())
    with pytest.raises(tv.TvInterpError, match="of role 'x', for which the graph has no place"):
        place_masks(prompts, ("bos", "is", "answer", "query_x", "query_is"))
