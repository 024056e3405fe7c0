"""Where a model comes from: a preset, a directory, a hub name, or a model that you hold."""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import FileError, ModelError, unknown
from .convert import (
    NO_HOOKED,
    bridge_from_hf,
    first_line,
    hooked_class,
    hooked_from_hf,
    no_deprecation,
    why_not_hooked,
)

WEIGHTS = Path(__file__).parent / "reference" / "weights"


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

    Returns:
        A HookedTransformer or TransformerBridge in eval mode.

    Raises:
        FileError: if a directory or a file in it is missing or broken.
        ModelError: if the model cannot be held by the class, or the hub does not give it.
        UnknownName: if the name looks like a misspelt preset, or the backend is not known.
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
        if backend == "hooked" and hooked_class() is None:
            raise ModelError(f'{NO_HOOKED}; use backend="bridge"')
        hf_model, tokenizer = _read_directory(directory, dtype, device)
        if backend == "auto":
            backend = "bridge" if why_not_hooked(hf_model) else "hooked"
        build = hooked_from_hf if backend == "hooked" else bridge_from_hf
        return build(hf_model, tokenizer, name=directory.name)


def reference_directory(name: str) -> Path | None:
    """Return the directory of a preset's weights, None where there is no such preset."""
    return next((path for path in WEIGHTS.glob("*/") if path.name == name), None)


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

    hooked = hooked_class()
    if backend == "hooked" and hooked is None:
        raise ModelError(f'{NO_HOOKED}; use backend="bridge"')
    load = TransformerBridge.boot_transformers
    if hooked is not None and backend != "bridge":
        from transformer_lens.loading_from_pretrained import get_official_model_name

        with contextlib.suppress(ValueError):  # a name that HookedTransformer has no table entry of
            if backend == "hooked" or get_official_model_name(name):
                load = hooked.from_pretrained_no_processing
    try:
        with no_deprecation(), _cache_alone_if_offline():
            return load(name, dtype=dtype, device=str(device)).eval()
    except Exception as error:  # the hub, transformers and TransformerLens each have their own
        raise ModelError(
            f"{name!r} is neither a preset ({', '.join(_presets())}) nor a directory, and the hub "
            f"did not give it ({first_line(error)}): check name and connection, or pass a directory"
        ) from error


@contextlib.contextmanager
def _cache_alone_if_offline() -> Iterator[None]:
    """Where the hub does not answer, look at its cache alone: it would try for a minute."""
    from huggingface_hub import constants, get_session

    before = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # each version of the hub's client has its own; any answer is no exception
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


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
            raise FileError(f"{directory / name} is not JSON: {first_line(error)}") from error

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
            raise FileError(f"{path} is truncated or corrupt: {first_line(error)}") from error
    try:  # not AutoTokenizer: for some model types it builds a tokenizer of its own instead
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, **local)
    except Exception as error:  # the Rust side raises bare Exception
        raise FileError(
            f"{directory}/tokenizer.json cannot be read: {first_line(error)}"
        ) from error
    dtype = dtype or (torch.float64 if "F64" in stored else torch.float32)
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        config = AutoConfig.from_pretrained(directory, **local)
        rows, ids = config.get_text_config().vocab_size, max(tokenizer.get_vocab().values()) + 1
        hf_model, report = (None, {}) if ids > rows else load(
            directory, config=config, dtype=dtype, attn_implementation="eager",
            use_safetensors=True, output_loading_info=True, **local,
        )  # fmt: skip
    except RuntimeError as error:
        raise FileError(
            f"{directory}: weights do not fit config.json: {first_line(error)}"
        ) from error
    except Exception as error:  # unknown model types, remote code, invalid values
        raise ModelError(f"transformers cannot load {directory}: {first_line(error)}") from error
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


def _checked(dtype: Any, device: Any) -> tuple[torch.dtype | None, torch.device]:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ModelError(f"expected a dtype such as torch.float32 or 'float64', got {dtype!r}")
    try:
        return found, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"expected a device such as 'cpu' or 'cuda:0', got {device!r}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries from printing and drawing progress bars; then all is as it was."""
    with warnings.catch_warnings():  # tqdm in a notebook without ipywidgets: no bar is drawn here
        warnings.filterwarnings("ignore", "IProgress not found")
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
