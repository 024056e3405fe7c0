"""A thousand drawn configurations: a right result, or one error with what to do; nothing else."""

from __future__ import annotations

import dataclasses
import functools
import string
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from conftest import KINDS
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from random_models import hf_model, word_tokenizer, words
from test_prompts import assert_roles_spell_the_words
from trained_tokenizers import byte_level, sentence_piece

import tv_interp as tv
from tv_interp.errors import TvInterpError
from tv_interp.models.convert import bridge_from_hf, hooked_from_hf
from tv_interp.prompts.corruptions import CORRUPTIONS
from tv_interp.prompts.roles import ROLE_NAMES
from tv_interp.scores import Scores
from tv_interp.scores.metrics import METRICS
from tv_interp.sweep.plan import MEASURES, Plan

TOKENIZERS = {
    "words": lambda: word_tokenizer(words()),
    "byte_level": byte_level,
    "sentence_piece": sentence_piece,
}


def fuzz(n: int):
    """The same ``n`` examples in each run: what fails here fails everywhere."""
    return settings(
        max_examples=n,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@functools.cache
def model(tokenizer: str):
    """A tiny random model with one of the tokenizers."""
    tokens = TOKENIZERS[tokenizer]()
    build = hooked_from_hf if "hooked" in KINDS else bridge_from_hf
    return build(hf_model("llama", d_vocab=len(tokens) + 9, n_ctx=160, n_layers=2), tokens)


def attempt(call):
    """Run something; None where it was refused in one line that says more than a name."""
    try:
        return call()
    except TvInterpError as error:
        text = str(error)
        assert "\n" not in text and len(text) > 30, text
        assert any(mark in text for mark in (":", ";", "expected")), text
        return None


def anything_but(usual: st.SearchStrategy, odd: list[Any]) -> st.SearchStrategy:
    """Mostly what is usual, now and then what nobody should pass."""
    return st.integers(0, 19).flatmap(lambda i: st.sampled_from(odd) if i == 0 else usual)


# --------------------------------------------------------------------------------- what is drawn

LETTERS = (
    string.ascii_letters + string.digits + " -'.,:;>äß" + "λόγος" + "مدينة" + "北京大阪" + "🙂👩‍🚀é"
)
ODD_WORDS = [
    "", " ", "\n", "a\nb", "{x}", "{y}", "is", "->", "\x00", "\ud800", "\u200b", "a" * 300,
    "<s>", "<bos>", "<|endoftext|>", "<unk>", None, 3, float("nan"), ("a", "b"),
]  # fmt: skip
plain_words = st.sampled_from(words()[3:])
two_words = st.builds("{} {}".format, plain_words, plain_words)
any_words = st.one_of(plain_words, plain_words, two_words, st.text(LETTERS, min_size=1, max_size=8))
odd_words = anything_but(any_words, ODD_WORDS)
TEMPLATES = (
    "{x} is {y}\n", "{x} -> {y}\n", "{x} : {y} ", "{x} is {y}", "is {x} -> {y} :", "{x} is{y}\n",
    "{x}: {y}\n\n", "Q: {x}\nA: {y}\n\n", "{x} λ {y}\n", "{x}🙂{y} ",
)  # fmt: skip
ODD_TEMPLATES = [
    "", "{x}", "{y} {x}", "{x} {y}", "{x}{y}", "{x} is {x}", "{x} is {y} {y}", "{z} {x} is {y}",
    "{x} \ud800 {y}", "{{x}} is {{y}}", None,
]  # fmt: skip
templates = anything_but(st.sampled_from(TEMPLATES), ODD_TEMPLATES)


@st.composite
def tasks(draw) -> Any:
    """Pairs, as a dict or as a DataFrame of some columns."""
    n = draw(st.integers(0, 9))
    xs, ys = ([draw(odd_words) for _ in range(n)] for _ in "xy")
    if draw(st.booleans()):  # several inputs share an answer
        ys = [ys[i % 3] for i in range(n)]
    family = draw(st.sampled_from(["user", "knowledge", "categorization", "bijection", ""]))
    columns = draw(st.sampled_from(["", "", "xy", "yx", "ab", "xyz", "x"]))
    pairs: Any = dict(zip(xs, ys, strict=True))
    if columns:
        pairs = pd.DataFrame({c: xs if c in "xa" else ys for c in columns}, dtype=object)
    return lambda: tv.Task.from_pairs(pairs, family=family)


task_names = st.sampled_from(["country-capital", "singular-plural", "digit", "no-such-task"])
sizes = {
    "n_demos": anything_but(st.integers(0, 6), [-1, 10**6]),
    "n_prompts": anything_but(st.integers(1, 5), [0, -3]),
    "seed": st.integers(0, 2**32),
    "template": templates,
    "prepend_bos": st.sampled_from([None, True, False]),
}
corruptions = anything_but(st.sampled_from(CORRUPTIONS), ["", "answer"])


# --------------------------------------------------------------------------------------- prompts


@pytest.mark.slow
@fuzz(600)
@given(
    which=st.sampled_from(list(TOKENIZERS)),
    task=tasks(),
    how=st.fixed_dictionaries(sizes),
    kind=corruptions,
    then=st.sampled_from(["zero_shot", "keep_demos", "other_query", "dummies", "select", "show"]),
    number=st.integers(-1, 6),
)
def test_prompts_of_any_words_know_their_roles_or_are_refused(which, task, how, kind, then, number):
    made = attempt(lambda: tv.make_prompts(model(which), task(), **how))
    if made is None:
        return
    assert len(made) == how["n_prompts"] and made.n_demos == how["n_demos"]
    assert_roles_spell_the_words(made)
    pair = attempt(lambda: made.corrupt(kind, seed=number))
    if pair is not None:
        assert 0 < len(pair) <= len(made) and (pair.answer != pair.foil).all()
        assert torch.equal(pair.clean.lengths, pair.corrupted.lengths)
        n = int(pair.clean.lengths.max())  # storage may be wider
        assert torch.equal(pair.clean.role_ids[:, :n], pair.corrupted.role_ids[:, :n])
        assert_roles_spell_the_words(pair.corrupted)
    follow = {
        "zero_shot": lambda: made.zero_shot(),
        "keep_demos": lambda: made.keep_demos([number, 0]),
        "other_query": lambda: made.other_query(seed=number),
        "dummies": lambda: made.dummies(seed=number).corrupted,
        "select": lambda: made.select([number]),
        "show": lambda: made.show(number) and None,
    }
    after = attempt(follow[then])
    if after is not None:
        assert_roles_spell_the_words(after)


# -------------------------------------------------------------------------------------- analyses


@functools.cache
def contrast(which: str, n_prompts: int, n_demos: int, seed: int):
    """Pairs of words that the tokenizer knows, of one or more tokens; doubles among them."""
    w = list(words()[3:])
    if which != "words":
        pairs = tv.get_task("country-capital").pairs
        w = [*list(pairs)[:20], *dict.fromkeys(pairs.values())]
    pairs = {w[i]: w[20 + i // 2] for i in range(20)} | {f"{w[i]} {w[i + 1]}": w[i] for i in (3, 9)}
    prompts = tv.make_prompts(
        model(which), tv.Task.from_pairs(pairs), n_demos=n_demos, n_prompts=n_prompts, seed=seed,
        template="{x} -> {y}:",
    )  # fmt: skip
    if seed == 1:
        prompts = prompts.select([0] * n_prompts)  # all prompts are the same
    return prompts.corrupt("random_answers", seed=seed + 1)


roles = anything_but(st.sampled_from(ROLE_NAMES), ["", "query"])
heads = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 1), st.integers(0, 3)),
        st.sampled_from(["L0H1.z@answer", "L1H3.z@query_is", "L9H9.z@answer", "L0H1", "", "head"]),
        st.tuples(st.integers(-2, 3), st.integers(-2, 5)),
    ),
    max_size=3,
)
metrics = anything_but(st.sampled_from(list(METRICS)), ["logits", ""])
directions = anything_but(st.sampled_from(["denoise", "noise"]), ["both"])
numbers = anything_but(st.sampled_from([None, 1.0, 1e4, 1e6, 1e9]), [0, -1.0, float("nan")])
CALLS: dict[str, dict[str, st.SearchStrategy]] = {
    "patch_heads": {
        "at": roles, "direction": directions, "metric": metrics,
        "demos": anything_but(st.sampled_from(["joint", "each"]), ["all"]),
    },
    "patch_local_paths": {"at": roles, "direction": directions, "metric": metrics},
    "patch_positions": {
        "by": anything_but(st.sampled_from(["role", "token"]), ["demo"]), "metric": metrics,
    },
    "patch_sources": {
        "at": roles, "direction": directions, "metric": metrics, "heads": heads,
        "roles": st.none() | st.lists(roles, max_size=2),
        "parts": st.lists(anything_but(st.sampled_from(["q", "k", "value", "kv", "both"]), ["v"]),
                          max_size=2),
    },
    "patch_together": {
        "sets": st.dictionaries(st.text(max_size=3), heads, max_size=2), "at": roles,
        "metric": metrics,
    },
    "patch_interactions": {"heads": heads, "at": roles, "metric": metrics},
    "patch_paths": {
        "senders": st.none() | heads, "receivers": heads, "metric": metrics,
        "via": anything_but(st.sampled_from(["k", "v", "kv", "q"]), ["", "z"]),
        "through": anything_but(st.sampled_from(["direct", "mlp", "position"]), ["all"]),
    },
    "knock_out": {
        "dest": roles, "src": roles, "metric": metrics,
        "demos": st.none() | st.lists(st.integers(-1, 4), max_size=2),
        "sets": st.none() | st.dictionaries(st.text(max_size=3), heads, max_size=2),
        "max_memory": numbers,
    },
    "rank_heads": {"at": roles, "metric": metrics, "k": st.integers(-1, 9)},
    "saliency_flow": {"metric": metrics},
    "extract_vectors": {"at": roles, "heads": st.none() | heads},
    "inject_vectors": {"at": roles, "metric": metrics},
    "discover_circuit": {"method": st.sampled_from(["eap", "eap-ig", "exactly"])},
}  # fmt: skip
OF_PROMPTS = ("knock_out", "saliency_flow", "extract_vectors")


