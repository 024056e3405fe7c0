"""How much of a task vector do single heads carry, and do the found ones carry more than others?

The paper of local and global vectors (arXiv 2406.16007) stops at which positions matter. Here a
vector is taken apart by the heads that wrote it: of a local vector the writers' part at the
answers, of a global one the readers' part at ``query_is``. What was there before (at an answer its
own word) and what MLPs make of both is no head's, so all heads together need not make the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xarray as xr

from ..interventions.recording import record_run
from ..interventions.sites import Head, Site
from ..models.adapter import Adapter
from ..prompts import Contrast, Task, check_contrast, get_task
from ..scores import Scores, get_metric
from ..scores.metrics import Targets
from .common import all_heads, as_sites, label_scores, provenance
from .comparison import wrapped
from .convergence import share_of
from .find import HeadReport, control_sets, find_heads, split_prompts
from .heads import patch_together
from .vectors import Vectors, extract_vectors, inject_vectors


class HeadSets(NamedTuple):
    """Vectors from heads alone.

    Attributes:
        scores: Effects over ``(prompt, layer, site)``: ``vector`` (the whole local or global vector
            exchanged), ``heads``, ``all heads``, ``control 0`` and so on, and their mean
            ``controls`` where there are any.
        controls: The heads of each control.
    """

    scores: Scores
    controls: tuple[tuple[Head, ...], ...]


def head_vectors(
    model: Any,
    contrast: Contrast,
    heads: Iterable[Site | Head | str],
    *,
    at: str = "answer",
    taken: Iterable[Site | Head | str] = (),
    metric: str = "logit_diff",
    seed: int = 0,
) -> HeadSets:
    """Measure how much of a vector's effect the writes of some heads carry.

    At layer l, ``vector`` puts the clean residual stream into the corrupted run. A set of heads
    adds only the change of what its heads up to layer l write, clean minus corrupted, each as it
    was in its own run. Controls have as many other heads from the same layers; see `control_sets`.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        contrast: Clean and corrupted prompts.
        heads: The found writers (``at="answer"``) or readers (``at="query_is"``).
        at: Role.
        taken: Other heads that no control may have.
        metric: Name of a metric.
        seed: Decides the controls.

    Returns:
        m(patched) - m(corrupted); `share_of(scores, "heads", "vector")` is the share.

    Raises:
        TvInterpError: if a head is outside of the model, or there are none.
        ModelError: if heads' outputs do not add up in the residual stream.
    """
    check_contrast(contrast)
    adapter, measure = Adapter.of(model), get_metric(metric)
    chosen = [site.at for site in as_sites(heads, at, adapter)]
    others = {site.at for site in as_sites([*chosen, *taken], at, adapter)}
    controls = control_sets(chosen, all_heads(adapter), others, seed)
    sets: dict[str, Sequence[Head]] = {"heads": chosen, "all heads": all_heads(adapter)}
    sets |= {f"control {i}": c for i, c in enumerate(controls)}
    whole = _exchange(model, contrast, at, None)
    each = [  # of the heads with one number, what that of each layer writes
        _exchange(model, contrast, at, [(layer, head) for layer in adapter.layers])
        for head in range(adapter.n_heads)
    ]
    changes = {"vector": whole}
    for name, members in sets.items():
        total = whole.data * 0
        for layer, head in members:  # what is written stays there in all later layers
            total[{"layer": slice(layer, None)}] += each[head].data.isel(layer=layer, drop=True)
        changes[name] = replace(whole, data=total)
    readout = measure.readout(Targets.of(contrast.clean))
    run = record_run(adapter, contrast.corrupted)
    base = readout(run.logits, torch.arange(len(contrast))).numpy()
    dummy = replace(contrast.corrupted, answer=contrast.answer, foil=contrast.foil)
    effects = {
        name: inject_vectors(model, dummy, v, mode="add", metric=measure, run=run).data.values
        - base[:, None]
        for name, v in changes.items()
    }
    if controls:
        effects["controls"] = np.mean([effects[f"control {i}"] for i in range(len(controls))], 0)
    attrs = provenance(adapter) | contrast.provenance | {"metric": metric, "at": at}
    attrs["heads"] = [f"L{layer}H{head}" for layer, head in chosen]
    scores = label_scores(
        np.stack(list(effects.values()), -1), ("layer", "site"),
        {"layer": np.arange(adapter.n_layers), "site": list(effects)},
        unit=measure.unit, total=None, prompts=contrast.clean, attrs=attrs,
    )  # fmt: skip
    return HeadSets(scores, tuple(controls))


def _exchange(model: Any, contrast: Contrast, at: str, heads: Sequence[Head] | None) -> Vectors:
    """Subtract what is at a role in the corrupted run from what is there in the clean run."""
    ours, theirs = (
        extract_vectors(model, p, at=at, heads=heads) for p in (contrast.clean, contrast.corrupted)
    )
    return replace(ours, data=ours.data - theirs.data.values)


# --------------------------------------------------------------------------------- the found heads

Through = Literal["alone", "run"]
THROUGH: tuple[Through, ...] = ("alone", "run")


class HeadShare(NamedTuple):
    """What the found heads of one role carry of its vector, under one corruption, on test.

    Attributes:
        label: ``"writer"`` (of the local vector) or ``"reader"`` (of the global one).
        corruption: What the vector is exchanged against.
        layer: Where what the heads write does most by itself, on the half that chose them.
        through: ``"alone"``: what the heads write is added there, and no MLP has seen it;
            ``"run"``: their outputs are exchanged where they are, so that all later parts respond.
        heads: The found heads up to that layer; none above it can be in the vector.
        vector: Effect of the whole vector there, in the metric's unit.
        share: The heads' effect over the vector's, with its 95 % interval ``lo`` to ``hi``.
        lo: Lower end.
        hi: Upper end.
        every: The same share of all heads up to that layer.
        controls: Shares of layer-matched random sets of other heads; empty where too few are left.
        above: The heads' share minus the mean of the controls', ``above_lo`` to ``above_hi`` (95 %,
            over prompts); NaN without controls.
        above_lo: Lower end.
        above_hi: Upper end.
    """

    label: str
    corruption: str
    layer: int
    through: Through
    heads: tuple[Site, ...]
    vector: float
    share: float
    lo: float
    hi: float
    every: float
    controls: tuple[float, ...]
    above: float
    above_lo: float
    above_hi: float


@dataclass(frozen=True, eq=False)
class HeadShares:
    """What `measure_head_shares` found.

    Attributes:
        rows: A row for each label, corruption and way; none for a label without heads.
        scores: Effects of the test half over ``(prompt, site)`` by ``corruption/role/through``;
            sites as in `HeadSets`.
        found: The search that chose the heads.
        settings: Provenance as plain values.
    """

    rows: tuple[HeadShare, ...]
    scores: Mapping[str, Scores]
    found: HeadReport
    settings: Mapping[str, Any]

    def to_pandas(self) -> Any:
        """Write one row for each label, corruption and way."""
        import pandas as pd

        return pd.DataFrame([row._asdict() for row in self.rows])

    def __str__(self) -> str:
        """A table at 80 columns."""
        s = self.settings
        lines = [
            f"{s['task']} on {s['model']}: what the found heads carry of a vector",
            "Heads and layer from one half of the prompts, the rest from the other: share of",
            "the vector's effect [95 %], and of as many random heads, mean (range).",
            "alone: what heads write, unseen by MLPs; run: exchanged where they are.",
        ]
        titles = {
            "writer": "LOCAL vector at the answers, and its WRITERS",
            "reader": "GLOBAL vector at query_is, and its READERS",
        }
        for label, title in titles.items():
            rows = [row for row in self.rows if row.label == label]
            lines += ["", f"{title}{'' if rows else ': none found'}"]
            for r in rows:
                if r.through == THROUGH[0]:
                    names = ", ".join(f"L{head.layer}H{head.head}" for head in r.heads) or "none"
                    head = f"{r.corruption}, layer {r.layer}: vector {r.vector:+.2f} {s['unit']}; "
                    lines.append(f"  {head}heads {names}")
                text = f"    {r.through:<6}heads {_span(r.share, r.lo, r.hi)}, all {r.every:.2f}"
                if r.controls:
                    text += f", random {np.mean(r.controls):.2f}"
                    text += f" ({min(r.controls):.2f} to {max(r.controls):.2f})"
                lines.append(text)
        return "\n".join(wrapped(lines))


def _span(value: float, lo: float, hi: float) -> str:
    return f"{value:.2f} [{lo:.2f}, {hi:.2f}]" if np.isfinite(value) else "not measurable"


def measure_head_shares(
    model: Any,
    task: str | Task,
    *,
    n_demos: int = 8,
    n_prompts: int = 64,
    seed: int = 0,
    corruptions: Sequence[str] | None = None,
    template: str | None = None,
    progress: bool = False,
) -> HeadShares:
    """Find writers and readers, and measure what they carry of the local and the global vector.

    `find_heads` chooses the heads on one half of the prompts, which also chooses the layer: the one
    where what they write does most by itself. On the other half the whole vector is put into
    corrupted prompts at that layer, then the found heads' part, then that of random heads from the
    same layers, found heads left out; see `head_vectors` and `patch_together`.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        task: A task or the name of a shipped one.
        n_demos: Demonstrations in each prompt.
        n_prompts: Prompts in each half.
        seed: Decides prompts, halves, corruptions and random sets.
        corruptions: At least two; None for the task family's defaults.
        template: As in `make_prompts`.
        progress: Whether to show progress.

    Returns:
        Shares of the vector's effect on the logit difference, under each corruption that makes one.

    Raises:
        UnknownName: for an unknown task or corruption.
        PromptError: if prompts cannot be built, or a corruption does not fit the task.
        TvInterpError: if fewer than two corruptions are given.
        ModelError: if heads' outputs do not add up in the residual stream.
    """
    task = get_task(task)
    drawn: dict[str, Any] = dict(n_demos=n_demos, n_prompts=n_prompts, seed=seed, template=template)
    found = find_heads(model, task, corruptions=corruptions, progress=progress, **drawn)
    halves = split_prompts(model, task, **drawn)  # those of the search
    labels = {
        "writer": ("answer", found.writers, found.copiers),
        "reader": ("query_is", found.readers, found.relays),
    }
    kinds = dict.fromkeys(effect.corruption for head in found.found for effect in head.effects)
    rows: list[HeadShare] = []
    scores: dict[str, Scores] = {}
    for label, (at, heads, others) in labels.items():
        for kind in kinds if heads else ():
            fit, test = (half.corrupt(kind, seed=seed + 1 + i) for i, half in enumerate(halves))
            sites = [head.site for head in heads]
            layer = _layer_of(model, fit, sites, at)
            taken = [head.site for head in others]
            sets = head_vectors(model, test, sites, at=at, taken=taken, seed=seed)
            alone = replace(sets.scores, data=sets.scores.data.sel(layer=layer, drop=True))
            ways = {"alone": alone, "run": _in_the_run(model, test, sites, sets, layer, at)}
            here = tuple(site for site in sites if site.layer <= layer)
            for through in THROUGH:
                effects = ways[through]
                scores[f"{kind}/{at}/{through}"] = effects
                row = HeadShare(label, kind, layer, through, here, *_shares(effects, sets))
                rows.append(row)
    metric = get_metric("logit_diff")
    settings = dict(found.settings) | {"metric": metric.name, "unit": metric.unit}
    return HeadShares(tuple(rows), scores, found, settings)


def _layer_of(model: Any, contrast: Contrast, heads: Sequence[Site], at: str) -> int:
    """Find the layer where what the heads write does most by itself."""
    written = _exchange(model, contrast, at, [head.at for head in heads])
    total = written.data.cumsum("layer").assign_coords(written.data.coords)
    dummy = replace(contrast.corrupted, answer=contrast.answer, foil=contrast.foil)
    found = inject_vectors(
        model, dummy, replace(written, data=total), mode="add", metric="logit_diff"
    )
    return int(found.mean().values.argmax())


def _in_the_run(
    model: Any, contrast: Contrast, heads: Sequence[Site], sets: HeadSets, layer: int, at: str
) -> Scores:
    """Exchange the same sets of heads, up to a layer, in the corrupted run itself."""
    members: dict[str, Sequence[Head]] = {
        "heads": [site.at for site in heads],
        "all heads": all_heads(Adapter.of(model)),
        **{f"control {i}": control for i, control in enumerate(sets.controls)},
    }
    below = {name: [h for h in each if h[0] <= layer] for name, each in members.items()}
    found = patch_together(model, contrast, below, at=at)
    vector = sets.scores.data.sel(layer=layer, drop=True).sel(site=["vector"])
    parts = [vector, found.data]
    if sets.controls:
        mean = found.data.isel(site=slice(2, None)).mean("site")
        parts.append(mean.expand_dims(site=["controls"], axis=1))
    return replace(found, data=xr.concat(parts, dim="site"), total=None)


def _shares(effects: Scores, sets: HeadSets) -> tuple[Any, ...]:
    """Get the vector's effect and the shares of it, in the order of `HeadShare`."""
    whole = share_of(effects, "heads", "vector")
    every = float(share_of(effects, "all heads", "vector")["value"])
    names = [f"control {i}" for i in range(len(sets.controls))]
    controls = tuple(float(share_of(effects, name, "vector")["value"]) for name in names)
    ends, above = ("value", "lo", "hi"), (np.nan,) * 3
    if controls:
        ours, theirs, vector = (
            effects.data.sel(site=name, drop=True) for name in ("heads", "controls", "vector")
        )
        both = xr.concat([ours - theirs, vector], dim="site").assign_coords(site=["gap", "vector"])
        found = share_of(replace(effects, data=both.transpose("prompt", "site")), "gap", "vector")
        above = tuple(float(found[end]) for end in ends)
    return (
        float(effects.mean().sel(site="vector")), *(float(whole[end]) for end in ends), every,
        controls, *above,
    )  # fmt: skip
