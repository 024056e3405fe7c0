"""After every measurement, a failed one too, the model is as it was; and what is refused."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from conftest import KINDS, tiny_model
from random_models import hf_model, word_tokenizer, words

from tv_interp.analysis.ablation import EdgeRunner
from tv_interp.analysis.common import Experiment
from tv_interp.analysis.edges import score_edges, survey
from tv_interp.analysis.heads import (
    knock_out,
    patch_heads,
    patch_local_paths,
    patch_sources,
    patch_together,
)
from tv_interp.analysis.interactions import patch_interactions
from tv_interp.analysis.paths import patch_paths
from tv_interp.analysis.positions import patch_positions
from tv_interp.analysis.ranking import rank_heads
from tv_interp.analysis.saliency import saliency_flow
from tv_interp.errors import ModelError, PromptError, UnknownName
from tv_interp.interventions import Patch, Site, record, run_variants
from tv_interp.models.adapter import Adapter
from tv_interp.models.convert import bridge_from_hf, hooked_from_hf
from tv_interp.models.replay import Layout
from tv_interp.prompts import make_prompts
from tv_interp.prompts.tasks import Task
from tv_interp.scores import Metric

TASK = Task.from_pairs({f"w{i}": f"w{i + 20}" for i in range(20)})


def run_edges(model, contrast, metric):
    """Run with all edges kept, put together from all senders."""
    run = Experiment(model, contrast, None, "noise", metric, "query_is")
    assert len(run.total) == len(contrast)  # reads both runs as they are
    parts, graph, masks = survey(run)
    runner = EdgeRunner(graph, parts, (run.base, run.donor), masks, run.readout)
    return runner.run(np.ones(len(graph.edges), dtype=bool))


CALLS = {
    "record": lambda model, contrast, metric: record(model, contrast),
    "patch_heads": lambda model, contrast, metric: patch_heads(model, contrast, metric=metric),
    "patch_together": lambda model, contrast, metric: patch_together(
        model, contrast, {"a": [(0, 1), (1, 0)]}, metric=metric
    ),
    "patch_sources": lambda model, contrast, metric: patch_sources(
        model, contrast, heads=[(1, 1)], metric=metric
    ),
    "patch_paths": lambda model, contrast, metric: patch_paths(
        model, contrast, receivers=[(1, 1)], metric=metric
    ),
    "knock_out": lambda model, contrast, metric: knock_out(model, contrast.clean, metric=metric),
    "patch_local_paths": lambda model, contrast, metric: patch_local_paths(
        model, contrast, metric=metric
    ),
    "patch_positions": lambda model, contrast, metric: patch_positions(
        model, contrast, by="token", metric=metric
    ),
    "patch_interactions": lambda model, contrast, metric: patch_interactions(
        model, contrast, heads=[(0, 1), (1, 0)], metric=metric
    ),
    "rank_heads": lambda model, contrast, metric: rank_heads(model, contrast, k=2, metric=metric),
    "saliency_flow": lambda model, contrast, metric: saliency_flow(
        model, contrast.clean, metric=metric
    ),
    "exact edges": lambda model, contrast, metric: score_edges(
        model, contrast, method="exact", metric=metric
    ),
    "attributed edges": lambda model, contrast, metric: score_edges(
        model, contrast, method="eap-ig-activations", metric=metric
    ),
    "run_edges": run_edges,
}


def build(kind: str, arch: str = "gpt2"):
    """A model of this test's own, so that what it leaves behind shows here and nowhere else."""
    make = hooked_from_hf if kind == "hooked" else bridge_from_hf
    return make(hf_model(arch, n_layers=2), word_tokenizer(words()))


def pairs(model):
    return make_prompts(model, TASK, n_demos=2, n_prompts=2, seed=1).corrupt("answers", seed=2)


class FailsLater(Exception):
    pass


def failing_metric(after: int):
    """A logit that cannot be computed any more after so many runs."""
    seen = []

    def compute(logits, rows, targets):
        seen.append(1)
        if len(seen) > after:
            raise FailsLater
        return logits[:, 5]

    return Metric("failing", "logits", compute, lambda vocab: None)


