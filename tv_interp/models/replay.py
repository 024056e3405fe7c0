"""Record the calls of a model's blocks once, and make them again on a suffix.

In one forward pass the arguments of every block are kept, and the key-value cache that it is handed
is swapped for one that only listens. Later a block can be called again by itself: on the last
positions alone, with the recorded keys and values in front of them. Nothing is assumed about the
architecture but that positions are the second axis of what a block is given, and the last two of a
mask; whether that holds is tested against the recorded logits before it is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tape:
    """What one forward pass left behind.

    Attributes:
        resid: Input of each block, ``[row, pos, d_model]``.
        calls: The other arguments of each block.
        keys: Keys of each block as its cache stores them; empty where it has no cache.
        values: Values, likewise.
        logits: At the last token, ``[row, vocab]``.
    """

    resid: list[Tensor] = field(default_factory=list)
    calls: list[tuple[tuple, dict[str, Any]]] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    @property
    def resumes_anywhere(self) -> bool:
        """Whether keys and values were recorded, so that a run can start at any position."""
        return len(self.keys) == len(self.resid)


class Listener:
    """Stands in for a key-value cache while recording: keeps what it is handed."""

    def __init__(self, tape: Tape) -> None:
        """Write to a tape."""
        self.tape = tape
        self.past_keys = torch.empty(1, 0)  # HookedTransformer asks for its size

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values ``[row, pos, head, d_head]`` (HookedTransformer)."""
        self.tape.keys.append(keys.detach())
        self.tape.values.append(values.detach())
        return keys, values

    def update(
        self, keys: Tensor, values: Tensor, *where: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep keys and values ``[row, head, pos, d_head]`` (transformers)."""
        return self.append(keys, values)

    def get_seq_length(self, *where: Any) -> int:
        """Nothing lies in front."""
        return 0


class Prefix:
    """Stands in for a key-value cache while replaying: recorded keys and values, never changed."""

    def __init__(self, keys: Tensor, values: Tensor, axis: int) -> None:
        """Keep the prefix; ``axis`` is that of positions."""
        self.past_keys, self.past_values, self.axis = keys, values, axis

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put the prefix in front (HookedTransformer)."""
        return (
            torch.cat([self.past_keys, keys], self.axis),
            torch.cat([self.past_values, values], self.axis),
        )

    def update(
        self, keys: Tensor, values: Tensor, *where: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """Put the prefix in front (transformers)."""
        return self.append(keys, values)

    def get_seq_length(self, *where: Any) -> int:
        """Length of the prefix."""
        return self.past_keys.shape[self.axis]


def is_cache(value: Any) -> bool:
    """Whether an argument of a block is a key-value cache."""
    return hasattr(value, "update") and hasattr(value, "get_seq_length")


def on_suffix(value: Any, cache: Any, start: int, length: int) -> Any:
    """Cut an argument of a block to the positions from ``start`` on.

    Args:
        value: A mask ``[row, 1, pos, pos]``, positions or their embeddings ``[1, pos, ...]``, a
            cache, a tuple of these, or anything else, which stays.
        cache: What takes the place of a cache.
        start: First position.
        length: Number of positions of the recorded run.
    """
    if isinstance(value, tuple | list):
        return type(value)(on_suffix(v, cache, start, length) for v in value)
    if isinstance(value, Tensor):
        if value.ndim == 4 and value.shape[-2:] == (length, length):
            return value[:1, :, start:]
        if value.ndim >= 2 and value.shape[1] == length:
            return value[:1, start:]
        return value
    return cache if is_cache(value) else value
