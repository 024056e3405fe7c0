"""Where a model comes from: a preset, a directory, a hub name, or a model that you hold.

Weights stay raw (nothing folded, nothing centred) in both TransformerLens classes, so that their
numbers agree with each other and with the HF model they come from.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import math
import os
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import FileError, ModelError, unknown

WEIGHTS = Path(__file__).parent / "reference" / "weights"
_CONVERTERS = {  # architecture: TransformerLens's own converter of its weights
    "GPT2LMHeadModel": ("gpt2", "convert_gpt2_weights"),
    "LlamaForCausalLM": ("llama", "convert_llama_weights"),
    "MistralForCausalLM": ("mistral", "convert_mistral_weights"),
    "GPTNeoXForCausalLM": ("neox", "convert_neox_weights"),
    "Gemma2ForCausalLM": ("gemma", "convert_gemma_weights"),
    "Qwen2ForCausalLM": ("qwen2", "convert_qwen2_weights"),
}
_NO_HOOKED = "the installed TransformerLens has no HookedTransformer (3.9 was the last)"


def load_model(
    name_or_model: Any,
    *,
    backend: Literal["auto", "hooked", "bridge"] = "auto",
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """Load a model in eval mode with raw weights, or check one that you hold.

    Args:
        name_or_model: A preset (``"reference"``), a local HF directory (config.json, safetensors,
            tokenizer.json; no hub is asked), a hub name, or a HookedTransformer or
            TransformerBridge, which is returned as it is.
        backend: ``"auto"``: HookedTransformer where the installed TransformerLens has the class and
            it can hold the model exactly, else TransformerBridge.
        dtype: None: as stored but at least float32; float32 for hub names.
        device: None: the GPU where CUDA has one, else the CPU.
    """
    if backend not in ("auto", "hooked", "bridge"):
        raise unknown("backend", backend, ("auto", "hooked", "bridge"))
    if not isinstance(name_or_model, (str, os.PathLike)):
        return _held(name_or_model, backend, dtype, device)
    dtype, device = _checked(dtype, device)
    directory = _find_directory(name_or_model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _quiet():
        if directory is None:
            return _load_from_hub(str(name_or_model), backend, dtype or torch.float32, device)
        if backend == "hooked" and _hooked_class() is None:
            raise ModelError(f'{_NO_HOOKED}; use backend="bridge"')
        hf_model, tokenizer = _read_directory(directory, dtype, device)
        if backend == "auto":
            backend = "bridge" if _why_not_hooked(hf_model) else "hooked"
        build = hooked_from_hf if backend == "hooked" else bridge_from_hf
        return build(hf_model, tokenizer, name=directory.name)


def reference_directory(name: str) -> Path | None:
    """Return the directory of a preset's weights, None where there is no such preset."""
    return next((path for path in WEIGHTS.glob("*/") if path.name == name), None)


def hooked_from_hf(hf_model: Any, tokenizer: Any = None, *, name: str = "custom") -> Any:
    """Copy an HF model, which stays as it is, into a HookedTransformer with raw weights.

    The tokenizer is used exactly as it is (TransformerLens would reload it by name).
    """
    if reason := _why_not_hooked(hf_model):
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
    with torch.no_grad(), _no_deprecation():
        hooked = _hooked_class()(cfg).eval()
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
        raise ModelError(f"TransformerBridge cannot hold {architecture}: {_line(error)}") from error
    _attach_tokenizer(bridge, tokenizer)
    return bridge.eval()


def _held(model: Any, backend: str, dtype: Any, device: Any) -> Any:
    if not (hasattr(model, "hook_dict") and hasattr(model, "cfg")):
        raise ModelError(
            "expected a name, a directory, a HookedTransformer or a TransformerBridge, got "
            f"{type(model).__name__}: save an HF model with save_pretrained and pass the directory"
        )
    if dtype is not None or device is not None:
        raise ModelError("a model you hold is used as it is: leave dtype and device out")
    if backend not in ("auto", "bridge" if hasattr(model, "original_model") else "hooked"):
        raise ModelError(f"you hold a {type(model).__name__}: leave out backend={backend!r}")
    return model


def _presets() -> list[str]:
    return sorted({"reference"} | {path.name for path in WEIGHTS.glob("*/")})


def _find_directory(name_or_path: str | os.PathLike) -> Path | None:
    """Resolve a preset or a path; None means a hub name."""
    name = os.fspath(name_or_path)
    path = reference_directory(name) if isinstance(name_or_path, str) else None
    path = path or Path(name).expanduser()
    if path.is_dir() and name:
        return path
    if name in _presets():
        raise ModelError(f"preset {name!r} has no weights in {WEIGHTS}: reinstall tv_interp")
    if not isinstance(name_or_path, str) or path.exists() or name[:1] in ("", "/", ".", "~"):
        raise FileError(f"expected a preset, a hub name or an existing directory, got {name!r}")
    if difflib.get_close_matches(name, _presets(), n=1, cutoff=0.75):
        raise unknown("model", name, _presets())
    return None


