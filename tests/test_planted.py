"""The planted models do what their truth says, seen by a loop of TransformerLens hooks."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch
from conftest import KINDS

from tv_interp.errors import ModelError, PromptError, UnknownName
from tv_interp.models import planted
from tv_interp.prompts.build import make_prompts

HAS_HOOKED = "hooked" in KINDS
N_PROMPTS, N_DEMOS = 12, 3
HEADS = [(layer, head) for layer in range(4) for head in range(4)]

# (name, corruption) -> total, and {(head, where): (denoise, noise)} in parts of the total; every
# other head has effect 0 at answers and at query_is, in both directions. A word whose "logits" slot
# holds 1 has logit 4, all others 0.
TRUTH = {
    # clean 4 - 0, corrupted 0 - 4: total 8. The right words are at the answers, so the head that
    # puts the answer's word into "value" is all that changed; keys did not change.
    ("write_then_read", "answers"): (
        8.0,
        {
            ((0, 3), "answer"): (1, 1),
            ((2, 1), "query_is"): (1, 1),
            ((3, 0), "query_is"): (1, 1),
        },
    ),
    # 8 again; now only the keys changed
    ("write_then_read", "inputs"): (
        8.0,
        {
            ((1, 1), "answer"): (1, 1),
            ((2, 1), "query_is"): (1, 1),
            ((3, 0), "query_is"): (1, 1),
        },
    ),
    # the value is a function of the last input alone
    ("value_route", "answers"): (0.0, {}),
    # the foil is a filler with logit 0 in both runs: clean 4 - 0, corrupted 0 - 0
    ("value_route", "inputs"): (
        4.0,
        {
            ((1, 0), "answer"): (1, 1),
            ((2, 3), "query_is"): (1, 1),
            ((3, 1), "query_is"): (1, 1),
        },
    ),
    ("two_writers_or", "answers"): (0.0, {}),
    # slot "sum" of the answer word: clean 2, corrupted 0, one writer patched 1, in both directions;
    # relu(s) - relu(s - 1) is 1, 0, 1: one writer suffices and none is needed
    ("two_writers_or", "inputs"): (
        4.0,
        {
            ((1, 0), "answer"): (1, 0),
            ((1, 2), "answer"): (1, 0),
            ((2, 3), "query_is"): (1, 1),
            ((3, 1), "query_is"): (1, 1),
        },
    ),
    ("two_writers_and", "answers"): (0.0, {}),
    # relu(s - 1) of 2, 0, 1 is 1, 0, 0: no writer suffices and each is needed
    ("two_writers_and", "inputs"): (
        4.0,
        {
            ((1, 0), "answer"): (0, 1),
            ((1, 2), "answer"): (0, 1),
            ((2, 3), "query_is"): (1, 1),
            ((3, 1), "query_is"): (1, 1),
        },
    ),
    ("negative_reader", "answers"): (0.0, {}),
    # clean 4 * (1 - 0.4) = 2.4, corrupted 0. Reader (2, 3) alone moves 4.0, reader (2, 1) -1.6.
    ("negative_reader", "inputs"): (
        2.4,
        {
            ((1, 0), "answer"): (1, 1),
            ((2, 3), "query_is"): (5 / 3, 5 / 3),
            ((2, 1), "query_is"): (-2 / 3, -2 / 3),
            ((3, 1), "query_is"): (1, 1),
        },
    ),
    ("nothing", "answers"): (0.0, {}),
    ("nothing", "inputs"): (0.0, {}),
}


@functools.cache
def case_of(name, backend="auto", dtype=torch.float32):
    return planted.build(name, backend=backend, dtype=dtype)


# -------------------------------------- prompts by hand, and in each forward pass each head in turn


def derange(rng, n):
    while True:
        order = rng.permutation(n)
        if (order != np.arange(n)).all():
            return order


def tokens_of(demos, query):
    words = [word for x, y in demos for word in (x, "is", y)]
    return [planted.VOCABULARY.index(word) for word in ("<bos>", *words, query, "is")]


def contrast(task, corruption, *, n_prompts=N_PROMPTS, n_demos=N_DEMOS, seed=0):
    """Clean and corrupted tokens [prompt pos], answer [prompt], foil [prompt]."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n_prompts):
        demos, query, answer, foil = task.sample(rng, n_demos)
        xs, ys = zip(*demos, strict=True)
        order = derange(rng, n_demos)
        swapped, other = demos, query
        if corruption == "answers":
            swapped = list(zip(xs, (ys[i] for i in order), strict=True))
        elif corruption == "inputs":
            swapped = list(zip((xs[i] for i in order), ys, strict=True))
        else:
            other = next(task.other_queries(rng, planted.Sample(demos, query, answer, foil)))
        foil = dict(swapped).get(other, foil)
        assert foil != answer
        word_ids = [planted.VOCABULARY.index(word) for word in (answer, foil)]
        rows.append((tokens_of(demos, query), tokens_of(swapped, other), *word_ids))
    return [torch.tensor(column) for column in zip(*rows, strict=True)]


