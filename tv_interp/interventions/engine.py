"""Run a model under interventions: exact recomputation of what a patch can reach, nothing else.

A *variant* is a set of patches and cuts that are made in one run. Causal masking: a change at layer
l and position p reaches only layers from l and positions from p on. So the plain run is recorded
once, and of each variant only what it can reach is computed again, by the model's own blocks:

* **Changes at the last token alone** (readers, knock-outs of ``query_is``): one token per variant.
  Variants are laid side by side in the position axis, where they share the recorded keys and
  values of all other tokens and do not see each other. A variant enters at its layer.
* **Changes elsewhere** (writers): all tokens from the first changed one on, with variants stacked
  in the batch axis. In the layer of the change only the changed tokens are computed, since no
  other token of that layer can differ; in the last layer only keys, values and the last token.

Nothing is approximated, and no result depends on how the work is cut up. What a model's blocks
cannot do when called by themselves (`Replays` says what was tested) is done by longer calls, in the
end by full forward passes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from ..errors import ModelError, PromptError
from ..models.adapter import Adapter, Edit, HookName, Read
from ..models.finite import not_finite
from ..models.replay import Layout, Tape
from ..prompts import Prompts, check_prompts
from .recording import Run, call_bytes, check_memory, record_run, slot_bytes
from .sites import Cut, Patch, Variant

Readout = Callable[[Float[Tensor, "row vocab"], Int[Tensor, " row"]], Float[Tensor, "row *metric"]]
"""Turns logits at the last token, and the prompts they belong to, into one number each, or into one
of each of several metrics. One that reads few tokens may name them in ``tokens [prompt, token]``;
then it is handed the logits of these alone, through ``of_tokens``."""

Change = Patch | Cut
CACHE = 8 * 2**20
"""Bytes of an MLP's hidden layer in one call on the CPU: more would fall out of its cache."""
MOST_SLOTS = 64
"""Most tokens side by side in one call: each is offered the keys of all, and uses its own."""


