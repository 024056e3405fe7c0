"""The hook points of a model: the only code that knows TransformerLens classes.

`HookedTransformer` and `TransformerBridge` share the names and shapes of the hook points used here
(``resid_pre resid_post attn_out mlp_out q k v z attn_scores pattern``). They differ in ways that
silently spoil a measurement, so every run goes through `Adapter.run`, which

1. checks each name against the model before it runs (a bridge skips unknown names in silence),
2. hands each hook a tensor and expects a new one back (in-place edits leak on the bridge),
3. counts firings: a hook that never fires is an error,
4. removes its own hooks and nothing else, after an exception too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ModelError, unknown
from .replay import Listener, Prefix, Tape, is_cache, on_suffix

Edit = Callable[[Tensor], Tensor]
Read = Callable[[Tensor], None]
HookName = tuple[str, int]
"""What is hooked, and in which layer: ``("z", 3)``."""

_NAMES = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_post": "blocks.{}.hook_resid_post",
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "q": "blocks.{}.attn.hook_q",
    "k": "blocks.{}.attn.hook_k",
    "v": "blocks.{}.attn.hook_v",
    "z": "blocks.{}.attn.hook_z",
    "attn_scores": "blocks.{}.attn.hook_attn_scores",
    "pattern": "blocks.{}.attn.hook_pattern",
}
COMPONENTS = tuple(_NAMES)
_ALIBI = ("alibi",)


@dataclass(frozen=True)
class Adapter:
    """A model behind one set of words.

    Attributes:
        model: The HookedTransformer or TransformerBridge.
        name: What results call the model.
        n_layers: Number of blocks.
        n_heads: Query heads in a block.
        n_kv_heads: Key and value heads in a block; fewer on grouped-query attention.
        d_head: Width of a head.
    """

    model: Any
    name: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int

    @classmethod
    def of(cls, model: Any) -> Adapter:
        """Look at a model and refuse what cannot be measured exactly.

        Raises:
            ModelError: if it is no TransformerLens model, is in training mode, or is of an
                architecture that the interventions cannot be exact on (named).
        """
        cfg = getattr(model, "cfg", None)
        if cfg is None or not hasattr(model, "hook_dict"):
            raise ModelError(
                "expected a HookedTransformer or a TransformerBridge, got "
                f"{type(model).__name__}: use load_model(...)"
            )
        if model.training:
            raise ModelError(
                "the model is in training mode, so dropout would change its results: "
                "call model.eval() first"
            )
        architecture = _architecture(model)
        if (
            getattr(cfg, "positional_embedding_type", "") in _ALIBI
            or "bloom" in architecture.lower()
        ):
            raise ModelError(
                f"{architecture} uses ALiBi attention, which is not supported: interventions "
                "would not be exact; use a model with learned or rotary positions"
            )
        if getattr(getattr(cfg, "hf_config", None), "is_encoder_decoder", False) or any(
            word in architecture for word in ("T5", "Bart", "Bert", "EncoderDecoder")
        ):
            raise ModelError(
                f"{architecture} is not a causal decoder: use a decoder-only language model"
            )
        if _NAMES["z"].format(0) not in model.hook_dict:
            raise ModelError(
                f"{architecture} has no attention heads at {_NAMES['z'].format(0)!r}: this "
                "architecture is not supported"
            )
        groups = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
        name = getattr(cfg, "model_name", None) or architecture
        return cls(model, str(name), cfg.n_layers, cfg.n_heads, groups, cfg.d_head)

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the model's first parameter."""
        return next(self.model.parameters()).dtype

    def kv_head(self, head: int) -> int:
        """Get the key and value head that a query head uses."""
        return head * self.n_kv_heads // self.n_heads

    def run(
        self,
        tokens: Int[Tensor, "row pos"],
        edits: Mapping[HookName, Edit] | None = None,
        reads: Mapping[HookName, Read] | None = None,
    ) -> Float[Tensor, "row vocab"]:
        """Run the model once and return the logits at the last token.

        Args:
            tokens: Token ids without padding.
            edits: What replaces an activation: takes the tensor, returns a new one.
            reads: What looks at an activation; sees it after the edit.

        Raises:
            UnknownName: if a component is not known.
            ModelError: if the model has no such hook point, or one never fired.
        """
        with self._hooked(edits, reads), torch.no_grad():
            return self.model(tokens.to(self.device), return_type="logits")[:, -1]

    def tape(self, tokens: Int[Tensor, "row pos"]) -> Tape:
        """Run the model once and keep what `replay` needs."""
        tape, handles = Tape(), []

        def before(block: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            tape.resid.append(args[0].detach())
            tape.calls.append((args[1:], dict(kwargs)))
            listener = Listener(tape)
            args = tuple(listener if is_cache(a) else a for a in args)
            kwargs = {k: listener if is_cache(v) else v for k, v in kwargs.items()}
            if not self._is_bridge:
                kwargs["past_kv_cache_entry"] = listener
            return args, kwargs

        caching = {"use_cache": True} if self._is_bridge else {}
        try:
            for block in self.model.blocks:
                handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            with torch.no_grad():
                tokens = tokens.to(self.device)
                logits = self.model(tokens, return_type="logits", **caching)
                tape.logits.append(logits[:, -1])
        finally:
            for handle in handles:
                handle.remove()
        return tape

    def replay(
        self,
        tape: Tape,
        layer: int,
        start: int,
        rows: Int[Tensor, " row"],
        *,
        edits: Mapping[HookName, Edit] | None = None,
        reads: Mapping[HookName, Read] | None = None,
        add: Float[Tensor, "row pos d_model"] | None = None,
        until: int | None = None,
    ) -> Float[Tensor, "row vocab"] | None:
        """Run the blocks from a layer and a position on, with everything before as recorded.

        Args:
            tape: A recorded run.
            layer: First block that runs.
            start: First position that is recomputed.
            rows: Rows of the tape; repeats are variants of the same prompt.
            edits: As in `run`; what they see starts at ``start``.
            reads: As in `run`.
            add: Added to the input of the first block, from ``start`` on.
            until: First block that does not run; then nothing is returned.

        Returns:
            Logits at the last token.
        """
        length = tape.resid[0].shape[1]
        axis = 2 if self._is_bridge else 1
        rows = rows.to(self.device)
        x = tape.resid[layer][rows, start:]
        if add is not None:
            x = x + add
        last = self.n_layers if until is None else until
        with self._hooked(edits, reads), torch.no_grad():
            for i in range(layer, last):
                prefix = None
                if start and tape.resumes_anywhere:
                    keys, values = (
                        t[i].narrow(axis, 0, start)[rows] for t in (tape.keys, tape.values)
                    )
                    prefix = Prefix(keys, values, axis)
                args, kwargs = tape.calls[i]
                args = on_suffix(args, prefix, start, length)
                kwargs = {k: on_suffix(v, prefix, start, length) for k, v in kwargs.items()}
                if not self._is_bridge:
                    kwargs["past_kv_cache_entry"] = prefix
                out = self.model.blocks[i](x, *args, **kwargs)
                x = out[0] if isinstance(out, tuple) else out
            return None if until is not None else self._unembed(x[:, -1:])[:, -1]

    def _unembed(self, resid: Float[Tensor, "row 1 d_model"]) -> Float[Tensor, "row 1 vocab"]:
        norm = getattr(self.model, "ln_final", None)  # a HookedTransformer without norms has none
        logits = self.model.unembed(resid if norm is None else norm(resid))
        if self._is_bridge:
            return self.model.adapter.apply_output_logits_transform(logits)
        cap = getattr(self.model.cfg, "output_logits_soft_cap", -1.0)
        return cap * torch.tanh(logits / cap) if cap and cap > 0 else logits

    @cached_property
    def _points(self) -> Mapping[str, Any]:
        return self.model.hook_dict  # a bridge builds it anew each time it is asked

    @property
    def _is_bridge(self) -> bool:
        return hasattr(self.model, "original_model")

    @contextmanager
    def _hooked(
        self, edits: Mapping[HookName, Edit] | None, reads: Mapping[HookName, Read] | None
    ) -> Iterator[None]:
        """Hook the model while something runs; a hook that did not fire is an error."""
        edits, reads = edits or {}, reads or {}
        fired: dict[HookName, int] = dict.fromkeys([*edits, *reads], 0)
        added: list[tuple[Any, Any]] = []

        def hook_for(name: HookName) -> Callable[..., Tensor | None]:
            edit, read = edits.get(name), reads.get(name)

            def hook_fn(activation: Tensor, hook: Any) -> Tensor | None:
                fired[name] += 1
                new = None
                if edit is not None:
                    activation = new = edit(activation)
                if read is not None:
                    read(activation)
                return new

            return hook_fn

        points = self._points
        try:
            for name in fired:
                point = points[self._checked_name(name, points)]
                before = len(point.fwd_hooks)
                point.add_hook(hook_for(name))
                added += [(point, handle) for handle in point.fwd_hooks[before:]]
            yield
        finally:
            for point, handle in added:
                handle.hook.remove()
                point.fwd_hooks.remove(handle)
        silent = [_NAMES[what].format(layer) for (what, layer), n in fired.items() if n == 0]
        if silent:
            raise ModelError(
                f"hook {silent[0]!r} never fired on {self.name}: its effect would read as 0; this "
                "architecture does not run through that hook point"
            )

    def read(
        self,
        tokens: Int[Tensor, "row pos"],
        names: Iterable[HookName],
        edits: Mapping[HookName, Edit] | None = None,
    ) -> tuple[Float[Tensor, "row vocab"], dict[HookName, Tensor]]:
        """Run the model once and return copies of activations with the logits; see `run`."""
        store: dict[HookName, Tensor] = {}
        logits = self.run(tokens, edits, {name: _keep(store, name) for name in names})
        return logits, store

    def read_block(
        self,
        tape: Tape,
        layer: int,
        rows: Int[Tensor, " row"],
        names: Iterable[HookName],
        edits: Mapping[HookName, Edit] | None = None,
        add: Float[Tensor, "row pos d_model"] | None = None,
    ) -> dict[HookName, Tensor]:
        """Run one block of a recorded run again, at all positions, and return activations in it.

        Needs no key-value cache, so it is exact wherever blocks can be called by themselves.
        """
        store: dict[HookName, Tensor] = {}
        reads = {name: _keep(store, name) for name in names}
        self.replay(tape, layer, 0, rows, edits=edits, reads=reads, add=add, until=layer + 1)
        return store

    def _checked_name(self, name: HookName, points: Mapping[str, Any]) -> str:
        what, layer = name
        if what not in _NAMES:
            raise unknown("component", what, _NAMES)
        full = _NAMES[what].format(layer)
        if full not in points:
            raise ModelError(
                f"{self.name} has no hook point {full!r} (it has {self.n_layers} layers): this "
                "architecture does not support that intervention"
            )
        return full


def _keep(store: dict[HookName, Tensor], name: HookName) -> Read:
    def read(activation: Tensor) -> None:
        store[name] = activation.detach().clone()

    return read


def _architecture(model: Any) -> str:
    cfg = model.cfg
    for key in ("original_architecture", "architecture"):
        if getattr(cfg, key, None):
            return str(getattr(cfg, key))
    return type(model).__name__
