"""The exact engine against its specification: every fast path, every fallback, every limit."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from pathlib import Path

import naive
import numpy as np
import pytest
import torch
from conftest import KINDS, note_difference, precise, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import ARCHITECTURES
from test_exact import BELOW, HEADS, TOLERANCE, a_contrast, agree, each_model
from test_left_as_found import FailsLater, build, pairs, state_of
from test_left_as_found import agree as agree_in_all

from tv_interp.analysis.heads import (
    knock_out,
    patch_heads,
    patch_local_paths,
    patch_sources,
    patch_together,
)
from tv_interp.analysis.interactions import patch_interactions
from tv_interp.analysis.paths import THROUGH, patch_paths
from tv_interp.analysis.positions import patch_positions
from tv_interp.analysis.ranking import Race, _looks, rank_heads
from tv_interp.errors import ModelError, PromptError, TvInterpError, UnknownName
from tv_interp.interventions import Patch, Site, record, run_variants
from tv_interp.interventions import recording as recording_module
from tv_interp.interventions.recording import Replays
from tv_interp.models import planted
from tv_interp.prompts import make_prompts
from tv_interp.scores import METRICS
from tv_interp.scores.metrics import Targets

FAST = Replays(layers=True, suffix=True, groups=True, picks=True)
LEVELS = {
    "no picks": Replays(layers=True, suffix=True, groups=True),
    "no groups": Replays(layers=True, suffix=True, picks=True),
    "suffix only": Replays(layers=True, suffix=True),
    "layers only": Replays(layers=True),
    "nothing": Replays(),
}
SPREAD = [(0, 1), (1, 2), (2, 0)]


def cells_of(scores, heads) -> np.ndarray:
    """Some heads of scores over layer and head, ``[prompt, cell]``."""
    return np.stack([scores.data.sel(layer=la, head=h).values for la, h in heads], 1)


def read_whole(name: str, contrast, clean_logits=None):
    """A metric for the naive loop: of a whole run's whole vocabulary, one prompt at a time."""
    readout = METRICS[name].readout(Targets.of(contrast.clean, clean_logits))
    return lambda logits, prompts, i: readout(logits[None], torch.tensor([i]))[0]


def naive_interactions(model, contrast, heads, at, direction="denoise", metric=naive.logit_diff):
    """Joint effect minus the two alone, each from its own run, ``[prompt, pair]``."""
    couples = list(itertools.combinations(range(len(heads)), 2))
    sets = [[h] for h in heads] + [[heads[a], heads[b]] for a, b in couples]
    effects = naive.patch_heads(model, contrast, sets, at, direction, metric)
    joint = [
        effects[:, len(heads) + i] - effects[:, a] - effects[:, b]
        for i, (a, b) in enumerate(couples)
    ]
    return torch.stack(joint, 1)


def naive_tokens(model, contrast, cells, direction="denoise", metric=naive.logit_diff):
    """Effect of exchanging a head's output at one token, a (layer, head, token) each."""
    base, donor, sign = naive.sides(contrast, direction)
    effects = torch.zeros(len(contrast), len(cells), dtype=torch.float64)
    for i in range(len(contrast)):
        tokens = naive.tokens_of(base, i)
        plain = metric(naive.run(model, tokens), contrast.clean, i)
        z = naive.read_z(model, naive.tokens_of(donor, i))
        for n, (la, head, p) in enumerate(cells):
            edit = (naive.z_name(la), naive.put([p], head, z[la][[p], head]))
            effects[i, n] = sign * (
                metric(naive.run(model, tokens, [edit]), contrast.clean, i) - plain
            )
    return effects


# --------------------------------------------------------------------- fast paths and fallbacks


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.bfloat16])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_fast_path_is_found_on_every_architecture(arch, dtype, kind):
    """So the other tests do test them."""
    contrast = a_contrast(arch, kind, "rugged")
    with precise(dtype):
        recorded = record(tiny_model(arch, kind, dtype), contrast)
    assert recorded.clean.replays == recorded.corrupted.replays == FAST


@pytest.mark.parametrize("arch", ["mistral", "gemma2"])
def test_every_fast_path_is_found_with_a_window_that_binds(arch, kind):
    model, contrast = tiny_model(arch, kind, window=5), a_contrast(arch, kind, "plain")
    assert record(model, contrast).clean.replays == FAST


@pytest.mark.parametrize("name", planted.names())
def test_planted_models_on_the_bridge_have_layers_only(name):
    """Their blocks take no key-value cache, so tests on them are tests of a fallback."""
    for backend in {KINDS[0], "bridge"}:
        case = planted.build(name, backend=backend)
        clean = make_prompts(case.model, case.task, n_demos=3, n_prompts=2)
        found = record(case.model, clean.corrupt("inputs")).clean.replays
        expected = FAST if backend == "hooked" else Replays(layers=True, picks=found.picks)
        assert found == expected


