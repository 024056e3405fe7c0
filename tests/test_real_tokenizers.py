"""Tokenizers in use, in any script: roles at the right tokens, and patching equals a plain loop."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from random_models import hf_model
from test_prompts import assert_roles_spell_the_words
from trained_tokenizers import byte_level, sentence_piece

import naive  # isort: skip
import tv_interp as tv
from tv_interp.models.convert import bridge_from_hf, hooked_from_hf
from tv_interp.prompts.roles import Role, Template

SCRIPTS = {
    "greek": {"σκύλος": "ζώο", "τριαντάφυλλο": "λουλούδι", "Αθήνα": "πόλη", "ψωμί": "τροφή",
              "μπλε": "χρώμα", "κιθάρα": "όργανο"},
    "arabic": {"كلب": "حيوان", "وردة": "زهرة", "القاهرة": "مدينة", "خبز": "طعام",
               "أزرق": "لون", "عود": "آلة"},
    "chinese": {"狗": "动物", "玫瑰花": "植物", "北京": "城市", "面包": "食物", "蓝色": "颜色",
                "钢琴": "乐器"},
    "emoji": {"🐕": "🦴", "🌹": "🌷", "🏙️": "🗺️", "🍞": "😋", "👩‍🚀": "🚀", "🎹": "🎶"},
    "several words": {"guide dog": "working animal", "red rose": "flower", "New York City": "town",
                      "bread": "something to eat", "light blue": "colour", "piano": "instrument"},
    "accents": {"Ærø": "øy", "café crème": "boisson", "Łódź": "miasto", "São Paulo": "cidade",
                "naïve": "adjectif", "Ångström": "enhet"},
}  # fmt: skip
TEXTS = (
    tuple(
        f"{x} {c} {y}\n"
        for pairs in SCRIPTS.values()
        for x, y in pairs.items()
        for c in ("is", "->")
    )
    * 3
)
TOKENIZERS = {"byte_level": byte_level, "sentence_piece": sentence_piece}
TEMPLATES = ("{x} is {y}\n", "{x} -> {y}\n", "Q: {x}\nA: {y}\n\n")
NARROW = ("{x}->{y}\n", "{x} =>{y};", "Q:{x}\nA:{y}\n\n")
"""Where a space in front of a word is a token of its own, which all answers would share."""
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS)
every_script = pytest.mark.parametrize("script", SCRIPTS)


@functools.cache
def model(tokenizer: str, kind: str):
    """A tiny random model that reads with a tokenizer trained on these words."""
    tokens = TOKENIZERS[tokenizer](texts=TEXTS)
    build = hooked_from_hf if kind == "hooked" else bridge_from_hf
    return build(hf_model("llama", d_vocab=len(tokens) + 9, n_ctx=192, n_layers=2), tokens)


def templates(script: str) -> tuple[str, ...]:
    return NARROW if script in ("arabic", "chinese", "emoji") else TEMPLATES


def prompts(tokenizer: str, kind: str, script: str, template: str | None = None, **how):
    task = tv.Task.from_pairs(SCRIPTS[script], name=script)
    how = {"n_demos": 3, "n_prompts": 5, "seed": 2} | how
    template = template or templates(script)[1]
    return tv.make_prompts(model(tokenizer, kind), task, template=template, **how)


@every_tokenizer
@every_script
@pytest.mark.parametrize("number", range(3))
def test_what_stands_at_a_role_decodes_to_its_word(tokenizer, script, number):
    """Decoded, where `assert_roles_spell_the_words` asks the tokenizer's offsets."""
    template = templates(script)[number]
    found = prompts(tokenizer, "bridge", script, template)
    assert_roles_spell_the_words(found)
    parsed, n_bos = Template.parse(template), int(found.prepend_bos)
    for i, sample in enumerate(found.samples):
        row = found.tokens[i, : found.lengths[i]]

        def at(role: Role, demo: int, i=i, row=row) -> str:
            here = (found.role_ids[i] == role) & (found.demo_ids[i] == demo)
            return found.tokenizer.decode(row[here[: len(row)]]).strip()

        for d, (x, y) in enumerate(sample.demos):
            assert (at(Role.x, d), at(Role.answer, d)) == (x, y)
            assert at(Role.is_, d) == parsed.between.strip()
        assert at(Role.query_x, -1) == sample.query
        assert at(Role.query_is, -1) == parsed.between.strip()
        for token, word in ((found.answer[i], sample.answer), (found.foil[i], sample.foil)):
            first = found.tokenizer.decode(token).strip()
            assert word.startswith(first.rstrip("\ufffd"))  # half a character decodes to that sign
        whole = found.tokenizer.decode(row[n_bos:])
        assert whole.strip() == found.texts[i].strip()


@every_tokenizer
def test_words_have_several_tokens_and_rows_several_lengths(tokenizer):
    several, lengths = 0, set()
    for script in SCRIPTS:
        found = prompts(tokenizer, "bridge", script)
        spans = torch.cat([found.spans("x"), found.spans("answer")], 1)
        several += int((spans[..., 1] > spans[..., 0]).sum())
        lengths |= set(found.lengths.tolist())
    assert several > 15 and len(lengths) > 3


def test_a_space_in_front_of_an_answer_belongs_to_it_and_to_the_token_that_is_asked_for():
    found = prompts("byte_level", "bridge", "several words")
    pieces = found.tokenizer.convert_ids_to_tokens(found.answer.tolist())
    assert all(piece.startswith("Ġ") for piece in pieces)
    tight = prompts("byte_level", "bridge", "several words", "{x} ->{y}\n")
    pieces = tight.tokenizer.convert_ids_to_tokens(tight.answer.tolist())
    assert not any(piece.startswith("Ġ") for piece in pieces)
    spaced = prompts("sentence_piece", "bridge", "several words")
    pieces = spaced.tokenizer.convert_ids_to_tokens(spaced.answer.tolist())
    assert all(piece.startswith("▁") for piece in pieces)


@every_tokenizer
def test_answers_that_share_their_first_token_are_dropped_and_counted(tokenizer):
    pairs = {"bread": "flower", "piano": "flower town", "red rose": "town", "guide dog": "colour"}
    found = tv.make_prompts(
        model(tokenizer, "bridge"), tv.Task.from_pairs(pairs), n_demos=3, n_prompts=30, seed=0,
        template="{x} -> {y}\n",
    )  # fmt: skip
    assert len(found) == 30 and (found.answer != found.foil).all()
    assert found.dropped["answer and foil share their first token"] > 0


@pytest.mark.slow
@every_tokenizer
@every_script
def test_patching_equals_the_plain_loop_of_hooks(tokenizer, script, kind):
    held = model(tokenizer, kind)
    pair = prompts(tokenizer, kind, script, n_prompts=3).corrupt("random_answers", seed=1)
    every = [(layer, head) for layer in range(2) for head in (0, 3)]
    layers, heads = map(list, zip(*every, strict=True))
    for at in ("answer", "query_is"):
        ours = tv.patch_heads(held, pair, at=at).data.values[:, layers, heads]
        loop = naive.patch_heads(held, pair, [[h] for h in every], at).numpy()
        np.testing.assert_allclose(ours, loop, atol=2e-5)
        assert np.abs(loop).max() > 1e-3
    ours = tv.knock_out(held, pair.clean, src="answer").data.values[:, layers, heads]
    loop = naive.knock_out(held, pair.clean, [[h] for h in every], "query_is", "answer").numpy()
    np.testing.assert_allclose(ours, loop, atol=2e-5)
