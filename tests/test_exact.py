"""Every number equals a plain loop of TransformerLens hooks; and the laws that numbers obey."""

from __future__ import annotations

import functools
import itertools

import naive
import numpy as np
import pytest
import torch
from conftest import KINDS, note_difference, precise, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import ARCHITECTURES

from tv_interp.analysis.common import Experiment
from tv_interp.analysis.heads import (
    PARTS,
    _source_changes,
    knock_out,
    patch_heads,
    patch_local_paths,
    patch_sources,
    patch_together,
    source_masks,
)
from tv_interp.analysis.paths import patch_paths
from tv_interp.errors import ModelError, TvInterpError, UnknownName
from tv_interp.interventions import Cut, Patch, Site, record, run_variants
from tv_interp.interventions.sites import HEAD_COMPONENTS
from tv_interp.prompts import Contrast, make_prompts
from tv_interp.prompts.roles import ROLE_NAMES
from tv_interp.prompts.tasks import Task
from tv_interp.scores import METRICS

HEADS = list(itertools.product(range(3), range(4)))
BELOW = HEADS[:8]  # what the last layer writes at a demonstration reaches nothing
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
PLAIN = Task.from_pairs({f"w{i}": f"w{i + 20}" for i in range(20)})
# Inputs and answers of one or two tokens, so the rows of one batch have different lengths.
RUGGED = Task.from_pairs(
    {
        (f"w{i}" if i % 2 else f"w{i} w{i + 40}"): (
            f"w{i + 20}" if i % 3 else f"w{i + 20} w{i + 30}"
        )
        for i in range(20)
    }
)
MODELS = [
    pytest.param(arch, kind, dtype, id=f"{arch}-{kind}-{str(dtype)[6:]}")
    for arch in ARCHITECTURES
    for kind in KINDS
    for dtype in TOLERANCE
]
each_model = pytest.mark.parametrize(("arch", "kind", "dtype"), MODELS)


@functools.cache
def a_contrast(arch: str, kind: str, which: str, n_prompts: int = 2) -> Contrast:
    """``plain``: one token a word, no separator; ``rugged``: one or two, and a separator."""
    model = tiny_model(arch, kind)
    if which == "plain":
        made = make_prompts(
            model, PLAIN, n_demos=3, n_prompts=n_prompts, seed=1, template="{x} is {y}\n"
        )
        return made.corrupt("inputs", seed=2)
    made = make_prompts(
        model, RUGGED, n_demos=3, n_prompts=n_prompts, seed=0, template="{x} -> {y} :\n"
    )
    contrast = made.corrupt("random_answers", seed=3)
    assert len(contrast) == n_prompts and len(contrast.clean.lengths.unique()) > 1
    assert len(contrast.clean.spans("answer").diff(dim=-1).unique()) == 2  # of one token and of two
    return contrast


def sample(items, n: int, seed: int = 0) -> list:
    """Draw without replacement, in order."""
    items = list(items)
    chosen = np.random.default_rng(seed).permutation(len(items))[:n]
    return [items[i] for i in sorted(chosen)]


