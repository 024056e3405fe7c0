"""The parts of a random circuit: who reads whom, in which layer, and which edges are true.

Parts are listed so that each stands behind those that it reads from. A time is twice a layer for
attention and one more for the MLP of the same layer, so a part needs a later time than its sources.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import ModelError
from .planted import Back, Match, Place
from .superposition import COHERENCE, Part

Placed = Sequence[tuple[Part, Place]]

GATES = {  # how many parts it joins, ramp, full
    "or": (2, (0.5, 0.7), math.inf),
    "and": (2, (1.3, math.inf), 2.0),
    "majority": (3, (1.5, 1.6), math.inf),
}
SOURCES = {  # corruption: the slot of the embedding that it changes, and at which role
    "inputs": ("x", "x"),
    "answers": ("y", "answer"),
    "query": ("x", "query_x"),
}
TRIES = 500
CONSTANT = 0.2  # most that constant decoys add to a word's logit together, in parts of the answer's


@dataclass
class _Strand:
    """A writer or reader and what follows it, while the circuit is planned."""

    name: str
    label: str
    gated: bool = False
    copies: bool = False  # a writer that copies the answer
    reads: set[str] = field(default_factory=set)
    key: str = ""
    gain: float = 1.0
    hop: int = 0  # 1 where a writer takes its word in two steps, by way of "is"
    steps: int = 0
    relays: int = 0


class Plan:
    """A circuit in the making."""

    def __init__(self, settings: Mapping[str, Any], rng: np.random.Generator) -> None:
        """Decide who reads whom, and where relays and steps go.

        Raises:
            ModelError: if relays and steps do not fit into the layers.
        """
        self.settings, self.rng = settings, rng
        self.is_key = "key" in settings["routes"]
        both, n_gated = len(set(settings["routes"])) == 2, self._n_gated("writers")
        self.writers = [
            _Strand(f"w{i}", "writer", gated=i < n_gated, copies=both and i % 2 == 1)
            for i in range(settings["writers"])
        ]
        self.keys = [w.name for w in self.writers if self.is_key and not w.copies]
        self.values = ["gate"] * bool(n_gated)
        self.values += [w.name for w in self.writers[n_gated:] if w.copies or not self.is_key]
        self._make_readers()
        self._lengthen()

    def _n_gated(self, what: str) -> int:
        redundancy = self.settings["redundancy"]
        gated = redundancy != "none" and self.settings["gated"] == what
        return GATES[redundancy][0] if gated else 0

    def _make_readers(self) -> None:
        """Give every value a reader, every reader something to read, and all a share."""
        rng, n_gated, n = self.rng, self._n_gated("readers"), self.settings["cancellers"]
        readers = [
            _Strand(f"r{i}", "reader", gated=i < n_gated) for i in range(self.settings["readers"])
        ]
        cancellers = [_Strand(f"c{i}", "canceller") for i in range(n)]
        free = readers[n_gated:]
        for value in self.values[bool(n_gated) :]:
            free[rng.integers(len(free))].reads.add(value)
            for reader in free:
                reader.reads |= {value} if rng.random() < 0.3 else set()
        for i, reader in enumerate(readers):
            some = self.values[:1] if reader.gated else rng.permutation(self.values)[:1].tolist()
            reader.reads = reader.reads or set(some) or {"y"}
            reader.key = self.keys[i % len(self.keys)] if self.is_key else ""
        adding = [_Strand("gate", "gate", reads=readers[0].reads)] * bool(n_gated) + free
        for strand in adding:
            strand.gain = float(rng.uniform(0.7, 1.3))
        strongest = max(adding, key=lambda strand: strand.gain)
        taken = float(rng.uniform(0.3, 0.5))  # never all of it: no sum of effects is 0
        for canceller in cancellers:
            canceller.reads, canceller.key = strongest.reads, strongest.key
            canceller.gain = -taken * strongest.gain / n
        self.readers, self.ends = readers + cancellers, adding + cancellers
        total = sum(strand.gain for strand in self.ends)
        for strand in self.ends:
            strand.gain /= total

    def _lengthen(self) -> None:
        """Put relays and MLP steps at random where the layers allow it."""
        settings, alone = self.settings, [s for s in self.writers + self.readers if not s.gated]
        steps = [("steps", s) for s in alone if len(s.reads) <= 2]
        relays = [("hop", w) for w in self.writers if not w.copies]
        relays += [("relays", s) for s in self.writers + self.ends] * 2
        for setting, options in (("mlp_steps", steps), ("relays", relays)):
            left = [options[i] for i in self.rng.permutation(len(options))]
            for _ in range(settings[setting]):
                if not any(self._lengthened(*left.pop()) for _ in range(len(left))):
                    raise ModelError(
                        f"{settings['relays']} relays and {settings['mlp_steps']} MLP steps do not "
                        f"fit into {settings['layers']} layers: take fewer, or more layers"
                    )

    def _lengthened(self, what: str, strand: _Strand) -> bool:
        """Lengthen a strand unless it then would not fit; say whether it did."""
        setattr(strand, what, getattr(strand, what) + 1)
        parts = self.circuit()
        n_mlps = sum(part.attends is None for part in parts)
        if n_mlps < self.settings["layers"] and _depth(parts) <= self.settings["layers"]:
            return True
        setattr(strand, what, getattr(strand, what) - 1)
        return False

    def circuit(self) -> list[Part]:
        """List the parts of the circuit."""
        parts: list[Part] = []
        for w in self.writers:
            first = Part(w.label, "answer", "x", ("x",), w.name, attends=Back(2))
            if w.copies:
                first = replace(first, source="answer", reads=("y",), attends=Back(0))
            elif w.hop:
                slot = f"{w.name} at is"
                parts.append(Part("relay", "is", "x", ("x",), slot, attends=Back(1)))
                first = replace(first, source="is", reads=(slot,), attends=Back(1))
            parts += self._chain(first, w)
        if gated := [w.name for w in self.writers if w.gated]:
            parts.append(self._gate("answer", gated))
        if self.is_key:
            parts.append(Part("query", "query_is", "query_x", ("x",), "query", attends=Back(1)))
        for r in self.readers:
            attends = Match("query", r.key) if self.is_key else Back(2)
            reads, gain = tuple(sorted(r.reads)), 1 / len(r.reads)
            writes = r.name if r.gated else "out"
            first = Part(r.label, "query_is", "answer", reads, writes, gain, attends)
            parts += self._chain(first, r)
        if gated := [r.name for r in self.readers if r.gated]:
            parts += self._chain(replace(self._gate("query_is", gated), writes="out"), self.ends[0])
        return parts

    def _gate(self, role: str, reads: Sequence[str]) -> Part:
        _, ramp, full = GATES[self.settings["redundancy"]]
        return Part("gate", role, role, tuple(reads), "gate", ramp=ramp, full=full)

    def _chain(self, first: Part, strand: _Strand) -> list[Part]:
        """Follow a part by its steps and relays; the last one writes for it, with its share."""
        chain, end, role = [first], first.writes, first.role
        start = COHERENCE if self.settings["superposed"] == "compressed" else 0.0
        for kind in ["mlp"] * strand.steps + ["relay"] * strand.relays:
            slot = f"{strand.name} after {len(chain)}"
            chain[-1] = replace(chain[-1], writes=slot)
            attends = Back(0) if kind == "relay" else None
            chain.append(Part(kind, role, role, (slot,), end, 1.0, attends, (start, math.inf)))
        chain[-1] = replace(chain[-1], gain=chain[-1].gain * strand.gain)
        return chain

    def decoys(self) -> list[Part]:
        """List parts that attend like the others and change nothing."""
        rng, n = self.rng, self.settings["decoys"]
        found: list[Part] = []
        for i in range(n):
            slot, kind = f"decoy {i}", i % 4
            if kind == 0:
                part = Part("decoy", "answer", "x", ("x",), slot, attends=Back(2))
            elif kind == 1 and self.is_key:
                match = Match("query", str(rng.permutation(self.keys)[0]))
                part = Part("decoy", "query_is", "answer", ("y",), slot, attends=match)
            elif kind == 1:
                read = str(rng.permutation(self.values)[0])
                part = Part("decoy", "query_is", "answer", (read,), slot, attends=Back(2))
            elif kind == 2:
                gain = CONSTANT / len(range(2, n, 4))
                part = Part("decoy", "query_is", "is", ("is",), "out", gain, Back(3))
            else:
                part = Part("decoy", "x", "x", ("x",), slot, attends=Back(0))
            found.append(part)
        return found


# --------------------------------------------------------------------------------------- places


def _after(part: Part, written: Mapping[str, int]) -> int:
    """Get the first time, of its kind, that is later than those of a part's sources."""
    time = 1 + max(written.get(slot, -1) for _, slot, _ in part.inputs())
    return time + (time % 2 != (part.attends is None))