def run_variants(
    model: Any,
    prompts: Prompts,
    variants: Sequence[Variant],
    readout: Readout,
    *,
    others: Literal["respond", "frozen"] = "respond",
    run: Run | None = None,
    max_memory: float | None = None,
    progress: str | None = None,
) -> Float[Tensor, "variant prompt *metric"]:
    """Run prompts under each variant and read a number off the logits at the last token.

    Args:
        model: The model.
        prompts: What to run.
        variants: The interventions; an empty variant is the plain run.
        readout: From logits and prompt numbers to one number each, or to one a metric.
        others: Whether tokens that a variant does not change respond to it, or stay as recorded;
            the last token always responds.
        run: The plain run of these prompts, where it has been recorded.
        max_memory: Bytes that one step may take; None for 2 GiB. Decides memory and speed only.
        progress: Label of a progress bar; None for none.

    Raises:
        ModelError: if the model discards an edit, or a hook never fires.
    """
    check_prompts(prompts)
    adapter = Adapter.of(model)
    budget = check_memory(max_memory)
    for variant in variants:
        for change in variant:
            _check_change(adapter, change)
    if run is None:
        run = record_run(adapter, prompts, max_memory=budget / 2)
    out = torch.empty(0, len(prompts))
    bar = tqdm(
        total=len(run.kept) * len(variants), desc=progress, disable=progress is None, leave=False
    )
    with bar:
        for rows, tape in run.tapes():
            batch = Batch(run, rows, tape, budget / 2)
            for some, values in _run_batch(batch, variants, readout, others):
                if not out.numel():
                    size = (len(variants), len(prompts), *values.shape[2:])
                    out = torch.empty(size, dtype=values.dtype)
                out[torch.tensor(some)[:, None], rows] = values
                bar.update(len(some))
    if not out.isfinite().all():
        raise not_finite(adapter, "values under intervention")
    return out


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts of equal length, their recorded run, and the memory that one step may take."""

    run: Run
    rows: Int[Tensor, " row"]
    tape: Tape
    budget: float

    @property
    def adapter(self) -> Adapter:
        """The model."""
        return self.run.adapter

    @property
    def last(self) -> int:
        """Position of the last token."""
        return self.tape.n_pos - 1

    @cached_property
    def _positions(self) -> dict[tuple[str, int | None], Tensor]:
        return {}

    def positions(self, patch: Patch) -> Int[Tensor, "row place"]:
        """Get the positions of a patch, one column for roles outside of demonstrations."""
        if patch.positions is not None:
            return patch.positions[self.rows]
        key = (patch.site.role, patch.site.demo)
        if key not in self._positions:
            self._positions[key] = self.places(*key)
        return self._positions[key]

    def places(self, role: str, demo: int | None = None) -> Int[Tensor, "row demo"]:
        """Get the last tokens of a role, one column for roles outside of demonstrations."""
        found = self.run.prompts.positions(role)[self.rows]
        found = found if demo is None else found[:, demo]
        return found if found.ndim == 2 else found[:, None]

    def touches(self, change: Change) -> Bool[Tensor, "row pos"]:
        """Mark the tokens at which something is changed."""
        if isinstance(change, Cut):
            return change.dest[self.rows, : self.tape.n_pos]
        mask = torch.zeros(len(self.rows), self.tape.n_pos, dtype=torch.bool)
        return mask.scatter(1, self.positions(change), True)

    def at_a_time(self, n_slots: int, n_keys: int) -> int:
        """Get how many variants one call may stack, each over all rows."""
        each = call_bytes(self.adapter, n_slots, n_keys) * len(self.rows)
        most = self.budget / each
        if self.adapter.device.type == "cpu":
            hidden = len(self.rows) * n_slots * self.adapter.d_mlp * self.adapter.dtype.itemsize
            most = min(most, CACHE / hidden)
        return max(1, int(most))


# ---------------------------------------------------------------------------------- what reaches


INPUTS = ("resid_pre", "resid_post")
LOCAL = ("q", "z", "attn_out", "mlp_out")
"""Components that change nothing but what their own token gives to the residual stream."""


@dataclass(frozen=True, eq=False)
class Reach:
    """What of a variant can change the last logits, and from where on.

    Attributes:
        changes: Its changes, without those that reach nothing.
        first: Layer of the first; the number of layers where only the last output is changed.
        start: First position.
    """

    changes: Variant
    first: int
    start: int


def _stage(change: Change) -> int:
    """Get the layer that first sees a change: its own, or the next for a block's output."""
    if isinstance(change, Cut):
        return change.layer
    return change.site.layer + (change.site.component == "resid_post")


def _layer(change: Change) -> int:
    return change.layer if isinstance(change, Cut) else change.site.layer


def _is_input(change: Change) -> bool:
    return isinstance(change, Patch) and change.site.component in INPUTS


def _is_key(change: Change) -> bool:
    return isinstance(change, Patch) and change.site.component in ("k", "v")


def _is_local(change: Change) -> bool:
    return isinstance(change, Cut) or change.site.component in LOCAL


def _reaches(batch: Batch, variants: Sequence[Variant]) -> list[Reach]:
    """See what each variant can change in any of these prompts."""
    n_layers, ends = batch.adapter.n_layers, {}
    for variant in variants:
        for change in variant:
            key = _place(change)
            if key not in ends:
                columns = batch.touches(change).any(0).nonzero()
                ends[key] = int(columns[0]), int(columns[-1])
    out = []
    for variant in variants:
        live = []
        for change in variant:
            # of the last layer, other tokens matter by their keys and values alone
            over = _stage(change) == n_layers - 1 and _is_local(change)
            over |= _stage(change) == n_layers
            if not over or ends[_place(change)][1] == batch.last:
                live.append(change)
        first = min((_stage(c) for c in live), default=n_layers)
        start = min((ends[_place(c)][0] for c in live), default=batch.last)
        out.append(Reach(tuple(live), first, start))
    return out


