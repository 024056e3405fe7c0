"""NaN and infinity in weights, logits, gradients and effects end in one error that says where."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from random_models import words

import tv_interp as tv
from tv_interp.errors import ModelError
from tv_interp.interventions.recording import last_logits, record_run
from tv_interp.models.adapter import Adapter

PAIRS = {w: words()[30 + i] for i, w in enumerate(words()[3:28])}


def spoilt(kind: str, arch: str = "llama", dtype=torch.float32):
    """A tiny model of its own, to be broken: the others are shared by the tests."""
    return tiny_model.__wrapped__(arch, kind, dtype)


def pairs(model, n: int = 3):
    clean = tv.make_prompts(model, tv.Task.from_pairs(PAIRS), n_demos=2, n_prompts=n, seed=3)
    return clean.corrupt("answers", seed=1)


def weight_of(model, *parts: str):
    """The first weight whose name has all parts."""
    named = model.named_parameters()
    return next((n, w) for n, w in named if all(part in n for part in parts))


def multiply(weight, factor: float) -> None:
    with torch.no_grad():
        weight.mul_(factor)


METHODS = {
    "patch_heads": lambda m, c: tv.patch_heads(m, c),
    "patch_paths": lambda m, c: tv.patch_paths(m, c, receivers=["L2H1.z@query_is"]),
    "knock_out": lambda m, c: tv.knock_out(m, c.clean),
    "saliency_flow": lambda m, c: tv.saliency_flow(m, c.clean),
    "eap": lambda m, c: tv.discover_circuit(m, c, method="eap"),
    "eap-ig": lambda m, c: tv.discover_circuit(m, c, method="eap-ig"),
    "extract_vectors": lambda m, c: tv.extract_vectors(m, c.clean),
    "record": lambda m, c: tv.record(m, c),
    "last_logits": lambda m, c: last_logits(Adapter.of(m), c.clean),
    "record_run": lambda m, c: record_run(Adapter.of(m), c.clean),
}
MODULE = {"saliency_flow": "saliency", "eap": "attribution"}


@pytest.mark.parametrize("method", METHODS)
def test_one_weight_that_is_nan_is_named_with_the_place_where_it_first_shows(method, kind):
    model = spoilt(kind)
    contrast = pairs(model)
    name, weight = weight_of(model, "1.", "W_in" if kind == "hooked" else "gate")
    with torch.no_grad():
        weight.view(-1)[5] = float("nan")
    with pytest.raises(ModelError, match=f"NaN or infinite logits for 3 of 3 prompts, first at "
                       f"mlp_out of layer 1; so does its weight '{name}'"):  # fmt: skip
        METHODS[method](model, contrast)


def test_one_row_of_the_embedding_spoils_the_prompts_that_use_it_and_their_number_is_said(kind):
    model = spoilt(kind)
    prompts = pairs(model, 6).clean
    word = next(t for t in prompts.tokens[0].tolist() if (prompts.tokens == t).any(1).sum() < 6)
    n = int((prompts.tokens == word).any(1).sum())
    _, weight = weight_of(model, "embed")
    with torch.no_grad():
        weight[word, 2] = float("inf")
    with pytest.raises(ModelError, match=f"for {n} of 6 prompts, first at resid_pre of layer 0"):
        last_logits(Adapter.of(model), prompts)


def test_infinite_logits_are_named_though_all_before_them_is_finite(kind):
    model = spoilt(kind)
    _, weight = weight_of(model, "unembed" if kind == "hooked" else "lm_head")
    multiply(weight, 1e38)
    multiply(weight_of(model, "ln_final" if kind == "hooked" else "model.norm")[1], 1e3)
    with pytest.raises(ModelError, match="first at the final norm or the unembedding; its weights "
                       "are finite in float32: look for values that are huge"):  # fmt: skip
        tv.record(model, pairs(model))


def test_float16_that_overflows_is_told_to_load_float32(kind):
    model = spoilt(kind, dtype=torch.float16)
    contrast = pairs(model)
    tv.record(model, contrast)  # as it is, it runs
    multiply(weight_of(model, "2.", "W_out" if kind == "hooked" else "down_proj")[1], 6e4)
    with pytest.raises(ModelError, match="first at mlp_out of layer 2; its weights are finite, so "
                       "float16 overflows: load it in float32"):  # fmt: skip
        tv.patch_heads(model, contrast)


def test_bfloat16_that_overflows_is_told_to_load_float32(kind):
    model = spoilt(kind, dtype=torch.bfloat16)
    contrast = pairs(model)
    for name in ("W_in", "W_out") if kind == "hooked" else ("gate_proj", "down_proj"):
        multiply(weight_of(model, "0.", name)[1], 1e25)
    with pytest.raises(ModelError, match="mlp_out of layer 0; .*so bfloat16 overflows: load it in"):
        tv.saliency_flow(model, contrast.clean)


def test_a_vector_that_no_logit_sees_is_named_too(kind, monkeypatch):
    """What the last layer writes at an answer reaches no logit of the last token."""
    model = spoilt(kind)
    prompts = pairs(model).clean
    here = prompts.positions("answer")[0, 1]

    def spoil(x, hook):
        x = x.clone()
        x[:, here] = float("inf")
        return x

    with model.hooks(fwd_hooks=[("blocks.2.hook_resid_post", spoil)]):
        with pytest.raises(ModelError, match="NaN or infinite vectors at 'answer'"):
            tv.extract_vectors(model, prompts)


def test_values_and_gradients_under_intervention_are_named(kind):
    model = spoilt(kind)
    contrast = pairs(model)
    recorded = tv.record(model, contrast)
    adapter = Adapter.of(model)
    name, weight = weight_of(model, "2.", "W_in" if kind == "hooked" else "gate")
    with torch.no_grad():
        weight.view(-1)[5] = float("nan")  # after the plain runs
    with pytest.raises(ModelError, match=f"infinite values under intervention; .*weight '{name}'"):
        tv.patch_heads(model, contrast, recorded=recorded)
    from tv_interp.analysis.gradients import Walk
    from tv_interp.scores import get_metric
    from tv_interp.scores.metrics import Targets

    rows, tape = next(iter(recorded.clean.tapes()))
    readout = get_metric("logit_diff").readout(Targets.of(contrast.clean))
    with pytest.raises(ModelError, match=f"infinite gradients at z of layer 1; .*weight '{name}'"):
        Walk(adapter, tape, tape.resid[0], readout, rows, [("z", 1)])


@pytest.mark.parametrize("method", ["saliency_flow", "eap"])
def test_products_that_overflow_are_named(method, kind, monkeypatch):
    from tv_interp.analysis import gradients

    class Steep(gradients.Walk):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.gradients = {n: g + 1e38 for n, g in self.gradients.items()}
            self.seen = {n: 10 + a for n, a in self.seen.items()}

    monkeypatch.setattr(f"tv_interp.analysis.{MODULE[method]}.Walk", Steep)
    model = tiny_model("llama", kind)
    with pytest.raises(ModelError, match="NaN or infinite scores; its weights are finite"):
        METHODS[method](model, pairs(model))


def test_looking_for_the_place_leaves_no_hook_behind(kind):
    model = spoilt(kind)
    contrast = pairs(model)

    def hooks() -> list[int]:
        found = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
        return found + [len(point.fwd_hooks) for point in model.hook_dict.values()]

    tv.record(model, contrast)  # a bridge adds hooks of its own in its first run
    before = hooks()
    multiply(weight_of(model, "unembed" if kind == "hooked" else "lm_head")[1], float("nan"))
    with pytest.raises(ModelError, match="NaN or infinite"):
        tv.record(model, contrast)
    assert hooks() == before