def resid_variants(model, contrast, recorded=None):
    """Blocks' inputs and outputs, replaced and added, with a cut and a head beside them."""
    run = (recorded or record(model, contrast)).clean
    z = run.z_at("answer")
    d_model = model.cfg.d_model
    value = torch.randn(len(contrast), 3, d_model, generator=torch.Generator().manual_seed(0))
    variants = [
        (Patch(Site(1, None, "resid_pre", "answer"), value),),
        (Patch(Site(1, None, "resid_post", "answer"), value, "add"),),
        (Patch(Site(2, None, "resid_post", "query_is"), value[:, 0]),),
        (
            Patch(Site(0, None, "resid_post", "query_is"), value[:, 1]),
            Patch(Site(1, 2), z[:, 1, :, 2]),
        ),
        (
            Patch(Site(1, None, "attn_out", "x"), value),
            Patch(Site(2, 1, "z", "query_is"), z[:, 2, 0, 1]),
        ),
    ]  # fmt: skip
    return run_variants(
        model, contrast.clean, variants, lambda x, rows: x[:, 5].cpu(), run=run
    ).T.numpy()


READER = dict(senders=[(0, 1), (1, 2)], receivers=[(2, 3)], via=["k", "kv"])
MEASURES = {
    "writers": lambda m, c, r: patch_heads(m, c, recorded=r),
    "readers": lambda m, c, r: patch_heads(m, c, at="query_is", metric="kl", recorded=r),
    "noised": lambda m, c, r: patch_heads(m, c, at="x", direction="noise", recorded=r),
    "knock-out": lambda m, c, r: knock_out(m, c.clean),
    "knock-out at answers": lambda m, c, r: knock_out(m, c.clean, dest="answer", src="x"),
    "roles": lambda m, c, r: patch_positions(m, c, recorded=r),
    "interactions": lambda m, c, r: patch_interactions(m, c, heads=SPREAD, recorded=r),
    "blocks": resid_variants,
}
NEED_BLOCKS = {
    "local paths": lambda m, c, r: patch_local_paths(m, c, recorded=r),
    "sources": lambda m, c, r: patch_sources(m, c, heads=SPREAD, roles=["x"], recorded=r),
    **{
        f"paths through {way}": lambda m, c, r, way=way: patch_paths(
            m, c, through=way, recorded=r, **READER
        )
        for way in THROUGH
    },
}


def numbers(measure, model, contrast) -> np.ndarray:
    found = measure(model, contrast, record(model, contrast))
    return found if isinstance(found, np.ndarray) else found.data.values


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("arch", ["gemma2", "phi"])
def test_every_level_of_fallback_gives_the_same_numbers(arch, level, kind, monkeypatch):
    model, contrast = tiny_model(arch, kind), a_contrast(arch, kind, "rugged")
    fast = {name: numbers(f, model, contrast) for name, f in MEASURES.items()}
    deep = {name: numbers(f, model, contrast) for name, f in NEED_BLOCKS.items()}
    monkeypatch.setattr(recording_module, "probe_replays", lambda adapter, tape: LEVELS[level])
    for name, expected in fast.items():
        error = np.abs(numbers(MEASURES[name], model, contrast) - expected).max()
        note_difference(name, error)
        assert error < 1e-5 < 1e-3 < np.abs(expected).max(), name
    for name, expected in deep.items():
        if level == "nothing":
            refusal = "cannot be called by themselves exactly, so sources and paths cannot be meas"
            with pytest.raises(ModelError, match=refusal):
                numbers(NEED_BLOCKS[name], model, contrast)
            continue
        error = np.abs(numbers(NEED_BLOCKS[name], model, contrast) - expected).max()
        note_difference(name, error)
        assert error < 1e-5 < 1e-3 < np.abs(expected).max(), name


def test_a_model_that_cannot_be_replayed_is_warned_of_once(kind):
    """Here what block 1 gives depends on how often it has run."""
    model = build(kind)
    contrast = pairs(model)
    calls = []

    def drift(block, args, out):
        calls.append(1)
        first = out[0] if isinstance(out, tuple) else out
        first = first + len(calls) * torch.linspace(-1, 1, first.shape[-1])
        return (first, *out[1:]) if isinstance(out, tuple) else first

    with pytest.warns(UserWarning, match="blocks of .* cannot be run from a middle layer") as seen:
        handle = model.blocks[1].register_forward_hook(drift)
        try:
            found = record(model, contrast)
        finally:
            handle.remove()
    assert len(seen) == 1 and found.clean.replays == found.corrupted.replays == Replays()


