"""Run prompts once and keep what patching needs: the set-up that all sweeps share."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import PromptError, TvInterpError
from ..models.adapter import Adapter
from ..models.replay import Layout, Tape
from ..prompts import Contrast, Prompts, check_contrast, check_prompts
from .storing import IN_PLACE, Kept, Store

MEMORY = 2 * 2**30
"""Bytes that recorded runs may take, and one step of a sweep, unless told otherwise."""
MAX_SHARE = MEMORY / 3
"""What each of two recorded runs, and one step of a sweep, may take of it."""
MOST_ROWS = 256


@dataclass(frozen=True)
class Replays:
    """How a model's blocks can be called again, as tested against the recorded logits.

    Attributes:
        layers: From any layer on, at all tokens.
        suffix: From any token on.
        groups: At any tokens, in any layout.
        picks: Unembedding a few tokens alone gives their logits.
    """

    layers: bool = False
    suffix: bool = False
    groups: bool = False
    picks: bool = False


@dataclass(frozen=True, eq=False)
class Run:
    """One recorded run over all prompts.

    Attributes:
        adapter: The model.
        prompts: What was run.
        logits: Logits at the last token, on the CPU.
        replays: What can be computed again from it.
        kept: Row numbers of each batch of equal length, and what its forward pass left behind; None
            where that does not fit in memory and is computed again when it is needed.
        max_memory: Bytes that it may take, and one step of a sweep.
    """

    adapter: Adapter
    prompts: Prompts
    logits: Float[Tensor, "prompt vocab"]
    replays: Replays
    kept: tuple[tuple[Tensor, Tape | Kept | None], ...]
    max_memory: float = MEMORY

    @cached_property
    def zero_shot(self) -> Float[Tensor, "prompt vocab"]:
        """Logits of the same prompts without demonstrations, on the CPU; run once, when asked."""
        return last_logits(self.adapter, self.prompts.zero_shot())

    def tapes(self) -> Iterator[tuple[Tensor, Tape]]:
        """Go through the batches: row numbers, and what the forward pass left behind."""
        for rows, tape in self.kept:
            if isinstance(tape, Kept):
                tape = tape.load(self.adapter.device)
            yield rows, self._tape(rows) if tape is None else tape

    def z_at(
        self, at: str | Int[Tensor, "prompt demo"]
    ) -> Float[Tensor, "prompt layer *demo head d_head"]:
        """Get the head outputs at the last token of a role's spans, or at positions; on the CPU."""
        positions = self.prompts.positions(at) if isinstance(at, str) else at
        parts = []
        for rows, tape in self.tapes():
            where = positions[rows].to(tape.resid[0].device)
            index = torch.arange(len(rows), device=where.device)
            index = index[:, None] if where.ndim == 2 else index
            parts.append(torch.stack([z[index, where] for z in tape.z], 1).cpu())
        order = torch.cat([rows for rows, _ in self.kept]).argsort()
        return torch.cat(parts)[order]

    def _tape(self, rows: Tensor) -> Tape:
        length = int(self.prompts.lengths[rows[0]])
        return self.adapter.tape(self.prompts.tokens[rows, :length])


@dataclass(frozen=True, eq=False)
class Recorded:
    """The clean and the corrupted run of a contrast, so that several sweeps share one set-up.

    Attributes:
        model: The model.
        contrast: What was run.
        clean: The clean run.
        corrupted: The corrupted run.
    """

    model: Any
    contrast: Contrast
    clean: Run
    corrupted: Run


