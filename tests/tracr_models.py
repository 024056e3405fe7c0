"""Programs compiled by tracr, as TransformerLens models with their prompts and true edges.

Weights and truths were made by `benchmarks/compile_tracr.py`, which says what they mean.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from random_models import SPECIAL, word_tokenizer
from safetensors.torch import load_file

import tv_interp as tv
from tv_interp.models.convert import no_deprecation
from tv_interp.prompts.tasks.base import Sample
from tv_interp.prompts.tasks.lookup import LookUp

DATA = Path(__file__).parent / "data" / "tracr"
PROGRAMS = ("reverse", "lookup")
TEMPLATE = "{x} is {y} "
WORDS = tuple("abcdefgh")


class Truth(NamedTuple):
    """Names of the nodes and edges that are true."""

    nodes: frozenset[str]
    edges: frozenset[str]


class Tracr(NamedTuple):
    """A model, pairs of prompts, and what was kept about it.

    Attributes:
        model: A HookedTransformer.
        contrast: Prompts and their twins.
        truths: By ablation, what is true.
        example: Words of a prompt and tracr's own logits after it, in the order of the words.
    """

    model: Any
    contrast: tv.Contrast
    truths: dict[str, Truth]
    example: dict[str, Any]


class FirstWord(tv.Task):
    """What comes out of a reversed prompt at its last token: its first word."""

    name, family = "first word", "tracr"

    def sample(self, rng: np.random.Generator, n_demos: int) -> Sample:
        words = rng.permutation(WORDS).tolist()
        demos = list(zip(words[:n_demos], words[-n_demos - 1 : -1], strict=True))
        return Sample(demos, words[n_demos], words[0], words[-1])

    def twin(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Draw another prompt, whose first word is the foil."""
        while True:
            other = self.sample(rng, len(sample.demos))
            if other.answer == sample.foil:
                return other


def compiled(program: str, n_prompts: int) -> Tracr:
    """Make a program's model and prompts: all words drawn anew, or the inputs exchanged."""
    about = json.loads((DATA / f"{program}.json").read_text("utf-8"))
    weights = load_file(DATA / f"{program}.safetensors")
    model = hooked(weights, word_tokenizer(about["vocabulary"][1:]), program)
    task = FirstWord() if program == "reverse" else LookUp(words=WORDS)
    n_demos = about["n_demos"]
    clean = tv.make_prompts(model, task, n_demos=n_demos, n_prompts=n_prompts, template=TEMPLATE)
    if isinstance(task, FirstWord):
        rng = np.random.default_rng(1)
        twins = clean.with_samples([task.twin(sample, rng) for sample in clean.samples])
        contrast = tv.Contrast(clean, twins, "all words")
    else:
        contrast = clean.corrupt("inputs")
    truths = {
        ablation: Truth(frozenset(edge.split("->")[0] for edge in edges), frozenset(edges))
        for ablation, edges in about["truths"].items()
    }
    return Tracr(model, contrast, truths, about["example"])


def word_ids(tokenizer) -> list[int]:
    """Ids of ``<bos>`` and the words: the tokenizer has two more special tokens."""
    return [0, *range(len(SPECIAL), len(tokenizer))]


def hooked(weights: dict[str, torch.Tensor], tokenizer, name: str):
    """Put a program's weights into a HookedTransformer."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    n_layers = sum(key.endswith(".Q") for key in weights)
    n_heads, d_model, d_head = weights["0.Q"].shape
    ids = torch.tensor(word_ids(tokenizer))
    embed, unembed = torch.zeros(len(tokenizer), d_model), torch.zeros(d_model, len(tokenizer))
    embed[ids], unembed[:, ids] = weights["embed"], weights["unembed"]
    state = {"embed.W_E": embed, "unembed.W_U": unembed, "pos_embed.W_pos": weights["pos_embed"]}
    for layer in range(n_layers):
        for part in "QKVO":
            state[f"blocks.{layer}.attn.W_{part}"] = weights[f"{layer}.{part}"]
        for part in ("in", "out"):
            state[f"blocks.{layer}.mlp.W_{part}"] = weights[f"{layer}.{part}"]
    with no_deprecation():
        cfg = HookedTransformerConfig(
            n_layers=n_layers, n_heads=n_heads, d_model=d_model, d_head=d_head,
            d_mlp=weights["0.in"].shape[1], d_vocab=len(tokenizer), act_fn="relu",
            n_ctx=len(weights["pos_embed"]), normalization_type=None, device="cpu",
            model_name=f"tracr-{name}", init_weights=False,
        )  # fmt: skip
        model = HookedTransformer(cfg, tokenizer=tokenizer)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(state.pop(key, torch.zeros_like(parameter)))
    assert not state, f"weights without a parameter: {sorted(state)}"
    return model.eval()