def state_of(model) -> dict:
    """Everything that a measurement could leave changed."""
    modules = {}
    for name, module in model.named_modules():
        modules[name] = {
            "hooks": [list(d) for d in (
                module._forward_hooks, module._forward_pre_hooks,
                module._backward_hooks, module._backward_pre_hooks,
            )],
            "training": module.training,
            "lists": [
                [id(handle) for handle in getattr(module, attribute, [])]
                for attribute in ("fwd_hooks", "bwd_hooks")
            ],
        }  # fmt: skip
    parameters = {
        name: (p.requires_grad, p.grad, p.dtype, p.detach().double().sum().item(), p._version)
        for name, p in model.named_parameters()
    }
    return {
        "modules": modules,
        "parameters": parameters,
        "buffers": {name: b.double().sum().item() for name, b in model.named_buffers()},
        "cfg": copy.deepcopy({k: repr(v) for k, v in vars(model.cfg).items()}),
        "attributes": sorted(vars(model)),
        "torch": torch.get_rng_state().tolist(),
        "numpy": repr(np.random.get_state()),
        "python": random.getstate(),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
    }


@pytest.fixture(params=KINDS)
def found(request):
    """A model with a hook of the user's, a permanent one, frozen weights and a gradient."""
    model = build(request.param)
    fired = {"user": 0, "permanent": 0}
    z, resid = "blocks.1.attn.hook_z", "blocks.0.hook_resid_pre"

    def count_as(name):
        def hook_fn(activation, hook):
            fired[name] += 1

        return hook_fn

    model.hook_dict[z].add_hook(count_as("user"))
    model.hook_dict[resid].add_hook(count_as("permanent"), is_permanent=True)
    weights = list(model.parameters())
    weights[0].requires_grad_(False)
    weights[1].grad = torch.ones_like(weights[1])
    contrast = pairs(model)
    with torch.no_grad():
        model(contrast.clean.tokens)  # what a first run leaves behind is not ours
    assert fired == {"user": 1, "permanent": 1}
    return model, contrast, fired


def agree(before: dict, after: dict) -> None:
    for key in before:
        if isinstance(before[key], dict):
            assert before[key].keys() == after[key].keys(), key
            changed = {k: (v, after[key][k]) for k, v in before[key].items() if v != after[key][k]}
            assert not changed, (key, dict(list(changed.items())[:2]))
        else:
            assert before[key] == after[key], key


@pytest.mark.parametrize("call", CALLS)
def test_all_is_as_it_was(call, found):
    model, contrast, fired = found
    grad = list(model.parameters())[1].grad
    list(model.parameters())[1].grad = None
    before = state_of(model)
    result = CALLS[call](model, contrast, "logit_diff")
    agree(before, state_of(model))
    counted = dict(fired)
    assert min(counted.values()) > 1  # the user's own hooks fired in our runs
    with torch.no_grad():
        model(contrast.clean.tokens)
    assert fired == {name: n + 1 for name, n in counted.items()}  # and still do, once a run
    assert grad.eq(1).all() and result is not None


@pytest.mark.parametrize("call", [name for name in CALLS if name != "record"])
@pytest.mark.parametrize("when", ["plain", "patched"])
def test_all_is_as_it_was_after_an_exception(call, when, found):
    model, contrast, fired = found
    list(model.parameters())[1].grad = None
    before = state_of(model)
    # the runs that are not changed are read first
    n_plain = {"knock_out": 1, "saliency_flow": 0}.get(call, 2)
    with pytest.raises(FailsLater):
        CALLS[call](model, contrast, failing_metric(0 if when == "plain" else n_plain))
    agree(before, state_of(model))


def test_gradients_are_kept(found):
    model, contrast, _ = found
    weight = list(model.parameters())[1]
    grad = weight.grad
    patch_heads(model, contrast)
    assert weight.grad is grad and grad.eq(1).all()


