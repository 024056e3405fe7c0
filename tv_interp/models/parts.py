"""The maps inside a block: what each head reads and writes, and how a block is wired.

Circuits are about inputs that differ from head to head, which no block can be called with. So the
maps around attention are taken by themselves: the norm in front of it, the linear maps to queries,
keys and values, and from a head's z to what it adds to the residual stream. Whether a model is put
together from these is not assumed but tested on one recorded prompt.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ModelError
from .adapter import Adapter, Gradients, HookName, no_graph_kept
from .replay import Layout, Tape

Via = Literal["q", "k", "v"]
VIA: tuple[Via, ...] = ("q", "k", "v")
Norm = Literal["layer", "rms", "other"]
_ROUGH = 0.02
"""How far two ways to compute the same may differ in half precision, of the largest value."""


@dataclass(frozen=True)
class Parts:
    """A model's blocks in parts.

    Attributes:
        adapter: The model.
        has_mlp: Whether its blocks have MLPs.
        order: ``"serial"`` where an MLP reads what its block's heads add, ``"parallel"`` where it
            reads what they read.
        kind: What the norm in front of attention does, the gain and bias apart: ``"layer"``
            subtracts the mean and divides by the standard deviation, ``"rms"`` divides by the root
            mean square, ``"other"`` does something else.
        takes_scores: Whether attention goes on from edited scores; some bridges discard them.
    """

    adapter: Adapter
    has_mlp: bool
    order: Literal["serial", "parallel"]
    kind: Norm = "other"
    takes_scores: bool = False

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
                    found = parts._kind(tape), parts._takes_scores(tape)
                    return replace(parts, kind=found[0], takes_scores=found[1])
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

    def through_norm(
        self,
        layer: int,
        x: Float[Tensor, "row pos d_model"],
        change: Float[Tensor, "row pos each d_model"],
    ) -> Float[Tensor, "row pos each d_model"]:
        """Apply the Jacobian of the norm in front of attention at ``x``, to several changes of it.

        With the gain g, and s what the centred x is divided by to give y, the Jacobian of ``"rms"``
        is diag(g) (1 - y y' / d) / s, and that of ``"layer"`` takes the mean away besides.
        """
        if self.kind == "other":
            return self._through_any_norm(layer, x, change)
        y, scale = self._standardize(x)
        taken = [y, torch.ones_like(y)] if self.kind == "layer" else [y]
        out = torch.stack(taken, 2).to(change.dtype).flatten(0, 1)
        flat = change.flatten(0, 1)
        parts = flat @ out.mT / change.shape[-1]
        changed = torch.baddbmm(flat, parts, out, alpha=-1).view(change.shape)
        return changed.mul_((self._gain(layer) / scale).to(change.dtype)[:, :, None])

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
            if not self._has_post_norm(layer):
                return each
            eps = self.adapter.model.cfg.eps
            whole = each.sum(2, keepdim=True)
            scale = [(x.square().mean(-1, keepdim=True) + eps).sqrt() for x in (each, whole)]
            normed = block.ln1_post(each.flatten(0, 1)).view(each.shape)
            return normed * scale[0] / scale[1]

    def writes_minus(
        self,
        layer: int,
        z: Float[Tensor, "row pos head d_head"],
        other: Float[Tensor, "row pos head d_head"],
    ) -> Float[Tensor, "row pos head d_model"]:
        """Compute what each head adds, less what it adds where it has another z."""
        if self._has_post_norm(layer):
            return self.writes(layer, z) - self.writes(layer, other)
        return self.writes(layer, z - other)

    def adds(
        self, layer: int, z: Float[Tensor, "row pos head d_head"]
    ) -> Float[Tensor, "row pos d_model"]:
        """Compute what a layer's heads add together, bias included."""
        if self._has_post_norm(layer):
            return self.writes(layer, z).sum(2) + self.bias(layer)
        weight = self.adapter.model.blocks[layer].attn.W_O.detach()
        return z.flatten(2) @ weight.flatten(0, 1) + self.bias(layer)

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

    def _has_post_norm(self, layer: int) -> bool:
        return getattr(self.adapter.model.blocks[layer], "ln1_post", None) is not None

    def _each_head(self, weight: Tensor) -> Tensor:
        """Repeat what query heads share."""
        n = self.adapter.n_heads
        return weight if len(weight) == n else weight.repeat_interleave(n // len(weight), 0)

    def _through_any_norm(self, layer: int, x: Tensor, change: Tensor) -> Tensor:
        """Apply the Jacobian of a norm that nothing is known of.

        Its transpose is linear in the gradient that it is given, so its derivative by that is the
        Jacobian.
        """
        inputs, given = x.clone().requires_grad_(True), torch.zeros_like(x, requires_grad=True)
        out = self.norm(layer, inputs, gradients="on")
        with torch.enable_grad():
            (back,) = torch.autograd.grad(out, inputs, given, create_graph=True)
        batch = change.movedim(2, 0)
        (changed,) = torch.autograd.grad(back, given, batch, is_grads_batched=True)
        return changed.movedim(0, 2)

    def _standardize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what a norm of this kind gives before gain and bias, and what it divides by."""
        x = x if x.dtype == torch.float64 else x.float()
        x = x - x.mean(-1, keepdim=True) if self.kind == "layer" else x
        scale = (x.square().mean(-1, keepdim=True) + self.adapter.model.cfg.eps).sqrt()
        return x / scale, scale

    def _gain(self, layer: int) -> Float[Tensor, " d_model"]:
        """Measure what a norm multiplies by, however it stores that: at 1, -1, 1, ... and minus it.

        There no element is near 0, and the bias drops out.
        """
        signs = torch.ones(1, 1, self.adapter.d_model, device=self.adapter.device)
        signs[..., 1::2] = -1
        signs = signs.to(self.adapter.dtype)
        both = self.norm(layer, torch.cat([signs, -signs]))
        return (both[0] - both[1])[0] / 2 / self._standardize(signs)[0][0, 0]

    def _kind(self, tape: Tape) -> Norm:
        """Find which kind of norm has the Jacobian that the model's has, in all layers."""
        for kind in ("layer", "rms"):
            parts = replace(self, kind=kind)
            if all(parts._has_jacobian(tape, layer) for layer in self.adapter.layers):
                return kind
        return "other"

    def _has_jacobian(self, tape: Tape, layer: int) -> bool:
        """Whether the Jacobian at a recorded prompt is that of a norm of this kind."""
        x = tape.resid[layer][:1]
        change = torch.linspace(-1, 2, x.shape[-1]).sin().to(x).expand_as(x)[:, :, None]
        ours = self.through_norm(layer, x, change)
        theirs = self._through_any_norm(layer, x, change)
        exact = {torch.float64: 1e-10, torch.float32: 1e-5}.get(x.dtype, _ROUGH)
        return bool((ours - theirs).abs().max() <= exact * theirs.abs().max())

    def _takes_scores(self, tape: Tape) -> bool:
        """Whether halved attention scores change what heads give, by more than rounding."""
        one = Tape([tape.resid[0][:1]], tape.calls)
        edits = {("attn_scores", 0): lambda scores: scores / 2}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of edits that are discarded: it is what we ask
                z = self.adapter.read_block(one, 0, [("z", 0)], edits)
        except ModelError:  # there is no such hook, or it never fires
            return False
        plain = tape.z[0][:1]
        return bool((z["z", 0] - plain).abs().max() > _ROUGH * plain.abs().max())

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
        z = seen["z", layer]
        pairs.append((self.writes(layer, z).sum(2) + self.bias(layer), heads))
        pairs.append((self.adds(layer, z), heads))
        out = x + heads
        if self.has_mlp:
            read = out if self.order == "serial" else x
            pairs.append((self.mlp(one, layer, read), seen["mlp_out", layer]))
            out = out + seen["mlp_out", layer]
        pairs.append((out, tape.resid[layer + 1][:1]))
        tolerance = _ROUGH if adapter.dtype in (torch.bfloat16, torch.float16) else 1e-4
        return all(_close(a, b, tolerance) for a, b in pairs)


def _close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    """Whether two ways to compute the same agree."""
    return bool((ours - theirs).abs().max() <= tolerance * (1 + theirs.abs().max()))


def _strange(adapter: Adapter) -> ModelError:
    return ModelError(
        f"the blocks of {adapter.name} are not norm, heads and MLP added to the residual stream, "
        "so its edges are not defined; use patch_heads and patch_paths"
    )