# ------------------------------------------------------------------------- equality with naive


@each_model
def test_local_paths_equal_the_naive_loop(arch, kind, dtype):
    model = tiny_model(arch, kind, dtype)
    with precise(dtype):
        for at, direction in (("answer", "denoise"), ("x", "noise"))[
            : 2 if dtype == torch.float32 else 1
        ]:
            contrast = a_contrast(arch, kind, "rugged")
            heads = BELOW[::2] if dtype == torch.float32 else BELOW[1::4]
            scores = patch_local_paths(model, contrast, at=at, direction=direction)
            assert scores.attrs["effect"] == "local path"
            expected = naive.patch_local_paths(model, contrast, heads, at, direction)
            agree(f"local {at}", cells_of(scores, heads), expected, dtype)
            assert (scores.data.sel(layer=2) == 0).all()  # only the last token is read there


def uneven(arch: str, kind: str):
    """Two prompts of equal length, so of one batch, whose answers are at different tokens."""
    contrast = a_contrast(arch, kind, "rugged", 24)
    for rows, _ in contrast.clean.buckets():
        places = contrast.clean.positions("answer")[rows]
        other = (places != places[0]).any(1).nonzero()[:, 0]
        if len(other):
            return contrast.select(rows[[0, int(other[0])]])
    raise AssertionError("no two prompts of equal length differ")


@pytest.mark.parametrize("arch", ["gpt2", "gemma2", "phi"])
def test_one_batch_whose_rows_change_at_different_tokens(arch, kind):
    """What one row changes is frozen in the other, in all that lays rows side by side."""
    model, contrast = tiny_model(arch, kind), uneven(arch, kind)
    recorded = record(model, contrast)
    assert [len(rows) for rows, _ in recorded.clean.kept] == [2]
    heads = [(0, 1), (1, 2)]
    for at in ("answer", "x"):
        local = cells_of(patch_local_paths(model, contrast, at=at, recorded=recorded), heads)
        expected = naive.patch_local_paths(model, contrast, heads, at)
        agree(f"local {at}", local, expected, torch.float32)
    total = cells_of(patch_heads(model, contrast, recorded=recorded), heads)
    expected = naive.patch_heads(model, contrast, [[h] for h in heads], "answer")
    agree("writers", total, expected, torch.float32)
    cut = cells_of(knock_out(model, contrast.clean, dest="answer", src="x"), heads)
    expected = naive.knock_out(model, contrast.clean, [[h] for h in heads], "answer", "x")
    agree("knock-out", cut, expected, torch.float32)
    for through in THROUGH:
        scores = patch_paths(
            model, contrast, through=through, recorded=recorded, **READER | {"via": "kv"}
        )
        paths = [(s, (2, 3), "kv") for s in READER["senders"]]
        expected = naive.patch_paths(model, contrast, paths, through=through)
        agree(f"paths {through}", scores.data, expected, torch.float32)


@each_model
def test_interactions_equal_the_naive_loop(arch, kind, dtype):
    model = tiny_model(arch, kind, dtype)
    heads = [(0, 3), (1, 1), (2, 2)]
    with precise(dtype):
        for at, direction, which in (
            ("query_is", "denoise", "plain"),
            ("answer", "noise", "rugged"),
        ):
            contrast = a_contrast(arch, kind, which)
            scores = patch_interactions(model, contrast, heads=heads, at=at, direction=direction)
            expected = naive_interactions(model, contrast, heads, at, direction)
            small = np.abs(expected.numpy()).max() < 100 * TOLERANCE[dtype]
            error = np.abs(scores.data.values - expected.numpy()).max()
            note_difference(f"interactions {at}", error)
            assert error <= 2 * TOLERANCE[dtype] and not small
            text = f"L0H3.z@{at} + L1H1.z@{at}"
            assert scores.data.site.values[0] == text and scores.attrs["effect"] == "interaction"