def agree(name: str, scores, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Compare ``[prompt, cell]`` with the naive loop, note the difference, refuse empty effects."""
    got = np.asarray(scores, dtype=np.float64).reshape(expected.shape)
    expected = expected.double().numpy()
    error = float(np.abs(got - expected).max())
    note_difference(name, error)
    assert error <= TOLERANCE[dtype], f"{name} differs by {error:.2g}"
    assert np.abs(expected).max() > 100 * TOLERANCE[dtype], f"{name}: nothing to compare"


# ------------------------------------------------------------------------- equality with naive


@each_model
def test_heads(arch, kind, dtype):
    """All heads, or a sample: at three roles, both ways, jointly and one by one."""
    model = tiny_model(arch, kind, dtype)
    full = dtype == torch.float32
    with precise(dtype):
        for seed, (at, direction, which) in enumerate(
            [
                ("answer", "denoise", "rugged"),
                ("query_is", "noise", "plain"),
                ("x", "noise", "rugged"),
            ][: 3 if full else 1]
        ):
            contrast = a_contrast(arch, kind, which)
            heads = HEADS if full and at == "answer" else sample(BELOW, 3, seed)
            scores = patch_heads(model, contrast, at=at, direction=direction)
            found = np.stack([scores.data.values[:, la, h] for la, h in heads], 1)
            expected = naive.patch_heads(model, contrast, [[h] for h in heads], at, direction)
            agree(f"heads {at} {direction}", found, expected, dtype)
        total = naive.total(model, contrast)
        agree("total", scores.total.values, total, dtype)
        contrast = a_contrast(arch, kind, "rugged")
        scores = patch_heads(model, contrast, at="answer", demos="each")
        assert scores.data.dims == ("prompt", "layer", "head", "demo")
        demo = ARCHITECTURES.index(arch) % 3
        heads = sample(BELOW, 2, seed=demo)
        found = np.stack([scores.data.values[:, la, h, demo] for la, h in heads], 1)
        expected = naive.patch_heads(model, contrast, [[h] for h in heads], "answer", demo=demo)
        agree(f"heads answer[{demo}]", found, expected, dtype)


@each_model
def test_sets_and_knockouts(arch, kind, dtype):
    model = tiny_model(arch, kind, dtype)
    sets = {"pair": [(0, 1), (0, 3)], "chain": [(0, 0), (1, 2), (2, 3)], "none": []}
    some = sample(HEADS, 6 if dtype == torch.float32 else 3)
    with precise(dtype):
        contrast = a_contrast(arch, kind, "rugged")
        scores = patch_together(model, contrast, sets, at="answer")
        expected = naive.patch_heads(model, contrast, list(sets.values()), "answer")
        agree("together", scores.data, expected, dtype)
        assert (scores.data.sel(site="none") == 0).all()
        prompts = contrast.clean
        scores = knock_out(model, prompts)
        found = np.stack([scores.data.values[:, la, h] for la, h in some], 1)
        expected = naive.knock_out(model, prompts, [[h] for h in some], "query_is", "answer")
        agree("knockout", found, expected, dtype)
        scores = knock_out(model, prompts, dest="answer", src="x", sets=sets, demos=[0, 2])
        expected = naive.knock_out(model, prompts, sets.values(), "answer", "x", demos=[0, 2])
        agree("knockout of sets", scores.data, expected, dtype)


@each_model
def test_sources(arch, kind, dtype):
    """Parts and roles of the source split, at the query and at demonstrations."""
    model = tiny_model(arch, kind, dtype)
    with precise(dtype):
        for seed, (at, direction, which, roles) in enumerate(
            [
                ("query_is", "denoise", "rugged", ["x", "is", "answer", "end", "all"]),
                ("answer", "noise", "plain", ["x", "is", "answer", "earlier", "carried", "all"]),
            ]
        ):
            if dtype == torch.float64 and seed != ARCHITECTURES.index(arch) % 2:
                continue
            contrast = a_contrast(arch, kind, which)
            heads = sample(HEADS[4:8], 2, seed)  # in layer 0 few sources differ
            scores = patch_sources(
                model, contrast, at=at, heads=heads, roles=roles, direction=direction
            )
            rng = np.random.default_rng(seed)
            cells = [(heads[rng.integers(2)], roles[rng.integers(len(roles))], p) for p in PARTS]
            found = np.stack(
                [
                    scores.data.sel(role=role, part=part, site=str(Site(*head, "z", at))).values
                    for head, role, part in cells
                ],
                1,
            )
            expected = naive.patch_sources(model, contrast, cells, at, direction)
            agree(f"sources {at} {direction}", found, expected, dtype)


@each_model
def test_paths(arch, kind, dtype):
    """Direct paths equal path patching with everything in between frozen."""
    model = tiny_model(arch, kind, dtype)
    via = ["q", "k", "v", "kv"]
    with precise(dtype):
        for direction, which in (("denoise", "rugged"), ("noise", "plain"))[
            : 2 if dtype == torch.float32 else 1
        ]:
            contrast = a_contrast(arch, kind, which)
            senders, receivers = [(0, 1), (1, 2)], [(1, 3), (2, 0)]
            scores = patch_paths(
                model, contrast, senders=senders, receivers=receivers, via=via, direction=direction
            )
            paths = [((0, 1), (2, 0), "kv"), ((0, 1), (1, 3), "k"), ((1, 2), (2, 0), "v")]
            paths = paths if dtype == torch.float32 else paths[:1]
            found = np.stack(
                [
                    scores.data.values[:, senders.index(s), receivers.index(r), via.index(v)]
                    for s, r, v in paths
                ],
                1,
            )
            expected = naive.patch_paths(model, contrast, paths, direction=direction)
            agree(f"paths {direction}", found, expected, dtype)
            assert (scores.data[:, 1, 0] == 0).all()  # a sender in the receiver's layer
            assert abs(scores.data.sel(via="q")).max() < TOLERANCE[dtype]  # q is read elsewhere
        # The query of a receiver sees what is written at its own token alone.
        here = patch_paths(
            model,
            contrast,
            senders=[(0, 2)],
            receivers=[(2, 1)],
            via=via,
            sender_at="query_is",
            direction=direction,
        )
        paths = [((0, 2), (2, 1), v) for v in ("q", "kv")][: 2 if dtype == torch.float32 else 1]
        expected = naive.patch_paths(
            model, contrast, paths, sender_at="query_is", direction=direction
        )
        found = here.data.sel(via=[v for *_, v in paths]).values
        agree("paths from query_is", found, expected, dtype)


@pytest.mark.parametrize("arch", ["mistral", "gemma2"])
def test_window_that_binds(arch, kind):
    """Sliding windows are the model's own: whole runs through its blocks stay exact."""
    model = tiny_model(arch, kind, window=5)
    contrast = a_contrast(arch, kind, "plain")
    heads = sample(BELOW, 3)
    scores = patch_heads(model, contrast)
    found = np.stack([scores.data.values[:, la, h] for la, h in heads], 1)
    expected = naive.patch_heads(model, contrast, [[h] for h in heads], "answer")
    agree("window heads", found, expected, torch.float32)
    cells = [((1, 2), "is", part) for part in ("pattern", "value", "kv", "both")]
    scores = patch_sources(model, contrast, at="answer", heads=[(1, 2)], roles=["is"])
    found = scores.data.sel(part=[part for *_, part in cells]).values
    expected = naive.patch_sources(model, contrast, cells, "answer")
    agree("window sources", found, expected, torch.float32)


# --------------------------------------------------------------------------- one set of numbers


@pytest.mark.skipif(len(KINDS) == 1, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_both_classes_give_the_same_numbers(arch):
    hooked, bridge = (tiny_model(arch, kind) for kind in ("hooked", "bridge"))
    contrast = a_contrast(arch, "hooked", "rugged")
    for name, measure in {
        "heads": lambda model: patch_heads(model, contrast),
        "sources": lambda model: patch_sources(model, contrast, heads=[(1, 1)], roles=["x", "is"]),
        "knockout": lambda model: knock_out(model, contrast.clean, sets={"a": BELOW, "b": HEADS}),
        "paths": lambda model: patch_paths(
            model, contrast, senders=[(0, 1), (1, 3)], receivers=[(2, 3)], via=["kv", "k"]
        ),
    }.items():
        ours, theirs = measure(hooked), measure(bridge)
        assert ours.data.dims == theirs.data.dims and abs(ours.data).max() > 1e-4
        error = float(abs(ours.data - theirs.data).max())
        note_difference(f"classes {name}", error)
        assert error <= 1e-5, f"{name} differs by {error:.2g}"


@pytest.mark.parametrize("arch", ["gpt2", "gemma2"])
def test_transformer_lens_patching_gives_the_same_numbers(arch, kind):
    """Where `transformer_lens.patching` applies: prompts of one length, one position at a time."""
    from transformer_lens.patching import get_act_patch_attn_head_out_by_pos

    model = tiny_model(arch, kind, n_layers=2)
    prompts = make_prompts(model, PLAIN, n_demos=2, n_prompts=2, seed=5, template="{x} is {y}\n")
    contrast = prompts.corrupt("answers", seed=6)
    corrupted = contrast.corrupted.tokens
    assert len(contrast.clean.lengths.unique()) == 1

    def metric(logits):
        last = logits[:, -1]
        rows = torch.arange(len(last))
        return (last[rows, contrast.answer] - last[rows, contrast.foil]).mean()

    with torch.no_grad():
        _, cache = model.run_with_cache(contrast.clean.tokens)
        theirs = get_act_patch_attn_head_out_by_pos(model, corrupted, cache, metric)
        theirs = theirs - metric(model(corrupted, return_type="logits"))
    ours = patch_heads(model, contrast, at="query_is").mean().values
    np.testing.assert_allclose(ours, theirs[:, -1].numpy(), atol=1e-5)
    ours = patch_heads(model, contrast, at="answer", demos="each").mean()
    for demo, position in enumerate(contrast.clean.positions("answer")[0]):
        got = ours.sel(demo=demo).values
        np.testing.assert_allclose(got, theirs[:, position].numpy(), atol=1e-5)
        assert np.abs(got).max() > 1e-3


# -------------------------------------------------------------------------- rows and their order


def test_one_prompt(kind):
    model, contrast = tiny_model("llama", kind), a_contrast("llama", kind, "rugged")
    whole = patch_heads(model, contrast).data.values
    for i in range(len(contrast)):
        alone = patch_heads(model, contrast.select([i])).data.values
        np.testing.assert_allclose(alone[0], whole[i], atol=1e-5)


@pytest.mark.parametrize("max_memory", [1, 200_000, 1_000_000])
def test_a_budget_decides_memory_alone(max_memory, kind):
    """From one prompt and one variant at a time, recorded again whenever needed, to all at once."""
    model = tiny_model("qwen2", kind)
    contrast = a_contrast("qwen2", kind, "rugged", 5)
    assert max(len(rows) for rows, _ in contrast.clean.buckets()) > 1
    recorded, tight = record(model, contrast), record(model, contrast, max_memory=max_memory)
    kept = [tape is not None for _, tape in tight.clean.kept]
    assert all(tape is not None for _, tape in recorded.clean.kept)
    assert {1: not any(kept), 200_000: any(kept) and not all(kept), 1_000_000: all(kept)}[max_memory]
    torch.testing.assert_close(tight.clean.logits, recorded.clean.logits, rtol=0, atol=1e-5)
    z = recorded.clean.z_at("answer")
    torch.testing.assert_close(tight.clean.z_at("answer"), z, rtol=0, atol=1e-5)
    dest, src = contrast.clean.mask("query_is"), contrast.clean.mask("is")
    variants = [
        (),
        (Patch(Site(1, 2), z[:, 1, :, 2]),),
        (Patch(Site(1, 2, "z", "answer", 1), z[:, 1, 1, 2], "add"), Cut(2, 0, dest, src)),
        (Cut(2, 1, dest, src), Patch(Site(0, 0), z[:, 0, :, 0])),
        (),
    ]

    def readout(logits, rows):
        return logits[:, 7] * (1 + rows)

    few = run_variants(model, contrast.corrupted, variants, readout, max_memory=max_memory)
    many = run_variants(model, contrast.corrupted, variants, readout)
    torch.testing.assert_close(few, many, rtol=0, atol=1e-5)
    torch.testing.assert_close(many[0], many[4], rtol=0, atol=1e-5)
    plain = recorded.corrupted.logits[:, 7] * (1 + torch.arange(5))
    torch.testing.assert_close(many[0], plain, rtol=0, atol=1e-5)
    assert (many[1:4] - many[0]).abs().max(1).values.min() > 1e-3
    readers, sets = [(1, 0), (2, 2)], {"a": [(0, 1)], "b": BELOW, "c": []}
    for name, call in {
        "readers": lambda r: patch_heads(model, contrast, at="query_is", metric="prob", recorded=r),
        "together": lambda r: patch_together(model, contrast, sets, recorded=r),
        "local": lambda r: patch_local_paths(model, contrast, recorded=r),
        "paths": lambda r: patch_paths(
            model, contrast, receivers=readers, through="mlp", recorded=r
        ),
        "sources": lambda r: patch_sources(
            model, contrast, heads=readers, roles=["answer"], recorded=r
        ),
    }.items():
        np.testing.assert_allclose(
            call(tight).data.values, call(recorded).data.values, atol=1e-5, err_msg=name
        )
    cut, uncut = (knock_out(model, contrast.clean, max_memory=m) for m in (max_memory, None))
    np.testing.assert_allclose(cut.data.values, uncut.data.values, atol=1e-5)


def test_no_variants():
    model, contrast = tiny_model("gpt2", KINDS[0]), a_contrast("gpt2", KINDS[0], "plain")
    none = run_variants(model, contrast.clean, [], lambda logits, rows: logits[:, 0])
    assert none.shape == (0, 2)


@settings(max_examples=3, deadline=None, derandomize=True)
@given(order=st.permutations(range(5)))
def test_permuted_prompts_permute_rows(order):
    model = tiny_model("gpt2", KINDS[0])
    contrast = a_contrast("gpt2", KINDS[0], "rugged", 5)
    heads = [(0, 0), (1, 3)]
    shuffled = contrast.select(order)
    for measure in (
        lambda c: patch_together(model, c, {"both": heads}, metric="kl").data,
        lambda c: patch_sources(model, c, heads=heads, roles=["answer"], parts=["kv"]).data,
        lambda c: knock_out(model, c.clean, sets={"both": heads}).data,
    ):
        np.testing.assert_allclose(measure(shuffled), measure(contrast)[list(order)], atol=1e-5)


def test_wrong_donor_is_noticed(kind):
    """Negative control: the loop with another prompt's donor is far from what is measured."""
    model, contrast = tiny_model("llama", kind), a_contrast("llama", kind, "plain")
    sets = {"all": HEADS, "last": [(2, 0), (2, 1)]}
    ours = patch_together(model, contrast, sets, at="query_is").data.values
    right = naive.patch_heads(model, contrast, sets.values(), "query_is")
    wrong = naive.patch_heads(model, contrast, sets.values(), "query_is", shift=1)
    assert np.abs(ours - right.numpy()).max() < 1e-5
    assert np.abs(ours - wrong.numpy()).max(0).min() > 0.1


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("at", ["answer", "query_is"])
def test_components_of_blocks_are_patched_as_by_hooks(arch, at, kind):
    """The residual stream of another prompt at a role, replaced or added."""
    model, contrast = tiny_model(arch, kind), a_contrast(arch, kind, "rugged")
    prompts, donor = contrast.corrupted, contrast.clean
    components = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    variants, edits = [], []
    for component, mode in itertools.product(components, ("replace", "add")):
        name = f"blocks.1.hook_{component}"
        rows = []
        for i in range(len(prompts)):
            (value,) = naive.read(model, naive.tokens_of(donor, i), [name])
            rows.append(value[naive.last_tokens(donor, i, at)])
        value = torch.stack(rows)
        value = value if at == "answer" else value[:, 0]
        variants.append((Patch(Site(1, None, component, at), value, mode),))
        edits.append((name, rows, mode))
    ours = run_variants(model, prompts, variants, lambda logits, rows: logits[:, 5].cpu())
    for n, (name, rows, mode) in enumerate(edits):
        for i in range(len(prompts)):
            where = naive.last_tokens(prompts, i, at)

            def edit(x, where=where, value=rows[i], mode=mode):
                x[0, where] = value if mode == "replace" else x[0, where] + value
                return x

            expected = naive.run(model, naive.tokens_of(prompts, i), [(name, edit)])[5]
            assert abs(ours[n, i] - expected) < 1e-5, (name, mode)


# ----------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_null_patch_changes_nothing(direction, kind):
    model, contrast = tiny_model("gemma2", kind), a_contrast("gemma2", kind, "rugged")
    same = Contrast(contrast.clean, contrast.clean, "nothing")
    settings = dict(direction=direction)
    for scores in (
        patch_heads(model, same, **settings),
        patch_heads(model, same, at="x", demos="each", **settings),
        patch_together(model, same, {"all": HEADS}, at="query_is", **settings),
        patch_sources(model, same, heads=[(1, 1)], roles=["answer", "all"], **settings),
        patch_paths(model, same, senders=[(0, 1)], receivers=[(2, 1)], via=["q", "kv"], **settings),
    ):
        assert abs(scores.data).max() < 2e-6 and abs(scores.total).max() < 2e-6


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("corruption", ["random_answers", "inputs"])
def test_all_heads_at_the_query_recover_all(arch, corruption):
    """The query's own tokens do not change, so what its heads read is all that can."""
    kind = KINDS[0]
    contrast = a_contrast(arch, kind, "plain" if corruption == "inputs" else "rugged")
    model = tiny_model(arch, kind)
    for direction in ("denoise", "noise"):
        scores = patch_together(
            model, contrast, {"all": HEADS, "none": []}, at="query_is", direction=direction
        )
        np.testing.assert_allclose(scores.data.sel(site="all"), scores.total, atol=1e-5)
        assert (scores.data.sel(site="none") == 0).all()
        assert abs(scores.total).min() > 1e-3


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_metrics(name, direction):
    """Every metric by its formula, on the logits of plain runs."""
    model, contrast = tiny_model("llama", KINDS[0]), a_contrast("llama", KINDS[0], "plain")
    clean_logits = [naive.run(model, naive.tokens_of(contrast.clean, i)) for i in range(2)]

    def formula(logits, prompts, i):
        answer, foil = int(prompts.answer[i]), int(prompts.foil[i])
        p = torch.exp(logits - logits.max()) / torch.exp(logits - logits.max()).sum()
        if name == "kl":
            ref = clean_logits[i].softmax(0)
            return -sum(ref[t] * (ref[t].log() - p[t].log()) for t in range(len(p)))
        answers = [prompts.tokens[i, t] for t in naive.tokens_with(prompts, i, "answer")]
        return {
            "logit_diff": logits[answer] - logits[foil],
            "prob": p[answer],
            "log_prob": p[answer].log(),
            "accuracy": float(p.argmax() == answer),
            "choice": 1.0 if p[answer] > p[foil] else 0.0 if p[answer] < p[foil] else 0.5,
            "label_rate": float(int(p.argmax()) in {answer, foil, *map(int, answers)}),
            "rank": float(sorted(p.tolist(), reverse=True).index(float(p[answer])) + 1),
        }[name]

    def as_tensor(*args):
        return torch.as_tensor(formula(*args))

    sets = {"all": HEADS, "some": BELOW, "one": [(2, 1)]}
    scores = patch_together(model, contrast, sets, at="query_is", direction=direction, metric=name)
    expected = naive.patch_heads(model, contrast, sets.values(), "query_is", direction, as_tensor)
    np.testing.assert_allclose(scores.data, expected.numpy(), atol=1e-5)
    total = naive.total(model, contrast, as_tensor).numpy()
    np.testing.assert_allclose(scores.total, total, atol=1e-5)
    cut = knock_out(model, contrast.clean, sets={"all": HEADS}, metric=name)
    expected = naive.knock_out(
        model, contrast.clean, [HEADS], "query_is", "answer", metric=as_tensor
    )
    np.testing.assert_allclose(cut.data.values, expected.numpy(), atol=1e-5)
    chance = {
        "logit_diff": 0, "prob": 1 / 101, "log_prob": -np.log(101), "kl": None,
        "accuracy": 1 / 101, "choice": 0.5, "label_rate": 0, "rank": 51,
    }[name]  # fmt: skip
    if chance is None:
        assert cut.total is None
    else:
        clean = [float(formula(clean_logits[i], contrast.clean, i)) for i in range(2)]
        np.testing.assert_allclose(cut.total, np.array(clean) - chance, atol=1e-5)
    assert scores.unit == METRICS[name].unit == cut.unit


def test_label_rate_knows_the_labels_of_this_prompt():
    """A prediction that is one of the prompt's labels counts, any other does not."""
    contrast = a_contrast("llama", KINDS[0], "rugged")
    from tv_interp.scores.metrics import Targets

    targets = Targets.of(contrast.clean)
    read = METRICS["label_rate"].readout(targets)
    logits = torch.zeros(1, 101)
    for i in range(2):
        spans = contrast.clean.spans("answer")[i]
        labels = {int(contrast.clean.tokens[i, first]) for first, _ in spans}
        labels |= {int(contrast.answer[i]), int(contrast.foil[i])}
        for token in range(101):
            one = logits.clone()
            one[0, token] = 1
            assert read(one, torch.tensor([i])) == float(token in labels)


@given(
    layer=st.integers(0, 99),
    head=st.integers(0, 99),
    component=st.sampled_from([*"qkvz", "resid_pre", "attn_out", "mlp_out", "resid_post"]),
    role=st.sampled_from(ROLE_NAMES),
    demo=st.none() | st.integers(0, 30),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_sites_parse_what_they_print(layer, head, component, role, demo):
    if role not in ("x", "is", "answer", "end"):
        demo = None
    site = Site(layer, head if component in HEAD_COMPONENTS else None, component, role, demo)
    assert Site.parse(str(site)) == site
    assert Site.parse(f"{site}") is not site


@pytest.mark.parametrize(
    "text", ["", "L1", "L1H2", "L1H2.z", "L1H2.z@", "L1H2.z@answer[]", "H2L1.z@x", "L-1H2.z@x"]
)
def test_what_is_no_site(text):
    with pytest.raises(UnknownName, match="expected a site such as"):
        Site.parse(text)


def test_sites_refuse_what_is_unknown():
    with pytest.raises(UnknownName, match="unknown role 'anwser': did you mean 'answer'"):
        Site.parse("L1H2.z@anwser")
    with pytest.raises(UnknownName, match="unknown component 'o'"):
        Site.parse("L1H2.o@answer")
    with pytest.raises(UnknownName, match="'resid_post' is a component of blocks: expected no hea"):
        Site.parse("L1H2.resid_post@answer")
    with pytest.raises(UnknownName, match="'z' is a component of heads: expected a head"):
        Site.parse("L1.z@answer")
    with pytest.raises(UnknownName, match="outside of demonstrations, got demo=1: leave it out"):
        Site.parse("L1H2.z@query_is[1]")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("at", ["query_is", "answer"])
def test_sources_add_up_in_z(arch, at):
    """Exactly: parts to both, and both over roles to the exchange of the whole z."""
    dtype, kind = torch.float64, KINDS[0]
    contrast = a_contrast(arch, kind, "rugged")
    with precise(dtype):
        run = Experiment(tiny_model(arch, kind, dtype), contrast, None, "denoise", "logit_diff", at)
        masks = source_masks(contrast.clean, at)
        sites = [Site(la, h, "z", at) for la, h in ((0, 3), (1, 1), (2, 2))]
        change = _source_changes(run, sites, masks, PARTS)
        exchanged = run.donor.z_at(at) - run.base.z_at(at)
    names = ("pattern", "value", "interaction")
    for site in sites:
        for role in masks:
            parts = sum(change[role, part, site] for part in names)
            torch.testing.assert_close(parts, change[role, "both", site], rtol=0, atol=1e-12)
        z = exchanged[:, site.layer, ..., site.head, :]
        split = [role for role in masks if role not in ("all", "carried")]
        whole = sum(change[role, "both", site] for role in split)
        torch.testing.assert_close(whole, z, rtol=0, atol=1e-10)
        torch.testing.assert_close(change["all", "both", site], z, rtol=0, atol=1e-10)
        if at == "answer":  # without its own answer, and its own answer
            rest = change["carried", "both", site] + change["answer", "both", site]
            torch.testing.assert_close(rest, z, rtol=0, atol=1e-10)
        assert z.abs().max() > 1e-3
        # All keys of the donor and all its values, but queries of the base: not the whole exchange.
        if site.layer:
            assert (change["all", "kv", site] - z).abs().max() > 1e-6


def test_masks_split_what_is_seen():
    """At each token the roles are disjoint, and together they are all that it can see."""
    prompts = a_contrast("llama", KINDS[0], "rugged").clean
    for at in ("x", "is", "answer", "end", "query_x", "query_is"):
        masks = source_masks(prompts, at)
        split = [masks[role] for role in masks if role not in ("all", "carried")]
        assert (sum(m.int() for m in split) == masks["all"].int()).all()
        positions = prompts.positions(at).reshape(len(prompts), -1)
        for i, row in enumerate(positions):
            for n, dest in enumerate(row.tolist()):
                for role in masks:
                    seen = naive.sources_of(prompts, i, role, dest)
                    assert masks[role][i, n].nonzero()[:, 0].tolist() == seen, (at, role)


def test_recorded_runs_are_shared(kind):
    model, contrast = tiny_model("gpt2", kind), a_contrast("gpt2", kind, "plain")
    recorded = record(model, contrast)
    for measure in (
        lambda **kw: patch_heads(model, contrast, **kw),
        lambda **kw: patch_paths(model, contrast, receivers=[(1, 0)], **kw),
    ):
        with_it, without = measure(recorded=recorded), measure()
        assert with_it.data.identical(without.data) and with_it.attrs == without.attrs
    other = a_contrast("gpt2", kind, "rugged")
    with pytest.raises(TvInterpError, match="recorded= belongs to another model or contrast"):
        patch_heads(model, other, recorded=recorded)


def test_heads_by_site_text_and_pair(kind):
    """Three ways to name a head; one named twice counts once."""
    model, contrast = tiny_model("gpt2", kind), a_contrast("gpt2", kind, "plain")
    names = [(1, 2), Site(1, 2, "z", "x"), "L1H2.z@answer[1]", (0, 3)]
    scores = patch_sources(model, contrast, heads=names, roles=["x"], parts=["both"])
    assert scores.data.site.values.tolist() == ["L1H2.z@query_is", "L0H3.z@query_is"]
    paths = patch_paths(model, contrast, senders=[(0, 1), (0, 1)], receivers=names)
    once = patch_paths(model, contrast, senders=[(0, 1)], receivers=[(1, 2), (0, 3)])
    assert paths.data.identical(once.data) and (once.data[:, 0, 0] != 0).all()


# ------------------------------------------------------------------------------------ must fail


def test_bad_arguments(kind):
    model, contrast = tiny_model("gpt2", kind), a_contrast("gpt2", kind, "plain")
    for call, message in {
        lambda: patch_heads(model, contrast, at="anwser"): "unknown role 'anwser': did you mean",
        lambda: patch_heads(model, contrast, direction="both"): "unknown direction 'both'",
        lambda: patch_heads(model, contrast, metric="logits"): "unknown metric 'logits': did you m",
        lambda: patch_heads(model, contrast, demos="all"): "unknown demos 'all'",
        lambda: patch_heads(model, contrast, at="query_is", demos="each"): "use 'joint'",
        lambda: patch_heads(model, contrast, at="end"): "not every prompt has a 'end' token",
        lambda: patch_together(model, contrast, {"a": [(3, 0)]}): "L3H0 is outside of .*3 layers",
        lambda: patch_together(model, contrast, {"a": [(0, -1)]}): "L0H-1 is outside of",
        lambda: patch_sources(
            model, contrast, heads=["L1.attn_out@x"]
        ): "expected a head, got L1.attn_out@x",
        lambda: patch_sources(model, contrast, heads=[]): "empty selection: expected at least one",
        lambda: patch_sources(model, contrast, parts=["keys"]): "unknown part 'keys'",
        lambda: patch_sources(model, contrast, roles=["end"]): "unknown source role 'end'",
        lambda: patch_paths(model, contrast, receivers=[(0, 1)]): "no sender is below the receiv",
        lambda: patch_paths(
            model, contrast, receivers=[(1, 1)], senders=[(1, 0)]
        ): "no path between the chosen senders and receivers",
        lambda: patch_paths(model, contrast, receivers=[(1, 1)], via="o"): "unknown via 'o'",
        lambda: patch_paths(model, contrast, receivers=[(1, 1)], through="mlps"): "unknown through",
        lambda: patch_paths(
            model, contrast, receivers=[(1, 1)], receiver_at="answer"
        ): "receivers read at one token, got 'answer'",
        lambda: knock_out(model, contrast.clean, src="end"): "a prompt has no 'end' token",
        lambda: knock_out(model, contrast.clean, demos=[0, 3]): r"\[0, 3\] are not all within 0..2",
        lambda: knock_out(model, contrast.clean, src="query"): "unknown role 'query'",
        lambda: run_variants(
            model,
            contrast.clean,
            [(Patch(Site(0, 0), torch.zeros(2, 2, 16)),)],
            lambda logits, rows: logits[:, 0],
        ): "values for .2, 2. prompts and demonstrations, the prompts have .2, 3.",
    }.items():
        with pytest.raises(TvInterpError, match=message):
            call()


def test_cut_that_leaves_nothing():
    prompts = a_contrast("qwen2", KINDS[0], "plain").clean  # without BOS: the first token is an x
    model = tiny_model("qwen2", KINDS[0])
    assert prompts.role_ids[0, 0] == ROLE_NAMES.index("x")
    with pytest.raises(TvInterpError, match="leaves token 0 of prompt 0 nothing to attend to"):
        knock_out(model, prompts, dest="x", src="x")


def test_cut_that_leaves_nothing_within_a_window(kind):
    """With a window of one token, cutting a token from itself leaves it nothing."""
    model = tiny_model("mistral", kind, window=1)
    prompts = a_contrast("mistral", kind, "plain").clean
    with pytest.raises(ModelError, match="nothing to attend to|NaN or infinite"):
        knock_out(model, prompts, dest="query_is", src="query_is")
