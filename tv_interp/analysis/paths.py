"""Who reads what whom wrote: the effect of one head's write on another head's input.

Path effect of writer w on reader r, denoising (clean into corrupted; noising is the reverse):

1. w's output at the answer positions is exchanged in the base run. What the residual stream there
   gets from it until r's layer is w's message: the change of what the block's attention adds
   (``through="direct"``, post-norms included), and what the MLPs in between make of it at the same
   positions, all attention staying as it was (``"mlp"``: a vector that a writer starts and an MLP
   finishes has no direct path), or what all components in between make of it there, all other
   positions staying as they were (``"position"``).
2. The message is added to the residual stream that r's layer reads at those positions. Only the
   chosen inputs of r (k, v, both, or q) see it; on grouped-query attention r alone, as if
   ungrouped.
3. r's z at the last token is recomputed, and patched into the base run; all that follows is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import PromptError, TvInterpError, unknown
from ..interventions.engine import MOST_SLOTS, Batch, call_groups
from ..interventions.recording import Recorded
from ..interventions.sites import Head, Patch, Site, Variant
from ..models.adapter import Edit, HookName
from ..prompts import Contrast
from ..prompts.roles import DEMO_ROLES, parse_role
from ..scores import Metric, Scores
from .common import Direction, Experiment, all_heads, as_sites

Via = Literal["q", "k", "v", "kv"]
VIA: tuple[Via, ...] = ("q", "k", "v", "kv")
Through = Literal["direct", "mlp", "position"]
THROUGH: tuple[Through, ...] = ("direct", "mlp", "position")


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
            at the sender's positions, respond too; all attention stays as it was. ``"position"``:
            heads at these positions respond as well; all other positions stay as they were.
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
    received = _receive(run, pairs, several, through)
    variants: list[Variant] = [
        (Patch(r, received[s, r, one]),) for s, r in pairs for one in several
    ]
    found = run.effects(variants, "paths" if progress else None)
    found = found.reshape(len(contrast), len(pairs), len(several))
    effects = np.zeros((len(contrast), len(write_at), len(read_at), len(several)))
    row_of, column_of = ({site: i for i, site in enumerate(at)} for at in (write_at, read_at))
    for i, (s, r) in enumerate(pairs):
        effects[:, row_of[s], column_of[r]] = found[:, i]
    coords = {
        "sender": [str(s) for s in write_at],
        "receiver": [str(r) for r in read_at],
        "via": list(several),
    }
    return run.scores(effects, ("sender", "receiver", "via"), coords, through=through)


def _receive(
    run: Experiment, pairs: Sequence[tuple[Site, Site]], several: Sequence[Via], through: Through
) -> dict[tuple[Site, Site, Via], Tensor]:
    """Compute the receivers' z at their token with each sender's message, ``[prompt, d_head]``."""
    adapter, prompts = run.adapter, run.base.prompts
    senders_of: dict[int, list[Site]] = {}
    for sender, receiver in dict.fromkeys((s, r.layer) for s, r in pairs):
        senders_of.setdefault(receiver, []).append(sender)
    receivers_of: dict[tuple[Site, int], list[Site]] = {}
    for sender, receiver in pairs:
        receivers_of.setdefault((sender, receiver.layer), []).append(receiver)
    shape = (len(prompts), adapter.d_head)
    out: dict[tuple[Site, Site, Via], Tensor] = {
        (s, r, via): torch.zeros(shape, dtype=adapter.dtype) for s, r in pairs for via in several
    }
    values = run.donor.z_at(pairs[0][0].role)
    for rows, tape in run.base.tapes():
        batch = Batch(run.base, rows, tape, run.base.max_memory)
        messages = _Messages(batch, pairs[0][0].role, values[rows].to(adapter.device), through)
        sent = messages.send({s: max(la for t, la in receivers_of if t == s) for s, _ in pairs})
        for layer, senders in senders_of.items():
            for some in messages.few(senders):
                for via in several:
                    z = messages.receive(layer, [sent[s, layer] for s in some], via)
                    for i, sender in enumerate(some):
                        for reader in receivers_of[sender, layer]:
                            out[sender, reader, via][rows] = z[:, i, reader.at[1]].cpu()
    return out


class _Messages:
    """What senders write at some tokens of a batch, and what a layer's heads make of it.

    Senders are laid side by side, each at its own copy of the tokens, and behind them one copy that
    nobody changes: what is frozen takes its value from there.
    """

    def __init__(self, batch: Batch, role: str, values: Tensor, through: Through) -> None:
        """Keep a batch, the donor's head outputs at the senders' role, and the way."""
        self.batch, self.through = batch, through
        self.places = batch.places(role)
        self.values = values if values.ndim == 5 else values[:, :, None]
        self.own = torch.zeros(len(batch.rows), batch.tape.n_pos, dtype=torch.bool)
        self.own.scatter_(1, self.places, True)
        self.tokens = self.own.any(0).nonzero()[:, 0]
        self.read_at = torch.unique(torch.cat([self.tokens, torch.tensor([batch.last])]))

    def few(self, senders: Sequence[Site]) -> list[Sequence[Site]]:
        """Split senders into as many as fit side by side."""
        size = max(1, MOST_SLOTS // len(self.read_at) - 1)
        return [senders[i : i + size] for i in range(0, len(senders), size)]

    def send(self, tops: dict[Site, int]) -> dict[tuple[Site, int], Tensor]:
        """Compute each sender's message ``[row, token, d_model]`` to each layer up to its top."""
        out: dict[tuple[Site, int], Tensor] = {}
        for some in self.few(sorted(tops)):
            if self.through == "direct":
                for layer in sorted({site.layer for site in some}):
                    here = [site for site in some if site.layer == layer]
                    x = self._copies(layer, len(here) + 1)
                    edits = {("z", layer): self._exchange(here)}
                    written = self._call(layer, x, edits=edits, until="attn_out")
                    for site, change in zip(here, self._changes(written), strict=True):
                        out |= {(site, to): change for to in range(layer + 1, tops[site] + 1)}
            else:
                self._follow(some, tops, out)
        return out

    def _follow(
        self, some: Sequence[Site], tops: dict[Site, int], out: dict[tuple[Site, int], Tensor]
    ) -> None:
        """Follow messages through what responds, layer by layer."""
        first, top = some[0].layer, max(tops[site] for site in some)
        x = self._copies(first, len(some) + 1)
        for layer in range(first, top):
            here = [site if site.layer == layer else None for site in some]
            edits: dict[HookName, Edit] = {("z", layer): self._exchange(here)} if any(here) else {}
            if self.through == "mlp":
                started = [site.layer < layer for site in some]
                edits["attn_out", layer] = lambda a, frozen=started: self._as_plain(a, frozen)
            x = self._call(layer, x, edits=edits)
            if self.through == "position":
                free = self.own[:, self.tokens].repeat(1, len(some) + 1).to(x.device)
                x = torch.where(free[..., None], x, self._copies(layer + 1, len(some) + 1))
            for site, change in zip(some, self._changes(x), strict=True):
                if site.layer <= layer < tops[site]:
                    out[site, layer + 1] = change

    def receive(
        self, layer: int, messages: Sequence[Tensor], via: Via
    ) -> Float[Tensor, "row sender head d_head"]:
        """Compute a layer's z at the last token with each message in the inputs of ``via``."""
        slots = torch.isin(self.read_at, self.tokens)
        blind = [
            w for w in "qkv" if w not in via and (w != "q" or slots[-1])
        ]  # q is read at the end
        n = len(messages) + bool(blind)
        x = self.batch.tape.resid[layer][:, self.read_at.to(messages[0].device)]
        x = x[:, None].repeat(1, n, 1, 1)
        x[:, : len(messages), slots.to(x.device)] += torch.stack(list(messages), 1)
        edits: dict[HookName, Edit] = {(what, layer): self._as_plain for what in blind}
        z = call_groups(self.batch, layer, x.flatten(1, 2), self.read_at, edits=edits, until="z")
        return z.unflatten(1, (n, -1))[:, : len(messages), -1]

    def _call(self, layer: int, x: Tensor, **how: Any) -> Tensor:
        return call_groups(self.batch, layer, x, self.tokens, **how)

    def _copies(self, layer: int, n: int) -> Tensor:
        return self.batch.tape.resid[layer][:, self.tokens.to(self.values.device)].repeat(1, n, 1)

    def _changes(self, activation: Tensor) -> Sequence[Tensor]:
        """Subtract the unchanged copy from the others."""
        each = activation.unflatten(1, (-1, len(self.tokens)))
        return (each[:, :-1] - each[:, -1:]).unbind(1)

    def _as_plain(self, activation: Tensor, frozen: Sequence[bool] | None = None) -> Tensor:
        """Put the unchanged copy in the place of the others, or of some."""
        width = len(self.tokens) if frozen is not None else len(self.read_at)
        each = activation.unflatten(1, (-1, width))
        new = each[:, -1:].expand_as(each)
        if frozen is not None:
            mask = torch.tensor([*frozen, False], device=each.device)
            new = torch.where(mask[:, None, None], new, each)
        return new.flatten(1, 2)

    def _exchange(self, sites: Sequence[Site | None]) -> Edit:
        """Put the donor's z of each sender into its copy, at the sender's places of each prompt."""
        slot_of = torch.zeros(self.batch.tape.n_pos, dtype=torch.long)
        slot_of[self.tokens] = torch.arange(len(self.tokens))
        slot = slot_of[self.places].to(self.values.device)
        row = torch.arange(len(slot), device=slot.device)[:, None]

        def edit(z: Tensor) -> Tensor:
            new = z.clone()
            for i, site in enumerate(sites):
                if site is not None:
                    new[row, slot + i * len(self.tokens), site.at[1]] = self.values[
                        :, site.layer, :, site.at[1]
                    ]
            return new

        return edit