def record(
    model: Any, contrast: Contrast, *, max_memory: float | None = None, store: str = "model"
) -> Recorded:
    """Run the clean and the corrupted prompts once and keep what patching needs.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        contrast: Clean and corrupted prompts.
        max_memory: Bytes that the two runs and one step of a sweep may take together, about; what
            does not fit runs again whenever it is needed. None for 2 GiB. Decides memory and speed
            only.
        store: Where the runs are kept: ``"model"`` on its device, ``"cpu"``, or
            ``"disk:DIRECTORY"`` in files below it, which go with the last reference to the
            runs. Only what stays on the model's device counts for ``max_memory``: else every prompt
            runs once.

    Raises:
        FileError: if files cannot be written.
        ModelError: if the model cannot be measured exactly (see `Adapter.of`), or logits are NaN
            or infinite.
        PromptError: if the model cannot read the prompts.
        TvInterpError: if ``max_memory`` is not positive, or ``store`` none of these.
    """
    check_contrast(contrast)
    adapter = Adapter.of(model)
    budget, keeper = check_memory(max_memory) / 3, Store.parse(store)
    clean = record_run(adapter, contrast.clean, max_memory=budget, store=keeper)
    corrupted = record_run(
        adapter, contrast.corrupted, max_memory=budget, replays=clean.replays, store=keeper
    )
    return Recorded(model, contrast, clean, corrupted)


def record_run(
    adapter: Adapter,
    prompts: Prompts,
    *,
    max_memory: float | None = None,
    replays: Replays | None = None,
    store: Store = IN_PLACE,
) -> Run:
    """Run prompts once and keep what patching needs; see `record`.

    Args:
        adapter: The model.
        prompts: What to run.
        max_memory: As in `record`.
        replays: What is known of the model already; None tests it.
        store: Where it is kept.
    """
    check_fits(adapter, prompts)
    budget = left = check_memory(max_memory)
    kept: list[tuple[Tensor, Tape | Kept | None]] = []
    logits = []
    for rows, tokens in batches(adapter, prompts, budget):
        tape = adapter.tape(tokens)
        logits.append(tape.logits[0].cpu())
        if replays is None:
            replays = probe_replays(adapter, tape)
        if store.kind == "model":
            left -= tape_bytes(adapter, tokens.shape[1]) * len(rows)
        kept.append((rows, store.keep(tape) if left >= 0 else None))
    ordered = _in_order((rows for rows, _ in kept), logits)
    assert replays is not None
    return Run(adapter, prompts, ordered, replays, tuple(kept), budget)


def last_logits(adapter: Adapter, prompts: Prompts) -> Float[Tensor, "prompt vocab"]:
    """Run prompts once and keep nothing but the logits at the last token, on the CPU.

    Equal prompts, as zero-shot prompts often are, run once together.

    Raises:
        PromptError: if the model cannot read the prompts.
        ModelError: if the logits are NaN or infinite.
    """
    check_fits(adapter, prompts)
    parts = []
    for rows, tokens in batches(adapter, prompts, MEMORY):
        each, which = tokens.unique(dim=0, return_inverse=True)
        parts.append((rows, adapter.run(each).cpu()[which]))
    return _in_order(*zip(*parts, strict=True))


def _in_order(rows: Iterable[Tensor], logits: Iterable[Tensor]) -> Float[Tensor, "prompt vocab"]:
    """Put the logits of batches into the order of the prompts."""
    return torch.cat(list(logits))[torch.cat(list(rows)).argsort()]


