"""Tiny random models of every supported architecture, and tokenizers that know words.

All sizes differ from each other (``d_model``, ``d_vocab``, ``d_mlp``, ``n_ctx``, and
``n_heads * d_head`` where the architecture allows it), so that a transposed or mistaken axis cannot
pass unnoticed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.overrides import TorchFunctionMode

ARCHITECTURES = ("gpt2", "llama", "mistral", "gpt_neox", "phi", "gemma2", "qwen2")
OTHERS = ("gptj", "opt", "qwen3", "gemma3", "olmo2", "phi3", "stablelm", "granite")
"""Further ones, which the table of benchmarks/breadth.py covers; a HookedTransformer holds none."""
SPECIAL = ("<bos>", "<unk>", "<pad>")


def _config(arch: str, d_vocab: int, n_ctx: int, n_layers: int, window: int | None):
    """The config of a tiny model, with values that differ from every default that matters."""
    import transformers as hf

    tokens = dict(vocab_size=d_vocab, bos_token_id=0, eos_token_id=0, pad_token_id=2)
    if arch == "gpt2":
        return hf.GPT2Config(
            n_embd=64, n_head=4, n_layer=n_layers, n_positions=n_ctx, n_inner=80, **tokens
        )
    shared = dict(
        num_attention_heads=4,
        num_hidden_layers=n_layers,
        intermediate_size=72,
        max_position_embeddings=n_ctx,
        **tokens,
    )
    if arch == "gpt_neox":
        return hf.GPTNeoXConfig(
            hidden_size=64,
            rope_parameters=dict(
                rope_type="default", rope_theta=5000.0, partial_rotary_factor=0.25
            ),
            **shared,
        )
    if arch == "phi":  # attention and MLP side by side behind one norm, half of a head rotates
        return hf.PhiConfig(
            hidden_size=64,
            layer_norm_eps=1e-4,
            rope_parameters=dict(rope_type="default", rope_theta=5000.0, partial_rotary_factor=0.5),
            tie_word_embeddings=False,
            **shared,
        )
    shared |= dict(
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_parameters=dict(rope_type="default", rope_theta=5000.0),
        tie_word_embeddings=False,
    )
    if arch == "llama":
        return hf.LlamaConfig(hidden_size=60, head_dim=16, **shared)
    if arch == "mistral":
        return hf.MistralConfig(hidden_size=60, head_dim=16, sliding_window=window, **shared)
    if arch == "gemma2":
        return hf.Gemma2Config(
            hidden_size=60,
            head_dim=16,
            query_pre_attn_scalar=20,
            attn_logit_softcapping=8.0,
            final_logit_softcapping=10.0,
            sliding_window=window or 4 * n_ctx,
            **shared | dict(tie_word_embeddings=True),
        )
    if arch == "qwen2":
        return hf.Qwen2Config(hidden_size=64, use_sliding_window=False, **shared)
    if arch == "gptj":
        return hf.GPTJConfig(
            n_embd=64, n_head=4, n_layer=n_layers, n_positions=n_ctx, n_inner=80, rotary_dim=8,
            **tokens,
        )  # fmt: skip
    if arch == "opt":
        sizes = {k: v for k, v in shared.items() if k in ("num_attention_heads", *tokens)}
        return hf.OPTConfig(
            hidden_size=64, word_embed_proj_dim=64, ffn_dim=72, num_hidden_layers=n_layers,
            max_position_embeddings=n_ctx, **sizes,
        )  # fmt: skip
    if arch == "qwen3":
        return hf.Qwen3Config(hidden_size=60, head_dim=16, **shared)
    if arch == "gemma3":
        return hf.Gemma3TextConfig(
            hidden_size=60, head_dim=16, query_pre_attn_scalar=20, sliding_window=4 * n_ctx,
            **{k: v for k, v in shared.items() if k != "rope_parameters"},
        )  # fmt: skip
    if arch == "olmo2":
        return hf.Olmo2Config(hidden_size=64, **shared)
    if arch == "phi3":
        return hf.Phi3Config(hidden_size=64, **shared)
    if arch == "stablelm":
        sizes = {k: v for k, v in shared.items() if k != "rms_norm_eps"}
        return hf.StableLmConfig(hidden_size=64, **sizes)
    if arch == "granite":
        return hf.GraniteConfig(hidden_size=64, **shared)
    raise KeyError(f"no random model of {arch!r}: known are {ARCHITECTURES}")


def hf_model(
    arch: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    *,
    d_vocab: int = 101,
    n_ctx: int = 96,
    n_layers: int = 3,
    window: int | None = None,
    **overrides,
):
    """Build a random HF model: eval mode, eager attention, every weight far from its default.

    Norm weights and biases are random, queries and keys are large enough that attention is far from
    uniform, and the logits have a standard deviation of about 1. The global random state is
    left alone.

    Args:
        arch: One of `ARCHITECTURES`.
        seed: Decides every weight. Equal seeds give equal weights in both precisions (float64
            holds the same numbers as float32).
        dtype: ``torch.float32`` or ``torch.float64``.
        d_vocab: Size of the vocabulary; a tokenizer must not have more tokens.
        n_ctx: Context length.
        n_layers: Number of blocks.
        window: Sliding window of mistral and gemma2 (there: of its even layers); None: no window
            that binds.
        **overrides: Further fields of the HF config.
    """
    from transformers import AutoModelForCausalLM

    config = _config(arch, d_vocab, n_ctx, n_layers, window)
    config.update(overrides)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            value = torch.randn(weight.shape, generator=random)
            if "norm" in name or ".ln_" in name:
                centre = 1.0 if weight.mean() > 0.5 else 0.0  # Gemma stores the weight minus 1
                weight.copy_(centre + 0.3 * value)
            elif weight.ndim == 1:
                weight.copy_(0.3 * value)
            else:
                sharp = any(part in name for part in ("q_proj", "k_proj", "c_attn", "query_key"))
                unembeds = weight is model.get_output_embeddings().weight
                token = not unembeds and any(part in name for part in ("embed", "wte", "wpe"))
                weight.copy_(value * (1.8 if sharp else 1.0) / (4.0 if token else 8.0))
    return model.eval()


def word_tokenizer(words: Iterable[str] = (), *, prepend_bos: bool = True):
    """Make a tokenizer with one token per word: whitespace and punctuation separate words.

    Its ids are ``<bos>`` 0, ``<unk>`` 1, ``<pad>`` 2, then the words in the given order. It gives
    character offsets, and TransformerLens takes it as it is instead of reloading it by name.

    Args:
        words: The vocabulary; repeated words count once.
        prepend_bos: Whether encoding a text puts one ``<bos>`` in front.
    """
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*SPECIAL, *words]))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if prepend_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 0)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.init_kwargs.update(name_or_path="words", add_bos_token=True)
    return tokenizer


def save_checkpoint(directory: Path, model, tokenizer, *, template: str | None = None) -> Path:
    """Write a HF directory as the package ships them: no tokenizer class of a new transformers.

    Args:
        directory: Where to write; made if needed.
        model: From `hf_model`.
        tokenizer: From `word_tokenizer`.
        template: Stored as ``tv_template``, the model's own prompt template.
    """
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(tokenizer.encode("")),
        "bos_token": "<bos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "model_max_length": model.config.max_position_embeddings,
    }
    if template is not None:
        settings["tv_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


class TrueFloat64(TorchFunctionMode):
    """While active, code that asks for float32 gets float64.

    HF models compute norms, softmax and rotary angles in float32 whatever their dtype. Built and
    run inside this mode they are float64 throughout, and so comparable to 1e-10.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Run one torch call with float64 in place of float32."""

        def widen(value):
            return torch.float64 if value is torch.float32 else value

        kwargs = {name: widen(value) for name, value in (kwargs or {}).items()}
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(widen, args), **kwargs)


@functools.cache
def words(n: int = 60) -> tuple[str, ...]:
    """Return ``n`` made-up words, ``w0`` to ``w{n-1}``, after the connectives of the templates."""
    return ("is", "->", ":", *(f"w{i}" for i in range(n)))