@st.composite
def calls(draw) -> tuple[str, dict[str, Any]]:
    """A function and its arguments."""
    name = draw(st.sampled_from(list(CALLS)))
    return name, {key: draw(values) for key, values in CALLS[name].items()}


@pytest.mark.slow
@fuzz(250)
@given(
    which=st.sampled_from(list(TOKENIZERS)),
    n_prompts=st.integers(1, 4),
    n_demos=st.integers(2, 4),
    seed=st.integers(0, 2),
    call=calls(),
    max_memory=numbers,
)
def test_every_analysis_gives_finite_numbers_of_its_shape_or_is_refused(
    which, n_prompts, n_demos, seed, call, max_memory
):
    name, how = call
    pair, held = contrast(which, n_prompts, n_demos, seed), model(which)

    def run():
        if name in OF_PROMPTS:
            return getattr(tv, name)(held, pair.clean, **how)
        if name == "inject_vectors":
            vectors = tv.extract_vectors(held, pair.clean, at=how["at"])
            return tv.inject_vectors(held, pair.corrupted, vectors, metric=how["metric"])
        if name in ("discover_circuit", "rank_heads"):
            return getattr(tv, name)(held, pair, **how)
        recorded = tv.record(held, pair, max_memory=max_memory)
        return getattr(tv, name)(held, pair, recorded=recorded, **how)

    found = attempt(run)
    if not isinstance(found, Scores):
        return
    assert found.data.sizes["prompt"] == len(pair)
    assert np.isfinite(found.data.values).all()
    assert found.total is None or np.isfinite(found.total.values).all()
    if {"layer", "head"} <= set(found.data.dims):
        assert found.data.sizes["layer"] == 2 and found.data.sizes["head"] == 4
    if seed == 1 and name == "knock_out" and "prob" in how["metric"]:  # equal prompts; own foils
        np.testing.assert_allclose(np.ptp(found.data.values, axis=0), 0, atol=1e-4)
    table = found.to_pandas()
    assert np.isfinite(table["mean"]).all()