@functools.cache
def contrast_of(name, corruption):
    return contrast(case_of(name).task, corruption)


def positions(where, tokens):
    length = tokens.shape[1]
    return {
        "x": list(range(1, length - 2, 3)),
        "answer": list(range(3, length, 3)),
        "query_is": [length - 1],
    }[where]


@torch.no_grad()
def metric(model, tokens, answer, foil, hooks=()):
    """logit(answer) - logit(foil) after the last token: [prompt]."""
    logits = model.run_with_hooks(tokens, fwd_hooks=list(hooks))[:, -1]
    rows = torch.arange(len(tokens))
    return logits[rows, answer] - logits[rows, foil]


@torch.no_grad()
def activations(model, tokens, what, hooks=()):
    """{layer: activation [prompt pos head d_head]} of each hook named in ``what``."""
    kept = {one: {} for one in what}

    def keep(one, layer):
        def hook(value, hook):
            kept[one][layer] = value.clone()

        return (f"blocks.{layer}.attn.hook_{one}", hook)

    reads = [keep(one, layer) for one in what for layer in range(4)]
    model.run_with_hooks(tokens, fwd_hooks=[*hooks, *reads])
    assert all(sorted(layers) == [0, 1, 2, 3] for layers in kept.values())
    return [kept[one] for one in what]


def patch(what, place, pos, values, rows=slice(None)):
    """A hook that replaces one head's z, k or v at some positions, in some rows of the batch."""
    layer, head = place

    def hook(value, hook):
        value = value.clone()
        value[rows, pos, head] = values[layer][:, pos, head]
        return value

    return (f"blocks.{layer}.attn.hook_{what}", hook)


def patch_each(heads, pos, z, n):
    """Hooks for a batch of ``n`` prompts once per head: each head's z in its own rows."""
    return [patch("z", at, pos, z, slice(i * n, (i + 1) * n)) for i, at in enumerate(heads)]


def effects(model, clean, corrupted, answer, foil, wheres):
    """total, and {(head, where): (denoise, noise)}: means over prompts, in logits."""
    m_clean, m_corrupted = (metric(model, t, answer, foil) for t in (clean, corrupted))
    ([z_clean], [z_corrupted]) = (activations(model, t, "z") for t in (clean, corrupted))
    n = len(HEADS)
    answers, foils = answer.repeat(n), foil.repeat(n)
    found = {}
    for where in wheres:
        pos = positions(where, clean)
        hooks = patch_each(HEADS, pos, z_clean, len(clean))
        denoised = metric(model, corrupted.repeat(n, 1), answers, foils, hooks).view(n, -1)
        hooks = patch_each(HEADS, pos, z_corrupted, len(clean))
        noised = metric(model, clean.repeat(n, 1), answers, foils, hooks).view(n, -1)
        both = (denoised - m_corrupted).mean(1).tolist(), (m_clean - noised).mean(1).tolist()
        found |= {(head, where): pair for head, *pair in zip(HEADS, *both, strict=True)}
    return (m_clean - m_corrupted).mean().item(), found


# ----------------------------------------------------------------------------------- the truth


