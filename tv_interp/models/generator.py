"""Random circuits as real models: known truth to score a method against.

A circuit is made of *strands*: a writer takes a word at ``x`` to the answer position, a reader
takes it on to ``query_is``, where it becomes the prediction. On the ``"value"`` route the word
itself is read (the answer belongs to the last input); on the ``"key"`` route readers find the
answer to the query by what writers wrote (look-up), and with both routes they also read what a
second kind of writer copied there. Relays and MLP steps lengthen a strand, cancellers read and
subtract, and decoys attend and write like the others but change nothing. Strands add up in the
logits, so their edges act alone, but for those that a gate joins:

============== =================================================================================
``redundancy`` of the gated parts
============== =================================================================================
``or``         one of two suffices: noising one changes nothing
``and``        both of two are needed: denoising one changes nothing
``majority``   two of three suffice: no single exchange changes anything, only pairs do
============== =================================================================================

The truth is stated for an ablation and a corruption. The ablation is always ``"corrupted"``: what
is outside of the circuit takes its value from the corrupted run. An edge is true if its sender
differs between the two runs and its receiver lies on a way to the logits; so a head that carries
inputs is true under ``inputs`` and not under ``answers``. `tv_interp.models.superposition` says how
words lie in the residual stream. Related: tracr (arXiv 2301.05062), InterpBench (arXiv 2407.14494).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch

from ..display import Shown, wrapped
from ..errors import ModelError, unknown
from .planted import ANSWERS, FILLERS, TEMPLATE, Backend, PlantedTask, Sizes, make_model
from .strands import GATES, SOURCES, Plan, node_of, place_parts, true_edges
from .superposition import Normalization, Shape, Superposed, compose

Route = Literal["key", "value"]
Redundancy = Literal["none", "or", "and", "majority"]
Gated = Literal["writers", "readers"]


@dataclass(frozen=True)
class Truth:
    """What is in the circuit, and for which ablation.

    Attributes:
        corruption: Of the prompts.
        ablation: What takes the place of all that is outside: ``"corrupted"``, the corrupted run.
        nodes: Names such as ``embed@x``, ``L1H0@answer``, ``L1.mlp@answer``; without ``logits``.
        edges: Names such as ``L1H0@answer->L3H2.k@query_is`` or ``L3H2@query_is->logits``: the role
            of a head that reads keys or values is where it looks from.
    """

    corruption: str
    ablation: Literal["corrupted"]
    nodes: frozenset[str]
    edges: frozenset[str]


@dataclass(frozen=True, repr=False)
class PlantedCircuit(Shown):
    """A generated model, its task, and the truth about it.

    Attributes:
        name: ``circuit-`` and the seed.
        model: HookedTransformer or TransformerBridge, in eval mode.
        task: Where its prompts come from; the model answers all of them correctly.
        template: The template of its prompts.
        labels: Node to what it is: ``writer``, ``reader``, ``canceller``, ``relay`` (passes on),
            ``query`` (fetches the query), ``mlp`` (a step), ``gate`` or ``decoy``.
        truths: Corruption to what is true under it.
        settings: What the circuit was made of.
    """

    name: str
    model: Any
    task: PlantedTask
    template: str
    labels: Mapping[str, str]
    truths: Mapping[str, Truth]
    settings: Mapping[str, Any]

    @property
    def corruptions(self) -> tuple[str, ...]:
        """The corruptions under which something is true."""
        return tuple(self.truths)

    def __str__(self) -> str:
        """Nodes by what they are, and how many are true under each corruption."""
        by_label: dict[str, list[str]] = {}
        for node, label in self.labels.items():
            by_label.setdefault(label, []).append(node)
        lines = [f"{self.name}: a planted circuit, and the truth about it"]
        lines += [f"{label:<10}{', '.join(nodes)}" for label, nodes in by_label.items()]
        lines += [
            f"corruption {kind}: {len(truth.nodes)} nodes, {len(truth.edges)} edges"
            for kind, truth in self.truths.items()
        ]
        return "\n".join(wrapped(lines))

    def nodes(self, *labels: str) -> frozenset[str]:
        """Get the nodes with one of some labels."""
        return frozenset(node for node, label in self.labels.items() if label in labels)


def draw_circuit(
    seed: int, *, backend: Backend = "auto", dtype: torch.dtype = torch.float32
) -> PlantedCircuit:
    """Make a circuit whose every setting is drawn at random.

    Args:
        seed: Decides all of it.
        backend: As in `planted_circuit`.
        dtype: As in `planted_circuit`.

    Raises:
        UnknownName: if there is no such backend.
        ModelError: if HookedTransformer is asked for and TransformerLens does not have it.

    Example:
        >>> draw_circuit(3).corruptions
        ('inputs', 'answers', 'query')
    """
    rng = np.random.default_rng([seed, 1])
    routes = [("value",), ("value",), ("value",), ("key",), ("key", "value")][rng.integers(5)]
    writers, readers = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    redundancy, gated = "none", "writers"
    if routes == ("value",) and rng.random() < 0.75:
        redundancy = ("or", "and", "majority")[rng.integers(3)]
        gated = ("writers", "readers")[rng.integers(2)]
        n = GATES[redundancy][0] + int(rng.integers(2))  # one more that acts alone, or none
        if gated == "writers":
            writers = n
        else:
            readers, writers = n, min(writers, 1 + n - GATES[redundancy][0])
    if "key" in routes:  # a writer of keys has a reader of its own
        readers = max(readers, math.ceil(writers / len(routes)))
        writers = max(writers, len(routes))
    n_mlps = int(rng.integers(3))
    return planted_circuit(
        seed=seed,
        writers=writers,
        readers=readers,
        relays=int(rng.integers(3)),
        mlp_steps=max(0, n_mlps - (redundancy != "none")),
        redundancy=redundancy,
        gated=gated,
        cancellers=int(rng.integers(2)),
        decoys=int(rng.integers(2, 5)),
        routes=routes,
        layers=5 if n_mlps or redundancy != "none" else int(rng.integers(4, 6)),
        heads=4,
        superposed=get_args(Superposed)[rng.integers(3)],
        normalization=get_args(Normalization)[rng.integers(2)],
        backend=backend,
        dtype=dtype,
    )


def planted_circuit(
    *,
    seed: int = 0,
    writers: int = 2,
    readers: int = 1,
    relays: int = 0,
    mlp_steps: int = 0,
    redundancy: Redundancy = "none",
    gated: Gated = "writers",
    cancellers: int = 0,
    decoys: int = 3,
    routes: Sequence[Route] = ("value",),
    layers: int = 5,
    heads: int = 4,
    width: int | None = None,
    superposed: Superposed = "none",
    normalization: Normalization = "none",
    backend: Backend = "auto",
    dtype: torch.dtype = torch.float32,
) -> PlantedCircuit:
    """Make a model with a random circuit of given parts.

    Args:
        seed: Decides where parts are, who reads whom, how much, and all directions.
        writers: Heads that bring a word to the answer positions. With both routes the first, third,
            ... write keys and the others copy values.
        readers: Heads that bring it from there to ``query_is``.
        relays: Heads in between that pass a word on: at ``is``, ``answer`` or ``query_is``.
        mlp_steps: MLPs in between, one per layer, at ``answer`` or ``query_is``.
        redundancy: How the gated parts are joined; the gate is an MLP.
        gated: Which parts are: the first writers (gate at ``answer``), or the first readers (gate
            at ``query_is``), which then all read the first writer.
        cancellers: Readers that subtract what the strongest reader adds, together up to half of it.
        decoys: Heads outside of the circuit, in turn: one that writes at answers and one that reads
            answers into slots that nobody reads, one that adds a constant to the prediction, and
            one at ``x``.
        routes: How readers use what was written.
        layers: Of the model.
        heads: In a layer.
        width: Of the residual stream; None for as much as the circuit needs. Compressed words use
            what more there is.
        superposed: ``"none"``: each word of a slot has an axis. ``"rotated"``: a random direction,
            orthogonal to all others. ``"compressed"``: random directions, more than dimensions.
        normalization: ``"LN"`` for LayerNorms.
        backend: As in `planted.build`.
        dtype: Of all parameters.

    Raises:
        UnknownName: for an unknown route, redundancy, superposition, normalization or backend.
        ModelError: if the parts do not fit into the layers and heads, the slots not into the width,
            or a writer has no reader; if HookedTransformer is asked for and does not exist.

    Example:
        >>> case = planted_circuit(redundancy="or")
        >>> sorted(case.truths["inputs"].edges)[:2]
        ['L2H0@answer->L3.mlp@answer', 'L3.mlp@answer->L4H2.v@query_is']
    """
    settings: dict[str, Any] = dict(
        writers=writers, readers=readers, relays=relays, mlp_steps=mlp_steps,
        redundancy=redundancy, gated=gated, cancellers=cancellers, decoys=decoys,
        routes=tuple(routes), layers=layers, heads=heads, width=width,
        superposed=superposed, normalization=normalization,
    )  # fmt: skip
    _check(**settings)
    rng = np.random.default_rng(seed)
    shape = Shape(layers, heads, width, superposed, normalization)
    plan = Plan(settings, rng)
    parts = [*plan.circuit(), *plan.decoys()]
    placed = place_parts(parts, layers, heads, rng)
    key = "key" in settings["routes"]
    slots = list(dict.fromkeys(["x", "y", "is", "out", *(part.writes for part in parts)]))
    state = compose(placed, slots, shape, FILLERS if key else ANSWERS, rng)
    d_head, d_mlp = (state[f"blocks.0.{name}"].shape[-1] for name in ("attn.W_Q", "mlp.W_in"))
    sizes = Sizes(layers, heads, d_head, d_mlp)
    norm = None if normalization == "none" else normalization
    # on the value route the metric reads nothing that another answer or query changes
    truths = [Truth(kind, "corrupted", *true_edges(placed, kind)) for kind in SOURCES]
    name = f"circuit-{seed}"
    return PlantedCircuit(
        name=name,
        model=make_model(state, sizes, backend, dtype, normalization=norm),
        task=PlantedTask(name, "lookup" if key else "last"),
        template=TEMPLATE,
        labels={node_of(part, at): part.label for part, at in placed},
        truths={truth.corruption: truth for truth in (truths if key else truths[:1])},
        settings=settings,
    )


def _check(
    *, writers: int, readers: int, redundancy: str, gated: str, routes: tuple[str, ...], **others
) -> None:
    """Refuse settings that make no circuit."""
    choices = [("redundancy", redundancy, get_args(Redundancy)), ("gated", gated, get_args(Gated))]
    choices += [("route", route, get_args(Route)) for route in routes or ("",)]
    for kind, known in (("superposed", Superposed), ("normalization", Normalization)):
        choices.append((kind, others.pop(kind), get_args(known)))
    for kind, name, known in choices:
        if name not in known:
            raise unknown(kind, name, known)
    least = {"writers": 1, "readers": 1, "layers": 2, "heads": 1}
    numbers = dict(writers=writers, readers=readers) | {
        name: n for name, n in others.items() if name != "width"
    }
    for name, n in numbers.items():
        if n < least.get(name, 0):
            raise ModelError(f"expected {name} of {least.get(name, 0)} or more, got {n}")
    if redundancy != "none":
        n, there = GATES[redundancy][0], numbers[gated]
        if tuple(routes) != ("value",):
            raise ModelError(
                f"redundancy={redundancy!r} needs routes=('value',), got {routes}: two keys that "
                "contradict each other have no answer"
            )
        if there < n:
            raise ModelError(f"redundancy={redundancy!r} joins {n} {gated}, got {there}")
        if gated == "readers" and writers > 1 and readers == n:
            raise ModelError(
                f"the {n} gated readers read the first writer alone, got {writers} writers: add "
                "a reader"
            )
    if "key" in routes and math.ceil(writers / len(set(routes))) > readers:
        raise ModelError(
            f"every writer of keys needs a reader of its own, got writers={writers} and "
            f"readers={readers}: add readers"
        )
    if len(set(routes)) == 2 and writers < 2:
        raise ModelError(f"both routes need 2 writers or more, got {writers}")