@each_model
def test_positions_equal_the_naive_loop(arch, kind, dtype):
    """By role at several lengths, and by token."""
    model = tiny_model(arch, kind, dtype)
    few = dtype == torch.float64
    with precise(dtype):
        contrast = a_contrast(arch, kind, "rugged")
        scores = patch_positions(model, contrast)
        roles = scores.data.role.values.tolist()
        assert {"x", "is", "answer", "end", "query_x", "query_is"} <= set(roles)
        for role, heads in (("is", BELOW[1::3]), ("query_x", BELOW[::4]))[: 1 if few else 2]:
            expected = naive.patch_heads(model, contrast, [[h] for h in heads], role)
            found = cells_of(scores, heads)[..., roles.index(role)]
            agree(f"role {role}", found, expected, dtype)
        contrast = a_contrast(arch, kind, "plain")
        scores = patch_positions(model, contrast, by="token", direction="noise")
        n = contrast.clean.tokens.shape[1]
        assert scores.data.dest.values.tolist() == list(range(n))
        cells = [(0, 1, 3), (1, 2, n - 4), (1, 0, n - 1), (2, 3, n - 1)][2 if few else 0 :]
        found = np.stack([scores.data.values[:, la, h, p] for la, h, p in cells], 1)
        expected = naive_tokens(model, contrast, cells, "noise")
        agree("token", found, expected, dtype)


def test_cells_that_cannot_differ_are_exactly_0(kind):
    """Before the first difference of any prompt, and in the last layer away from the last token."""
    for arch, which in (("gpt2", "plain"), ("gemma2", "plain")):
        model, contrast = tiny_model(arch, kind), a_contrast(arch, kind, which)
        effects = patch_positions(model, contrast, by="token").data
        differ = (contrast.clean.tokens != contrast.corrupted.tokens).any(0).nonzero()[:, 0]
        first, last = int(differ[0]), int(effects.dest[-1])
        assert 0 < first < last
        assert (effects.sel(dest=range(first)) == 0).all()
        assert (effects.sel(layer=2, dest=range(last)) == 0).all()
        assert (abs(effects.sel(layer=2, dest=last)).max("prompt") > 0).all()
        assert (abs(effects.sel(layer=0, dest=first)).max("prompt") > 0).all()


def test_prompts_of_several_lengths_have_no_common_tokens(kind):
    model, contrast = tiny_model("gpt2", kind), a_contrast("gpt2", kind, "rugged")
    with pytest.raises(PromptError, match="have no common tokens: sweep by='role', or select"):
        patch_positions(model, contrast, by="token")
    with pytest.raises(UnknownName, match="unknown by 'tokens': did you mean 'token'"):
        patch_positions(model, contrast, by="tokens")
    for heads in ([], [(0, 1)], [(0, 1), "L0H1.z@x"]):
        with pytest.raises(TvInterpError, match="expected (two heads or more|at least one head)"):
            patch_interactions(model, contrast, heads=heads)


@pytest.mark.parametrize("n_prompts", [1, pytest.param(64, marks=pytest.mark.slow)])
def test_one_prompt_and_64(n_prompts, kind):
    model = tiny_model("gpt2", kind)
    contrast = a_contrast("gpt2", kind, "rugged", max(n_prompts, 2))
    contrast = contrast if n_prompts > 1 else contrast.select([1])
    assert len(contrast) == n_prompts
    heads = [(0, 2), (1, 1)]
    recorded = record(model, contrast)
    for at, head in zip(("answer", "query_is"), heads, strict=True):
        found = cells_of(patch_heads(model, contrast, at=at, recorded=recorded), [head])
        agree(at, found, naive.patch_heads(model, contrast, [[head]], at), torch.float32)
    joint = patch_interactions(model, contrast, heads=heads, at="answer", recorded=recorded)
    expected = naive_interactions(model, contrast, heads, "answer")
    agree("interaction", joint.data, expected, torch.float32)
    if n_prompts == 1:
        local = cells_of(patch_local_paths(model, contrast, recorded=recorded), heads)
        expected = naive.patch_local_paths(model, contrast, heads, "answer")
        agree("local", local, expected, torch.float32)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_by_every_new_sweep(name, kind):
    """Pair metrics unembed two tokens; the naive loop reads the whole vocabulary for all."""
    model, contrast = tiny_model("gemma2", kind), a_contrast("gemma2", kind, "rugged")
    recorded = record(model, contrast)
    metric = read_whole(name, contrast, recorded.clean.logits)
    heads, how = [(0, 1), (1, 3)], dict(metric=name, recorded=recorded)
    local = cells_of(patch_local_paths(model, contrast, **how), heads)
    expected = naive.patch_local_paths(model, contrast, heads, "answer", metric=metric)
    np.testing.assert_allclose(local, expected, atol=1e-5)
    joint = patch_interactions(model, contrast, heads=heads, **how).data.values
    expected = naive_interactions(model, contrast, heads, "query_is", metric=metric)
    np.testing.assert_allclose(joint, expected, atol=2e-5)
    roles = patch_positions(model, contrast, **how).data.sel(role="x", layer=0, head=1)
    expected = naive.patch_heads(model, contrast, [[(0, 1)]], "x", metric=metric)
    np.testing.assert_allclose(roles.values[:, None], expected, atol=1e-5)