@pytest.mark.parametrize(("name", "corruption"), TRUTH)
def test_every_head_has_the_effect_worked_out_by_hand(name, corruption):
    case = case_of(name)
    total, expected = TRUTH[name, corruption]
    found_total, found = effects(
        case.model, *contrast_of(name, corruption), wheres=("answer", "query_is")
    )
    assert len(found) == 2 * len(HEADS)
    assert found_total == pytest.approx(total, abs=1e-4)
    scale = total or 1.0
    for key, values in found.items():
        wanted = expected.get(key, (0, 0))
        assert [v / scale for v in values] == pytest.approx(wanted, abs=1e-3), key


@pytest.mark.parametrize("name", planted.names())
def test_the_labels_are_what_the_table_says(name):
    case = case_of(name)
    seen = {
        (where, corruption): {place for place, at in TRUTH[name, corruption][1] if at == where}
        for where in ("answer", "query_is")
        for corruption in case.corruptions
    }
    assert case.corruptions == ("answers", "inputs")
    assert seen["answer", "inputs"] == case.writers
    assert seen["answer", "answers"] == case.copiers
    at_query = seen["query_is", "inputs"] | seen["query_is", "answers"]
    assert at_query == case.readers | case.relays
    assert not case.readers & case.relays


@pytest.mark.parametrize("name", planted.names())
def test_edges_are_what_reaches_the_readers(name):
    """The change at answers, through a reader's keys and values alone, moves the metric."""
    case, edges = case_of(name), set()
    for corruption in case.corruptions:
        clean, corrupted, *words = (column[:4] for column in contrast_of(name, corruption))
        pos = positions("answer", clean)
        for base, donor in ((corrupted, clean), (clean, corrupted)):
            before = metric(case.model, base, *words)
            [z] = activations(case.model, donor, "z")
            for receiver in case.readers:
                senders = [head for head in HEADS if head[0] < receiver[0]]
                each, n = base.repeat(len(senders), 1), len(senders)
                k, v = activations(case.model, each, "kv", patch_each(senders, pos, z, len(base)))
                reads = [patch("k", receiver, pos, k), patch("v", receiver, pos, v)]
                after = metric(case.model, each, *(word.repeat(n) for word in words), reads)
                moved = (after.view(n, -1) - before).abs().amax(1) > 1e-3
                edges |= {(sender, receiver) for sender, yes in zip(senders, moved) if yes}  # noqa: B905
    copied = {(sender, receiver) for sender in case.copiers for receiver in case.readers}
    assert edges == case.edges | copied


@pytest.mark.parametrize("name", ["write_then_read", "value_route"])
def test_a_decoy_is_strong_at_inputs(name):
    case = case_of(name)
    total, found = effects(case.model, *contrast_of(name, "inputs"), wheres=("x",))
    strong = {key: [v / total for v in values] for key, values in found.items() if any(values)}
    assert set(strong) == {((0, 1), "x")}
    assert strong[(0, 1), "x"] == pytest.approx([1, 1], abs=1e-3)


def test_a_decoy_looks_at_answers_and_writes_nothing():
    for name, place in (("write_then_read", (2, 2)), ("value_route", (2, 0))):
        case = case_of(name)
        clean, corrupted, *_ = contrast_of(name, "answers")
        z, other = (activations(case.model, t, "z")[0][place[0]] for t in (clean, corrupted))
        moved = (z - other)[:, -1, place[1]].abs().amax(-1)
        assert (moved > 0.5).any()


def test_another_query_shows_who_carries_the_query():
    case = case_of("write_then_read")
    by_hand = contrast_of("write_then_read", "query")
    prompts = make_prompts(case.model, case.task, n_demos=N_DEMOS, n_prompts=N_PROMPTS)
    made = prompts.corrupt("query")
    assert len(made) == N_PROMPTS
    made = (made.clean.tokens, made.corrupted.tokens, made.answer, made.foil)
    for pairs in (by_hand, made):
        total, found = effects(case.model, *pairs, wheres=("answer", "query_is"))
        assert total == pytest.approx(8, abs=1e-4)
        strong = {key for key, values in found.items() if max(map(abs, values)) > 1e-3}
        assert strong == {(place, "query_is") for place in ((1, 2), (2, 1), (3, 0))}