def _depth(parts: Sequence[Part]) -> int:
    """Count the layers that parts need at least; the last one works at the last token alone."""
    written: dict[str, int] = {}
    for part in parts:
        written[part.writes] = max(_after(part, written), written.get(part.writes, -1))
    ends = ((part.role != "query_is") + written[part.writes] // 2 for part in parts)
    return 1 + max(ends)


def place_parts(
    parts: Sequence[Part], layers: int, heads: int, rng: np.random.Generator
) -> list[tuple[Part, Place]]:
    """Give each part a layer and each head a number at random.

    Args:
        parts: Each behind those that it reads from.
        layers: Of the model; each has one MLP.
        heads: In a layer.
        rng: Source of randomness.

    Raises:
        ModelError: if they do not fit.
    """
    n_heads = sum(part.attends is not None for part in parts)
    room = f"{layers} layers of {heads} heads"
    if n_heads > layers * heads:
        raise ModelError(f"expected at most {layers * heads} heads in {room}, got {n_heads}")
    latest = _latest(parts, layers)
    for _ in range(TRIES):
        free = {time: heads if time % 2 == 0 else 1 for time in range(2 * layers)}
        written: dict[str, int] = {}
        times: list[int] = []
        for part, most in zip(parts, latest, strict=True):
            some = [t for t in range(_after(part, written), most + 1, 2) if free[t]]
            if not some:
                break
            time = some[rng.integers(len(some))]
            free[time] -= 1
            times.append(time)
            written[part.writes] = max(time, written.get(part.writes, -1))
        else:
            numbers = {layer: rng.permutation(heads).tolist() for layer in range(layers)}
            where = [(t // 2, numbers[t // 2].pop() if t % 2 == 0 else 0) for t in times]
            return list(zip(parts, where, strict=True))
    raise ModelError(
        f"found no place for {n_heads} heads and {len(parts) - n_heads} MLPs in {room}: take more "
        "layers or heads"
    )


def _latest(parts: Sequence[Part], layers: int) -> list[int]:
    """Get the latest time of each part: before all that read it."""
    read: dict[str, int] = {}
    times = []
    for part in reversed(parts):
        end = 2 * layers if part.role == "query_is" else 2 * layers - 2
        before = min(end, read.get(part.writes, end))
        is_mlp = part.attends is None
        time = before - 1 - ((before - 1) % 2 != is_mlp)
        times.append(time)
        for _, slot, _ in part.inputs():
            read[slot] = min(time, read.get(slot, time))
    return times[::-1]


# ---------------------------------------------------------------------------------------- truth


def node_of(part: Part, at: Place) -> str:
    """Name the node of a part, as circuits do."""
    layer, head = at
    return f"L{layer}.mlp@{part.role}" if part.attends is None else f"L{layer}H{head}@{part.role}"


def true_edges(placed: Placed, corruption: str) -> tuple[frozenset[str], frozenset[str]]:
    """Follow what a corruption changes, and keep what reaches the logits.

    Args:
        placed: Parts with their places.
        corruption: ``"inputs"``, ``"answers"`` or ``"query"``.

    Returns:
        Names of nodes, ``logits`` left out, and of edges.
    """
    slot, role = SOURCES[corruption]
    differs: dict[tuple[str, str], list[str]] = defaultdict(list)
    differs[slot, role].append(f"embed@{role}")
    reads: list[tuple[str, str, str]] = []  # sender, receiver, the receiver's node
    for part, at in placed:
        node, before = node_of(part, at), len(reads)
        for name, slot, role in part.inputs():
            receiver = node.replace("@", f".{name}@") if name else node
            reads += [(sender, receiver, node) for sender in differs[slot, role]]
        if len(reads) > before:
            differs[part.writes, part.role].append(node)
    reads += [(sender, "logits", "logits") for sender in differs["out", "query_is"]]
    live, edges = {"logits"}, set()
    for sender, receiver, node in reversed(reads):
        if node in live:
            live.add(sender)
            edges.add(f"{sender}->{receiver}")
    return frozenset(live - {"logits"}), frozenset(edges)
