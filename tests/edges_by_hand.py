"""Exact exchange of edges by TransformerLens hooks alone, for prompts of equal length.

Three runs an edge, no engine. Of tv_interp it knows only the fields of prompts.
"""

from __future__ import annotations

import re
from collections import defaultdict

import torch


class EdgesByHand:
    """Exchanges the message along some edges, and reads the metric.

    An edge changes what its sender gives to one input of its receiver. The receiver's output is
    computed with it, then put into a run that is otherwise plain.
    """

    def __init__(self, model, contrast, direction):
        self.model, self.prompts = model, contrast.clean
        base, donor = contrast.clean.tokens, contrast.corrupted.tokens
        self.sign = -1 if direction == "noise" else 1
        if direction == "denoise":
            base, donor = donor, base
        self.tokens, self.words = base, (contrast.answer, contrast.foil)
        self.base, self.donor = self.cache(base), self.cache(donor)
        self.answers = {}
        self.plain = self.metric()
        self.total = self.sign * (self.metric(tokens=donor) - self.plain).mean().item()

    @torch.no_grad()
    def run(self, hooks, tokens=None):
        return self.model.run_with_hooks(
            self.tokens if tokens is None else tokens, fwd_hooks=list(hooks)
        )

    def cache(self, tokens):
        kept = {}

        def keep(name):  # a bridge knows its hooks by other names too
            return name, lambda value, hook: kept.update({name: value.clone()})

        whats = ("attn.hook_z", "hook_attn_out", "hook_mlp_out", "hook_resid_pre")
        names = [f"blocks.{la}.{what}" for la in range(self.model.cfg.n_layers) for what in whats]
        self.run(map(keep, names), tokens)
        return kept

    def metric(self, hooks=(), tokens=None):
        logits, rows = self.run(hooks, tokens)[:, -1], torch.arange(len(self.tokens))
        return logits[rows, self.words[0]] - logits[rows, self.words[1]]

    def at(self, role):
        positions = self.prompts.positions(role)
        positions = positions[:, None] if positions.ndim == 1 else positions
        mask = torch.zeros(self.tokens.shape, dtype=torch.bool)
        return mask.scatter(1, positions, True)[..., None]

    @torch.no_grad()
    def message(self, sender):
        """The change of what a node writes, at its role: [prompt pos d_model]."""
        what, role = sender.split("@")
        if what == "embed":
            change = self.difference("blocks.0.hook_resid_pre")
        elif what.endswith("mlp"):
            change = self.difference(f"blocks.{what[1:-4]}.hook_mlp_out")
        else:
            layer, head = map(int, re.findall(r"\d+", what))
            z = self.difference(f"blocks.{layer}.attn.hook_z")[:, :, head]
            change = z @ self.model.blocks[layer].attn.W_O[head]
        return change * self.at(role)

    def difference(self, name):
        return self.donor[name] - self.base[name]

    def answer(self, receiver, change):
        """The hook that makes a receiver respond to a change of its input, and nothing else."""
        what, _, role = receiver.partition("@")
        if what == "logits":
            return (
                f"blocks.{self.model.cfg.n_layers - 1}.hook_resid_post",
                lambda x, hook: x + change,
            )
        block = "blocks." + re.findall(r"\d+", what)[0]
        if what.endswith("mlp"):
            before = self.base[f"{block}.hook_attn_out"] + change
            new = self.read(f"{block}.hook_mlp_out", [(f"{block}.hook_attn_out", put(before))])
            return f"{block}.hook_mlp_out", put(new, self.at(role))
        head, via = int(re.findall(r"\d+", what)[1]), what[-1]
        before = self.base[f"{block}.hook_resid_pre"] + change
        name = f"{block}.attn.hook_{via}"
        new = self.read(name, [(f"{block}.hook_resid_pre", put(before))])
        z = self.read(f"{block}.attn.hook_z", [(name, put(new, head=head))])
        return f"{block}.attn.hook_z", put(z, self.at(role), head)

    def read(self, name, hooks):
        kept = {}
        self.run([*hooks, (name, lambda x, hook: kept.update({name: x.clone()}))])
        return kept[name]

    @torch.no_grad()
    def read_edges(self, edges):
        """The edges whose receiver takes up something of what the sender writes otherwise."""
        senders = {edge.split("->")[0] for edge in edges}
        messages = {sender: self.message(sender) for sender in senders}
        live = {sender: m[:, m.any(-1).any(0)] for sender, m in messages.items() if m.any()}
        found, weights = [], {}
        for edge in edges:
            sender, receiver = edge.split("->")
            if sender not in live:
                continue
            what = receiver.split("@")[0]
            if what not in weights:
                weights[what] = self.weights(what)
            taken = live[sender] @ weights[what]
            if taken.norm() > 1e-3 * live[sender].norm() * weights[what].norm():
                found.append(edge)
        return found

    def weights(self, what):
        """What a receiver applies to its input first, norms apart."""
        if what == "logits":
            return self.model.unembed.W_U
        layer, *head = map(int, re.findall(r"\d+", what))
        block = self.model.blocks[layer]
        return getattr(block.attn, f"W_{what[-1].upper()}")[head[0]] if head else block.mlp.W_in

    def effect(self, *edges):
        """Mean effect of exchanging edges together, in parts of the total."""
        senders = defaultdict(list)
        for sender, receiver in (edge.split("->") for edge in sorted(edges)):
            senders[receiver].append(sender)
        hooks = []
        for key in ((receiver, *some) for receiver, some in senders.items()):
            if key not in self.answers:
                self.answers[key] = self.answer(key[0], sum(map(self.message, key[1:])))
            hooks.append(self.answers[key])
        return self.sign * (self.metric(hooks) - self.plain).mean().item() / self.total


def put(new, mask=None, head=None):
    """A hook that puts a value in, at some tokens and for one head."""

    def hook(value, hook):
        value = value.clone()
        there = value if head is None else value[:, :, head]
        what = new if head is None else new[:, :, head]
        there[:] = what if mask is None else torch.where(mask, what, there)
        return value

    return hook