def _place(change: Change) -> Any:
    if isinstance(change, Cut):
        return id(change.dest)
    if change.positions is not None:
        return id(change.positions)
    return change.site.role, change.site.demo


# ------------------------------------------------------------------------------------- execution


def _run_batch(
    batch: Batch,
    variants: Sequence[Variant],
    readout: Readout,
    others: Literal["respond", "frozen"],
) -> Iterator[tuple[list[int], Float[Tensor, "variant row *metric"]]]:
    """Run all variants on one batch of prompts, some at a time: their numbers and values."""
    reaches = _reaches(batch, variants)
    can = batch.run.replays
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, reach in enumerate(reaches):
        if not reach.changes:
            groups["plain"].append(i)
        elif others == "frozen":
            groups[frozenset(map(_place, reach.changes))].append(i)
        elif not can.layers:
            groups["forward"].append(i)
        elif can.groups and reach.start == batch.last:
            groups["last"].append(i)
        else:
            groups[reach.first, reach.start if can.suffix else 0].append(i)
    for key, members in groups.items():
        changes = {i: reaches[i] for i in members}
        if key == "plain":
            value = readout(batch.tape.logits[0], batch.rows).cpu()
            yield members, value.expand(len(members), *value.shape)
        elif key == "forward":
            yield from _forwards(batch, changes, readout)
        elif key == "last" or others == "frozen":
            for some, resid in _respond(batch, changes):
                yield some, _values(batch, resid, readout)
        else:
            for some, resid in _suffixes(batch, changes, *key):
                yield some, _values(batch, resid, readout)


def _respond(
    batch: Batch, reaches: dict[int, Reach]
) -> Iterator[tuple[list[int], Float[Tensor, "row variant d_model"]]]:
    """Run variants that change the same tokens: these and the last respond, others are frozen."""
    own = torch.zeros(len(batch.rows), batch.tape.n_pos, dtype=torch.bool)
    own[:, -1] = True
    for change in next(iter(reaches.values())).changes:
        own |= batch.touches(change)
    tokens = own.any(0).nonzero()[:, 0]
    responds = own[:, tokens]  # tokens may differ from prompt to prompt
    adapter, tape = batch.adapter, batch.tape
    n_keys = tape.n_pos + MOST_SLOTS
    free = batch.budget / len(batch.rows) - call_bytes(adapter, 0, n_keys)
    size = min(MOST_SLOTS, free / slot_bytes(adapter, n_keys)) / len(tokens)
    size = max(1, int(size))
    order = sorted(reaches, key=lambda i: reaches[i].first)
    where, places = tokens.to(adapter.device), Places(batch, tokens, "slots")
    for at in range(0, len(order), size):
        some = order[at : at + size]
        x, n = tape.resid[0][:, :0], 0
        for stage in range(reaches[some[0]].first, adapter.n_layers + 1):
            new = sum(reaches[i].first == stage for i in some)
            x = torch.cat([x, tape.resid[stage][:, where].repeat(1, new, 1)], 1)
            n += new
            active = [reaches[i].changes for i in some[:n]]
            x = _with_inputs(places, active, stage, x)
            if stage == adapter.n_layers or not n:
                continue
            layout = Layout.frozen(tokens, n)
            edits, reads = _edits(places, active, stage, layout)
            x = call_groups(batch, stage, x, tokens, edits=edits, reads=reads)
            if not responds.all():
                kept = tape.resid[stage + 1][:, where].repeat(1, n, 1)
                mask = responds.repeat(1, n)[..., None].to(adapter.device)
                x = torch.where(mask, x, kept)
        yield some, x[:, len(tokens) - 1 :: len(tokens)]


