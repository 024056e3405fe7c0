"""From an HF model in memory to a TransformerLens model with the same weights.

Weights stay raw (nothing folded, nothing centred) in both TransformerLens classes, so that their
numbers agree with each other and with the HF model they come from.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch

from ..errors import ModelError

_CONVERTERS = {  # architecture: TransformerLens's own converter of its weights
    "GPT2LMHeadModel": ("gpt2", "convert_gpt2_weights"),
    "LlamaForCausalLM": ("llama", "convert_llama_weights"),
    "MistralForCausalLM": ("mistral", "convert_mistral_weights"),
    "GPTNeoXForCausalLM": ("neox", "convert_neox_weights"),
    "PhiForCausalLM": ("phi", "convert_phi_weights"),
    "Gemma2ForCausalLM": ("gemma", "convert_gemma_weights"),
    "Qwen2ForCausalLM": ("qwen2", "convert_qwen2_weights"),
}
_NO_BOS = ("GPTNeoXForCausalLM", "PhiForCausalLM", "Qwen2ForCausalLM")
NO_HOOKED = "the installed TransformerLens has no HookedTransformer (3.9 was the last)"


def hooked_from_hf(hf_model: Any, tokenizer: Any = None, *, name: str = "custom") -> Any:
    """Copy an HF model, which stays as it is, into a HookedTransformer with raw weights.

    The tokenizer is used exactly as it is (TransformerLens would reload it by name).
    """
    if reason := why_not_hooked(hf_model):
        raise ModelError(f'{reason}; use backend="bridge"')
    from transformer_lens import HookedTransformerConfig

    architecture, weight = type(hf_model).__name__, next(hf_model.parameters())
    module, convert = _CONVERTERS[architecture]
    module = import_module(f"transformer_lens.pretrained.weight_conversions.{module}")
    cfg = HookedTransformerConfig(
        **_hooked_config(hf_model.config, architecture),
        model_name=name,
        original_architecture=architecture,
        init_weights=False,
        dtype=weight.dtype,
        device=str(weight.device),
    )
    raw = ("center_writing_weights", "center_unembed", "fold_value_biases")
    raw = dict.fromkeys(("fold_ln", *raw, "refactor_factored_attn_matrices"), False)
    with torch.no_grad(), no_deprecation():
        hooked = hooked_class()(cfg).eval()
        weights = getattr(module, convert)(hf_model, cfg)
        if architecture == "Gemma2ForCausalLM":
            weights |= _gemma_in_full_precision(hf_model)
        hooked.load_and_process_state_dict(weights, **raw)
    _attach_tokenizer(hooked, tokenizer)
    _check_same_logits(hooked, hf_model)
    return hooked


def bridge_from_hf(hf_model: Any, tokenizer: Any = None, *, name: str = "custom") -> Any:
    """Wrap an HF model in a TransformerBridge with eager attention.

    The bridge replaces the submodules of the HF model: give it a copy of its own.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    architecture = type(hf_model).__name__
    hf_model.eval().set_attn_implementation("eager")
    try:
        bridge = build_bridge_from_module(
            hf_model, architecture, hf_config=hf_model.config, model_name=name
        )
    except Exception as error:  # an adapter may fail in any way on a model it does not know
        reason = first_line(error)
        raise ModelError(f"TransformerBridge cannot hold {architecture}: {reason}") from error
    _attach_tokenizer(bridge, tokenizer)
    return bridge.eval()


def hooked_class() -> Any:
    """Return HookedTransformer, None where the installed TransformerLens does not have it."""
    try:
        from transformer_lens import HookedTransformer
    except ImportError:  # also what hasattr raises in 4.x
        return None
    return HookedTransformer


def why_not_hooked(hf_model: Any) -> str | None:
    """Say what keeps a HookedTransformer from holding the model exactly, None if nothing does."""
    if hooked_class() is None:
        return NO_HOOKED
    architecture, config = type(hf_model).__name__, hf_model.config
    if architecture not in _CONVERTERS:
        return f"no way from {architecture} to a HookedTransformer"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    biased = architecture == "GPTNeoXForCausalLM"  # the converters know no other choice
    known = ("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")
    found = {
        "quantized weights": getattr(config, "quantization_config", None) is not None,
        f"{rope} rotary scaling": rope != "default",
        f"activation {_activation(config)!r}": _activation(config) not in known,
        "cross-attention": getattr(config, "add_cross_attention", False),
        "this attention_bias": getattr(config, "attention_bias", biased) != biased,
        "mlp_bias": getattr(config, "mlp_bias", False),
        "qk_layernorm": getattr(config, "qk_layernorm", False),
    }
    reasons = " and ".join(what for what, present in found.items() if present)
    return f"a HookedTransformer cannot hold {architecture} with {reasons}" if reasons else None


def first_line(error: BaseException) -> str:
    """Return the first line of an error, shortened: those of the libraries are pages long."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text if len(text) <= 160 else text[:160] + '...'}"


@contextlib.contextmanager
def no_deprecation() -> Iterator[None]:
    """Ignore that TransformerLens announces the end of HookedTransformer at every construction."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "HookedTransformer", DeprecationWarning)
        yield


