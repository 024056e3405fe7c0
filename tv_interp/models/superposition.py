"""From a list of parts to weights: words in slots, slots in directions of the residual stream.

The residual stream holds *slots*. A slot holds the code of a word, a unit vector of ``n_code``
numbers: one-hot where each word has a number of its own, and in fewer dimensions than there are
words where they are compressed, which is superposition (Elhage et al. 2022, arXiv 2209.10652): few
words are there at once, so a sharp softmax and a threshold tell them apart. Slots are orthogonal to
each other, so what nobody reads changes nothing; a random rotation hides them from the axes.

Beside the slots there is a code of the position, which is sinusoidal (a step back is a rotation),
and a flag at ``<bos>``, where heads rest that find nothing. Under LayerNorm the directions are
orthogonal to the vector of ones, and an anchor, a constant much longer than the slots together,
keeps the norm nearly constant: a part still stretches everything else a little, as in any model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from ..errors import ModelError
from .planted import FILLERS, INPUTS, LOGIT, N_CTX, VOCABULARY, Back, Match, Place

Superposed = Literal["none", "rotated", "compressed"]
Normalization = Literal["none", "LN"]

N_WORDS = len(INPUTS)
COHERENCE = 0.25  # most cosine between two compressed codes; the thresholds of MLPs live with it
LEAST = 14  # fewest numbers in which that many codes are as far apart as that
SCORE = 40.0  # attention score of the wanted key
REST = 24.0  # score of <bos>: more than any key that is not wanted, at COHERENCE and SHIFTED
SHIFTED = 0.4  # most cosine between the codes of two positions
ANCHOR = 16.0  # length of the anchor; a slot has length 1
FREQUENCIES = {"none": 18, "rotated": 18, "compressed": 8}  # of positions, from 37ths of a turn


@dataclass(frozen=True)
class Part:
    """A head or an MLP function, and where it acts.

    Attributes:
        label: ``writer``, ``reader``, ``canceller``, ``relay``, ``query``, ``mlp``, ``gate`` or
            ``decoy``.
        role: Role of the token at which it writes something that counts.
        source: Role of the token that it reads; the same for MLPs.
        reads: Slots whose sum it reads.
        writes: Slot that it writes.
        gain: What a 1 becomes.
        attends: Where a head looks; None for an MLP.
        ramp: From where to where the sum of what an MLP reads makes its output rise from 0 to 1;
            the second is infinite where it goes on rising, and 1 is then reached at ``full``.
        full: See ``ramp``.
    """

    label: str
    role: str
    source: str
    reads: tuple[str, ...]
    writes: str
    gain: float = 1.0
    attends: Back | Match | None = None
    ramp: tuple[float, float] = (0.0, math.inf)
    full: float = 1.0

    def inputs(self) -> list[tuple[str, str, str]]:
        """List what it takes: the input's name (empty for MLPs), the slot, and its role."""
        if self.attends is None:
            return [("", slot, self.role) for slot in self.reads]
        found = [("v", slot, self.source) for slot in self.reads]
        if isinstance(self.attends, Match):
            found += [("q", self.attends.query, self.role), ("k", self.attends.key, self.source)]
        return found


class Shape(NamedTuple):
    """Sizes of the model and how words lie in it."""

    layers: int
    heads: int
    width: int | None
    superposed: Superposed
    normalization: Normalization