# ---------------------------------------------------------------------------------------- scores


@pytest.mark.slow
@fuzz(50)
@given(data=st.data())
def test_scores_of_any_numbers_are_averaged_tested_and_kept(data, tmp_path_factory):
    n, layers, heads_ = (data.draw(st.integers(1, most)) for most in (6, 3, 3))
    value = st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, 1.0, 1e-30])
    effects = [[[data.draw(value) for _ in range(heads_)] for _ in range(layers)] for _ in range(n)]
    array = xr.DataArray(
        np.array(effects), dims=("prompt", "layer", "head"),
        coords={"prompt": range(n), "layer": range(layers), "head": range(heads_)}, name="effect",
    )  # fmt: skip
    total = xr.DataArray([data.draw(value) for _ in range(n)], dims="prompt", name="total")
    whole = data.draw(st.sampled_from([None, total, total * 0, total * 0 + 2]))
    clusters = tuple(data.draw(st.lists(st.sampled_from("abλ "), min_size=n, max_size=n)))
    scores = Scores(array, "logits", whole, clusters, {"at": "answer", "corruption": "answers"})
    level = data.draw(st.sampled_from([0.9, 0.95, 0.5]))
    for of in data.draw(st.sampled_from([("mean",), ("recovered",)])):
        interval = attempt(lambda of=of: scores.ci(of, level=level))
        if interval is not None:
            one = len(set(clusters)) == 1  # nothing to resample: the interval is the whole line
            assert (np.isfinite(interval.value) & (np.isfinite(interval.lo) | one)).all()
            assert (interval.lo <= interval.hi).all()
    pvalues = attempt(scores.pvalues)
    assert pvalues is None or ((pvalues > 0) & (pvalues <= 1)).all()
    marked = attempt(scores.significant)
    assert marked is None or marked.shape == (layers, heads_)
    assert len(scores.top(4)) == min(4, layers * heads_)
    path = tmp_path_factory.mktemp("scores") / "s.nc"
    scores.save(path)
    again = Scores.load(path)
    xr.testing.assert_identical(again.data, scores.data)
    assert again.clusters == scores.clusters


