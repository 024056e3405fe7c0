"""NaN and infinities: named where they first appear, and never handed on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ModelError

if TYPE_CHECKING:
    from .adapter import Adapter, Edit, HookName, Read

ORDER = ("resid_pre", "q", "k", "v", "z", "attn_out", "mlp_out", "resid_post")
"""Where it is looked for; attention scores are infinite where they are masked."""


class _Found(Exception):
    """Ends a run at the first numbers that mean nothing."""


def check_logits(
    adapter: Adapter,
    logits: Float[Tensor, "row vocab"],
    tokens: Int[Tensor, "row pos"],
    edits: Mapping[HookName, Edit] | None = None,
) -> Float[Tensor, "row vocab"]:
    """Hand back logits, unless some are NaN or infinite.

    Args:
        adapter: The model.
        logits: What it gave at the last token.
        tokens: What it was given.
        edits: What was changed.

    Raises:
        ModelError: naming where they come from; then the model runs once more to find out.
    """
    bad = ~logits.isfinite().all(1)
    if not bad.any():
        return logits
    row = bad.nonzero()[:1, 0].to(tokens.device)
    same = edits is None and len(tokens) > 1  # edits are made for all rows
    place = _first_place(adapter, tokens[row] if same else tokens, edits)
    raise not_finite(adapter, f"logits for {int(bad.sum())} of {len(bad)} prompts", place)


def not_finite(adapter: Adapter, what: str, place: str = "") -> ModelError:
    """Build the error for numbers that mean nothing, with the weight at fault if there is one.

    Args:
        adapter: The model.
        what: What is NaN or infinite.
        place: Where it is first, where that is known.
    """
    named = adapter.model.named_parameters()
    bad = next((name for name, weight in named if not weight.isfinite().all()), None)
    first = f", first at {place}" if place else ""
    if bad is not None:
        cause = f"so does its weight {bad!r}: load or train it again"
    elif adapter.dtype in (torch.float16, torch.bfloat16):
        cause = f"its weights are finite, so {_short(adapter.dtype)} overflows: load it in float32"
    else:
        cause = f"its weights are finite in {_short(adapter.dtype)}: look for values that are huge"
    return ModelError(f"{adapter.name} gives NaN or infinite {what}{first}; {cause}")


def _first_place(adapter: Adapter, tokens: Tensor, edits: Mapping[HookName, Edit] | None) -> str:
    """Run again and stop at the first hook point that sees them."""

    def stop_at(place: str) -> Read:
        def read(activation: Tensor) -> None:
            if not activation.isfinite().all():
                raise _Found(place)

        return read

    def ends(*given: Any) -> NoReturn:
        raise _Found("the final norm or the unembedding")

    names = [(what, layer) for layer in adapter.layers for what in ORDER]
    reads = {
        (what, layer): stop_at(f"{what} of layer {layer}")
        for what, layer in names
        if adapter.has((what, layer))
    }
    handle = adapter.model.unembed.register_forward_hook(ends)
    try:
        adapter.run(tokens, edits, reads)
    except _Found as found:
        return str(found)
    finally:
        handle.remove()
    return ""


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