def batches(adapter: Adapter, prompts: Prompts, budget: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Go through prompts of equal length, as many at a time as fit: rows and their tokens."""
    for rows, tokens in prompts.buckets():
        n = tokens.shape[1]
        each = tape_bytes(adapter, n) + call_bytes(adapter, n, n)
        most = max(1, min(MOST_ROWS, int(budget / each)))
        yield from zip(rows.split(most), tokens.split(most), strict=True)


def tape_bytes(adapter: Adapter, n_pos: int) -> int:
    """Bytes that a recorded prompt takes."""
    width = adapter.d_model + 2 * adapter.n_kv_heads * adapter.d_head
    width += adapter.n_heads * adapter.d_head
    return n_pos * (adapter.n_layers * width + adapter.d_model) * adapter.dtype.itemsize


def slot_bytes(adapter: Adapter, n_keys: int) -> int:
    """Bytes that one call of a block takes for a token of a row, about, at its peak."""
    tokens = 8 * adapter.d_model + 3 * adapter.d_mlp
    return (tokens + 3 * adapter.n_heads * n_keys) * adapter.dtype.itemsize


def call_bytes(adapter: Adapter, n_slots: int, n_keys: int) -> int:
    """Bytes that one call of a block takes for a row, about: its tokens, and the keys they see."""
    keys = 4 * adapter.n_kv_heads * adapter.d_head * n_keys * adapter.dtype.itemsize
    return keys + n_slots * slot_bytes(adapter, n_keys)


def check_memory(max_memory: float | None) -> float:
    """Get the budget in bytes.

    Raises:
        TvInterpError: if it is not positive.
    """
    if max_memory is None:
        return MEMORY
    if not max_memory > 0:
        raise TvInterpError(f"expected max_memory in bytes, more than 0, got {max_memory}")
    return max_memory


def check_fits(adapter: Adapter, prompts: Prompts) -> None:
    """Refuse prompts that the model cannot read.

    Raises:
        PromptError: if there are none, a token id is outside of the vocabulary, or they are longer
            than the context.
    """
    check_prompts(prompts)
    if len(prompts) == 0:
        raise PromptError("empty selection: expected at least one prompt")
    vocab, n_ctx = adapter.model.cfg.d_vocab, adapter.model.cfg.n_ctx
    if int(prompts.tokens.max()) >= vocab:
        raise PromptError(
            f"token id {int(prompts.tokens.max())} is outside of {adapter.name}'s vocabulary of "
            f"{vocab}: make the prompts for this model with make_prompts(model, ...)"
        )
    if int(prompts.lengths.max()) > n_ctx:
        raise PromptError(
            f"prompts of {int(prompts.lengths.max())} tokens are longer than the context of "
            f"{adapter.name} ({n_ctx}): use fewer demonstrations"
        )


def probe_replays(adapter: Adapter, tape: Tape) -> Replays:
    """Test on one prompt what blocks called again give, against the recorded logits.

    From a middle layer on: two groups of the second half of the tokens side by side. Where that
    differs: that half alone, then all tokens. What cannot be done is done another way later; a
    warning says so where that is slow.
    """
    n, middle = tape.n_pos, adapter.n_layers // 2
    expected = tape.logits[0][:1].float()
    tolerance = 0.02 if adapter.dtype in (torch.bfloat16, torch.float16) else 1e-4
    pick = torch.stack([expected[0].argmax(), expected[0].argmin()])[None]

    def ends_right(layout: Layout, n_groups: int = 1) -> dict[str, bool]:
        x = tape.resid[middle][:1, layout.tokens.to(adapter.device)]
        row = torch.zeros(1, dtype=torch.long)
        try:
            for layer in adapter.layers[middle:]:
                x = adapter.block(tape, layer, x, layout, rows=row)
            each = x.shape[1] // n_groups
            whole = adapter.logits(x[:, each - 1 :: each])[0].float()
            picked = adapter.logits(x[:, each - 1 :: each], pick)[0].float()
        except Exception:  # any failure of a block called by itself means another way
            return {}
        most = tolerance * (1 + expected.abs().max())
        right = bool((whole - expected).abs().max() <= most)
        picks = bool((picked - expected[:, pick[0]]).abs().max() <= most)
        return {"layers": True, "picks": picks} if right else {}

    half = torch.arange(n // 2, n)
    if len(tape.resid) == adapter.n_layers + 1:
        if tape.has_keys:
            if adapter.shares_keys and (right := ends_right(Layout.frozen(half, 2), 2)):
                return Replays(suffix=True, groups=True, **right)
            if right := ends_right(Layout.suffix(n // 2, n)):
                return Replays(suffix=True, **right)
        if right := ends_right(Layout.suffix(0, n)):
            return Replays(**right)
    warnings.warn(
        f"the blocks of {adapter.name} cannot be run from a middle layer exactly, so every "
        "intervention takes a full forward pass: the numbers are the same, only slower",
        stacklevel=5,
    )
    return Replays()