def call_groups(
    batch: Batch,
    layer: int,
    x: Float[Tensor, "row slot d_model"],
    tokens: Int[Tensor, " token"],
    *,
    edits: dict[HookName, Edit] | None = None,
    reads: dict[HookName, Read] | None = None,
    until: Literal["z", "attn_out"] | None = None,
) -> Tensor:
    """Call a block on some tokens in several variants side by side; all others are as recorded.

    Where a model's blocks cannot be called in such a layout, each variant gets a row of its own in
    the batch axis with all tokens in it, and what edits and reads see is cut to the same shape.

    Args:
        batch: Prompts and their recorded run.
        layer: Which block.
        x: Its input, variant by variant.
        tokens: Positions, ascending, of each variant.
        edits: As in `Adapter.run`; see the tokens of all variants side by side.
        reads: Likewise.
        until: As in `Adapter.block`.

    Raises:
        ModelError: if the model's blocks cannot be called by themselves at all.
    """
    adapter, tape, n = batch.adapter, batch.tape, x.shape[1] // len(tokens)
    if batch.run.replays.groups:
        layout = Layout.frozen(tokens, n)
        return adapter.block(tape, layer, x, layout, edits=edits, reads=reads, until=until)
    check_layers(batch.run)
    where = tokens.to(adapter.device)

    def narrow(wide: Tensor) -> Tensor:
        parts = wide[:, where].unflatten(0, (n, -1))
        return parts.transpose(0, 1).flatten(1, 2)

    def widen(slots: Tensor, wide: Tensor) -> Tensor:
        new = wide.clone()
        new[:, where] = slots.unflatten(1, (n, -1)).transpose(0, 1).flatten(0, 1).to(new.dtype)
        return new

    whole = widen(x, tape.resid[layer].repeat(n, 1, 1))
    out = adapter.block(
        tape,
        layer,
        whole,
        Layout.suffix(0, tape.n_pos),
        edits={
            k: lambda a, edit=edit: widen(edit(narrow(a)), a) for k, edit in (edits or {}).items()
        },
        reads={k: lambda a, read=read: read(narrow(a)) for k, read in (reads or {}).items()},
        until=until,
    )
    return narrow(out)


def check_layers(run: Run) -> None:
    """Refuse a model whose blocks cannot be called by themselves.

    Raises:
        ModelError: naming the model.
    """
    if not run.replays.layers:
        raise ModelError(
            f"the blocks of {run.adapter.name} cannot be called by themselves exactly, so sources "
            "and paths cannot be measured on it; use patch_heads and knock_out"
        )


def _suffixes(
    batch: Batch, reaches: dict[int, Reach], first: int, start: int
) -> Iterator[tuple[list[int], Float[Tensor, "row variant d_model"]]]:
    """Run variants that enter at the same layer and position, all tokens from there on."""
    adapter, tape = batch.adapter, batch.tape
    n_pos, n_rows = tape.n_pos, len(batch.rows)
    layout = Layout.suffix(start, n_pos)
    places = Places(batch, layout.tokens, "rows")
    size = batch.at_a_time(n_pos - start, n_pos)
    members = list(reaches)
    for at in range(0, len(members), size):
        some = members[at : at + size]
        changes = [reaches[i].changes for i in some]
        which = torch.arange(n_rows).repeat(len(some))
        source = which.to(adapter.device)
        stage, x = first, None
        entry = [c for variant in changes for c in variant if _stage(c) == first]
        if batch.run.replays.groups and first < adapter.n_layers and all(map(_is_local, entry)):
            x = tape.resid[first + 1][source, start:]
            for tokens_here, new in _enter(batch, changes, first, entry):
                x[:, (tokens_here - start).to(x.device)] = new
            stage = first + 1
        if x is None:
            x = tape.resid[stage][source, start:]
        for layer in range(stage, adapter.n_layers):
            x = _with_inputs(places, changes, layer, x)
            if layer == adapter.n_layers - 1 and batch.run.replays.suffix and start < batch.last:
                x = _last_layer(batch, changes, x, start, which)
            else:
                edits, reads = _edits(places, changes, layer, layout)
                x = adapter.block(tape, layer, x, layout, rows=which, edits=edits, reads=reads)
        end = Places(batch, layout.tokens[-1:], "rows")
        x = _with_inputs(end, changes, adapter.n_layers, x[:, -1:])
        yield some, x.reshape(len(some), n_rows, -1).transpose(0, 1)


