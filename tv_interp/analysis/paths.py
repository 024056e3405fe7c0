"""Who reads what whom wrote: the effect of one head's write on another head's input.

Path effect of writer w on reader r, denoising (clean into corrupted; noising is the reverse):

1. w's output at the answer positions is exchanged in the base run; the change of what the block's
   attention adds to the residual stream there is w's message (post-norms are included).
2. The message is added to the residual stream that r's layer reads at those positions: as it is
   (``through="direct"``), or with what the MLPs in between make of it at the same positions, all
   attention staying as it was (``"mlp"``; a vector that a writer starts and an MLP finishes has no
   direct path). Only the chosen inputs of r (k, v, both, or q) see it;
   on grouped-query attention r alone, as if ungrouped.
3. r's z at the last token is recomputed, and patched into the base run; all that follows is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import PromptError, TvInterpError, unknown
from ..interventions.engine import ROWS_PER_RUN, Recorded, Run, chunks, run_variants
from ..interventions.sites import Head, Patch, Site, Variant
from ..models.adapter import Adapter, Edit, HookName
from ..models.replay import Tape
from ..prompts import Contrast
from ..prompts.roles import DEMO_ROLES, parse_role
from ..scores import Metric, Scores
from .common import Direction, Experiment, all_heads, as_sites

Via = Literal["q", "k", "v", "kv"]
VIA: tuple[Via, ...] = ("q", "k", "v", "kv")
Through = Literal["direct", "mlp"]
THROUGH: tuple[Through, ...] = ("direct", "mlp")


def patch_paths(
    model: Any,
    contrast: Contrast,
    *,
    receivers: Iterable[Site | Head | str],
    senders: Iterable[Site | Head | str] | None = None,
    via: Via | Sequence[Via] = "kv",
    through: Through = "direct",
    sender_at: str = "answer",
    receiver_at: str = "query_is",
    direction: Direction = "denoise",
    metric: str | Metric = "logit_diff",
    recorded: Recorded | None = None,
    progress: bool = False,
) -> Scores:
    """Measure how far each sender's write reaches the metric through each receiver.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        contrast: Clean and corrupted prompts.
        receivers: Heads that read, at ``receiver_at``.
        senders: Heads that write, at ``sender_at``; None for all in layers below some receiver.
        via: Which of the receiver's inputs the message reaches; several for an axis of them.
        through: ``"direct"``: through the residual stream alone. ``"mlp"``: the MLPs between,
            at the sender's positions, respond too; all attention stays as it was.
        sender_at: Role at which senders write.
        receiver_at: Role at which receivers read; the last token.
        direction: As in `patch_heads`.
        metric: As in `patch_heads`.
        recorded: As in `patch_heads`.
        progress: As in `patch_heads`.

    Returns:
        Scores over ``(prompt, sender, receiver, via)``; 0 where the sender is not below the
        receiver.

    Raises:
        UnknownName: for an unknown role, via or through.
        PromptError: if ``receiver_at`` is a role of demonstrations.
        TvInterpError: if no sender is below any receiver.
    """
    if through not in THROUGH:
        raise unknown("through", through, THROUGH)
    several = (via,) if isinstance(via, str) else tuple(via)
    for one in several:
        if one not in VIA:
            raise unknown("via", one, VIA)
    if parse_role(receiver_at) in DEMO_ROLES:
        raise PromptError(
            f"receivers read at one token, got {receiver_at!r}, a role of every demonstration: use "
            "'query_is'"
        )
    run = Experiment(model, contrast, recorded, direction, metric, receiver_at)
    adapter = run.adapter
    read_at = as_sites(receivers, receiver_at, adapter)
    top = max(site.layer for site in read_at)
    below = [head for head in all_heads(adapter) if head[0] < top]
    if senders is None and not below:
        raise TvInterpError("no sender is below the receivers: they are all in layer 0")
    write_at = as_sites(below if senders is None else senders, sender_at, adapter)
    pairs = [(s, r) for s in write_at for r in read_at if s.layer < r.layer]
    if not pairs:
        raise TvInterpError(
            "no path between the chosen senders and receivers: every sender is in the layer of a "
            "receiver or above; choose senders below"
        )
    messages = _messages(adapter, run.base, run.donor, pairs, through)
    received = _receive(adapter, run.base, messages, pairs, several)
    variants: list[Variant] = [
        (Patch(r, received[s, r, one]),) for s, r in pairs for one in several
    ]
    values = run_variants(
        model, run.base.prompts, variants, run.readout, progress="paths" if progress else None
    )
    effects = np.zeros((len(contrast), len(write_at), len(read_at), len(several)))
    found = run.effects(values).reshape(len(contrast), len(pairs), len(several))
    for i, (s, r) in enumerate(pairs):
        effects[:, write_at.index(s), read_at.index(r)] = found[:, i]
    coords = {
        "sender": [str(s) for s in write_at],
        "receiver": [str(r) for r in read_at],
        "via": list(several),
    }
    return run.scores(effects, ("sender", "receiver", "via"), coords, through=through)


def _messages(
    adapter: Adapter,
    base: Run,
    donor: Run,
    pairs: Sequence[tuple[Site, Site]],
    through: Through,
) -> dict[tuple[Site, int], Tensor]:
    """Compute each sender's change of what a receiver reads, ``[prompt, demo, d_model]``."""
    wanted = sorted({(s, r.layer) for s, r in pairs})
    role = pairs[0][0].role
    places, values = _demo_axis(base.prompts.positions(role), 2), donor.z_at(role)
    width = adapter.model.cfg.d_model
    out = {key: torch.zeros(*places.shape, width, dtype=adapter.dtype) for key in wanted}
    for rows, tokens in chunks(base.prompts):
        index = torch.arange(len(rows), device=adapter.device)[:, None]
        at = (index, places[rows].to(adapter.device))
        tape, every = adapter.tape(tokens), torch.arange(len(rows))
        top = max(layer for _, layer in wanted)
        plain = {}
        for layer in range(min(s.layer for s, _ in wanted), top):
            plain |= adapter.read_block(tape, layer, every, [("attn_out", layer)])
        for site in sorted({s for s, _ in wanted}):
            value = _demo_axis(values[rows, site.layer, ..., site.head, :], 3).to(adapter.device)
            name, edit = ("attn_out", site.layer), _replace((*at, site.head), value)
            z = {("z", site.layer): edit}
            written = adapter.read_block(tape, site.layer, every, [name], z)[name][at]
            layers = [layer for s, layer in wanted if s == site]
            if through == "direct":
                change: Tensor = written - plain[name][at]
                changes = dict.fromkeys(layers, change)
            else:
                frozen: dict[HookName, Edit] = {
                    key: _put(value) for key, value in plain.items() if key[1] > site.layer
                }
                frozen[name] = _replace(at, written)
                changes = _respond(adapter, tape, site.layer, layers, frozen, at)
            for layer, change in changes.items():
                out[site, layer][rows] = change.cpu()
    return out