# ----------------------------------------------------------------------------------------- plans

fields = st.sampled_from(
    ["model", "task", "corruption", "n_demos", "n_prompts", "seed", "metric", "direction",
     "template", "backend", "measure", "out", "load", "seeds", ""]
)  # fmt: skip
values = st.one_of(
    st.integers(-2, 9), st.text(LETTERS, max_size=4), st.none(), st.booleans(), st.floats(),
    st.sampled_from(["reference", "digit", "logit_diff", "noise", "hooked", "../..", "answers"]),
)  # fmt: skip


@pytest.mark.slow
@fuzz(100)
@given(
    measure=anything_but(st.sampled_from(MEASURES), ["reader", "", None, 3, []]),
    grid=st.dictionaries(fields, st.lists(values, max_size=3) | values, max_size=3),
    settings_=st.dictionaries(fields, values, max_size=3),
)
def test_a_plan_is_cells_or_is_refused(measure, grid, settings_, tmp_path_factory):
    import json

    import yaml

    text = {"measure": measure, "grid": grid} | {k: v for k, v in settings_.items() if k != "grid"}
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    path.write_text(yaml.safe_dump(text), encoding="utf-8")
    plan = attempt(lambda: Plan.load(path))
    if plan is None:
        return
    assert len(plan.cells) == len(set(plan.cells)) > 0
    keys = {cell.key for cell in plan.cells}
    assert len(keys) == len(plan.cells)
    assert all(set(key) <= set("0123456789abcdef") for key in keys)
    json.dumps([str(cell) for cell in plan.cells])
    assume(True)