class Space:
    """Where slots, positions and flags lie in the residual stream.

    Attributes:
        n_code: Dimensions of a slot.
        width: Of the residual stream.
        codes: Unit vectors ``[word, n_code]``.
        basis: Orthonormal rows ``[dimension, width]``.
        turns: Angle that one step back turns each pair of position numbers by.
    """

    def __init__(self, slots: Sequence[str], shape: Shape, rng: np.random.Generator) -> None:
        """Give every slot its dimensions.

        Raises:
            ModelError: if the width is too small.
        """
        self.turns = _frequencies(FREQUENCIES[shape.superposed], rng)
        rest = 2 * len(self.turns) + 2  # and the two flags
        spare = shape.normalization == "LN"  # one dimension is taken by the vector of ones
        least = N_WORDS if shape.superposed != "compressed" else LEAST
        needed = rest + spare + len(slots) * least
        self.width = needed if shape.width is None else shape.width
        if self.width < needed:
            raise ModelError(
                f"expected width of {needed} or more for {len(slots)} slots of "
                f"{N_WORDS} words (superposed={shape.superposed!r}), got {self.width}"
            )
        self.n_code = min(N_WORDS, (self.width - rest - spare) // len(slots))
        self.codes = _codes(self.n_code, rng)
        self.basis = _basis(self.width, shape, rng)
        self._slots = {slot: rest + i * self.n_code for i, slot in enumerate(slots)}

    @property
    def bos(self) -> torch.Tensor:
        """Direction of the flag at ``<bos>``."""
        return self.basis[0]

    @property
    def anchor(self) -> torch.Tensor:
        """Direction of the constant."""
        return self.basis[1]

    @property
    def position(self) -> torch.Tensor:
        """Directions of the position's numbers, cosines first."""
        return self.basis[2 : 2 + 2 * len(self.turns)]

    def slot(self, *names: str) -> torch.Tensor:
        """Sum of the directions of slots ``[n_code, width]``."""
        starts = [self._slots[name] for name in names]
        return torch.stack([self.basis[at : at + self.n_code] for at in starts]).sum(0)


def compose(
    places: Sequence[tuple[Part, Place]],
    slots: Sequence[str],
    shape: Shape,
    words: Sequence[str],
    rng: np.random.Generator,
) -> dict[str, torch.Tensor]:
    """Write parts as weights, under the names of HookedTransformer.

    Args:
        places: Each part with its layer and its head; the head of an MLP counts for nothing.
        slots: Names of all slots; ``x`` holds inputs, ``y`` fillers, ``is`` a constant at that
            word, ``out`` the prediction.
        shape: Sizes.
        words: What the codes in the slot ``out`` mean, in order.
        rng: Source of the random directions.

    Raises:
        ModelError: if the width is too small for the slots.
    """
    space = Space(slots, shape, rng)
    width, n_code = space.width, space.n_code
    d_head = max(n_code, 2 * len(space.turns)) + 1
    d_mlp = 2 * N_WORDS

    def zeros(*size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.float64)

    embed, unembed = zeros(len(VOCABULARY), width), zeros(width, len(VOCABULARY))
    for slot, known in (("x", INPUTS), ("y", FILLERS)):
        for code, word in zip(space.codes, known, strict=False):
            embed[VOCABULARY.index(word)] = code @ space.slot(slot)
    for code, word in zip(space.codes, words, strict=False):
        unembed[:, VOCABULARY.index(word)] = LOGIT * code @ space.slot("out")
    embed[VOCABULARY.index("<bos>")] = space.bos
    every = space.codes.sum(0)  # a bit of every word
    embed[VOCABULARY.index("is")] = every / (space.codes @ every).abs().max() @ space.slot("is")
    if shape.normalization == "LN":
        embed += ANCHOR * space.anchor
    steps = torch.arange(1, N_CTX, dtype=torch.float64)[:, None] * space.turns
    where = torch.cat([steps.cos(), steps.sin()], 1) / math.sqrt(len(space.turns))
    state = {
        "embed.W_E": embed,
        "pos_embed.W_pos": torch.cat([zeros(1, width), where @ space.position]),
        "unembed.W_U": unembed,
        "unembed.b_U": zeros(len(VOCABULARY)),
    }
    for layer in range(shape.layers):
        W = {f"W_{what}": zeros(shape.heads, width, d_head) for what in "QKV"}
        W |= {f"b_{what}": zeros(shape.heads, d_head) for what in "QKV"}
        W |= {"W_O": zeros(shape.heads, d_head, width), "b_O": zeros(width)}
        M = {"W_in": zeros(width, d_mlp), "b_in": zeros(d_mlp)}
        M |= {"W_out": zeros(d_mlp, width), "b_out": zeros(width)}
        for part, (_, head) in ((p, at) for p, at in places if at[0] == layer):
            if part.attends is None:
                _write_mlp(M, part, space)
            else:
                _write_head({name: tensor[head] for name, tensor in W.items() if name != "b_O"},
                            part, space)  # fmt: skip
        W["W_Q"] *= math.sqrt(d_head)  # the models divide scores by it
        W["b_Q"] *= math.sqrt(d_head)
        state |= {f"blocks.{layer}.attn.{name}": tensor for name, tensor in W.items()}
        state |= {f"blocks.{layer}.mlp.{name}": tensor for name, tensor in M.items()}
    if shape.normalization == "LN":
        # x / |x| * sqrt(width) is nearly x again, since nearly all of its length is the anchor
        norms = ["ln_final", *(f"blocks.{la}.ln{i}" for la in range(shape.layers) for i in (1, 2))]
        for name in norms:
            state[name + ".w"] = torch.full_like(state["blocks.0.mlp.b_out"], ANCHOR / width**0.5)
            state[name + ".b"] = zeros(width)
    return state


def _write_head(W: dict[str, torch.Tensor], part: Part, space: Space) -> None:
    """Fill the weights of one head; the tensors are views into those of its layer."""
    if isinstance(part.attends, Back):
        n, angle = len(space.turns), part.attends.steps * space.turns
        cos, sin = space.position[:n], space.position[n:]
        W["W_Q"][:, :n] = SCORE * (cos * angle.cos()[:, None] + sin * angle.sin()[:, None]).T
        W["W_Q"][:, n : 2 * n] = SCORE * (sin * angle.cos()[:, None] - cos * angle.sin()[:, None]).T
        W["W_K"][:, : 2 * n] = space.position.T
    elif isinstance(part.attends, Match):
        W["W_Q"][:, : space.n_code] = SCORE * space.slot(part.attends.query).T
        W["W_K"][:, : space.n_code] = space.slot(part.attends.key).T
    W["b_Q"][-1], W["W_K"][:, -1] = REST, space.bos
    W["W_V"][:, : space.n_code] = space.slot(*part.reads).T
    W["W_O"][: space.n_code] = part.gain * space.slot(part.writes)


def _write_mlp(M: dict[str, torch.Tensor], part: Part, space: Space) -> None:
    """Fill the weights of one MLP: each word's rise, and where it ends."""
    (start, end), n = part.ramp, N_WORDS
    slope = part.gain / (min(end, part.full) - start)
    for i, (threshold, sign) in enumerate(((start, 1), (end, -1))):
        if math.isfinite(threshold):
            M["W_in"][:, i * n : (i + 1) * n] = (space.codes @ space.slot(*part.reads)).T
            M["b_in"][i * n : (i + 1) * n] = -threshold
            M["W_out"][i * n : (i + 1) * n] = sign * slope * space.codes @ space.slot(part.writes)


# ------------------------------------------------------------------------------- random directions


def _codes(n_code: int, rng: np.random.Generator) -> torch.Tensor:
    """Draw unit codes of all words: one-hot, or random ones pushed apart to `COHERENCE`."""
    if n_code == N_WORDS:
        return torch.eye(N_WORDS, dtype=torch.float64)
    codes = rng.standard_normal((N_WORDS, n_code))
    for step in range(1000):
        codes /= np.linalg.norm(codes, axis=1, keepdims=True)
        cosines = codes @ codes.T - np.eye(N_WORDS)
        worst = np.abs(cosines).max()
        if worst <= COHERENCE:
            return torch.from_numpy(codes)
        push = np.sign(cosines) * (np.abs(cosines) / worst) ** (8 + step / 10)
        codes -= 0.05 * push @ codes
    raise ModelError(
        f"found no {N_WORDS} codes of {n_code} numbers with cosines below {COHERENCE}: take "
        "another seed or a larger width"
    )


def _frequencies(n: int, rng: np.random.Generator) -> torch.Tensor:
    """Draw angles of a step such that no two of `N_CTX` positions are alike."""
    whole = 2 * np.pi * np.arange(1, 19) / 37  # all of them: any two positions have cosine -1/36
    shifts = np.arange(1, N_CTX)[:, None]
    while True:
        some = np.sort(rng.permutation(whole)[:n])
        if np.abs(np.cos(shifts * some).mean(1)).max() <= SHIFTED:
            return torch.from_numpy(some)


def _basis(width: int, shape: Shape, rng: np.random.Generator) -> torch.Tensor:
    """Make orthonormal directions: axes, or random ones; under LayerNorm orthogonal to ones."""
    spare = int(shape.normalization == "LN")
    n = width - spare
    basis = np.eye(n)
    if shape.superposed != "none":
        basis, _ = np.linalg.qr(rng.standard_normal((n, n)))
    basis = np.pad(basis, ((0, 0), (0, spare)))
    if spare:  # mirror the last axis onto the vector of ones
        mirror = np.eye(width)[-1] - 1 / np.sqrt(width)
        basis -= 2 * np.outer(basis @ mirror, mirror) / (mirror @ mirror)
    return torch.from_numpy(basis)