@pytest.mark.parametrize("name", planted.names())
@pytest.mark.parametrize("n_demos", [2, 3, 6, 10])
def test_the_model_solves_its_task(name, n_demos):
    case = case_of(name)
    tokens, _, answer, _ = contrast(case.task, "inputs", n_demos=n_demos)
    with torch.no_grad():
        assert torch.equal(case.model(tokens)[:, -1].argmax(-1), answer)


# ------------------------------------------------------------------------- classes and manners


@pytest.mark.skipif(not HAS_HOOKED, reason="this TransformerLens has one class")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", planted.names())
def test_both_classes_have_equal_logits(name, dtype):
    hooked, bridge = (case_of(name, backend, dtype) for backend in ("auto", "bridge"))
    assert type(hooked.model).__name__ == "HookedTransformer"
    assert type(bridge.model).__name__ == "TransformerBridge"
    tokens = contrast_of(name, "inputs")[0]
    with torch.no_grad():
        one, other = hooked.model(tokens), bridge.model(tokens)
    assert one.dtype == dtype and one.std() > 0.1
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_the_bridge_has_the_same_truth():
    bridge = case_of("write_then_read", "bridge")
    pairs = contrast_of("write_then_read", "inputs")
    total, found = effects(bridge.model, *pairs, wheres=("answer",))
    strong = {key for key, values in found.items() if max(map(abs, values)) > 1e-3}
    assert total == pytest.approx(8, abs=1e-4)
    assert strong == {((1, 1), "answer")}


@pytest.mark.parametrize("backend", KINDS)
def test_left_as_found(backend):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    case = planted.build("two_writers_or", backend=backend)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    assert not case.model.training
    assert all(parameter.requires_grad for parameter in case.model.parameters())


@pytest.mark.parametrize("backend", KINDS)
def test_the_tokenizer_is_used_as_is(backend):
    case = case_of("value_route", backend)
    text = planted.TEMPLATE.format(x="cat", y="red") + "dog is"
    expected = tokens_of([("cat", "red")], "dog")
    assert case.model.tokenizer(text)["input_ids"] == expected
    assert case.model.to_tokens(text).tolist() == [expected]
    assert case.model.tokenizer.init_kwargs["tv_template"] == case.template


def test_sizes_are_distinct():
    for name in planted.names():
        cfg = case_of(name).model.cfg
        sizes = [cfg.d_model, cfg.d_vocab, cfg.d_head * cfg.n_heads, cfg.n_ctx, cfg.d_head]
        assert len(set(sizes)) == len(sizes)
        assert cfg.d_model < 320  # these models run thousands of times


def test_words_are_distinct_and_queries_many():
    assert len(set(planted.VOCABULARY)) == len(planted.VOCABULARY)
    for name in planted.names():
        task, rng = case_of(name).task, np.random.default_rng(0)
        assert len({task.sample(rng, 8).query for _ in range(300)}) == 28


def test_the_same_seed_gives_the_same_prompts():
    for name in planted.names():
        task = case_of(name).task
        one, other = (task.sample(np.random.default_rng(3), 8) for _ in range(2))
        assert tuple(one) == tuple(other)


def test_bad_input_is_refused():
    with pytest.raises(UnknownName, match="unknown planted model 'value_rout': did you mean"):
        planted.build("value_rout")
    with pytest.raises(UnknownName, match="unknown backend 'hf'"):
        planted.build("value_route", backend="hf")
    task = case_of("value_route").task
    for n_demos in (-1, 1, 11):
        with pytest.raises(PromptError, match="n_demos"):
            task.sample(np.random.default_rng(0), n_demos)
    sample = task.sample(np.random.default_rng(0), 3)
    with pytest.raises(PromptError, match="'value_route' cannot have the corruption 'query'"):
        task.other_queries(np.random.default_rng(0), sample)


@pytest.mark.skipif(HAS_HOOKED, reason="this TransformerLens has both classes")
def test_hooked_is_refused_where_it_does_not_exist():
    with pytest.raises(ModelError, match="transformer-lens 3.9"):
        planted.build("value_route", backend="hooked")
