"""Tokenizers as they are in use, trained on the word lists: byte-level BPE and unigram pieces."""

from __future__ import annotations

import functools

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tv_interp.models.reference.vocabulary import words

CONNECTIVES = ("is", "->", ":", "=>", ";", "Q:", "A:", "Q", "A")


def wrap(core: Tokenizer, bos: str, **special):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=bos, **special)


@functools.cache
def byte_level(normalizer: normalizers.Normalizer | None = None, texts: tuple[str, ...] = ()):
    """Train a tokenizer like GPT-2's: spaces belong to words, words split, no word is unknown."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700 + 10 * len(texts),
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    shipped = [w for w in words()[3:] if not w.isdigit()]
    lines = [
        f"{w} {c} {v}" for w, v in zip(shipped, shipped[1:], strict=False) for c in CONNECTIVES[:2]
    ]
    core.train_from_iterator([*lines, *texts], trainer)
    if normalizer is not None:
        core.normalizer = normalizer
    return wrap(core, "<|endoftext|>", unk_token="<|endoftext|>")


@functools.cache
def sentence_piece(texts: tuple[str, ...] = ()):
    """Train a tokenizer like Llama's: unigram pieces, ``▁`` for a space and in front of a text."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=600 + 10 * len(texts),
        special_tokens=["<s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    core.train_from_iterator([*words()[3:], *CONNECTIVES * 9, "\n", "-", ">", ";", *texts], trainer)
    return wrap(core, "<s>", unk_token="<unk>")
