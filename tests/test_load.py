"""Loading: one directory, three ways to run it, one set of numbers; and every bad input by name."""

from __future__ import annotations

import functools
import json
import os
import random
import socket
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import KINDS, precise, tiny_model
from random_models import (
    ARCHITECTURES,
    TrueFloat64,
    hf_model,
    save_checkpoint,
    word_tokenizer,
    words,
)
from tokenizers import Tokenizer

from tv_interp.errors import FileError, ModelError, UnknownName
from tv_interp.models import convert, load
from tv_interp.models.convert import bridge_from_hf, hooked_from_hf
from tv_interp.models.load import load_model

HookedTransformer = convert.hooked_class()
AUTO = KINDS[0]
needs_hooked = pytest.mark.skipif(AUTO != "hooked", reason="TransformerLens 4")
TEXT = "w3 is w40\nw7 is w21\nw5 -> unheard"
TOKENS = torch.randint(3, 60, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save a tiny model once: its directory, read-only by agreement, and the logits HF gives."""

    @functools.cache
    def save(arch, dtype=torch.float32, window=None, prepend_bos=True):
        directory = tmp_path_factory.mktemp("models") / "tiny"
        tokenizer = word_tokenizer(words(), prepend_bos=prepend_bos)
        with precise(dtype):
            reference = hf_model(arch, dtype=dtype, window=window)
            save_checkpoint(directory, reference, tokenizer, template="{x} -> {y}\n")
            return directory, logits(reference)

    return save


@pytest.fixture
def checkpoint(saved):
    return saved("llama")[0]


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of the checkpoint that a test may damage."""
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Loading a directory or a preset never opens a connection."""

    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def kind(model) -> str:
    return "bridge" if hasattr(model, "original_model") else "hooked"


def edit_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        out = model(TOKENS)
    return getattr(out, "logits", out)


# One set of numbers


@pytest.mark.parametrize("backend", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("arch", "window"), [*((arch, None) for arch in ARCHITECTURES), ("mistral", 5), ("gemma2", 5)]
)
def test_directory_gives_logits_of_hf_eager(arch, dtype, window, backend, saved):
    directory, expected = saved(arch, dtype, window)
    with precise(dtype):
        model = load_model(directory, backend=backend)
        got = logits(model)
    assert kind(model) == backend and got.dtype == dtype and not model.training
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


@needs_hooked
@pytest.mark.parametrize(
    ("arch", "fields"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"scale_attn_weights": False}),
        ("gpt2", {"n_inner": None, "activation_function": "relu"}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
        ("gpt_neox", {"use_parallel_residual": False, "hidden_act": "gelu_fast"}),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
        ("mistral", {"num_key_value_heads": 4}),
        ("qwen2", {"num_key_value_heads": 4, "rms_norm_eps": 1e-2}),
    ],
)
def test_settings_of_the_hf_config_are_kept(arch, fields):
    with TrueFloat64():
        reference = hf_model(arch, dtype=torch.float64, **fields)
        before = {name: weight.clone() for name, weight in reference.state_dict().items()}
        hooked = hooked_from_hf(reference)
        torch.testing.assert_close(logits(hooked), logits(reference), rtol=0, atol=1e-10)
    for name, weight in reference.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert len(before) == len(reference.state_dict())


@needs_hooked
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_both_classes_agree_on_the_config(arch):
    hooked, bridge = tiny_model(arch, "hooked"), tiny_model(arch, "bridge")
    for field in ("n_layers", "n_heads", "d_model", "d_head", "d_vocab", "n_ctx"):
        assert getattr(hooked.cfg, field) == getattr(bridge.cfg, field), field
    assert hooked.cfg.default_prepend_bos == bridge.cfg.default_prepend_bos


@needs_hooked
def test_map_that_is_wrong_is_noticed(monkeypatch):
    config = convert._hooked_config
    monkeypatch.setattr(convert, "_hooked_config", lambda *a: config(*a) | {"rotary_base": 99.0})
    with pytest.raises(ModelError, match="LlamaForCausalLM as a HookedTransformer gives other"):
        hooked_from_hf(hf_model("llama"))


def test_dtype(broken):
    assert load_model(broken).cfg.dtype == torch.float32
    wide = load_model(broken, dtype="float64")
    assert wide.cfg.dtype == torch.float64 == next(wide.parameters()).dtype
    hf_model("llama", dtype=torch.float64).save_pretrained(broken)
    assert next(load_model(broken).parameters()).dtype == torch.float64
    hf_model("llama", dtype=torch.bfloat16).save_pretrained(broken)
    assert next(load_model(broken).parameters()).dtype == torch.float32
    half = load_model(broken, dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16


def test_shards(broken):
    (broken / "model.safetensors").unlink()
    hf_model("llama").save_pretrained(broken, max_shard_size="50KB")
    assert len(list(broken.glob("*.safetensors"))) > 1
    expected = logits(hf_model("llama"))
    torch.testing.assert_close(logits(load_model(broken)), expected, rtol=0, atol=1e-5)
    next(broken.glob("model-00002*")).unlink()
    with pytest.raises(FileError, match=r"model-00002.*safetensors is missing in"):
        load_model(broken)


# The tokenizer as it is on disk


@pytest.mark.parametrize("backend", KINDS)
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_tokenizer_is_the_one_on_disk(prepend_bos, arch, backend, saved):
    directory, _ = saved(arch, prepend_bos=prepend_bos)
    on_disk = Tokenizer.from_file(str(directory / "tokenizer.json"))
    model = load_model(directory, backend=backend)
    encoded = model.tokenizer(TEXT, return_offsets_mapping=True)
    assert encoded["input_ids"] == on_disk.encode(TEXT).ids
    assert encoded["offset_mapping"] == on_disk.encode(TEXT).offsets
    assert (encoded["input_ids"][0] == 0) == prepend_bos == model.cfg.tokenizer_prepends_bos
    assert model.tokenizer.get_vocab() == on_disk.get_vocab()
    assert model.tokenizer.init_kwargs["tv_template"] == "{x} -> {y}\n"
    bos = model.to_tokens(TEXT, prepend_bos=True)[0].tolist()
    assert bos[0] == 0 and bos[1:] == model.to_tokens(TEXT, prepend_bos=False)[0].tolist()
    assert 0 not in bos[1:]


def test_word_tokenizer_is_used_as_it_is():
    tokenizer = word_tokenizer(words())
    assert bridge_from_hf(hf_model("llama"), tokenizer).tokenizer is tokenizer
    if HookedTransformer is not None:
        assert hooked_from_hf(hf_model("llama"), tokenizer).tokenizer is tokenizer


# What may be loaded, and what is left as it was


def test_auto_takes_hooked_where_it_can(checkpoint):
    model = load_model(str(checkpoint))
    assert kind(model) == AUTO and model.cfg.model_name == "tiny"
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("backend", KINDS)
def test_nothing_else_changes(backend, checkpoint, capfd):
    from transformers.utils import logging

    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    noise = (logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.is_grad_enabled())
    default = torch.get_default_dtype()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(checkpoint, backend=backend)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    assert noise == (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        torch.is_grad_enabled(),
    )
    assert torch.get_default_dtype() == default
    assert capfd.readouterr() == ("", "")


def test_presets_are_the_subdirectories(checkpoint, monkeypatch):
    monkeypatch.setattr(load, "WEIGHTS", checkpoint.parent)
    assert load.reference_directory("tiny") == checkpoint
    assert load.reference_directory(f"../{checkpoint.parent.name}/tiny") is None
    assert load.reference_directory("") is None
    assert load_model("tiny").cfg.model_name == "tiny"
    with pytest.raises(UnknownName, match="unknown model 'tinny': did you mean 'tiny'"):
        load_model("tinny")
    with pytest.raises(ModelError, match="preset 'reference' has no weights in .*reinstall"):
        load_model("reference")


@pytest.mark.parametrize("backend", KINDS)
def test_held_model_is_returned_as_it_is(backend):
    model = tiny_model("gpt2", backend).train()
    try:
        assert load_model(model) is model is load_model(model, backend=backend)
        assert model.training
    finally:
        model.eval()  # others have it too
    other = "bridge" if backend == "hooked" else "hooked"
    with pytest.raises(ModelError, match=f"you hold a .*: leave out backend='{other}'"):
        load_model(model, backend=other)
    with pytest.raises(ModelError, match="used as it is: leave dtype and device out"):
        load_model(model, dtype=torch.float64)


def test_what_hooked_cannot_hold_goes_to_the_bridge(tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    reference = hf_model("llama", rope_parameters=rope)
    save_checkpoint(tmp_path, reference, word_tokenizer(words()))
    model = load_model(tmp_path)
    assert kind(model) == "bridge"
    torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=1e-5)
    if HookedTransformer is not None:
        message = 'cannot hold LlamaForCausalLM with linear rotary scaling; use backend="bridge"'
        with pytest.raises(ModelError, match=message):
            load_model(tmp_path, backend="hooked")


@needs_hooked
@pytest.mark.parametrize(
    ("arch", "fields", "reason"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}, "this attention_bias and mlp_bias"),
        ("gpt_neox", {"attention_bias": False}, "this attention_bias"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm"),
        ("gpt2", {"activation_function": "mish"}, "activation 'mish'"),
    ],
)
def test_hooked_refuses_by_name(arch, fields, reason):
    with pytest.raises(ModelError, match=f"with {reason}; use backend="):
        hooked_from_hf(hf_model(arch, **fields))


@needs_hooked
def test_hooked_refuses_other_architectures():
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(
        hidden_size=32, num_layers=1, num_heads=4, vocab_size=50, attention_types=[[["global"], 1]]
    )
    with pytest.raises(ModelError, match='no way from GPTNeoForCausalLM to .*use backend="bridge"'):
        hooked_from_hf(GPTNeoForCausalLM(config))


def test_no_hooked_transformer(monkeypatch, checkpoint):
    for module in (convert, load):
        monkeypatch.setattr(module, "hooked_class", lambda: None)
    assert kind(load_model(checkpoint)) == "bridge"
    for name in (checkpoint, "gpt2"):
        with pytest.raises(ModelError, match='has no HookedTransformer.*use backend="bridge"'):
            load_model(name, backend="hooked")


def test_bridge_names_what_it_cannot_hold():
    model = hf_model("gpt2")
    model.__class__ = type("OddForCausalLM", (type(model),), {})
    with pytest.raises(ModelError, match="TransformerBridge cannot hold OddForCausalLM: "):
        bridge_from_hf(model)


# Hub names, without a hub


def test_hub_failure_is_one_line(monkeypatch):
    from transformer_lens.model_bridge import TransformerBridge

    def offline(*args, **kwargs):
        raise OSError("\nWe couldn't connect to the hub.\nCheck your connection.\n" + "x" * 999)

    monkeypatch.setattr(TransformerBridge, "boot_transformers", offline)
    if HookedTransformer is not None:
        monkeypatch.setattr(HookedTransformer, "from_pretrained_no_processing", offline)
    for name in ("gpt2", "nobody/no-model"):
        for backend in ("auto", *KINDS):
            with pytest.raises(ModelError) as caught:
                load_model(name, backend=backend)
            message = str(caught.value)
            assert message.startswith(f"'{name}' is neither a preset (reference")
            assert "OSError: We couldn't connect to the hub.)" in message
            assert "\n" not in message and len(message) < 400


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, offline):
    from huggingface_hub import constants

    asked = []

    def refuse(host, *args, **kwargs):
        asked.append(host)
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(ModelError, match="'nobody/no-model' is neither .* couldn't connect to "):
        load_model("nobody/no-model")
    assert len(asked) == (0 if offline else 1)
    assert constants.HF_HUB_OFFLINE == offline


def test_hub_names_reach_the_right_class(monkeypatch):
    from huggingface_hub import constants
    from transformer_lens.model_bridge import TransformerBridge

    asked = []

    def give(which):
        def loader(name, **kwargs):
            assert not constants.HF_HUB_OFFLINE
            asked.append((which, name, kwargs["dtype"], kwargs["device"]))
            return torch.nn.Linear(1, 1)

        return loader

    answers = SimpleNamespace(head=lambda url, timeout: "any")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the surroundings may be offline
    monkeypatch.setattr("huggingface_hub.get_session", lambda: answers)
    monkeypatch.setattr(TransformerBridge, "boot_transformers", give("bridge"))
    if HookedTransformer is not None:
        monkeypatch.setattr(HookedTransformer, "from_pretrained_no_processing", give("hooked"))
    assert not load_model("gpt2", device="cpu").training
    load_model("nobody/new-model", device="cpu", dtype="bfloat16")
    load_model("gpt2", device="cpu", backend="bridge")
    assert asked == [
        (AUTO, "gpt2", torch.float32, "cpu"),
        ("bridge", "nobody/new-model", torch.bfloat16, "cpu"),
        ("bridge", "gpt2", torch.float32, "cpu"),
    ]


# Must fail


def test_bad_arguments(checkpoint, tmp_path):
    with pytest.raises(UnknownName, match="unknown model 'refrence': did you mean 'reference'"):
        load_model("refrence")
    with pytest.raises(UnknownName, match="unknown backend 'hook': did you mean 'hooked'"):
        load_model(checkpoint, backend="hook")
    with pytest.raises(ModelError, match="expected a dtype .* got 'float99'"):
        load_model(checkpoint, dtype="float99")
    with pytest.raises(ModelError, match="expected a dtype .* got torch.int64"):
        load_model(checkpoint, dtype=torch.int64)
    with pytest.raises(ModelError, match="expected a device .* got 'gpu9'"):
        load_model(checkpoint, device="gpu9")
    for name in (tmp_path / "nowhere", f"{tmp_path}/nowhere", "./nowhere", "~/nowhere-42", ""):
        with pytest.raises(FileError, match="expected a preset, a hub name or an existing dir"):
            load_model(name)
    with pytest.raises(FileError, match="existing directory, got '.*config.json'"):
        load_model(os.path.relpath(checkpoint / "config.json"))
    with pytest.raises(FileError, match="config.json is missing in .*expected an HF model"):
        load_model(tmp_path)
    for value in (3, None, hf_model("gpt2")):
        with pytest.raises(ModelError, match=f"or a TransformerBridge, got {type(value).__name__}"):
            load_model(value)


def test_missing_files(broken):
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        content = (broken / name).read_bytes()
        (broken / name).unlink()
        with pytest.raises(FileError, match=f"{name} is missing in {broken}: expected"):
            load_model(broken)
        (broken / name).write_bytes(content)


@pytest.mark.parametrize("keep", [0, 5, 4000, -1])
def test_truncated_weights(broken, keep):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FileError, match="model.safetensors is truncated or corrupt: Safetensor"):
        load_model(broken)


def test_broken_json(broken):
    for name, content, message in [
        ("config.json", "{", "config.json is not JSON: JSONDecodeError"),
        ("tokenizer.json", "{", "tokenizer.json is not JSON"),
        ("tokenizer.json", "{}", "tokenizer.json cannot be read: "),
    ]:
        before = (broken / name).read_text()
        (broken / name).write_text(content)
        with pytest.raises(FileError, match=message):
            load_model(broken)
        (broken / name).write_text(before)


def test_parts_that_do_not_fit(broken):
    edit_json(broken / "config.json", num_hidden_layers=4)
    with pytest.raises(FileError, match="9 weights are missing, first model.layers.3"):
        load_model(broken)
    edit_json(broken / "config.json", num_hidden_layers=3, intermediate_size=70)
    with pytest.raises(FileError, match="weights do not fit config.json: "):
        load_model(broken)
    edit_json(broken / "config.json", vocab_size=50)
    with pytest.raises(FileError, match="has 66 token ids, config.json vocab_size 50: the two"):
        load_model(broken)
    edit_json(broken / "config.json", model_type="future9")
    with pytest.raises(ModelError, match="transformers cannot load .*future9"):
        load_model(broken)


def test_errors_are_one_line(broken):
    edit_json(broken / "config.json", intermediate_size=70)
    with pytest.raises(FileError) as caught:
        load_model(broken)
    assert "\n" not in str(caught.value)