# --------------------------------------------------------------------------- what fuzzing has found


def test_twins_in_storage_of_other_widths_are_swept_by_position():
    """Selecting rows keeps the width of the longest prompt, corrupting does not."""
    pair = contrast("byte_level", 4, 3, 0)
    rows = (pair.clean.lengths == pair.clean.lengths.min()).nonzero()[:, 0]
    narrow = pair.select(rows)
    wide = torch.nn.functional.pad(narrow.clean.tokens, (0, 5), value=7)
    padded = {k: torch.nn.functional.pad(getattr(narrow.clean, k), (0, 5), value=-1)
              for k in ("role_ids", "demo_ids")}  # fmt: skip
    clean = dataclasses.replace(narrow.clean, tokens=wide, **padded)
    for by in ("token", "role"):
        same, other = (
            tv.patch_positions(model("byte_level"), c, by=by)
            for c in (narrow, tv.Contrast(clean, narrow.corrupted, narrow.corruption))
        )
        np.testing.assert_array_equal(same.data, other.data)


@pytest.mark.parametrize("text", ["{x} \ud800 {y}", "{x} is {y}"])
def test_half_a_surrogate_pair_is_refused(text):
    w = words()[3:]
    task = tv.Task.from_pairs({w[i]: w[9 - i] + "\udc00" * ("is" in text) for i in range(5)})
    with pytest.raises(
        TvInterpError, match=r"'\\ud[8c]00' in a prompt is half of a surrogate pair"
    ):
        tv.make_prompts(model("byte_level"), task, n_demos=2, n_prompts=2, template=text)


@pytest.mark.parametrize("seed", [-1, 0.5, "0"])
def test_a_seed_that_no_generator_takes_is_refused(seed):
    pair = contrast("words", 2, 2, 0)
    for call in (
        lambda: pair.clean.corrupt("answers", seed=seed),
        lambda: pair.clean.other_query(seed=seed),
        lambda: pair.clean.dummies(seed=seed),
        lambda: tv.make_prompts(model("words"), "digit", seed=seed),
        lambda: tv.rank_heads(model("words"), pair, k=2, seed=seed),
        lambda: tv.patch_heads(model("words"), pair).ci(seed=seed),
        lambda: tv.patch_heads(model("words"), pair).pvalues(seed=seed),
    ):
        with pytest.raises(TvInterpError, match="expected seed to be a whole number of 0 or more"):
            call()


def test_messages_without_an_action_have_one():
    bare = tv.make_prompts(model("words"), pairs_of_words(), n_demos=0, n_prompts=2)
    with pytest.raises(TvInterpError, match="there are none: make prompts with n_demos of 1 or"):
        bare.corrupt("answers")
    with pytest.raises(TvInterpError, match="not all within 0..1: they are counted from 0"):
        tv.knock_out(model("words"), contrast("words", 1, 2, 0).clean, demos=[2])


def test_a_prompt_that_is_not_there_is_not_shown():
    with pytest.raises(TvInterpError, match="expected rows of 0 to 1, got row 5"):
        tv.make_prompts(model("words"), pairs_of_words(), n_demos=2, n_prompts=2).show(5)


def pairs_of_words():
    w = words()[3:]
    return tv.Task.from_pairs({w[i]: w[20 + i] for i in range(9)})