@settings(max_examples=24, deadline=None, derandomize=True)
@given(
    arch=st.sampled_from(ARCHITECTURES),
    kind=st.sampled_from(KINDS),
    which=st.sampled_from(["plain", "rugged"]),
    at=st.sampled_from(["x", "is", "answer", "query_x", "query_is"]),
    heads=st.sets(st.sampled_from(HEADS), min_size=1, max_size=4).map(sorted),
    direction=st.sampled_from(["denoise", "noise"]),
    metric=st.sampled_from(["logit_diff", "log_prob", "prob", "kl"]),
    max_memory=st.sampled_from([1, 150_000, None]),
)
def test_any_sweep_equals_the_naive_loop(
    arch, kind, which, at, heads, direction, metric, max_memory
):
    model, contrast = tiny_model(arch, kind), a_contrast(arch, kind, which)
    recorded = record(model, contrast, max_memory=max_memory)
    how = dict(at=at, direction=direction, metric=metric, recorded=recorded)
    scores = patch_together(model, contrast, {"a": heads, "b": heads[:1]}, **how)
    read = read_whole(metric, contrast, recorded.clean.logits)
    expected = naive.patch_heads(model, contrast, [heads, heads[:1]], at, direction, read)
    error = np.abs(scores.data.values - expected.numpy()).max()
    note_difference(metric, error)
    assert error <= 1e-5


@pytest.mark.parametrize("arch", ["mistral", "gemma2"])
def test_windows_that_bind_stay_exact(arch, kind):
    """The window is of the model's positions, not of places in a layout."""
    model, contrast = tiny_model(arch, kind, window=5), a_contrast(arch, kind, "plain")
    assert contrast.clean.tokens.shape[1] > 10
    heads = [[h] for h in SPREAD]
    for at in ("answer", "query_is"):
        found = cells_of(patch_heads(model, contrast, at=at), SPREAD)
        agree(at, found, naive.patch_heads(model, contrast, heads, at), torch.float32)
    cut = cells_of(knock_out(model, contrast.clean), SPREAD)
    expected = naive.knock_out(model, contrast.clean, heads, "query_is", "answer")
    agree("knock-out", cut, expected, torch.float32)
    local = cells_of(patch_local_paths(model, contrast), BELOW[::3])
    expected = naive.patch_local_paths(model, contrast, BELOW[::3], "answer")
    agree("local", local, expected, torch.float32)
    for through in THROUGH:
        scores = patch_paths(model, contrast, through=through, **READER | {"via": "kv"})
        paths = [(s, (2, 3), "kv") for s in READER["senders"]]
        expected = naive.patch_paths(model, contrast, paths, through=through)
        agree(f"paths {through}", scores.data, expected, torch.float32)


# ---------------------------------------------------------------------------- negative controls


@pytest.mark.parametrize("wrong", ["row", "positions", "donor"])
def test_a_wrong_prefix_or_donor_is_far_off(wrong, kind):
    """What the equalities above would see if the engine took its keys from elsewhere."""
    for arch in ("gpt2", "llama"):
        model, contrast = tiny_model(arch, kind), a_contrast(arch, kind, "plain")
        right = patch_heads(model, contrast, at="query_is").data.values
        recorded = record(model, contrast)
        base, donor = (run.kept[0][1] for run in (recorded.corrupted, recorded.clean))
        axis = 2 if kind == "bridge" else 1  # of positions in a cache
        if wrong == "donor":
            donor.z[:] = [z.flip(0) for z in donor.z]
        else:
            flip = 0 if wrong == "row" else axis
            base.keys[:] = [k.flip(flip) for k in base.keys]
            base.values[:] = [v.flip(flip) for v in base.values]
        spoilt = patch_heads(model, contrast, at="query_is", recorded=recorded).data.values
        assert np.abs(spoilt - right).max() > 0.1


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_bfloat16_is_as_good_as_its_own_naive_loop(arch, kind):
    """Root mean square difference of effects, over the root mean square of the logits."""
    model, contrast = tiny_model(arch, kind, torch.bfloat16), a_contrast(arch, kind, "rugged", 4)
    exact = tiny_model(arch, kind)

    def diff(logits, prompts, i):
        return naive.logit_diff(logits.float(), prompts, i)

    heads = [[h] for h in BELOW]
    scale = record(exact, contrast).clean.logits.square().mean().sqrt().item()
    for at in ("answer", "query_is"):
        ours = cells_of(patch_heads(model, contrast, at=at), BELOW)
        loop = naive.patch_heads(model, contrast, heads, at, metric=diff).numpy()
        truth = cells_of(patch_heads(exact, contrast, at=at), BELOW)

        def rms(error, scale=scale):
            return float(np.sqrt((error**2).mean())) / scale

        apart, error, naive_error = rms(ours - loop), rms(ours - truth), rms(loop - truth)
        note_difference(f"from its loop, {at}", apart)
        note_difference(f"from float32, {at}", error)
        assert apart <= 0.01 < 0.05 < rms(truth)
        assert 0 < error <= 1.01 * naive_error <= 0.03