def _enter(
    batch: Batch, changes: Sequence[Variant], layer: int, entry: Sequence[Change]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run the layer of the first changes at the changed tokens: tokens, ``[stacked row, token]``.

    The layer's input is that of the plain run, so no other token's output can differ.
    """
    touched = torch.stack([batch.touches(change).any(0) for change in entry]).any(0)
    tokens = touched.nonzero()[:, 0]
    n, n_rows = len(changes), len(batch.rows)
    for few in tokens.split(max(1, MOST_SLOTS // n)):
        layout = Layout.frozen(few, n)
        x = batch.tape.resid[layer][:, few.to(batch.adapter.device)].repeat(1, n, 1)
        edits, reads = _edits(Places(batch, few, "slots"), changes, layer, layout)
        out = batch.adapter.block(batch.tape, layer, x, layout, edits=edits, reads=reads)
        yield few, out.view(n_rows, n, len(few), -1).transpose(0, 1).flatten(0, 1)


def _last_layer(
    batch: Batch, changes: Sequence[Variant], x: Tensor, start: int, which: Tensor
) -> Float[Tensor, "stacked 1 d_model"]:
    """Run the last layer: keys and values of the suffix, and the last token."""
    adapter, tape = batch.adapter, batch.tape
    layer, n_pos = adapter.n_layers - 1, tape.n_pos
    own = Layout(torch.arange(0), torch.arange(start, n_pos - 1))
    edits, _ = _edits(Places(batch, own.tokens, "rows"), changes, layer, own, _is_key)
    fresh = adapter.block(tape, layer, x[:, :-1], own, edits=edits, until="keys")
    front = adapter.behind(tape, layer, start, which, fresh)
    layout = Layout.suffix(n_pos - 1, n_pos)
    edits, reads = _edits(Places(batch, layout.tokens, "rows"), changes, layer, layout)
    return adapter.block(tape, layer, x[:, -1:], layout, front=front, edits=edits, reads=reads)


def _forwards(
    batch: Batch, reaches: dict[int, Reach], readout: Readout
) -> Iterator[tuple[list[int], Float[Tensor, "variant row *metric"]]]:
    """Run variants as full forward passes."""
    adapter, n_pos = batch.adapter, batch.tape.n_pos
    tokens = batch.run.prompts.tokens[batch.rows, :n_pos]
    layout = Layout.suffix(0, n_pos)
    places = Places(batch, layout.tokens, "rows")
    members = list(reaches)
    size = batch.at_a_time(n_pos, n_pos)
    for at in range(0, len(members), size):
        some = members[at : at + size]
        changes = [reaches[i].changes for i in some]
        edits: dict[HookName, Edit] = {}
        reads: dict[HookName, Read] = {}
        for layer in adapter.layers:
            more = _edits(places, changes, layer, layout, lambda change: True)
            edits, reads = edits | more[0], reads | more[1]
        logits = adapter.run(tokens.repeat(len(some), 1), edits, reads)
        values = readout(logits, batch.rows.repeat(len(some))).cpu()
        yield some, values.view(len(some), len(batch.rows), *values.shape[1:])


def _values(
    batch: Batch, resid: Float[Tensor, "row variant d_model"], readout: Readout
) -> Float[Tensor, "variant row *metric"]:
    """Read the last block's output at the last token."""
    adapter, rows, n = batch.adapter, batch.rows, resid.shape[1]
    tokens = getattr(readout, "tokens", None) if batch.run.replays.picks else None
    if tokens is not None:
        logits = adapter.logits(resid, tokens[rows])
        values = readout.of_tokens(logits.flatten(0, 1))  # type: ignore[attr-defined]
        return values.view(-1, n, *values.shape[1:]).transpose(0, 1)
    bytes_each = len(rows) * adapter.model.cfg.d_vocab * adapter.dtype.itemsize * 4
    out = []
    for some in resid.split(max(1, int(batch.budget / bytes_each)), 1):
        logits = adapter.logits(some).transpose(0, 1)
        values = readout(logits.flatten(0, 1), rows.repeat(some.shape[1])).cpu()
        out.append(values.view(some.shape[1], len(rows), *values.shape[1:]))
    return torch.cat(out)


# ----------------------------------------------------------------- from changes to edited tensors


class Places:
    """Where the tokens of a batch are in what a block is called on.

    Attributes:
        batch: The prompts.
        tokens: Positions that each variant has there, ascending.
        beside: Whether variants are side by side in the position axis, or stacked in the batch
            axis.
    """

    def __init__(self, batch: Batch, tokens: Tensor, beside: Literal["slots", "rows"]) -> None:
        """Look at one layout."""
        self.batch, self.tokens, self.beside = batch, tokens, beside
        self._slot_of = torch.full((batch.tape.n_pos,), -1)
        self._slot_of[tokens] = torch.arange(len(tokens))
        self._known: dict[Any, tuple[Tensor, Tensor, Tensor | None]] = {}

    def of(self, patch: Patch, number: int) -> tuple[Tensor, ...]:
        """Get rows, slots, heads (where it is of one) and values of a variant's patch, flat."""
        batch, key = self.batch, _place(patch)
        positions, value = batch.positions(patch), patch.value[batch.rows]
        value = value if value.ndim == 3 else value[:, None]
        if value.shape[:2] != positions.shape:
            raise PromptError(
                f"patch at {patch.site} has values for {tuple(value.shape[:2])} prompts and "
                f"demonstrations, the prompts have {tuple(positions.shape)}"
            )
        if key not in self._known:
            slot = self._slot_of[positions]
            row, here = torch.arange(len(slot))[:, None].expand_as(slot), slot >= 0
            self._known[key] = row[here], slot[here], None if here.all() else here
        row, slot, here = self._known[key]
        if self.beside == "slots":
            slot = slot + number * len(self.tokens)
        else:
            row = row + number * len(batch.rows)
        head = () if patch.site.head is None else (torch.full_like(row, patch.site.head),)
        value = value.flatten(0, 1) if here is None else value[here.to(value.device)]
        return row, slot, *head, value

    def cut(
        self, cut: Cut, number: int, layout: Layout, mask: Bool[Tensor, "row head slot key"]
    ) -> None:
        """Mark in a mask what a variant's cut takes away."""
        rows, n_rows, n = self.batch.rows, len(self.batch.rows), len(self.tokens)
        dest, src = cut.dest[rows][:, self.tokens], cut.src[rows][:, layout.keys]
        row, slot = slice(None), slice(None)
        if self.beside == "slots":
            slot = slice(number * n, (number + 1) * n)
        else:
            row = slice(number * n_rows, (number + 1) * n_rows)
        mask[row, cut.head, slot] |= dest[:, :, None] & src[:, None]


def _with_inputs(places: Places, changes: Sequence[Variant], stage: int, x: Tensor) -> Tensor:
    """Change the residual stream that goes into a layer."""
    modes: dict[str, list[tuple[Tensor, ...]]] = defaultdict(list)
    for i, variant in enumerate(changes):
        for change in variant:
            if _is_input(change) and _stage(change) == stage:
                assert isinstance(change, Patch)
                modes[change.mode].append(places.of(change, i))
    return _patcher(places.batch.adapter, modes)(x) if modes else x


def _edits(
    places: Places,
    changes: Sequence[Variant],
    layer: int,
    layout: Layout,
    only: Callable[[Change], bool] = lambda change: not _is_input(change),
) -> tuple[dict[HookName, Edit], dict[HookName, Read]]:
    """Gather the changes of variants within one layer into one edit for each hook point.

    Args:
        places: Where the variants' tokens are.
        changes: The variants.
        layer: The layer.
        layout: What its block is called on.
        only: Which changes are meant; the residual stream is changed elsewhere.
    """
    adapter = places.batch.adapter
    gathered: dict[HookName, dict[str, list[tuple[Tensor, ...]]]] = {}
    cut: Tensor | None = None
    for i, variant in enumerate(changes):
        for change in variant:
            if not only(change) or layer != _layer(change):
                continue
            if isinstance(change, Patch):
                name = (change.site.component, layer)
                modes = gathered.setdefault(name, defaultdict(list))
                modes[change.mode].append(places.of(change, i))
                continue
            if cut is None:
                n_rows = len(places.batch.rows)
                n_rows *= 1 if places.beside == "slots" else len(changes)
                shape = (n_rows, adapter.n_heads, len(layout.tokens), len(layout.keys))
                cut = torch.zeros(shape, dtype=torch.bool)
            places.cut(change, i, layout, cut)
    edits: dict[HookName, Edit] = {
        name: _patcher(adapter, modes) for name, modes in gathered.items()
    }
    reads: dict[HookName, Read] = {}
    if cut is not None:
        cut = cut.to(adapter.device)
        edits["attn_scores", layer] = _cutter(adapter, cut)
        reads["pattern", layer] = _check_cut(adapter, cut)
    return edits, reads


def _patcher(adapter: Adapter, modes: dict[str, list[tuple[Tensor, ...]]]) -> Edit:
    """Make an edit of places and values, ``(row, slot, head where there is one, value)``."""
    joined = {
        mode: tuple(torch.cat(part).to(adapter.device) for part in zip(*each, strict=True))
        for mode, each in modes.items()
    }

    def edit(activation: Tensor) -> Tensor:
        new = activation.clone()
        for mode, (*where, value) in joined.items():
            new.index_put_(tuple(where), value.to(new.dtype), accumulate=mode == "add")
        return new

    return edit


def _cutter(adapter: Adapter, mask: Tensor) -> Edit:
    def edit(scores: Tensor) -> Tensor:
        new = scores.masked_fill(mask, float("-inf"))
        # what the model masks itself is -inf or the smallest number, depending on its class
        if (new.amax(-1) <= torch.finfo(scores.dtype).min / 2).any():
            raise ModelError(
                "the cut leaves a token nothing to attend to within the sliding window of "
                f"{adapter.name}: cut fewer roles"
            )
        return new

    return edit


def _check_cut(adapter: Adapter, mask: Tensor) -> Read:
    def read(pattern: Tensor) -> None:
        if pattern[mask].any():
            raise ModelError(
                f"{adapter.name} discards edits of attention scores, so attention cannot be cut: "
                'load it with backend="hooked", or use patch_sources'
            )

    return read


def _check_change(adapter: Adapter, change: Change) -> None:
    """Refuse a change outside of the model.

    Raises:
        ModelError: naming the site and the model's size.
    """
    if isinstance(change, Cut):
        component, name = "z", f"L{change.layer}H{change.head}"
        layer, head = change.layer, change.head
    else:
        component, name = change.site.component, str(change.site)
        layer, head = change.site.layer, change.site.head
    heads = adapter.n_kv_heads if component in ("k", "v") else adapter.n_heads
    if layer >= adapter.n_layers or (head or 0) >= heads:
        raise ModelError(
            f"{name} is outside of {adapter.name}: it has {adapter.n_layers} layers and {heads} "
            f"heads for {component}"
        )
