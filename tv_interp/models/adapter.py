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

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import ModelError, unknown
from .finite import check_logits
from .replay import Layout, Listener, Prefix, Stop, Tape, is_cache, lay_out

Edit = Callable[[Tensor], Tensor]
Read = Callable[[Tensor], None]
HookName = tuple[str, int]
"""What is hooked, and in which layer: ``("z", 3)``."""
Gradients = Literal["off", "on"]

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
        d_model: Width of the residual stream.
        d_mlp: Width of an MLP's hidden layer.
    """

    model: Any
    name: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_mlp: int

    @classmethod
    def of(cls, model: Any) -> Adapter:
        """Look at a model and refuse what cannot be measured exactly.

        Raises:
            ModelError: if it is no TransformerLens model, is in training mode, lies on several
                devices, or is of an architecture that the interventions cannot be exact on (named).
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
        if getattr(cfg, "attention_dir", "causal") != "causal":
            raise ModelError(
                f"{architecture} attends in both directions (attention_dir="
                f"{cfg.attention_dir!r}), and interventions are exact only where nothing reaches "
                "back: use a causal model"
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
        devices = sorted({str(parameter.device) for parameter in model.parameters()})
        if len(devices) > 1:
            raise ModelError(
                f"the weights of {architecture} lie on several devices ({', '.join(devices)}), "
                "which is not supported: load it on one, without n_devices or device_map, in "
                'dtype="bfloat16" where it does not fit'
            )
        groups = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
        name = getattr(cfg, "model_name", None) or architecture
        d_mlp = getattr(cfg, "d_mlp", None) or 4 * cfg.d_model
        sizes = (cfg.n_layers, cfg.n_heads, groups, cfg.d_head, cfg.d_model, d_mlp)
        return cls(model, str(name), *sizes)

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
            ModelError: if the model has no such hook point, one never fired, or logits are NaN or
                infinite.
        """
        with self._hooked(edits, reads), self._last_unembedded(), torch.no_grad():
            logits = self.model(tokens.to(self.device), return_type="logits")[:, -1]
        return check_logits(self, logits, tokens, edits)

    def embed(self, tokens: Int[Tensor, "row pos"]) -> Float[Tensor, "row pos d_model"]:
        """Compute what enters the first block, and nothing else."""
        with torch.no_grad():
            return self.model(tokens.to(self.device), stop_at_layer=0)

    def tape(self, tokens: Int[Tensor, "row pos"]) -> Tape:
        """Run the model once and keep what `block` needs; only the last token is unembedded.

        Raises:
            ModelError: if logits are NaN or infinite.
        """
        tape, handles = Tape(), []

        def before(block: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            tape.resid.append(args[0].detach())
            tape.calls.append((args[1:], dict(kwargs)))
            listener = Listener(tape.keys, tape.values)
            args = tuple(listener if is_cache(a) else a for a in args)
            kwargs = {k: listener if is_cache(v) else v for k, v in kwargs.items()}
            if not self._is_bridge:
                kwargs["past_kv_cache_entry"] = listener
            return args, kwargs

        def after(block: Any, args: tuple, out: Any) -> None:
            tape.resid.append((out[0] if isinstance(out, tuple) else out).detach())

        caching = {"use_cache": True} if self._is_bridge else {}
        reads = {("z", layer): lambda z: tape.z.append(z.detach()) for layer in self.layers}
        try:
            for block in self.model.blocks:
                handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(self.model.blocks[-1].register_forward_hook(after))
            with torch.no_grad(), self._hooked(None, reads), self._last_unembedded():
                tokens = tokens.to(self.device)
                logits = self.model(tokens, return_type="logits", **caching)
                tape.logits.append(logits[:, -1])
        finally:
            for handle in handles:
                handle.remove()
        check_logits(self, tape.logits[0], tokens)
        return tape

    def block(
        self,
        tape: Tape,
        layer: int,
        x: Float[Tensor, "row slot d_model"],
        layout: Layout,
        *,
        rows: Int[Tensor, " row"] | None = None,
        front: tuple[Tensor, Tensor] | None = None,
        edits: Mapping[HookName, Edit] | None = None,
        reads: Mapping[HookName, Read] | None = None,
        until: Literal["keys", "pattern", "z", "attn_out"] | None = None,
        gradients: Gradients = "off",
    ) -> Any:
        """Call one block of a recorded run again, on some tokens.

        Args:
            tape: A recorded run.
            layer: Which block.
            x: Its input at the layout's tokens.
            layout: Which tokens, and what stands in front of them.
            rows: Rows of the tape that stand in front; repeats are variants of a prompt stacked in
                the batch axis. None for each once, in order.
            front: Keys and values in front, as the cache stores them; None for the recorded ones.
            edits: As in `run`; what they see are the layout's tokens.
            reads: As in `run`.
            until: ``"keys"`` ends the call once keys and values are computed, ``"pattern"``,
                ``"z"`` and ``"attn_out"`` once these are; None runs all of it.
            gradients: Whether what edits add can be differentiated with respect to.

        Returns:
            The block's output, or what ``until`` names: keys and values as the cache stores them,
            or the activation.
        """
        axis = self._position_axis
        prefix = None
        if front is None and len(layout.front):
            front = tuple(  # type: ignore[assignment]
                _some(_some(kept[layer], axis, layout.front), 0, rows)
                for kept in (tape.keys, tape.values)
            )
        if front is not None:
            prefix = Prefix(*front, axis)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        cache = Listener(keys, values, then="stop") if until == "keys" else prefix
        args, kwargs = tape.calls[layer]
        args = lay_out(args, cache, layout, tape.n_pos)
        kwargs = {name: lay_out(v, cache, layout, tape.n_pos) for name, v in kwargs.items()}
        if not self._is_bridge:
            kwargs["past_kv_cache_entry"] = cache
        seen: list[Tensor] = []

        def stop(activation: Tensor) -> None:
            seen.append(activation)
            raise Stop

        if until in ("pattern", "z", "attn_out"):
            reads = dict(reads or {}) | {(until, layer): stop}
        block = self.model.blocks[layer]
        with torch.set_grad_enabled(gradients == "on"), no_graph_kept(block, gradients):
            try:
                with self._hooked(edits, reads), self._slots(layer, layout, tape.n_pos):
                    out = block(x, *args, **kwargs)
            except Stop:
                return (keys[0], values[0]) if until == "keys" else seen[0]
        return out[0] if isinstance(out, tuple) else out

    def behind(
        self,
        tape: Tape,
        layer: int,
        start: int,
        rows: Int[Tensor, " row"],
        fresh: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Put fresh keys and values behind the recorded ones of the tokens before ``start``."""
        axis = self._position_axis
        before, recorded = torch.arange(start), (tape.keys, tape.values)
        kept = (_some(_some(t[layer], axis, before), 0, rows) for t in recorded)
        keys, values = (torch.cat(both, axis) for both in zip(kept, fresh, strict=True))
        return keys, values

    def keys_in_front(
        self, tapes: Sequence[Tape], layer: int, layout: Layout
    ) -> tuple[Tensor, Tensor]:
        """Get the keys in front of a layout in several runs, one below the other; values are 0.

        For a call whose attention pattern alone is wanted: that does not depend on values.
        """
        axis = self._position_axis
        keys = torch.cat([_some(tape.keys[layer], axis, layout.front) for tape in tapes])
        shape = list(keys.shape)
        shape[-1] = tapes[0].values[layer].shape[-1]
        return keys, tapes[0].values[layer].new_zeros(()).expand(shape)

    def exchanged(
        self,
        tape: Tape,
        other: Tape,
        layer: int,
        layout: Layout,
        mask: Bool[Tensor, "row pos"],
    ) -> tuple[Tensor, Tensor]:
        """Get the keys and values in front of a layout, the marked keys from another run."""
        axis = self._position_axis
        ours, theirs, values = (
            _some(kept[layer], axis, layout.front) for kept in (tape.keys, other.keys, tape.values)
        )
        marked = mask[:, layout.front.to(mask.device)]
        marked = marked[:, None, :, None] if self._is_bridge else marked[:, :, None, None]
        return torch.where(marked, theirs, ours), values

    def recorded_values(self, tape: Tape, layer: int) -> Float[Tensor, "row pos kv_head d_head"]:
        """Get the values of a recorded run."""
        values = tape.values[layer]
        return values.transpose(1, 2) if self._is_bridge else values

    def logits(
        self,
        resid: Float[Tensor, "row slot d_model"],
        tokens: Int[Tensor, "row token"] | None = None,
        gradients: Gradients = "off",
    ) -> Float[Tensor, "row slot token"]:
        """Unembed the output of the last block: some tokens, or the whole vocabulary."""
        unembed, norm = self.model.unembed, getattr(self.model, "ln_final", None)
        with torch.set_grad_enabled(gradients == "on"):
            normed = resid if norm is None else norm(resid)  # some HookedTransformers have no norms
            if tokens is None:
                logits = unembed(normed)
            else:
                tokens = tokens.to(self.device)
                logits = torch.einsum("bvd,bkd->bvk", normed, unembed.W_U.T[tokens])
                logits = logits + unembed.b_U[tokens][:, None]
            if self._is_bridge:
                return self.model.adapter.apply_output_logits_transform(logits)
            cap = getattr(self.model.cfg, "output_logits_soft_cap", -1.0)
            return cap * torch.tanh(logits / cap) if cap and cap > 0 else logits

    @property
    def layers(self) -> range:
        """Numbers of the blocks."""
        return range(self.n_layers)

    @property
    def shares_keys(self) -> bool:
        """Whether a token's attention does not depend on how many keys it is offered."""
        cfg = self.model.cfg
        return not (getattr(cfg, "use_logn_attn", 0) or getattr(cfg, "use_dynamic_ntk_rope", 0))

    @contextmanager
    def _slots(self, layer: int, layout: Layout, n_pos: int) -> Iterator[None]:
        """Make a HookedTransformer's attention take positions from a layout, for one call.

        It takes the position of a key from its place in the cache, so mask and rotary tables are
        put in the layout's order meanwhile. Blocks of a bridge are handed theirs.
        """
        if self._is_bridge or layout.is_plain:
            yield
            return
        attention = self.model.blocks[layer].attn
        whole = attention._make_causal_mask(n_pos, n_pos, 0, self.device)
        mask, places = layout.mask(whole), layout.keys.to(self.device)
        tables = {
            name: attention._buffers[name]
            for name in ("rotary_cos", "rotary_sin")
            if name in attention._buffers
        }
        try:
            attention._make_causal_mask = lambda *args, **kwargs: mask
            for name, table in tables.items():
                attention._buffers[name] = table[places]
            yield
        finally:
            attention._buffers.update(tables)
            del attention._make_causal_mask

    @contextmanager
    def _last_unembedded(self) -> Iterator[None]:
        """Unembed the last token alone while something runs: no other logits are ever read."""

        def last_token(unembed: Any, args: tuple) -> tuple:
            return (args[0][:, -1:], *args[1:])

        handle = self.model.unembed.register_forward_pre_hook(last_token)
        try:
            yield
        finally:
            handle.remove()

    @cached_property
    def _points(self) -> Mapping[str, Any]:
        return self.model.hook_dict  # a bridge builds it anew each time it is asked

    @property
    def _position_axis(self) -> int:
        """Axis of positions in the keys and values that a cache stores."""
        return 2 if self._is_bridge else 1

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

    def jacobian(
        self,
        tokens: Int[Tensor, "row pos"],
        where: Int[Tensor, " row"],
        outputs: Int[Tensor, " output"],
        edits: Mapping[HookName, Edit] | None = None,
    ) -> Float[Tensor, "row output d_model"]:
        """Differentiate last logits by what enters the first block at one token of each row.

        Args:
            tokens: Token ids without padding.
            where: The token of each row.
            outputs: Vocabulary ids whose logits are differentiated.
            edits: As in `run`.
        """
        index, where = torch.arange(len(tokens), device=self.device), where.to(self.device)
        entered: list[Tensor] = []

        def enter(x: Tensor) -> Tensor:
            entered.append(x[index, where].detach().requires_grad_(True))
            x = x.detach().clone()
            x[index, where] = entered[0]
            return x

        hooks = {("resid_pre", 0): enter, **(edits or {})}
        with self._hooked(hooks, None), no_graph_kept(self.model), torch.enable_grad():
            logits = self.model(tokens.to(self.device), return_type="logits")[:, -1]
            check_logits(self, logits, tokens, edits)
            rows = [
                torch.autograd.grad(logits[:, k].sum(), entered[0], retain_graph=True)[0]
                for k in outputs.tolist()
            ]
        return torch.stack(rows, 1)

    def read_block(
        self,
        tape: Tape,
        layer: int,
        names: Iterable[HookName],
        edits: Mapping[HookName, Edit] | None = None,
    ) -> dict[HookName, Tensor]:
        """Run one block of a recorded run again, at all positions, and return activations in it.

        Needs no key-value cache, so it is exact wherever blocks can be called by themselves.
        """
        store: dict[HookName, Tensor] = {}
        reads = {name: _keep(store, name) for name in names}
        layout = Layout.suffix(0, tape.n_pos)
        self.block(tape, layer, tape.resid[layer], layout, edits=edits, reads=reads)
        return store

    def has(self, name: HookName) -> bool:
        """Whether the model has a hook point."""
        return _NAMES[name[0]].format(name[1]) in self._points

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


def _some(values: Tensor, axis: int, index: Tensor | None) -> Tensor:
    """Select along an axis; a run from 0 on is a view, and None is all."""
    if index is None:
        return values
    n = len(index)
    if n and int(index[-1]) == n - 1 and torch.equal(index, torch.arange(n)):
        return values.narrow(axis, 0, n)
    return values.index_select(axis, index.to(values.device))


def _architecture(model: Any) -> str:
    cfg = model.cfg
    for key in ("original_architecture", "architecture"):
        if getattr(cfg, key, None):
            return str(getattr(cfg, key))
    return type(model).__name__


@contextmanager
def no_graph_kept(part: Any, gradients: Gradients = "on") -> Iterator[None]:
    """Cut what modules keep of a differentiated run loose from its graph.

    The attention of a TransformerBridge keeps what entered the norm in front of it until its block
    has run to the end, and with it everything that was needed to differentiate it.
    """
    try:
        yield
    finally:
        for module in part.modules() if gradients == "on" else ():
            for name, value in vars(module).items():
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    setattr(module, name, value.detach())
