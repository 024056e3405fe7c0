"""Crossed prompts, what states hold, the shape of heads, and what goes with failures."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from conftest import KINDS, tiny_model

import tv_interp as tv
from tv_interp.analysis.head_geometry import MEASURES, _shapes
from tv_interp.analysis.information import HELD, _ridge_hits
from tv_interp.errors import PromptError, TvInterpError, UnknownName
from tv_interp.prompts.crossing import cross
from tv_interp.prompts.tasks.categorization import Categorization
from tv_interp.sweep.failures import explain_failures

ONE = {f"w{i}": f"w{i + 20}" for i in range(12)}
OTHER = {f"w{i}": f"w{i + 40}" for i in range(12)}
TASK, PARTNER = tv.Task.from_pairs(ONE), tv.Task.from_pairs(OTHER)


def model_of(kind: str):
    return tiny_model("gpt2", kind, n_layers=2)


@functools.cache
def found_on(kind: str):
    model = model_of(kind)
    prompts = tv.make_prompts(model, TASK, n_demos=3, n_prompts=12, seed=0)
    return model, prompts, tv.information_map(model, prompts, other=PARTNER, seed=1)


def test_crossed_prompts_have_two_rules_and_two_queries():
    prompts = tv.make_prompts(model_of(KINDS[-1]), TASK, n_demos=3, n_prompts=10, seed=0)
    crossed = cross(prompts, other=PARTNER, seed=1)
    for plain, rule, query, both in zip(*(p.samples for p in crossed), strict=True):
        assert [x for x, _ in plain.demos] == [x for x, _ in both.demos]
        assert plain.demos == query.demos and rule.demos == both.demos
        assert plain.query == rule.query != query.query == both.query
        pairs = zip((plain, rule, query, both), (ONE, OTHER, ONE, OTHER), strict=True)
        for sample, rule_of in pairs:
            assert sample.answer == rule_of[sample.query] == sample.rule(sample.query)
            assert all(y == rule_of[x] for x, y in sample.demos)
    assert all(len(set(row)) == 4 for row in crossed.answers.tolist())
    assert [p.roles_of(0) for p in crossed] == [crossed.plain.roles_of(0)] * 4


def test_categorization_is_crossed_with_other_labels():
    task = Categorization(
        "low", lambda rng: f"w{rng.integers(30)}", lambda x: False,
        lambda rng: ("low", lambda x: int(x[1:]) < 15), labels=[f"w{i}" for i in range(40, 48)],
    )  # fmt: skip
    prompts = tv.make_prompts(model_of(KINDS[-1]), task, n_demos=4, n_prompts=8, seed=0)
    crossed = cross(prompts, seed=1)
    for plain, rule, query, both in zip(*(p.samples for p in crossed), strict=True):
        old, new = ({y for _, y in s.demos} for s in (plain, rule))
        assert len(old) == len(new) == 2 and not old & new
        names = dict(zip((y for _, y in plain.demos), (y for _, y in rule.demos), strict=True))
        assert names[plain.answer] == rule.answer and names[query.answer] == both.answer
        assert query.answer != plain.answer  # the other class
    with pytest.raises(PromptError, match="has 2 label words, and crossing needs four"):
        few = tv.make_prompts(
            model_of(KINDS[-1]), task.with_labels(["w40", "w41"]), n_demos=4, n_prompts=4
        )
        cross(few)


def test_what_cannot_be_crossed_is_refused_or_counted():
    model = model_of(KINDS[-1])
    prompts = tv.make_prompts(model, TASK, n_demos=3, n_prompts=10, seed=0)
    with pytest.raises(PromptError, match="declares no partner: pass other="):
        cross(prompts)
    lacking = tv.Task.from_pairs({x: y for x, y in OTHER.items() if x != "w4"})
    crossed = cross(prompts, other=lacking)
    reason = "the other rule lacks an input of the prompt"
    assert 0 < len(crossed.plain) == 10 - crossed.plain.dropped[reason] < 10
    same = tv.Task.from_pairs(dict.fromkeys(ONE, "w50"))
    with pytest.raises(PromptError, match="none of 10 prompts can be crossed: no other query"):
        cross(prompts, other=same)
    plain = tv.make_prompts(model, Unruled(), n_demos=3, n_prompts=4)
    with pytest.raises(PromptError, match="carry no rule"):
        cross(plain, other=PARTNER)
    with pytest.raises(UnknownName, match="unknown map"):
        found_on(KINDS[-1])[2].plot(of="other")  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="unknown information"):
        found_on(KINDS[-1])[2].share("other")  # type: ignore[arg-type]


class Unruled(tv.Task):
    name, family = "unruled", "other"

    def sample(self, rng, n_demos):
        *demos, (x, y) = [
            (f"w{i}", f"w{i + 20}") for i in rng.permutation(12)[: n_demos + 1].tolist()
        ]
        return demos, x, y, "w33"


def test_a_cell_of_the_map_is_what_a_plain_hook_gives(kind):
    model, prompts, found = found_on(kind)
    crossed = cross(prompts, other=PARTNER, seed=1)
    plain, both = crossed.plain, crossed.both
    rows = torch.arange(len(plain))

    @torch.no_grad()
    def choice(of, hooks=()):
        logits = model.run_with_hooks(of.tokens, fwd_hooks=list(hooks))[rows, of.lengths - 1]
        return logits.gather(1, crossed.answers).double().softmax(-1)[:, 1:].numpy()

    base = choice(plain)
    for role, layer in (("answer", 0), ("x", 0), ("query_x", 0), ("query_is", 1)):
        name = f"blocks.{layer}.hook_resid_post"
        kept = {}

        def keep(value, hook, kept=kept):
            kept["state"] = value.clone()

        at = plain.positions(role)
        at = at if at.ndim == 2 else at[:, None]
        choice(both, [(name, keep)])

        def put(value, hook, kept=kept, at=at):
            value = value.clone()
            value[rows[:, None], at] = kept["state"][rows[:, None], at]
            return value

        change = choice(plain, [(name, put)]) - base
        assert np.abs(change).max() > 0 or role == "x"
        for i, what in enumerate(HELD):
            ours = found.held[what].data.sel(role=role, layer=layer).values
            np.testing.assert_allclose(ours, change[:, i], atol=1e-5)


def test_demonstrations_hold_no_query_and_the_last_state_the_whole_answer(kind):
    _, _, found = found_on(kind)
    answer = found.held["answer"]
    assert answer.total is not None
    np.testing.assert_allclose(
        answer.data.sel(role="query_is", layer=1).values, answer.total.values, atol=1e-5
    )
    for scores in found.held.values():
        nowhere = [scores.data.sel(role="bos"), scores.data.sel(layer=1).drop_sel(role="query_is")]
        for cells in nowhere:  # cannot differ, and nobody reads after the last block
            np.testing.assert_allclose(cells.values, 0, atol=1e-6)
    assert "rule" in str(found) and "InformationMap" in repr(found)


def test_a_map_is_drawn_with_a_panel_for_each_kind_of_information():
    _, _, found = found_on(KINDS[-1])
    figure = found.plot()
    assert len(figure.data) == 3 and [a["text"] for a in figure.layout.annotations] == [
        f"part {what}" for what in HELD
    ]
    mean = found.held["rule"].mean().transpose("role", "layer").values
    clear = all(s.total_is_clear() for s in found.held.values())
    wanted = found.share("rule").transpose("role", "layer").values if clear else mean
    np.testing.assert_allclose(np.array(figure.data[0].z, dtype=float), wanted, rtol=1e-4)
    assert list(figure.data[0].y) == found.held["rule"].data["role"].values.tolist()
    assert len(found.plot(of="decoded").data) == len(found.decoded)


def test_the_decoder_finds_planted_classes_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    codes = rng.integers(4, size=400)
    axes = np.linalg.qr(rng.standard_normal((30, 4)))[0].T
    states = axes[codes] + 0.1 * rng.standard_normal((400, 30))
    fold = np.arange(400) % 5
    right, shuffled = _ridge_hits(states, [codes, rng.permutation(codes)], fold).mean(1)
    assert right > 0.99 and abs(shuffled - 0.25) < 0.08
    (noise,) = _ridge_hits(rng.standard_normal((400, 30)), [codes], fold).mean(1)
    assert abs(noise - 0.25) < 0.08


def test_shapes_of_writes_equal_a_plain_loop_over_pairs():
    rng = np.random.default_rng(1)
    words = rng.integers(3, size=(5, 2))
    writes = torch.from_numpy(rng.standard_normal((5, 1, 2, 2, 6)))
    separation, rank = _shapes(writes, words)
    for head in range(2):
        flat = writes[:, 0, head].reshape(10, 6).numpy()
        flat = flat - flat.mean(0)
        unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
        same: dict[bool, list[float]] = {True: [], False: []}
        for i in range(10):
            for j in range(i):
                same[bool(words.ravel()[i] == words.ravel()[j])].append(float(unit[i] @ unit[j]))
        wanted = np.mean(same[True]) - np.mean(same[False])
        assert separation[0, head] == pytest.approx(wanted)
        shares = np.linalg.svd(flat, compute_uv=False)
        shares = shares / shares.sum()
        assert rank[0, head] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


@pytest.mark.skipif("hooked" not in KINDS, reason="weights are written, which a bridge only shows")
def test_a_head_made_to_read_and_write_the_answers_stands_out():
    model = tiny_model.__wrapped__("gpt2", "hooked", n_layers=2)
    prompts = tv.make_prompts(model, TASK, n_demos=3, n_prompts=12, seed=0)
    contrast = prompts.corrupt("task", other=PARTNER)
    clean, corrupted = (
        model.run_with_cache(p.tokens)[1]["blocks.1.ln1.hook_normalized"].detach()
        for p in (contrast.clean, contrast.corrupted)
    )
    at = (torch.arange(len(contrast))[:, None], contrast.clean.positions("answer"))
    change = (clean - corrupted)[at].flatten(0, 1)
    axes = torch.linalg.svd(change, full_matrices=False).Vh[: model.cfg.d_head]
    with torch.no_grad():
        model.blocks[1].attn.W_V[2] = axes.T / model.blocks[1].ln1.w[:, None]
        wanted = model.unembed.W_U[:, contrast.answer] - model.unembed.W_U[:, contrast.foil]
        model.blocks[1].attn.W_O[3] = wanted.mean(1)
    found = tv.head_geometry(model, contrast, [(1, 2)], at="query_is", seed=0)
    reading = found.values.sel(layer=1, part="reading").values
    assert reading.argmax() == 2 and reading[2] > 1.3 * np.delete(reading, 2).max()
    row = next(r for r in found.rows if r.measure == "reading")
    assert row.lo > 0 and row.heads == pytest.approx(reading[2]) and len(row.controls) == 3
    assert found.values.sel(layer=1, head=3, part="rank") == pytest.approx(1, abs=1e-3)


def test_geometry_covers_both_classes_and_refuses_few_prompts(kind):
    model = model_of(kind)
    prompts = tv.make_prompts(model, TASK, n_demos=3, n_prompts=12, seed=0)
    contrast = prompts.corrupt("task", other=PARTNER)
    found = tv.head_geometry(model, contrast, ["L0H1.z@answer"], at="answer")
    assert [row.measure for row in found.rows] == list(MEASURES)
    assert np.isfinite(found.values.values).all() and "L0H1 at answer" in repr(found)
    assert found.values.attrs == {} and "separation" in str(found)
    with pytest.raises(PromptError, match="expected 8 prompts or more, got 3"):
        tv.head_geometry(model, contrast.select([0, 1, 2]), [(0, 1)])


def test_what_goes_with_failures_is_found_and_what_does_not_is_not():
    rng = np.random.default_rng(0)
    rows = []
    for i in range(16):
        works = float(i % 2)
        features = {"map: goes": works + 0.1 * rng.random(), "map: does not": rng.random()}
        rows.append({"local": works, "global": None, **features})
    table = explain_failures(rows).set_index("feature")
    assert table.outcome.unique().tolist() == ["local"]
    assert table.q["map: goes"] < 0.01 < 0.05 < table.q["map: does not"]
    assert table.n_works["map: goes"] == table.n_fails["map: goes"] == 8
    assert table.works["map: goes"] > 1 > table.fails["map: goes"]
    with pytest.raises(TvInterpError, match="no outcome has three where it works"):
        explain_failures(rows[:4])
