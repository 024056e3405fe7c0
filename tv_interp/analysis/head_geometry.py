"""The shape of what heads write and read, held against other heads of the same layers.

None of this is an intervention: it describes heads that interventions found (`find_heads`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from ..display import Shown, Table, as_text
from ..errors import PromptError
from ..interventions.recording import batches, check_memory
from ..interventions.sites import Head, Site
from ..models.adapter import Adapter
from ..models.replay import Layout, Tape
from ..prompts import Contrast, Prompts, check_contrast
from ..scores.statistics import jackknife
from .common import all_heads, as_sites, provenance
from .find import control_sets
from .one_vector import effective_rank
from .vectors import extract_vectors

MEASURES = {
    "separation": "cosine between centred writes of the same answer word, less that of others",
    "rank": "effective rank of the centred writes",
    "alignment": "cosine of the write's change with the unembedding of answer less foil",
    "reading": "change of the head's values by what the answers hold, over a random change",
}
N_BLOCKS = 8
N_RANDOM = 4


class GeometryRow(NamedTuple):
    """One measure of the chosen heads.

    Attributes:
        measure: A key of `MEASURES`.
        heads: Mean over the chosen heads.
        controls: The same mean for each set of other heads from the same layers.
        gap: ``heads`` less the mean of ``controls``, ``lo`` to ``hi`` (95 %, jackknife over blocks
            of prompts); NaN without controls.
        lo: Lower end.
        hi: Upper end.
    """

    measure: str
    heads: float
    controls: tuple[float, ...]
    gap: float
    lo: float
    hi: float


@dataclass(frozen=True, eq=False, repr=False)
class HeadGeometry(Shown):
    """What `head_geometry` measured.

    Attributes:
        values: Every head's over ``(layer, head, part)``, parts as in `MEASURES`; NaN where a head
            writes nothing that varies.
        rows: The chosen heads against others.
        settings: Provenance as plain values.
    """

    values: xr.DataArray
    rows: tuple[GeometryRow, ...]
    settings: dict[str, Any]

    def _blocks(self):
        s = self.settings
        yield (
            f"{s['task']} on {s['model']}: {', '.join(s['heads'])} at {s['at']}, against "
            f"{len(self.rows[0].controls)} sets of as many other heads from the same layers."
        )
        rows = [
            (r.measure, f"{r.heads:+.3g}", f"{np.mean(r.controls):+.3g}",
             f"{r.gap:+.3g} [{r.lo:+.3g}, {r.hi:+.3g}]") if r.controls
            else (r.measure, f"{r.heads:+.3g}", "none", "none")
            for r in self.rows
        ]  # fmt: skip
        yield Table(("measure", "heads", "controls", "gap"), rows)

    def __str__(self) -> str:
        """The chosen heads against others, a line each measure."""
        return as_text(self._blocks())

    def __repr__(self) -> str:
        """Heads, role and model."""
        s = self.settings
        return f"HeadGeometry({', '.join(s['heads'])} at {s['at']} of {s['model']})"


def head_geometry(
    model: Any,
    contrast: Contrast,
    heads: Iterable[Site | Head | str],
    *,
    at: str = "answer",
    taken: Iterable[Site | Head | str] = (),
    seed: int = 0,
) -> HeadGeometry:
    """Describe what heads write at a role, and how well they read what the answers hold.

    * ``separation``: cosine of centred clean writes with the same answer word (the demonstration's
      own at its roles, the prompt's at the query's), mean, less that of different words.
    * ``rank``: exponential entropy of the singular values of the centred clean writes.
    * ``alignment``: cosine of (clean - corrupted write, mean over demonstrations) with
      ``W_U[answer] - W_U[foil]``; norms before the unembedding are left out.
    * ``reading``: how far the clean run's residual stream at the answers moves this head's values
      in the corrupted run, over how far random directions of equal length move them; 1 is chance.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        contrast: Clean and corrupted prompts.
        heads: The found writers or readers.
        at: Role where they write.
        taken: Other heads that no control may have.
        seed: Decides controls and random directions.

    Returns:
        Values of all heads, and the chosen ones against `control_sets`.

    Raises:
        TvInterpError: if a head is outside of the model, or there are none.
        PromptError: if there are fewer than 8 prompts.
        ModelError: if heads' outputs do not add up in the residual stream.
    """
    check_contrast(contrast)
    adapter = Adapter.of(model)
    chosen = [site.at for site in as_sites(heads, at, adapter)]
    others = {site.at for site in as_sites([*chosen, *taken], at, adapter)}
    if len(contrast) < N_BLOCKS:
        raise PromptError(f"expected {N_BLOCKS} prompts or more, got {len(contrast)}")
    controls = control_sets(chosen, all_heads(adapter), others, seed)
    clean, corrupted = (_writes(adapter, p, at) for p in (contrast.clean, contrast.corrupted))
    unembed = model.unembed.W_U.detach().T.cpu().double()
    wanted = unembed[contrast.answer] - unembed[contrast.foil]
    words = _words_of(contrast.clean, at, clean.shape[3])
    aligned = _cosine((clean - corrupted).mean(3), wanted[:, None, None])
    reads = _reading(adapter, contrast, seed)
    blocks = np.array_split(np.random.default_rng([seed, 5]).permutation(len(contrast)), N_BLOCKS)

    def measured(rows: np.ndarray) -> Float[np.ndarray, "layer head part"]:
        index = torch.from_numpy(np.sort(rows))
        shapes = _shapes(clean[index], words[index.numpy()])
        means = [each[index].nanmean(0).numpy() for each in (aligned, reads)]
        return np.stack([*shapes, *means], -1)

    every = np.arange(len(contrast))
    whole = measured(every)
    without = [measured(np.setdiff1d(every, block)) for block in blocks]

    def mean_of(values: np.ndarray, members: Sequence[Head]) -> np.ndarray:
        return np.mean([values[head] for head in members], 0)

    def gaps(values: np.ndarray) -> np.ndarray:
        if not controls:
            return np.full(len(MEASURES), np.nan)
        return mean_of(values, chosen) - np.mean([mean_of(values, c) for c in controls], 0)

    ours, each, left = mean_of(whole, chosen), gaps(whole), [gaps(values) for values in without]
    theirs = [mean_of(whole, control) for control in controls]
    rows = tuple(
        GeometryRow(
            name, float(ours[i]), tuple(float(c[i]) for c in theirs),
            *jackknife(float(each[i]), [float(gap[i]) for gap in left]),
        )
        for i, name in enumerate(MEASURES)
    )  # fmt: skip
    data = xr.DataArray(
        whole, dims=("layer", "head", "part"),
        coords={"layer": np.arange(adapter.n_layers), "head": np.arange(adapter.n_heads),
                "part": list(MEASURES)},
    )  # fmt: skip
    about = provenance(adapter) | contrast.provenance | {"at": at, "seed": seed}
    about["heads"] = [f"L{layer}H{head}" for layer, head in chosen]
    return HeadGeometry(data, rows, about)


def _writes(
    adapter: Adapter, prompts: Prompts, at: str
) -> Float[Tensor, "prompt layer head place d_model"]:
    """Get what every head adds to the residual stream; one place for roles of the query."""
    out = []
    for head in range(adapter.n_heads):
        every = [(layer, head) for layer in adapter.layers]
        values = torch.from_numpy(
            extract_vectors(adapter.model, prompts, at=at, heads=every).data.values
        )
        out.append(values if values.ndim == 4 else values[:, :, None])
    return torch.stack(out, 2).double()


def _words_of(prompts: Prompts, at: str, n_places: int) -> np.ndarray:
    """Number the answer word of each write, ``[prompt, place]``."""
    if prompts.positions(at).ndim == 2:
        words = [[y for _, y in sample.demos] for sample in prompts.samples]
    else:
        words = [[sample.answer] * n_places for sample in prompts.samples]
    return np.unique(np.array(words), return_inverse=True)[1].reshape(len(prompts), n_places)


def _shapes(
    writes: Float[Tensor, "prompt layer head place d_model"], words: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compute separation and effective rank of each head's writes, ``[layer, head]``."""
    flat = writes.permute(1, 2, 0, 3, 4).flatten(2, 3)  # [layer, head, sample, d_model]
    flat = flat - flat.mean(2, keepdim=True)
    unit = flat / flat.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    codes = torch.from_numpy(words).flatten()
    onehot = torch.nn.functional.one_hot(codes).double()
    sizes = onehot.sum(0)
    sums = torch.einsum("lhsd,sc->lhcd", unit, onehot)
    own = (unit**2).sum((2, 3))  # a write with itself does not count
    within = (sums**2).sum((2, 3)) - own
    whole = (unit.sum(2) ** 2).sum(-1) - own
    n, pairs = len(codes), float((sizes * (sizes - 1)).sum())
    apart = n * (n - 1) - pairs
    blank = torch.full_like(within, torch.nan)
    separation = within / pairs - (whole - within) / apart if pairs and apart else blank
    return separation.numpy(), effective_rank(flat.flatten(0, 1)).view(flat.shape[:2]).numpy()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Compute cosines along the last axis; 0 for what is 0."""
    return torch.nn.functional.cosine_similarity(a, b.expand_as(a), dim=-1, eps=1e-12)


def _reading(adapter: Adapter, contrast: Contrast, seed: int) -> Float[Tensor, "prompt layer head"]:
    """Compute how much more the answers' change moves a head's values than a random one does."""
    out = torch.full((len(contrast), adapter.n_layers, adapter.n_heads), torch.nan).double()
    random = torch.Generator().manual_seed(seed)
    kv = torch.tensor([adapter.kv_head(head) for head in range(adapter.n_heads)])
    clean, positions = contrast.clean, contrast.clean.positions("answer")
    for rows, tokens in batches(adapter, contrast.corrupted, check_memory(None)):
        ours = adapter.tape(clean.tokens[rows, : tokens.shape[1]])
        base = adapter.tape(tokens)
        where = (torch.arange(len(rows))[:, None], positions[rows])
        for layer in adapter.layers:
            resid = base.resid[layer]
            change = (ours.resid[layer][where] - resid[where]).cpu()
            moves = [change]
            for _ in range(N_RANDOM):
                noise = torch.randn(change.shape, generator=random).to(change)
                noise = noise / noise.norm(dim=-1, keepdim=True)
                moves.append(noise * change.norm(dim=-1, keepdim=True))
            plain = _values_at(adapter, base, layer, resid, where)
            moved = []
            for by in moves:
                x = resid.clone()
                x[where] = x[where] + by.to(x)
                new = _values_at(adapter, base, layer, x, where)
                moved.append((new - plain).norm(dim=-1).mean(1))  # [row, kv_head]
            ratio = moved[0] / torch.stack(moved[1:]).mean(0)
            # some HookedTransformers repeat keys and values for each query head
            out[rows, layer] = ratio[:, kv] if ratio.shape[1] == adapter.n_kv_heads else ratio
    return out


def _values_at(
    adapter: Adapter, tape: Tape, layer: int, x: Tensor, where: tuple[Tensor, Tensor]
) -> Float[Tensor, "row place kv_head d_head"]:
    """Compute the values of a layer's heads at some tokens, from another input of its block."""
    seen: list[Tensor] = []
    layout, reads = Layout.suffix(0, tape.n_pos), {("v", layer): seen.append}
    adapter.block(tape, layer, x, layout, reads=reads, until="z")
    return seen[0].cpu()[where].double()
