"""The hook points of a model: the only code that knows TransformerLens classes.

`HookedTransformer` and `TransformerBridge` share the names and shapes of the hook points used here
(``resid_pre resid_post attn_out q k v z attn_scores pattern``). They differ in ways that silently
spoil a measurement, so every run goes through `Adapter.run`, which

1. checks each name against the model before it runs (a bridge skips unknown names in silence),
2. hands each hook a tensor and expects a new one back (in-place edits leak on the bridge),
3. counts firings: a hook that never fires is an error,
4. removes its own hooks and nothing else, after an exception too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ModelError, unknown

Edit = Callable[[Tensor], Tensor]
Read = Callable[[Tensor], None]
HookName = tuple[str, int]
"""What is hooked, and in which layer: ``("z", 3)``."""

_NAMES = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_post": "blocks.{}.hook_resid_post",
    "attn_out": "blocks.{}.hook_attn_out",
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
        if getattr(cfg, "positional_embedding_type", "") in _ALIBI or "bloom" in architecture.lower():
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

        points = self.model.hook_dict
        try:
            for name in fired:
                point = points.get(self._checked_name(name, points))
                before = len(point.fwd_hooks)
                point.add_hook(hook_for(name))
                added += [(point, handle) for handle in point.fwd_hooks[before:]]
            with torch.no_grad():
                logits = self.model(tokens.to(self.device), return_type="logits")[:, -1]
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
        return logits

    def read(
        self, tokens: Int[Tensor, "row pos"], names: Iterable[HookName], edits=None
    ) -> tuple[Float[Tensor, "row vocab"], dict[HookName, Tensor]]:
        """Run the model once and return copies of activations with the logits; see `run`."""
        store: dict[HookName, Tensor] = {}

        def reader(name: HookName) -> Read:
            def read(activation: Tensor) -> None:
                store[name] = activation.detach().clone()

            return read

        logits = self.run(tokens, edits, {name: reader(name) for name in names})
        return logits, store

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


def _architecture(model: Any) -> str:
    cfg = model.cfg
    for key in ("original_architecture", "architecture"):
        if getattr(cfg, key, None):
            return str(getattr(cfg, key))
    return type(model).__name__