@pytest.mark.parametrize("where", ["edit", "read"])
def test_exception_inside_a_hook(where, found):
    model, contrast, _ = found
    list(model.parameters())[1].grad = None
    before = state_of(model)

    def fail(activation):
        raise FailsLater

    adapter, tokens = Adapter.of(model), contrast.clean.tokens
    settings = {"edits": {("z", 1): fail}} if where == "edit" else {"reads": {("z", 1): fail}}
    with pytest.raises(FailsLater):
        adapter.run(tokens, **settings)
    agree(before, state_of(model))
    tape = adapter.tape(tokens)
    with pytest.raises(FailsLater):
        adapter.block(tape, 1, tape.resid[1], Layout.suffix(0, tape.n_pos), **settings)
    agree(before, state_of(model))


def test_exception_inside_the_model(found):
    """While it records, the model itself fails."""
    model, contrast, _ = found
    list(model.parameters())[1].grad = None
    before = state_of(model)

    def fail(*args, **kwargs):
        raise FailsLater

    handle = model.blocks[1].register_forward_hook(fail)
    for call in CALLS.values():
        with pytest.raises(FailsLater):
            call(model, contrast, "logit_diff")
    handle.remove()
    agree(before, state_of(model))


def test_a_hook_of_the_user_that_edits_is_part_of_the_model(kind):
    """What a user ablates stays ablated in both runs, and in what is recomputed."""
    model = build(kind)
    contrast = pairs(model)
    plain = patch_heads(model, contrast, at="query_is").data.values

    def ablate(z, hook):
        z = z.clone()
        z[:, :, 2] = 0
        return z

    model.hook_dict["blocks.1.attn.hook_z"].add_hook(ablate)
    ablated = patch_heads(model, contrast, at="query_is").data.values
    assert np.abs(ablated[:, 1, 2]).max() < 1e-5 < 1e-3 < np.abs(plain[:, 1, 2]).max()


# ------------------------------------------------------------------------------------ must fail


@pytest.mark.parametrize("call", CALLS)
def test_training_mode_is_refused(call, kind):
    model = build(kind)
    contrast = pairs(model)
    model.train()
    with pytest.raises(ModelError, match=r"in training mode, .*: call model.eval\(\) first"):
        CALLS[call](model, contrast, "logit_diff")
    assert model.training


def test_what_is_no_model():
    for value in (None, "gpt2", torch.nn.Linear(1, 1)):
        with pytest.raises(ModelError, match=f"got {type(value).__name__}: use load_model"):
            Adapter.of(value)


def test_layers_on_several_devices_are_refused_before_anything_runs(kind):
    model = tiny_model.__wrapped__("gpt2", kind)
    contrast = pairs(model)
    model.blocks[1].to("meta")  # a device that every machine has
    with pytest.raises(ModelError, match=r"lie on several devices \(cpu, meta\).*load it on one"):
        patch_heads(model, contrast, at="answer")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"positional_embedding_type": "alibi"}, "uses ALiBi attention, which is not supported"),
        ({"architecture": "BloomForCausalLM"}, "BloomForCausalLM uses ALiBi"),
        ({"architecture": "T5ForConditionalGeneration"}, "is not a causal decoder"),
        ({"architecture": "BertForMaskedLM"}, "is not a causal decoder"),
        ({}, "has no attention heads at 'blocks.0.attn.hook_z'"),
    ],
)
def test_architectures_are_refused_by_name(fields, message):
    from types import SimpleNamespace

    cfg = SimpleNamespace(n_layers=1, n_heads=1, d_head=1, **fields)
    with pytest.raises(ModelError, match=message):
        Adapter.of(SimpleNamespace(cfg=cfg, hook_dict={}, training=False))


def test_unknown_hooks(kind):
    model = tiny_model("gpt2", kind)
    adapter, tokens = Adapter.of(model), torch.tensor([[3, 4, 5]])
    with pytest.raises(UnknownName, match="unknown component 'patern': did you mean 'pattern'"):
        adapter.read(tokens, [("patern", 0)])
    with pytest.raises(ModelError, match=r"no hook point 'blocks.3.attn.hook_z' \(it has 3 layers"):
        adapter.run(tokens, {("z", 3): lambda z: z})
    value = torch.zeros(2, 3, 16)
    contrast = pairs(model)
    for site in (Site(3, 0), Site(0, 4), Site(0, 7, "q")):
        with pytest.raises(ModelError, match=f"L{site.layer}H{site.head}.* is outside of"):
            run_variants(model, contrast.clean, [(Patch(site, value),)], lambda x, rows: x[:, 0])