# ------------------------------------------------------------------------------- left as found


def whole_state(model) -> dict:
    """As `state_of`, and what a folded layout exchanges meanwhile, by identity."""
    attention = [block.attn for block in model.blocks]
    state = state_of(model)
    state["replaced"] = ["_make_causal_mask" in vars(a) for a in attention]
    state["tables"] = [(name, id(buffer)) for a in attention for name, buffer in a._buffers.items()]
    return state


def a_folded_call(model, contrast, recorded, **how):
    return patch_heads(model, contrast, at="query_is", recorded=recorded, **how)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_folded_layouts_leave_the_model_as_found(arch, kind):
    """After success, after an exception inside a block, after Ctrl-C midway."""
    model = build(kind, arch)
    contrast = pairs(model)
    recorded = record(model, contrast)
    before = whole_state(model)
    assert not any(before["replaced"])
    right = a_folded_call(model, contrast, recorded).data
    agree_in_all(before, whole_state(model))
    seen = []

    def fail(module, args, out):
        first = out[0] if isinstance(out, tuple) else out
        seen.append(("_make_causal_mask" in vars(model.blocks[1].attn), first.shape[1]))
        raise FailsLater

    handle = model.blocks[1].attn.register_forward_hook(fail)
    with pytest.raises(FailsLater):
        a_folded_call(model, contrast, recorded)
    handle.remove()
    n_heads = 2 * model.cfg.n_heads
    assert seen == [(kind == "hooked", n_heads)]  # it was in the middle of a folded layout
    agree_in_all(before, whole_state(model))
    calls = []

    def interrupted(logits, rows):
        calls.append(len(logits))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return logits[:, 5].cpu()

    z = recorded.clean.z_at("query_is")
    variants = [(), *((Patch(Site(la, h, "z", "query_is"), z[:, la, h]),) for la, h in HEADS[:8])]
    with pytest.raises(KeyboardInterrupt):
        run_variants(model, contrast.corrupted, variants, interrupted, run=recorded.corrupted)
    assert len(calls) == 2
    agree_in_all(before, whole_state(model))
    assert a_folded_call(model, contrast, recorded).data.identical(right)


