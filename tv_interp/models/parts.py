"""The maps inside a block: what each head reads and writes, and how a block is wired.

Circuits are about inputs that differ from head to head, which no block can be called with. So the
maps around attention are taken by themselves: the norm in front of it, the linear maps to queries,
keys and values, and from a head's z to what it adds to the residual stream. Whether a model is put
together from these is not assumed but tested on one recorded prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ModelError
from .adapter import Adapter, Gradients, HookName, no_graph_kept
from .replay import Layout, Tape

Via = Literal["q", "k", "v"]
VIA: tuple[Via, ...] = ("q", "k", "v")


@dataclass(frozen=True)
class Parts:
    """A model's blocks in parts.

    Attributes:
        adapter: The model.
        has_mlp: Whether its blocks have MLPs.
        order: ``"serial"`` where an MLP reads what its block's heads add, ``"parallel"`` where it
            reads what they read.
    """

    adapter: Adapter
    has_mlp: bool
    order: Literal["serial", "parallel"]

    @classmethod
    def of(cls, adapter: Adapter, tape: Tape) -> Parts:
        """Look at a model, and test what is found on a recorded prompt.

        Raises:
            ModelError: if its blocks cannot be called by themselves, or are put together in
                another way.
        """
        attn_only = getattr(adapter.model.cfg, "attn_only", False)  # it has the hook nonetheless
        has_mlp = adapter.has(("mlp_out", 0)) and not attn_only
        try:
            for order in ("serial", "parallel") if has_mlp else ("serial",):
                parts = cls(adapter, has_mlp, order)
                if all(parts._fits(tape, layer) for layer in adapter.layers):
                    return parts
        except (AttributeError, TypeError, RuntimeError) as error:
            raise _strange(adapter) from error
        raise _strange(adapter)

    def weights(
        self, layer: int, via: Via
    ) -> tuple[Float[Tensor, "head d_model d_head"], Float[Tensor, "head d_head"]]:
        """Get weight and bias of the map to queries, keys or values, one for each query head."""
        attention = self.adapter.model.blocks[layer].attn
        weight = getattr(attention, f"W_{via.upper()}").detach()
        bias = getattr(attention, f"b_{via.upper()}", None)
        bias = weight.new_zeros(len(weight), weight.shape[-1]) if bias is None else bias.detach()
        return self._each_head(weight), self._each_head(bias)

    def bias(self, layer: int) -> Float[Tensor, " d_model"]:
        """Get what attention adds at every token besides what its heads do."""
        weight = self.adapter.model.blocks[layer].attn.W_O
        bias = getattr(self.adapter.model.blocks[layer].attn, "b_O", None)
        return weight.new_zeros(weight.shape[-1]) if bias is None else bias.detach()

    def norm(
        self, layer: int, x: Float[Tensor, "*rows pos d_model"], gradients: Gradients = "off"
    ) -> Float[Tensor, "*rows pos d_model"]:
        """Apply the norm in front of attention."""
        flat, block = x.flatten(0, -3), self.adapter.model.blocks[layer]
        with torch.set_grad_enabled(gradients == "on"), no_graph_kept(block, gradients):
            return block.ln1(flat).view(x.shape)

    def writes(
        self, layer: int, z: Float[Tensor, "row pos head d_head"]
    ) -> Float[Tensor, "row pos head d_model"]:
        """Compute what each head adds to the residual stream.

        Where a norm follows attention, it is each head's share: the norm's scale is that of all
        heads together, so shares add up to what the block's attention adds, but for the bias.
        """
        block = self.adapter.model.blocks[layer]
        with torch.no_grad():
            each = torch.einsum("bthe,hed->bthd", z, block.attn.W_O)
            after = getattr(block, "ln1_post", None)
            if after is None:
                return each
            eps = self.adapter.model.cfg.eps
            whole = each.sum(2, keepdim=True)
            scale = [(x.square().mean(-1, keepdim=True) + eps).sqrt() for x in (each, whole)]
            return after(each.flatten(0, 1)).view(each.shape) * scale[0] / scale[1]

    def mlp(
        self, tape: Tape, layer: int, x: Float[Tensor, "row pos d_model"]
    ) -> Float[Tensor, "row pos d_model"]:
        """Compute what an MLP adds to the residual stream when it reads ``x``."""
        seen: list[Tensor] = []
        name: HookName = ("mlp_out", layer)
        silent = {("attn_out", layer): torch.zeros_like}
        layout = Layout.suffix(0, tape.n_pos)
        self.adapter.block(tape, layer, x, layout, edits=silent, reads={name: seen.append})
        return seen[0]

    def _each_head(self, weight: Tensor) -> Tensor:
        """Repeat what query heads share."""
        n = self.adapter.n_heads
        return weight if len(weight) == n else weight.repeat_interleave(n // len(weight), 0)

    def _fits(self, tape: Tape, layer: int) -> bool:
        """Whether a recorded block is what its parts make."""
        adapter, x = self.adapter, tape.resid[layer][:1]
        names: list[HookName] = [(w, layer) for w in ("q", "k", "v", "z", "attn_out")]
        one = Tape([r[:1] for r in tape.resid], tape.calls)
        seen = adapter.read_block(one, layer, names + [("mlp_out", layer)] * self.has_mlp)
        normed = self.norm(layer, x)
        pairs = []
        for via in VIA:
            weight, bias = self.weights(layer, via)
            ours = torch.einsum("btd,hde->bthe", normed, weight) + bias
            theirs = seen[via, layer]
            pairs.append((ours, theirs.repeat_interleave(ours.shape[2] // theirs.shape[2], 2)))
        heads = seen["attn_out", layer]
        pairs.append((self.writes(layer, seen["z", layer]).sum(2) + self.bias(layer), heads))
        out = x + heads
        if self.has_mlp:
            read = out if self.order == "serial" else x
            pairs.append((self.mlp(one, layer, read), seen["mlp_out", layer]))
            out = out + seen["mlp_out", layer]
        pairs.append((out, tape.resid[layer + 1][:1]))
        tolerance = 0.02 if adapter.dtype in (torch.bfloat16, torch.float16) else 1e-4
        return all(bool((a - b).abs().max() <= tolerance * (1 + b.abs().max())) for a, b in pairs)


def _strange(adapter: Adapter) -> ModelError:
    return ModelError(
        f"the blocks of {adapter.name} are not norm, heads and MLP added to the residual stream, "
        "so its edges are not defined; use patch_heads and patch_paths"
    )