def test_sites_of_grouped_keys(kind):
    """Keys and values have fewer heads than queries, and a patch there knows it."""
    model = tiny_model("llama", kind)
    contrast = pairs(model)
    value = torch.zeros(2, 2, 16)

    def measure(site):
        return run_variants(
            model, contrast.clean, [(), (Patch(site, value),)], lambda logits, rows: logits[:, 5]
        )

    plain, changed = measure(Site(0, 1, "v"))
    assert (plain - changed).abs().min() > 1e-4
    with pytest.raises(ModelError, match=r"L0H2.k@answer is outside of .* 2 heads for k"):
        measure(Site(0, 2, "k"))


def test_hook_that_never_fires_is_an_error(kind, monkeypatch):
    """A hook point that the model has and does not run reads as no effect, so it must not pass."""
    model = build(kind)
    contrast = pairs(model)
    dead = type(model.hook_dict["blocks.0.attn.hook_z"])()
    points = dict(model.hook_dict) | {"blocks.1.attn.hook_z": dead}
    monkeypatch.setattr(type(model), "hook_dict", property(lambda self: points), raising=False)
    if "hook_dict" in vars(model):
        monkeypatch.setitem(vars(model), "hook_dict", points)
    with pytest.raises(ModelError, match="'blocks.1.attn.hook_z' never fired on .*read as 0"):
        patch_heads(model, contrast)
    assert not dead.fwd_hooks


def test_edits_that_are_discarded_are_an_error(kind, monkeypatch):
    """As on some architectures of the bridge: the hook of scores fires, and nothing follows."""
    model = build(kind)
    contrast = pairs(model)
    from tv_interp.interventions import engine

    monkeypatch.setattr(engine, "_cutter", lambda adapter, mask: lambda scores: scores)
    with pytest.raises(ModelError, match="discards edits of attention scores, so attention cannot"):
        knock_out(model, contrast.clean)


@pytest.mark.parametrize("call", CALLS)
def test_nan_weights_are_named(call, kind):
    model = build(kind)
    contrast = pairs(model)
    with torch.no_grad():
        weight = dict(model.named_parameters())
        name = next(n for n in weight if "blocks.1" in n or "h.1." in n)
        weight[name].view(-1)[0] = float("nan")
    with pytest.raises(ModelError, match=f"NaN or infinite .* weight '{name}'"):
        CALLS[call](model, contrast, "logit_diff")


def test_prompts_of_another_model(kind):
    model = tiny_model("gpt2", kind)
    bigger = build(kind)
    prompts = pairs(bigger).clean
    from dataclasses import replace

    with pytest.raises(PromptError, match="token id 101 is outside of .* vocabulary of 101"):
        knock_out(model, replace(prompts, tokens=prompts.tokens + 101 - prompts.tokens.max()))
    short = make_prompts(model, TASK, n_demos=19, n_prompts=1)
    long = replace(
        short,
        tokens=short.tokens.repeat(1, 2),
        lengths=2 * short.lengths,
        role_ids=short.role_ids.repeat(1, 2),
        demo_ids=short.demo_ids.repeat(1, 2),
    )
    with pytest.raises(PromptError, match="longer than the context of .*use fewer demonstrations"):
        knock_out(model, long)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["edges", "saliency"])
def test_no_module_keeps_the_graph_of_a_gradient(kind, call):
    """The attention of a bridge keeps what entered its norm: a graph would stay alive with it."""
    model = tiny_model.__wrapped__("llama", kind)  # its own: others are shared
    w = words()[3:]
    prompts = make_prompts(model, Task.from_pairs({w[i]: w[9 - i] for i in range(5)}), n_demos=2)
    if call == "edges":
        score_edges(model, prompts.corrupt("answers"), method="eap")
    else:
        saliency_flow(model, prompts)
    kept = [
        (name, key)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor) and value.grad_fn is not None
    ]
    assert kept == []
    copy.deepcopy(model)