def resident() -> int:
    """Bytes of this process in memory; 0 where /proc does not tell."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * 4096 if path.exists() else 0


@pytest.mark.slow
def test_100_sweeps_leave_nothing_behind(kind):
    model = build(kind, "llama")
    contrast = pairs(model)

    def sweep():
        recorded = record(model, contrast)
        a_folded_call(model, contrast, recorded)
        patch_local_paths(model, contrast, recorded=recorded)
        patch_paths(model, contrast, receivers=[(1, 1)], recorded=recorded)
        knock_out(model, contrast.clean)

    def count():
        gc.collect()
        tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        return tensors, sum(len(m._forward_hooks) for m in model.modules())

    for _ in range(5):
        sweep()
    before, memory = count(), resident()
    for _ in range(100):
        sweep()
    assert count() == before
    assert resident() - memory < 40 * 2**20


def test_progress_has_its_label(kind, capfd):
    model, contrast = tiny_model("gpt2", kind), a_contrast("gpt2", kind, "rugged")
    for call, label in {
        lambda: patch_heads(model, contrast, progress=True): "denoise answer",
        lambda: patch_local_paths(model, contrast, progress=True): "local denoise answer",
        lambda: patch_positions(model, contrast, progress=True): "denoise by role",
        lambda: patch_interactions(model, contrast, heads=SPREAD, progress=True): "pairs query_is",
        lambda: knock_out(model, contrast.clean, progress=True): "cut query_is <- answer",
        lambda: rank_heads(model, contrast, k=2, progress=True): "12 heads on prompts 0 to 2",
        lambda: patch_heads(model, contrast): "",
    }.items():
        call()
        err = capfd.readouterr().err
        assert label in err and (err == "") is (label == "")
        assert not label or "0%|" in err, label


@pytest.mark.parametrize("max_memory", [0, -1, float("nan")])
def test_budgets_of_nothing_are_refused(max_memory):
    model, contrast = tiny_model("gpt2", KINDS[0]), a_contrast("gpt2", KINDS[0], "plain")
    message = f"expected max_memory in bytes, more than 0, got {max_memory}"
    for call in (
        lambda: record(model, contrast, max_memory=max_memory),
        lambda: knock_out(model, contrast.clean, max_memory=max_memory),
        lambda: run_variants(
            model, contrast.clean, [()], lambda x, rows: x[:, 0], max_memory=max_memory
        ),
    ):
        with pytest.raises(TvInterpError, match=message):
            call()


# -------------------------------------------------------------------- interactions, by hand


@pytest.mark.parametrize("backend", KINDS)
@pytest.mark.parametrize(
    ("circuit", "direction", "expected"),
    [
        # Both heads write the word; its logit is 4 * min(sum, 1). Alone 4 each, together 4.
        ("two_writers_or", "denoise", 4 - (4 + 4)),
        # Without one of them it is 4 still; without both 0.
        ("two_writers_or", "noise", 4 - (0 + 0)),
        # The logit is 4 * max(sum - 1, 0): alone nothing, together 4.
        ("two_writers_and", "denoise", 4 - (0 + 0)),
        # Without one of them it is 0 already.
        ("two_writers_and", "noise", 4 - (4 + 4)),
    ],
)
def test_interactions_of_two_writers_by_hand(circuit, direction, expected, backend):
    case = planted.build(circuit, backend=backend)
    clean = make_prompts(case.model, case.task, n_demos=3, n_prompts=6)
    scores = patch_interactions(
        case.model,
        clean.corrupt("inputs"),
        heads=[*sorted(case.writers), (1, 3)],
        at="answer",
        direction=direction,
    )
    pair, *with_decoy = scores.data.values.T
    np.testing.assert_allclose(pair, expected, atol=1e-5)
    np.testing.assert_allclose(with_decoy, 0, atol=1e-5)


# ------------------------------------------------------------------------------------ the race


def top_of(scores, k: int) -> set:
    mean = scores.mean().values
    order = np.argsort(-np.abs(mean), axis=None)[:k]
    return {tuple(map(int, np.unravel_index(i, mean.shape))) for i in order}


@pytest.mark.parametrize("circuit", ["value_route", "write_then_read", "negative_reader"])
def test_races_on_planted_circuits_find_what_a_full_sweep_finds(circuit):
    case = planted.build(circuit)
    contrast = make_prompts(case.model, case.task, n_demos=3, n_prompts=32).corrupt("inputs")
    for at in ("answer", "query_is"):
        full = patch_heads(case.model, contrast, at=at)
        k = int((abs(full.mean()) > 1e-3).sum())
        race = rank_heads(case.model, contrast, k=k, at=at)
        assert race.settled and {s.at for s in race.top} == top_of(full, k)
        assert race.share < 0.5 and 0 < k < 16


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_races_on_random_models_find_what_a_full_sweep_finds(arch):
    model, contrast = tiny_model(arch, KINDS[0]), a_contrast(arch, KINDS[0], "rugged", 32)
    full = patch_heads(model, contrast)
    rng = np.random.default_rng(3).permutation(32)
    for k in (1, 4):
        race = rank_heads(model, contrast, k=k, seed=3)
        assert race.settled and {s.at for s in race.top} == top_of(full, k)
        seen = race.effects.n_prompts.values
        assert set(seen.ravel()) <= set(_looks(32)) and seen.min() >= 8
        assert race.share == pytest.approx(seen.sum() / (12 * 32))
        for la, h in HEADS:  # each mean is over the prompts that the head saw, in the race's order
            mean = full.data.values[rng[: seen[la, h]], la, h].mean()
            assert float(race.effects["mean"][la, h]) == pytest.approx(mean, abs=1e-5)
            assert race.effects.lo[la, h] <= mean + 1e-6 and mean - 1e-6 <= race.effects.hi[la, h]
        means = [abs(float(race.effects["mean"].sel(layer=s.layer, head=s.head))) for s in race.top]
        assert means == sorted(means, reverse=True)
    assert len(race.to_pandas()) == 12


def test_races_are_decided_by_their_seed_and_print_at_80_columns():
    model, contrast = tiny_model("gpt2", KINDS[0]), a_contrast("gpt2", KINDS[0], "rugged", 32)
    one, same = (rank_heads(model, contrast, k=3, seed=5) for _ in range(2))
    assert one.effects.identical(same.effects) and one.top == same.top and one.share == same.share
    other = rank_heads(model, contrast, k=3, seed=6)
    assert not other.effects.identical(one.effects)
    text = str(one)
    assert max(map(len, text.splitlines())) <= 80 and len(text.splitlines()) == 7
    assert "with probability 0.95 the same top 3" in text and "of a full sweep over 32 pr" in text
    long = dataclasses.replace(one, attrs={**one.attrs, "model": "a-model-with-a-long-name" * 2})
    assert max(map(len, str(long).splitlines())) <= 80 and "random_answers" in str(long)


def test_races_refuse_what_makes_no_sense():
    model, contrast = tiny_model("gpt2", KINDS[0]), a_contrast("gpt2", KINDS[0], "plain")
    for how, message in (
        (dict(k=0), "expected k of 1 to 12, the heads of the model, got 0"),
        (dict(k=13), "expected k of 1 to 12, the heads of the model, got 13"),
        (dict(confidence=0), "expected a confidence between 0 and 1, got 0"),
        (dict(confidence=1.0), "expected a confidence between 0 and 1, got 1.0"),
        (dict(tolerance=-0.1), "expected a tolerance of 0 or more, got -0.1"),
        (dict(tolerance=float("nan")), "expected a tolerance of 0 or more, got nan"),
        (dict(at="anwser"), "unknown role 'anwser'"),
        (dict(direction="both"), "unknown direction 'both'"),
    ):
        with pytest.raises(TvInterpError, match=message):
            rank_heads(model, contrast, **{"k": 2} | how)


N, CANDIDATES, K = 64, 16, 4


def effects_of(shape: str, rng) -> np.ndarray:
    """Effects ``[prompt, candidate]``: few candidates matter, and prompts differ as named."""
    size = rng.exponential(0.25, CANDIDATES) * rng.choice([-1, 1], CANDIDATES)
    size[:K] += np.sign(size[:K]) * 0.5
    noise = {
        "normal": lambda: 1 + rng.normal(size=(N, CANDIDATES)),
        "exponential": lambda: rng.exponential(size=(N, CANDIDATES)),
        "zero-inflated": lambda: 10.0 * (rng.random((N, CANDIDATES)) < 0.1),
        "one in thirty": lambda: 30.0 * (rng.random((N, CANDIDATES)) < 1 / 30),
    }[shape]()
    return size * noise


def run_race(effects: np.ndarray, tolerance: float = 0.0) -> Race:
    looks = _looks(N)
    race = Race(CANDIDATES, N, K, 0.05 / (CANDIDATES * (len(looks) - 1)), tolerance)
    start = 0
    for stop in looks:
        race = race.look(effects[start:stop][:, race.undecided])
        start = stop
        if race.settled:
            break
    return race


def race_errors(shape: str, tolerance: float = 0.0, n_races: int = 200) -> tuple[float, float]:
    """Fraction of settled races whose top k is wrong by more than tolerance, and the mean share."""
    rng, wrong, share = np.random.default_rng(0), [], []
    for _ in range(n_races):
        effects = effects_of(shape, rng)
        race = run_race(effects, tolerance)
        assert race.settled
        true = np.abs(effects.mean(0))
        left_out = np.delete(true, race.top).max()
        wrong.append(left_out > true[race.top].min() + tolerance + 1e-12)
        share.append(race.seen.sum() / (N * CANDIDATES))
    return float(np.mean(wrong)), float(np.mean(share))


def test_who_has_left_a_race_does_not_come_back():
    """Else it would miss the prompts between, and the race end without being settled."""
    rng = np.random.default_rng(0)
    values = np.array([1.0, 0.5, 1.0]) + 1e-3 * rng.normal(size=(N, 3))
    values[8:20, 0] += 3 * rng.normal(size=12)  # what had beaten candidate 1 becomes uncertain,
    values[:, 2] += 2 * rng.normal(size=N)  # and what had not yet stays so
    race, start = Race(3, N, 1, 0.05 / 12), 0
    for stop in _looks(N):
        race = race.look(values[start:stop][:, race.undecided])
        start = stop
        assert 1 not in race.undecided and race.seen[1] == 8
        if race.settled:
            break
    assert race.settled and race.seen[0] == race.seen[2] == N
    assert race.top == [int(abs(values.mean(0)).argmax())]


@pytest.mark.parametrize("shape", ["normal", "exponential", "zero-inflated"])
def test_settled_races_are_wrong_in_at_most_5_percent(shape):
    wrong, share = race_errors(shape)
    assert wrong <= 0.05 and share < 1


def test_tolerance_saves_runs_and_bounds_the_loss():
    exact, with_tolerance = race_errors("normal", 0.0, 60), race_errors("normal", 0.3, 60)
    assert with_tolerance[0] <= 0.05 and with_tolerance[1] < exact[1] - 0.02