def _activation(config: Any) -> str:
    names = ("activation_function", "hidden_activation", "hidden_act")
    return next((value for name in names if (value := getattr(config, name, None))), "none")


def _hooked_config(config: Any, architecture: str) -> dict[str, Any]:
    """Translate an HF config into arguments of HookedTransformerConfig."""
    heads, width, n_layers = (  # GPT-2 has these names as aliases
        config.num_attention_heads, config.hidden_size, config.num_hidden_layers
    )  # fmt: skip
    result: dict[str, Any] = {
        "d_model": width,
        "n_heads": heads,
        "d_head": getattr(config, "head_dim", None) or width // heads,
        "n_layers": n_layers,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
        "act_fn": _activation(config),
        "normalization_type": "LN",
        "default_prepend_bos": architecture not in _NO_BOS,
    }
    if architecture == "GPT2LMHeadModel":
        return result | {
            "d_mlp": config.n_inner or 4 * width,
            "eps": config.layer_norm_epsilon,
            "use_attn_scale": config.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        }
    rope = config.rope_parameters
    result |= {
        "d_mlp": config.intermediate_size,
        "positional_embedding_type": "rotary",
        "rotary_base": rope["rope_theta"],
        "rotary_dim": int(result["d_head"] * (rope.get("partial_rotary_factor") or 1.0)),
        "rotary_adjacent_pairs": False,
    }
    if architecture == "GPTNeoXForCausalLM":
        parallel = config.use_parallel_residual
        return result | {"eps": config.layer_norm_eps, "parallel_attn_mlp": parallel}
    if architecture == "PhiForCausalLM":
        return result | {"eps": config.layer_norm_eps, "parallel_attn_mlp": True}
    llama = architecture == "LlamaForCausalLM"  # its converter alone has an ungrouped form
    grouped = not llama or config.num_key_value_heads != heads
    result |= {
        "eps": config.rms_norm_eps,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "n_key_value_heads": config.num_key_value_heads if grouped else None,
    }
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * n_layers
    window = None if llama else getattr(config, "sliding_window", None)
    if window and "sliding_attention" in kinds:
        kinds = ["local" if kind == "sliding_attention" else "global" for kind in kinds]
        result |= {"use_local_attn": True, "window_size": window, "attn_types": kinds}
    if architecture == "Gemma2ForCausalLM":
        result |= {
            "attn_scale": math.sqrt(config.query_pre_attn_scalar),
            "attn_scores_soft_cap": config.attn_logit_softcapping or -1.0,
            "output_logits_soft_cap": config.final_logit_softcapping or -1.0,
            "use_normalization_before_and_after": True,
        }
    return result


def _gemma_in_full_precision(hf_model: Any) -> dict[str, torch.Tensor]:
    """Weights that TransformerLens's converter rounds to float32, or scales otherwise than HF."""
    embed = hf_model.model.embed_tokens
    scale = getattr(embed, "embed_scale", torch.tensor(hf_model.config.hidden_size**0.5))
    weights = {"embed.W_E": embed.weight * scale.to(embed.weight)}
    weights["ln_final.w"] = hf_model.model.norm.weight + 1
    for i, layer in enumerate(hf_model.model.layers):
        weights[f"blocks.{i}.ln1.w"] = layer.input_layernorm.weight + 1
        weights[f"blocks.{i}.ln1_post.w"] = layer.post_attention_layernorm.weight + 1
        weights[f"blocks.{i}.ln2.w"] = layer.pre_feedforward_layernorm.weight + 1
        weights[f"blocks.{i}.ln2_post.w"] = layer.post_feedforward_layernorm.weight + 1
    return weights


def _check_same_logits(hooked: Any, hf_model: Any) -> None:
    """Compare one short run: it shows any setting of the HF config that the map does not know."""
    n, training = min(12, hooked.cfg.n_ctx), hf_model.training
    tokens = (torch.arange(n, device=hooked.W_E.device) * 7919 % hooked.cfg.d_vocab)[None]
    with torch.no_grad():
        expected = hf_model.eval()(tokens, use_cache=False).logits.float()
        error = (hooked(tokens).float() - expected).abs().max() / expected.abs().max()
    hf_model.train(training)
    if not error <= (1e-3 if hooked.cfg.dtype in (torch.float32, torch.float64) else 0.1):
        raise ModelError(
            f"{type(hf_model).__name__} as a HookedTransformer gives other logits than the HF model"
            f' (relative error {error:.1g}); use backend="bridge"'
        )


def _attach_tokenizer(model: Any, tokenizer: Any) -> None:
    """Set the tokenizer in as it is, and tell TransformerLens what it adds to a text."""
    if tokenizer is not None:
        ids = tokenizer.encode("a")
        model.tokenizer = tokenizer
        model.cfg.tokenizer_prepends_bos = len(ids) > 1 and ids[0] == tokenizer.bos_token_id
        model.cfg.tokenizer_appends_eos = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
