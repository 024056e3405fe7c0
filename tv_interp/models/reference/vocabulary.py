"""The words the reference models know, and the tokenizer that knows them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ...files import write_text
from ...prompts.tasks.knowledge import relations
from ...prompts.tasks.words import (
    LETTERS,
    NUMBERS,
    held_out_label_words,
    label_words,
)

BOS, UNK, PAD = "<bos>", "<unk>", "<pad>"
CONNECTIVE = "is"
SEPARATOR = ";"


@cache
def words() -> tuple[str, ...]:
    """List every token by id: specials, connective, words by name, and the separator last."""
    known = {*LETTERS, *NUMBERS, *label_words(), *held_out_label_words()}
    for pairs in relations().values():
        known |= {*pairs, *pairs.values()}
    return (BOS, UNK, PAD, CONNECTIVE, *sorted(known - {CONNECTIVE}), SEPARATOR)


def word_ids() -> dict[str, int]:
    """Map each token to its id."""
    return {word: i for i, word in enumerate(words())}


def template(separator: str) -> str:
    """Spell the prompt template of models trained with this separator ("": none)."""
    return f"{{x}} {CONNECTIVE} {{y}} {separator} " if separator else f"{{x}} {CONNECTIVE} {{y}} "


def make_tokenizer(known: int | None = None) -> Any:
    """Build the tokenizer: one token a word, words split at white space, no automatic BOS text.

    Args:
        known: How many of `words` it knows; None for all.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for word, i in word_ids().items() if known is None or i < known}
    inner = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.WordPiece(prefix="##")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=BOS, eos_token=BOS, unk_token=UNK, pad_token=PAD
    )
    tokenizer.init_kwargs |= {"name_or_path": "tv-interp-reference", "add_bos_token": True}
    tokenizer.init_kwargs["tv_template"] = template(separator="")
    return tokenizer


def save_tokenizer(
    directory: Path,
    prewired: Mapping[str, int],
    separator: str = "",
    known: int | None = None,
) -> None:
    """Write tokenizer.json and a tokenizer_config.json that transformers 4 and 5 both load.

    Args:
        directory: Where to.
        prewired: Offset of each head, by ``"layer.head"``, that training started as a
            previous-token head: it travels with the model, for whoever analyses it.
        separator: Token after every answer in training; "" for none.
        known: As in `make_tokenizer`.

    Raises:
        FileError: if a file cannot be written.
    """
    from tokenizers.processors import TemplateProcessing

    inner = make_tokenizer(known).backend_tokenizer
    inner.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, word_ids()[BOS])]
    )
    write_text(directory / "tokenizer.json", inner.to_str(pretty=True))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "bos_token": BOS,
        "eos_token": BOS,
        "unk_token": UNK,
        "pad_token": PAD,
        "model_max_length": 128,
        "clean_up_tokenization_spaces": False,
        "tv_template": template(separator),
        "tv_prewired": {f"L{k.replace('.', 'H')}": offset for k, offset in prewired.items()},
    }
    write_text(directory / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