def _respond(
    adapter: Adapter, tape: Tape, layer: int, layers: Sequence[int], edits: dict, at: tuple
) -> dict[int, Tensor]:
    """Run from a layer on with all attention as recorded, and read the residual stream's change."""
    store: dict[int, Tensor] = {}

    def reader(receiver: int):
        def read(resid: Tensor) -> None:
            store[receiver] = resid[at] - tape.resid[receiver][at]

        return read

    reads = {("resid_post", receiver - 1): reader(receiver) for receiver in layers}
    rows, until = torch.arange(len(tape.resid[0])), max(layers)
    edits = {key: edit for key, edit in edits.items() if key[1] < until}
    adapter.replay(tape, layer, 0, rows, edits=edits, reads=reads, until=until)
    return store


def _demo_axis(values: Tensor, ndim: int) -> Tensor:
    """Give values at a role outside of demonstrations a demonstration axis of one."""
    return values if values.ndim == ndim else values[:, None]


def _receive(
    adapter: Adapter,
    base: Run,
    messages: dict[tuple[Site, int], Tensor],
    pairs: Sequence[tuple[Site, Site]],
    several: Sequence[Via],
) -> dict[tuple[Site, Site, Via], Tensor]:
    """Recompute the receivers' z at their last token, ``[prompt, d_head]``, with each message."""
    out: dict[tuple[Site, Site, Via], Tensor] = {}
    shape = (len(base.prompts), adapter.d_head)
    senders_of: dict[int, list[Site]] = {}
    for sender, receiver in pairs:
        group = senders_of.setdefault(receiver.layer, [])
        if sender not in group:
            group.append(sender)
        for via in several:
            out[sender, receiver, via] = torch.zeros(shape, dtype=adapter.dtype)
    places = _demo_axis(base.prompts.positions(pairs[0][0].role), 2)
    last = base.prompts.positions(pairs[0][1].role)
    for rows, tokens in chunks(base.prompts, ROWS_PER_RUN // 4):
        tape = adapter.tape(tokens)
        for layer, senders in senders_of.items():
            readers = sorted({r for _, r in pairs if r.layer == layer})
            n, every = len(senders), torch.arange(len(rows))
            plain = adapter.read_block(tape, layer, every, [(what, layer) for what in "qkv"])
            index = torch.arange(n * len(rows), device=adapter.device)[:, None]
            message = torch.zeros(n * len(rows), *tape.resid[layer].shape[1:], dtype=adapter.dtype)
            message = message.to(adapter.device)
            where = (index, places[rows].repeat(n, 1).to(adapter.device))
            message[where] = torch.cat([messages[s, layer][rows] for s in senders]).to(
                adapter.device
            )
            for via in several:
                edits = {}
                for what in {"q", "k", "v"} - set(via):
                    whole = plain[what, layer]
                    edits[what, layer] = _put(whole.repeat(n, *[1] * (whole.ndim - 1)))
                store = adapter.read_block(
                    tape, layer, every.repeat(n), [("z", layer)], edits, add=message
                )
                z = store["z", layer].unflatten(0, (n, len(rows)))
                for i, sender in enumerate(senders):
                    for reader in readers:
                        key = (sender, reader, via)
                        if key in out:
                            out[key][rows] = z[i, every, last[rows], reader.head].cpu()
    return out


def _replace(at: tuple, value: Tensor):
    def edit(activation: Tensor) -> Tensor:
        new = activation.clone()
        new[at] = value
        return new

    return edit


def _put(value: Tensor):
    return lambda activation: value