def _load_from_hub(name: str, backend: str, dtype: torch.dtype, device: torch.device) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    hooked_class = _hooked_class()
    if backend == "hooked" and hooked_class is None:
        raise ModelError(f'{_NO_HOOKED}; use backend="bridge"')
    load = TransformerBridge.boot_transformers
    if hooked_class is not None and backend != "bridge":
        from transformer_lens.loading_from_pretrained import get_official_model_name

        with contextlib.suppress(ValueError):  # a name that HookedTransformer has no table entry of
            if backend == "hooked" or get_official_model_name(name):
                load = hooked_class.from_pretrained_no_processing
    try:
        with _no_deprecation():
            return load(name, dtype=dtype, device=str(device)).eval()
    except Exception as error:  # the hub, transformers and TransformerLens each have their own
        raise ModelError(
            f"{name!r} is neither a preset ({', '.join(_presets())}) nor a directory, and the hub "
            f"did not give it ({_line(error)}): check name and connection, or pass a directory"
        ) from error


def _read_directory(directory: Path, dtype: torch.dtype | None, device: torch.device) -> tuple:
    """Read HF model and tokenizer from disk alone; what is missing or broken is a FileError."""
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    def read_json(name: str) -> dict:
        if not (directory / name).is_file():
            raise FileError(f"{name} is missing in {directory}: expected an HF model directory")
        try:
            return json.loads((directory / name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise FileError(f"{directory / name} is not JSON: {_line(error)}") from error

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    read_json("config.json")
    read_json("tokenizer.json")
    shards, index = ["model.safetensors"], "model.safetensors.index.json"
    if not (directory / shards[0]).is_file() and (directory / index).is_file():
        shards = sorted(set(read_json(index).get("weight_map", {}).values())) or shards
    stored = set()
    for path in [directory / shard for shard in shards]:
        if not path.is_file():
            raise FileError(f"{path.name} is missing in {directory}: expected safetensors weights")
        try:
            with safe_open(path, framework="pt") as tensors:
                names = tensors.keys()
                stored |= {tensors.get_slice(name).get_dtype() for name in names}
        except Exception as error:  # SafetensorError derives from Exception
            raise FileError(f"{path} is truncated or corrupt: {_line(error)}") from error
    try:  # not AutoTokenizer: for some model types it builds a tokenizer of its own instead
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, **local)
    except Exception as error:  # the Rust side raises bare Exception
        raise FileError(f"{directory}/tokenizer.json cannot be read: {_line(error)}") from error
    dtype = dtype or (torch.float64 if "F64" in stored else torch.float32)
    load = AutoModelForCausalLM.from_pretrained
    try:
        config = AutoConfig.from_pretrained(directory, **local)
        rows, ids = config.get_text_config().vocab_size, max(tokenizer.get_vocab().values()) + 1
        hf_model, report = (None, {}) if ids > rows else load(
            directory, config=config, dtype=dtype, attn_implementation="eager",
            use_safetensors=True, output_loading_info=True, **local,
        )  # fmt: skip
    except RuntimeError as error:
        raise FileError(f"{directory}: weights do not fit config.json: {_line(error)}") from error
    except Exception as error:  # unknown model types, remote code, invalid values
        raise ModelError(f"transformers cannot load {directory}: {_line(error)}") from error
    if hf_model is None:
        raise FileError(
            f"{directory}: tokenizer.json has {ids} token ids, config.json vocab_size {rows}: the "
            "two belong to different models"
        )
    if missing := sorted(report["missing_keys"]):
        raise FileError(f"{directory}: {len(missing)} weights are missing, first {missing[0]}")
    if tokenizer.pad_token is None:  # an existing token: no id changes, and lists of texts work
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    return hf_model.to(device).eval(), tokenizer


def _hooked_class() -> Any:
    try:
        from transformer_lens import HookedTransformer
    except ImportError:  # also what hasattr raises in 4.x
        return None
    return HookedTransformer


def _activation(config: Any) -> str:
    names = ("activation_function", "hidden_activation", "hidden_act")
    return next((value for name in names if (value := getattr(config, name, None))), "none")


def _why_not_hooked(hf_model: Any) -> str | None:
    """Say what keeps a HookedTransformer from holding the model exactly, None if nothing does."""
    if _hooked_class() is None:
        return _NO_HOOKED
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
    }
    reasons = " and ".join(what for what, present in found.items() if present)
    return f"a HookedTransformer cannot hold {architecture} with {reasons}" if reasons else None


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
        "default_prepend_bos": architecture not in ("GPTNeoXForCausalLM", "Qwen2ForCausalLM"),
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


def _checked(dtype: Any, device: Any) -> tuple[torch.dtype | None, torch.device]:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ModelError(f"expected a dtype such as torch.float32 or 'float64', got {dtype!r}")
    try:
        return found, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"expected a device such as 'cpu' or 'cuda:0', got {device!r}") from error


def _line(error: BaseException) -> str:
    """Return the first line of an error, shortened: those of the libraries are pages long."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text if len(text) <= 160 else text[:160] + '...'}"


@contextlib.contextmanager
def _no_deprecation() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "HookedTransformer", DeprecationWarning)
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries from printing and drawing progress bars; then all is as it was."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_level = hub.get_verbosity()
    logging.set_verbosity_error()
    hub.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        hub.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()
