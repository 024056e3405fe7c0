"""Record the calls of a model's blocks once, and make them again on any of the tokens.

In one forward pass the arguments of every block are kept, and the key-value cache that it is handed
is swapped for one that only listens. Later a block can be called again by itself on some tokens
alone, with the recorded keys and values of others in front of them: which tokens, and who sees
whom, is a `Layout`. Nothing is assumed about the architecture but that positions are the second
axis of what a block is given, and the last two of a mask; whether that holds is tested against the
recorded logits before it is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tape:
    """What one forward pass left behind.

    Attributes:
        resid: Input of each block, and the output of the last one, ``[row, pos, d_model]``.
        calls: The other arguments of each block.
        keys: Keys of each block as its cache stores them; empty where it has no cache.
        values: Values, likewise.
        z: Head outputs of each block, ``[row, pos, head, d_head]``.
        logits: At the last token, ``[row, vocab]``.
    """

    resid: list[Tensor] = field(default_factory=list)
    calls: list[tuple[tuple, dict[str, Any]]] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    @property
    def has_keys(self) -> bool:
        """Whether keys and values were recorded, so that a block can be called on some tokens."""
        return bool(self.calls) and len(self.keys) == len(self.calls)

    @property
    def n_rows(self) -> int:
        """Number of prompts."""
        return len(self.resid[0])

    @property
    def n_pos(self) -> int:
        """Number of tokens of a prompt."""
        return self.resid[0].shape[1]


@dataclass(frozen=True, eq=False)
class Layout:
    """The tokens that a block is called on, and the recorded ones in front of them.

    A token sees what it sees in a plain run: those before it, within a window where there is one.
    Of the tokens that the block is called on it sees its own group alone. So many variants of one
    token can be laid side by side, share the recorded keys and values, and not see one another.

    Attributes:
        front: ``[key]`` positions whose recorded keys and values stand in front.
        tokens: ``[slot]`` positions of the tokens that are computed.
        group: ``[slot]`` group of each; None for one group.
    """

    front: Int[Tensor, " key"]
    tokens: Int[Tensor, " slot"]
    group: Int[Tensor, " slot"] | None = None

    @classmethod
    def suffix(cls, start: int, stop: int) -> Layout:
        """Lay out the tokens from ``start`` on; all before it are in front."""
        return cls(torch.arange(start), torch.arange(start, stop))

    @classmethod
    def frozen(cls, tokens: Int[Tensor, " token"], n_groups: int = 1) -> Layout:
        """Lay out some tokens, ascending, in so many groups; all others stay as recorded."""
        before = torch.arange(int(tokens[-1]) + 1)
        front = before[~torch.isin(before, tokens)]
        group = torch.arange(n_groups).repeat_interleave(len(tokens))
        return cls(front, tokens.repeat(n_groups), group)

    @cached_property
    def is_plain(self) -> bool:
        """Whether tokens follow the front without a gap, as in a key-value cache."""
        keys = torch.cat([self.front, self.tokens])
        one = self.group is None or len(self.group.unique()) <= 1
        return one and torch.equal(keys, torch.arange(len(keys)))

    @cached_property
    def keys(self) -> Int[Tensor, " key"]:
        """Positions of all keys: the front, then the tokens' own."""
        return torch.cat([self.front, self.tokens])

    @cached_property
    def strangers(self) -> Bool[Tensor, "slot key"]:
        """Mark keys of other groups."""
        group = torch.zeros_like(self.tokens) if self.group is None else self.group
        other = group[:, None] != group
        return torch.cat([other.new_zeros(len(group), len(self.front)), other], 1)

    def mask(self, whole: Tensor) -> Tensor:
        """Turn the mask of a plain run ``[..., pos, pos]`` into ``[..., slot, key]``."""
        device = whole.device
        here = whole[..., self.tokens.to(device), :][..., self.keys.to(device)]
        if self.group is None:
            return here
        never = False if here.dtype == torch.bool else torch.finfo(here.dtype).min
        return here.masked_fill(self.strangers.to(device), never)


class Stop(Exception):
    """Ends a call of a block once it has given what was wanted of it."""


class Listener:
    """Stands in for a key-value cache: keeps the keys and values that it is handed."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], *, then: str = "go on") -> None:
        """Write to lists; ``then="stop"`` ends the call as soon as it has."""
        self.keys, self.values, self.then = keys, values, then
        self.past_keys = torch.empty(1, 0)  # HookedTransformer asks for its size

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values ``[row, pos, head, d_head]`` (HookedTransformer)."""
        self.keys.append(keys.detach())
        self.values.append(values.detach())
        if self.then == "stop":
            raise Stop
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


def lay_out(value: Any, cache: Any, layout: Layout, n_pos: int) -> Any:
    """Turn a recorded argument of a block into that of a call on a layout.

    Args:
        value: A mask ``[row, 1, pos, pos]``, positions or their embeddings ``[1, pos, ...]``, a
            cache, a tuple of these, or anything else, which stays.
        cache: What takes the place of a cache.
        layout: Which tokens.
        n_pos: Number of positions of the recorded run.
    """
    if isinstance(value, tuple | list):
        return type(value)(lay_out(v, cache, layout, n_pos) for v in value)
    if isinstance(value, Tensor):
        if value.ndim == 4 and value.shape[-2:] == (n_pos, n_pos):
            return layout.mask(value[:1])
        if value.ndim >= 2 and value.shape[1] == n_pos:
            return value[:1, layout.tokens.to(value.device)]
        return value
    return cache if is_cache(value) else value
