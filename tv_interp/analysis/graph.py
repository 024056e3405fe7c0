"""A model as a graph of nodes with roles: who could pass something to whom.

* A **place** is a role, its tokens in all demonstrations together (``demos="joint"``) or one
  demonstration's (``"each"``: ``answer[2]``). All tokens of a role belong to it, not the last of a
  span alone, so that every token has one place.
* A **sender** is the embedding, a head or an MLP at a place: ``embed@x``, ``L1H0@answer``,
  ``L1.mlp@answer``. It writes at its own place, since the residual stream stays at a token.
* A **receiver** is an input that can be changed alone: the query of a head at a place
  (``L2H1.q@query_is``), the keys or the values that a head at a place reads
  (``L2H1.k@query_is``), an MLP at a place (``L1.mlp@answer``), or ``logits`` (at ``query_is``).
* An **edge** is ``SENDER->RECEIVER``. To queries, MLPs and logits it stays at a place. To keys and
  values it crosses from the sender's place to the place of the head that reads:
  ``L0H1@answer->L2H1.v@query_is``.

So roles are crossed inside heads alone, and a head at one place is another node than the same head
at another. On grouped-query attention each query head has its own edges, as if ungrouped. Heads and
MLPs of the last layer exist at ``query_is`` alone: elsewhere they reach nothing.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..display import Shown
from ..errors import PromptError, TvInterpError, UnknownName, unknown
from ..interventions.recording import batches, check_fits
from ..models.adapter import Adapter
from ..models.parts import VIA, Parts
from ..prompts import Prompts
from ..prompts.roles import DEMO_ROLES, ROLE_NAMES, parse_role

Demos = Literal["joint", "each"]
END = "query_is"
"""Where the answer is predicted."""

_PLACE = re.compile(r"(\w+?)(?:\[(\d+)\])?")


def places_of(prompts: Prompts, demos: Demos = "joint") -> tuple[str, ...]:
    """List the places of prompts, in the order of roles.

    Args:
        prompts: The prompts.
        demos: ``"joint"``: all demonstrations together; ``"each"``: a place for each.

    Raises:
        UnknownName: if ``demos`` is neither.
    """
    if demos not in ("joint", "each"):
        raise unknown("demos", demos, ("joint", "each"))
    found = []
    for role in sorted({int(r) for r in prompts.role_ids.unique()} - {-1}):
        name = ROLE_NAMES[role]
        if demos == "each" and parse_role(name) in DEMO_ROLES:
            found += [f"{name}[{i}]" for i in range(prompts.n_demos)]
        else:
            found.append(name)
    return tuple(found)


def place_masks(prompts: Prompts, places: Sequence[str]) -> Bool[Tensor, "prompt pos place"]:
    """Mark the tokens of each place.

    Raises:
        PromptError: if some token belongs to none: the prompts are of another kind.
    """
    masks = []
    for place in places:
        match = _PLACE.fullmatch(place)
        assert match is not None
        mask = prompts.mask(match[1])
        masks.append(mask if match[2] is None else mask & (prompts.demo_ids == int(match[2])))
    found = torch.stack(masks, -1)
    lost = (prompts.role_ids >= 0) & ~found.any(-1)
    if lost.any():
        row, pos = lost.nonzero()[0].tolist()
        role = ROLE_NAMES[int(prompts.role_ids[row, pos])]
        raise PromptError(
            f"token {pos} of prompt {row} is of role {role!r}, for which the graph has no place "
            f"(it has {', '.join(places)}): make the graph from prompts of the same kind"
        )
    return found


@dataclass(frozen=True, repr=False)
class RoleGraph(Shown):
    """All edges of a model over the places of some prompts; see this module's description.

    Attributes:
        n_layers: Blocks.
        n_heads: Query heads in a block.
        has_mlp: Whether blocks have MLPs.
        order: Whether an MLP reads what its block's heads add (``"serial"``) or not.
        places: Names of places; one is ``query_is``.
        sees: Pairs (source place, destination place) for which a token of the first stands at or
            before one of the second.
    """

    n_layers: int
    n_heads: int
    has_mlp: bool
    order: Literal["serial", "parallel"]
    places: tuple[str, ...]
    sees: frozenset[tuple[str, str]]

    def __str__(self) -> str:
        """Size and places."""
        size = f"{self.n_layers} layers of {self.n_heads} heads{' and MLPs' * self.has_mlp}"
        return f"RoleGraph({len(self.edges)} edges; {size}; {', '.join(self.places)})"

    @classmethod
    def of(cls, model: Any, prompts: Prompts, *, demos: Demos = "joint") -> RoleGraph:
        """Make the graph of a model over prompts.

        Args:
            model: A HookedTransformer or TransformerBridge in eval mode.
            prompts: Prompts whose tokens have roles.
            demos: ``"joint"``: a place holds all demonstrations; ``"each"``: one each.

        Raises:
            ModelError: if the model's blocks are not put together as edges need it.
            PromptError: if the model cannot read the prompts.
            UnknownName: for an unknown ``demos``.
        """
        places = places_of(prompts, demos)
        adapter = Adapter.of(model)
        check_fits(adapter, prompts)
        _, tokens = next(iter(batches(adapter, prompts.select([0]), 1)))
        parts = Parts.of(adapter, adapter.tape(tokens))
        return cls.over(parts, prompts, places)

    @classmethod
    def over(cls, parts: Parts, prompts: Prompts, places: Sequence[str]) -> RoleGraph:
        """Make the graph of a model whose parts are known."""
        masks = place_masks(prompts, places)
        position = torch.arange(masks.shape[1])[None, :, None]
        first = torch.where(masks, position, masks.shape[1]).amin(1)  # [prompt, place]
        last = torch.where(masks, position, -1).amax(1)
        sees = (first[:, :, None] <= last[:, None, :]).any(0)
        names = tuple(places)
        pairs = frozenset((names[s], names[d]) for s, d in sees.nonzero().tolist())
        adapter = parts.adapter
        return cls(adapter.n_layers, adapter.n_heads, parts.has_mlp, parts.order, names, pairs)

    # ------------------------------------------------------------------------------ senders

    @property
    def width(self) -> int:
        """Senders in a layer."""
        return self.n_heads + self.has_mlp

    @property
    def n_senders(self) -> int:
        """Senders at one place: the embedding, and all heads and MLPs."""
        return 1 + self.n_layers * self.width

    @property
    def end(self) -> int:
        """Number of the place where the answer is predicted."""
        return self.places.index(END)

    def below(self, layer: int, receiver: Literal["attention", "mlp"] = "attention") -> int:
        """Count the senders that a layer's attention, or MLP, reads: the first so many."""
        own = self.n_heads if receiver == "mlp" and self.order == "serial" else 0
        return 1 + layer * self.width + own

    def layer_of(self, sender: int) -> int:
        """Get the layer of a sender; -1 for the embedding."""
        return (sender - 1) // self.width if sender else -1

    def sender_name(self, sender: int, place: int) -> str:
        """Name a sender by its number and place."""
        at = self.places[place]
        if sender == 0:
            return f"embed@{at}"
        layer, number = divmod(sender - 1, self.width)
        return f"L{layer}.mlp@{at}" if number == self.n_heads else f"L{layer}H{number}@{at}"

    def is_live(self, layer: int, place: int) -> bool:
        """Whether what a layer writes at a place can reach the logits."""
        return layer < self.n_layers - 1 or place == self.end

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """Names of all nodes: senders, then ``logits``."""
        some = [
            self.sender_name(sender, place)
            for sender in range(self.n_senders)
            for place in range(len(self.places))
            if self.is_live(self.layer_of(sender), place)
        ]
        return (*some, "logits")

    # -------------------------------------------------------------------------------- edges

    @cached_property
    def _numbering(self) -> tuple[dict[tuple[str, int], Int[np.ndarray, "..."]], tuple[str, ...]]:
        """Number all edges and name them, receiver by receiver."""
        numbers: dict[tuple[str, int], np.ndarray] = {}
        names: list[str] = []
        places, heads = range(len(self.places)), range(self.n_heads)
        every = range(self.n_senders)
        lives = [[s for s in every if self.is_live(self.layer_of(s), place)] for place in places]
        called = [[f"{self.sender_name(s, p)}->" for s in lives[p]] for p in places]
        counts = [[bisect_left(alive, n) for n in range(len(every) + 1)] for alive in lives]

        def add(column: np.ndarray, place: int, to: str) -> None:
            """Number the edges to one receiver from the first so many senders at a place."""
            n = counts[place][len(column)]
            column[lives[place][:n]] = range(len(names), len(names) + n)
            names.extend([start + to for start in called[place][:n]])

        for layer in range(self.n_layers):
            n = self.below(layer)
            dests = [place for place in places if self.is_live(layer, place)]
            for via in VIA:
                table = np.full((len(places), n, len(places), self.n_heads), -1)
                for d in dests:
                    for src in places:
                        if src != d if via == "q" else not self._sees(src, d):
                            continue
                        for head in heads:
                            to = f"L{layer}H{head}.{via}@{self.places[d]}"
                            add(table[src, :, d, head], src, to)
                numbers[via, layer] = table
            if self.has_mlp:
                table = np.full((len(places), self.below(layer, "mlp")), -1)
                for d in dests:
                    add(table[d], d, f"L{layer}.mlp@{self.places[d]}")
                numbers["mlp", layer] = table
        table = np.full((len(places), self.n_senders), -1)
        add(table[self.end], self.end, "logits")
        numbers["logits", self.n_layers] = table
        return numbers, tuple(names)

    def _sees(self, src: int, dest: int) -> bool:
        return (self.places[src], self.places[dest]) in self.sees

    @property
    def numbers(self) -> dict[tuple[str, int], Int[np.ndarray, "..."]]:
        """Number of each edge by kind of receiver and layer; -1 where there is none.

        Arrays are ``[src place, sender, dest place, head]`` for ``q``, ``k`` and ``v``, and
        ``[place, sender]`` for ``mlp`` and ``logits``.
        """
        return self._numbering[0]

    @property
    def edges(self) -> tuple[str, ...]:
        """Names of all edges, in the order of their numbers."""
        return self._numbering[1]

    @cached_property
    def number_of(self) -> dict[str, int]:
        """Number of each edge by its name."""
        return {name: i for i, name in enumerate(self.edges)}

    @cached_property
    def ends(self) -> tuple[Int[np.ndarray, " edge"], Int[np.ndarray, " edge"]]:
        """Node that each edge comes from, and node that it goes to, as places in `nodes`."""
        where = {name: i for i, name in enumerate(self.nodes)}
        pairs = [split_edge(name) for name in self.edges]
        return (
            np.array([where[sender] for sender, _ in pairs]),
            np.array([where[node_of(receiver)] for _, receiver in pairs]),
        )

    def select(self, edges: Iterable[str]) -> Bool[np.ndarray, " edge"]:
        """Mark edges by name.

        Raises:
            UnknownName: for an unknown node, with the nearest names, or an edge that is not there.
        """
        mask = np.zeros(len(self.edges), dtype=bool)
        for name in edges:
            if name not in self.number_of:
                raise self._missing(name)
            mask[self.number_of[name]] = True
        return mask

    def between(
        self, senders: Iterable[str] | None = None, receivers: Iterable[str] | None = None
    ) -> tuple[str, ...]:
        """List the edges from some nodes to some nodes; None for all.

        Raises:
            UnknownName: for an unknown node, with the nearest names.
            TvInterpError: if there is no such edge.
        """
        chosen = []
        for some, end in zip((senders, receivers), self.ends, strict=True):
            if some is None:
                chosen.append(np.ones(len(self.edges), dtype=bool))
                continue
            named = list(some)
            for name in named:
                self.check_node(name)
            chosen.append(np.isin(end, [self.nodes.index(name) for name in named]))
        mask = chosen[0] & chosen[1]
        if not mask.any():
            raise TvInterpError(
                "no path between the chosen senders and receivers: a sender is below the receiver, "
                "and at the same place where the receiver is an MLP or the logits"
            )
        return tuple(self.edges[i] for i in np.flatnonzero(mask))

    def check_node(self, name: str) -> None:
        """Refuse a node that the graph does not have.

        Raises:
            UnknownName: with the nearest names.
        """
        if name not in self.nodes:
            raise unknown("node", name, self.nodes)

    def _missing(self, name: str) -> TvInterpError:
        if "->" not in name:
            return UnknownName(
                f"expected an edge such as 'L0H1@answer->L2H1.v@query_is', got {name!r}"
            )
        sender, receiver = split_edge(name)
        self.check_node(sender)
        self.check_node(node_of(receiver))
        return UnknownName(f"no edge leads from {sender} to {receiver} in this graph")

    def prune(self, mask: Bool[np.ndarray, " edge"]) -> Bool[np.ndarray, " edge"]:
        """Take away edges that lead from no embedding to the logits within the marked ones."""
        mask = mask.copy()
        source, target = self.ends
        n = len(self.nodes)
        fixed = np.array([name.startswith("embed@") for name in self.nodes])
        while True:
            fed, used = fixed.copy(), np.zeros(n, dtype=bool)
            fed[target[mask]] = True
            used[source[mask]] = True
            used[n - 1] = True
            kept = mask & fed[source] & used[target]
            if (kept == mask).all():
                return mask
            mask = kept


def split_edge(name: str) -> tuple[str, str]:
    """Split an edge into sender and receiver."""
    sender, receiver = name.split("->", 1)
    return sender, receiver


def node_of(receiver: str) -> str:
    """Get the node that a receiver belongs to: ``L2H1.v@query_is`` to ``L2H1@query_is``."""
    return re.sub(r"\.[qkv]@", "@", receiver)
