"""Do local vectors converge into one, and how many of them are needed? After arXiv 2406.16007.

Convergence is asked twice: by intervention (is one local vector, put at every answer, as good as
all of them?) and by similarity (cosine, CKA, distance to the global vector). Need is asked by
taking away k of n answer positions. The paper gives no formulas; those here are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from ..display import Shown
from ..errors import PromptError, TvInterpError, unknown
from ..interventions.engine import run_variants
from ..interventions.recording import last_logits, record_run
from ..interventions.sites import Cut, Patch, Site, Variant
from ..models.adapter import Adapter
from ..prompts import Contrast, Prompts, Task, check_prompts, get_task, make_prompts
from ..prompts.roles import DEMO_ROLES, parse_role
from ..prompts.tasks.base import pick_foil
from ..scores import Metric, Scores, get_metric
from ..scores.metrics import Targets
from .common import all_heads, label_scores, provenance
from .vectors import Vectors, extract_vectors, inject_vectors, residual_at

Ablation = Literal["knockout", "mean", "resample"]
ABLATIONS: tuple[Ablation, ...] = ("knockout", "mean", "resample")


def share_of(scores: Scores, site: str, whole: str, *, base: str | None = None) -> xr.Dataset:
    """Divide the mean of one site by that of another, by whatever other axes there are.

    Args:
        scores: Over ``(prompt, ..., site)``.
        site: The part.
        whole: What it is a share of.
        base: Subtracted from both first; None for nothing.

    Returns:
        ``value``, ``lo``, ``hi`` (95 %, paired bootstrap over query items); all NaN where the
        interval of the whole contains 0, since a share of it means nothing there.
    """
    data = scores.data
    zero = 0 * data.sel(site=whole, drop=True) if base is None else data.sel(site=base, drop=True)
    part, total = (data.sel(site=name, drop=True) - zero for name in (site, whole))
    dims = [d for d in part.dims if d != "prompt"]
    blank = part.mean("prompt").astype(float) * np.nan
    out = xr.Dataset({"value": blank, "lo": blank.copy(), "hi": blank.copy()})
    for where in np.ndindex(*(part.sizes[d] for d in dims)):
        cell = dict(zip(dims, where, strict=True))
        one = replace(scores, data=part.isel(cell, drop=True), total=total.isel(cell, drop=True))
        if one.total_is_clear():
            found = one.ci("recovered")
            for name in out:
                out[name][cell] = float(found[str(name)])
    return out


# ------------------------------------------------------------------------------------ convergence


@dataclass(frozen=True, eq=False, repr=False)
class Convergence(Shown):
    """What `measure_convergence` found.

    Attributes:
        scores: Metric values of dummies over ``(prompt, layer, site)``: ``none``, ``all`` local
            vectors, ``one`` of them at every answer (mean over which one), ``Pos Avg``, ``Pos Avg
            by class``.
        similarity: Cosines over ``(prompt, layer, part)`` between the local vectors of a prompt:
            ``raw``; ``centred`` on the mean of all prompts' vectors of that layer; centred of
            demonstrations with the ``same answer`` and with ``other answers`` (NaN where a prompt
            has no such pair); and of the centred local and centred ``global`` vector.
        distance: From a local vector to the global vector, over the length of the latter,
            ``(prompt, layer)``.
        cka: Linear CKA (Kornblith et al. 1905.00414) between demonstrations over prompts, mean over
            pairs of demonstrations, by layer.
        settings: Provenance as plain values.
    """

    scores: Scores
    similarity: Scores
    distance: Scores
    cka: xr.DataArray
    settings: Mapping[str, Any]

    def ratio(self, site: str = "one") -> xr.Dataset:
        """Divide a site's value by that of ``all``, by layer; see `share_of`."""
        return share_of(self.scores, site, "all")

    def effect_ratio(self, site: str = "one") -> xr.Dataset:
        """Divide a site's rise over ``none`` by that of ``all``, by layer; see `share_of`."""
        return share_of(self.scores, site, "all", base="none")

    @property
    def last_working_layer(self) -> int:
        """The last layer where all local vectors keep half of their largest effect."""
        means = self.scores.mean()
        rise = (means.sel(site="all") - means.sel(site="none")).values
        half = min(rise.max(), rise.max() / 2)  # where none rises there still is a best layer
        return int(np.flatnonzero(rise >= half)[-1])

    def __str__(self) -> str:
        """A table at 80 columns, one line a layer."""
        s = self.settings
        means, cosine = self.scores.mean(), self.similarity.data.mean("prompt")
        sites = ["none", "all", "one", "Pos Avg", "Pos Avg by class"]
        heads = ["none", "all", "one", "mean", "class", "ratio", "raw", "centr", "CKA", "dist"]
        lines = [
            f"{s['task']} on {s['model']}: local vectors into dummies, {s['metric']}",
            "layer" + "".join(f"{h:>7}" for h in heads),
        ]
        ratio = self.ratio()["value"]
        for i, layer in enumerate(means["layer"].values):
            row = [float(means.sel(layer=layer, site=site)) for site in sites]
            row += [float(ratio[i])]
            row += [float(cosine.sel(layer=layer, part=p)) for p in ("raw", "centred")]
            row += [float(self.cka[i]), float(self.distance.mean()[i])]
            lines.append(f"{layer:>5}" + "".join(f"{v:>7.2f}" for v in row))
        return "\n".join(lines)


def measure_convergence(
    model: Any,
    task: str | Task,
    *,
    n_demos: int = 8,
    n_prompts: int = 200,
    seed: int = 0,
    template: str | None = None,
    metric: str | None = None,
) -> Convergence:
    """Measure whether a prompt's local vectors become one, by intervention and by similarity.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        task: A task or the name of a shipped one.
        n_demos: Demonstrations; 2 or more.
        n_prompts: Prompts.
        seed: Decides prompts and dummies.
        template: As in `make_prompts`.
        metric: Name of a metric; None for ``choice`` on categorization, else ``accuracy``.

    Returns:
        Values and similarities by layer.

    Raises:
        UnknownName: for an unknown task or metric.
        PromptError: if the prompts cannot be built, or have fewer than two demonstrations.
        ModelError: if the model cannot be measured exactly.
    """
    task = get_task(task)
    if n_demos < 2:
        raise PromptError(f"expected two demonstrations or more to compare, got {n_demos}")
    name = metric or ("choice" if task.family == "categorization" else "accuracy")
    prompts = make_prompts(
        model, task, n_demos=n_demos, n_prompts=n_prompts, seed=seed, template=template
    )
    contrast = prompts.dummies(seed=seed + 1)
    clean, dummy = contrast.clean, contrast.corrupted
    adapter, measure = Adapter.of(model), get_metric(name)
    local, whole = extract_vectors(model, clean), extract_vectors(model, clean, at="query_is")

    run = record_run(adapter, dummy)

    def value(vectors: Vectors) -> np.ndarray:
        return inject_vectors(model, dummy, vectors, metric=measure, run=run).data.values

    one = [value(replace(local, data=local.data.isel(demo=i, drop=True))) for i in range(n_demos)]
    plain = measure.readout(Targets.of(dummy))(run.logits, torch.arange(len(dummy))).numpy()
    values = {
        "none": np.repeat(plain[:, None], adapter.n_layers, 1),
        "all": value(local),
        "one": np.mean(one, axis=0),
        "Pos Avg": value(local.pos_avg()),
        "Pos Avg by class": value(local.pos_avg("class")),
    }
    layers = {"layer": np.arange(adapter.n_layers)}
    attrs = provenance(adapter) | contrast.provenance | {"metric": name, "at": "answer"}
    scores = label_scores(
        np.stack(list(values.values()), -1), ("layer", "site"), layers | {"site": list(values)},
        unit=measure.unit, total=None, prompts=clean, attrs=attrs,
    )  # fmt: skip
    cosines = similarity(local, whole)
    alike = label_scores(
        np.stack(list(cosines.values()), -1), ("layer", "part"), layers | {"part": list(cosines)},
        unit="cosine", total=None, prompts=clean, attrs=attrs,
    )  # fmt: skip
    far = local.data.values - whole.data.values[:, :, None]
    length = np.linalg.norm(whole.data.values, axis=-1)
    distance = label_scores(
        np.linalg.norm(far, axis=-1).mean(-1) / length, ("layer",), layers,
        unit="lengths of the global vector", total=None, prompts=clean, attrs=attrs,
    )  # fmt: skip
    return Convergence(scores, alike, distance, linear_cka(local), attrs)


def similarity(local: Vectors, whole: Vectors) -> dict[str, Float[np.ndarray, "prompt layer"]]:
    """Compute cosines between the local vectors of each prompt; see `Convergence`.

    Args:
        local: Over ``(prompt, layer, demo, d_model)``.
        whole: Global vectors of the same prompts.
    """
    data = local.data.transpose("prompt", "layer", "demo", "d_model").values.astype(float)
    answers = local.data["answer"].values
    centred = data - data.mean((0, 2), keepdims=True)
    g = whole.data.values.astype(float)
    g = g - g.mean(0)
    others = ~np.eye(data.shape[2], dtype=bool)
    same = (answers[:, :, None] == answers[:, None]) & others

    def cosines(a: np.ndarray) -> np.ndarray:
        unit = a / np.linalg.norm(a, axis=-1, keepdims=True)
        return unit @ unit.swapaxes(-1, -2)

    def mean(values: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        pairs = np.broadcast_to(pairs, (len(data), *others.shape))[:, None]
        count = pairs.sum((-1, -2)).astype(float)
        count[count == 0] = np.nan
        return (values * pairs).sum((-1, -2)) / count

    inner = cosines(centred)
    to_global = (centred * g[:, :, None]).sum(-1)
    to_global /= np.linalg.norm(centred, axis=-1) * np.linalg.norm(g, axis=-1)[..., None]
    return {
        "raw": mean(cosines(data), others),
        "centred": mean(inner, others),
        "same answer": mean(inner, same),
        "other answers": mean(inner, others & ~same),
        "global": to_global.mean(-1),
    }


def linear_cka(local: Vectors) -> xr.DataArray:
    """Compute linear CKA between demonstrations over prompts, mean over their pairs, by layer."""
    data = local.data.transpose("layer", "demo", "prompt", "d_model").values.astype(float)
    data = data - data.mean(2, keepdims=True)
    gram = data @ data.swapaxes(-1, -2)  # [layer, demo, prompt, prompt]
    inner = np.einsum("lipq,ljpq->lij", gram, gram)
    size = np.sqrt(np.einsum("lii->li", inner))
    cka = inner / (size[:, :, None] * size[:, None])
    pairs = np.triu_indices(data.shape[1], 1)
    mean = cka[:, pairs[0], pairs[1]].mean(-1)
    return xr.DataArray(mean, dims=("layer",), coords={"layer": local.data["layer"]}, name="cka")


def contradict(prompts: Prompts, k: int, *, seed: int = 1) -> Prompts:
    """Let k demonstrations of each prompt contradict what was learned: France is Berlin.

    Args:
        prompts: Prompts of a relation whose answers are listed.
        k: How many, chosen at random for each prompt; a larger k keeps those of a smaller one.
        seed: Decides which, and their answers.

    Raises:
        PromptError: if there are fewer demonstrations, or the task lists no answers.
    """
    if not 0 <= k <= prompts.n_demos:
        raise PromptError(f"expected k of 0 to {prompts.n_demos} demonstrations, got {k}")
    pool: tuple[str, ...] = getattr(prompts.task, "answers", ())
    if len(set(pool)) < 2:
        raise PromptError(f"task {prompts.task.name!r} lists no other answers to contradict with")
    samples = []
    for row, sample in enumerate(prompts.samples):
        rng = np.random.default_rng([seed, row])
        order, demos = rng.permutation(prompts.n_demos), list(sample.demos)
        for i in order[:k]:
            x, y = demos[i]
            demos[i] = (x, pick_foil(rng, y, (), pool))
        samples.append(sample._replace(demos=demos))
    return prompts.with_samples(samples)


def convergence_boundary(
    model: Any,
    prompts: Prompts,
    *,
    layer: int,
    counts: Sequence[int] | None = None,
    metric: str = "accuracy",
    seed: int = 1,
) -> Scores:
    """Let k of n demonstrations contradict training, and see from which k on the relation is lost.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        prompts: Clean prompts of a familiar relation.
        layer: Where local vectors of the contradicting prompts go into dummies.
        counts: Which k; None for 0 to n.
        metric: Name of a metric, of the answer that was learned.
        seed: Decides which demonstrations contradict.

    Returns:
        Values over ``(prompt, demo, site)``: ``demo`` is k, site is ``few-shot`` (the contradicting
        prompts themselves), ``all`` (their local vectors in dummies), ``Pos Avg``, and ``none``
        (the dummies as they are).

    Raises:
        PromptError: as `contradict`.
        TvInterpError: if the layer is outside of the model.
    """
    adapter, measure = Adapter.of(model), get_metric(metric)
    contrast = prompts.dummies(seed=seed)
    rows, run = torch.arange(len(contrast)), record_run(adapter, contrast.corrupted)
    none = measure.readout(Targets.of(contrast.corrupted))(run.logits, rows).numpy()
    chosen = list(range(prompts.n_demos + 1) if counts is None else counts)
    values = []
    for k in chosen:
        donors = contradict(contrast.clean, k, seed=seed)
        local = extract_vectors(model, donors)
        logits = last_logits(adapter, donors)
        cell = [measure.readout(Targets.of(contrast.clean))(logits, rows).numpy()]
        for vectors in (local, local.pos_avg()):
            found = inject_vectors(
                model, contrast.corrupted, vectors, layers=layer, metric=measure, run=run
            )
            cell.append(found.data.values[:, 0])
        values.append(np.stack([*cell, none], -1))
    attrs = provenance(adapter) | contrast.provenance
    attrs |= {"metric": metric, "layer": layer, "at": "answer"}
    return label_scores(
        np.stack(values, 1), ("demo", "site"),
        {"demo": np.array(chosen), "site": ["few-shot", "all", "Pos Avg", "none"]},
        unit=measure.unit, total=None, prompts=contrast.clean, attrs=attrs,
    )  # fmt: skip


def cross_vectors(
    model: Any,
    contrast: Contrast,
    *,
    local_layer: int,
    global_layer: int,
    metric: str = "logit_diff",
    donors: Prompts | None = None,
) -> Scores:
    """Put local vectors, a global vector, both or none into dummies: 2 x 2.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        contrast: Clean prompts and dummies, as from `Prompts.dummies`.
        local_layer: Where local vectors go.
        global_layer: Where the global vector goes.
        metric: Name of a metric.
        donors: Donors of the global vector; None for the clean prompts behind another query, whose
            global vector does not hold this query's answer.

    Returns:
        Over ``(prompt, site)``: the values ``none``, ``local``, ``global``, ``both``, and their
        ``interaction`` both - local - global + none: negative where one replaces the other.

    Raises:
        TvInterpError: if a layer is outside of the model.
        PromptError: if there is no other query.
    """
    adapter, measure = Adapter.of(model), get_metric(metric)
    donors = contrast.clean.other_query() if donors is None else donors
    local = extract_vectors(model, contrast.clean).data.values
    whole = extract_vectors(model, donors, at="query_is").data.values
    for layer in (local_layer, global_layer):
        if not 0 <= layer < adapter.n_layers:
            raise TvInterpError(
                f"layer {layer} is outside of {adapter.name}: expected 0 to {adapter.n_layers - 1}"
            )
    here = Patch(
        Site(local_layer, None, "resid_post", "answer"), torch.from_numpy(local[:, local_layer])
    )
    there = Patch(
        Site(global_layer, None, "resid_post", "query_is"),
        torch.from_numpy(whole[:, global_layer]),
    )
    variants: list[Variant] = [(), (here,), (there,), (here, there)]
    readout = measure.readout(Targets.of(contrast.clean))
    none, a, b, both = run_variants(model, contrast.corrupted, variants, readout).double()
    values = torch.stack([none, a, b, both, both - a - b + none], -1).numpy()
    attrs = provenance(adapter) | contrast.provenance
    attrs |= {"metric": metric, "local_layer": local_layer, "global_layer": global_layer}
    return label_scores(
        values, ("site",), {"site": ["none", "local", "global", "both", "interaction"]},
        unit=measure.unit, total=None, prompts=contrast.clean, attrs=attrs,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- k of n


def ablate_demos(
    model: Any,
    prompts: Prompts,
    *,
    at: str = "answer",
    how: Sequence[Ablation] = ABLATIONS,
    draws: int = 4,
    counts: Sequence[int] | None = None,
    metric: str | Metric = "accuracy",
    seed: int = 0,
    progress: bool = False,
) -> Scores:
    """Take away a role's positions in k of n demonstrations, for every k.

    ``knockout``: no other token attends to them, in any layer and head. ``mean``: their residual
    stream, in every layer, is the mean over prompts at that demonstration. ``resample``: it is that
    of another prompt (rows are rotated by half). Mean and resample change the last token of the
    role, knockout all its tokens.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        prompts: Clean prompts, two or more.
        at: Role of demonstrations; another one than ``"answer"`` is the control.
        how: Which ablations.
        draws: Random orders in which demonstrations are taken away; values are means over them.
        counts: Which k; None for 0 to n.
        metric: Name of a metric.
        seed: Decides the orders.
        progress: Whether to show a progress bar.

    Returns:
        Values over ``(prompt, demo, part)``: ``demo`` is k, part the ablation.

    Raises:
        UnknownName: for an unknown role, ablation or metric.
        PromptError: for a role outside of demonstrations, or a single prompt.
        TvInterpError: if draws is below 1, or k is not 0 to n.
        ModelError: if the model discards edits of attention scores.
    """
    check_prompts(prompts)
    adapter, measure = Adapter.of(model), get_metric(metric)
    for each in how:
        if each not in ABLATIONS:
            raise unknown("ablation", each, ABLATIONS)
    if parse_role(at) not in DEMO_ROLES:
        raise PromptError(f"expected a role of demonstrations, got {at!r}")
    if len(prompts) < 2:
        raise PromptError("expected two prompts or more: ablations come from other prompts")
    if draws < 1:
        raise TvInterpError(f"expected draws of 1 or more, got {draws}")
    resid, _ = residual_at(adapter, prompts, at, "resid_pre")
    others = resid.roll(len(prompts) // 2, 0)
    mean = resid.mean(0, keepdim=True).expand_as(resid)
    rng = np.random.default_rng([seed, 7])
    n = prompts.n_demos
    orders = [rng.permutation(n).tolist() for _ in range(draws)]
    chosen = list(range(n + 1) if counts is None else counts)
    if not chosen or not 0 <= min(chosen) <= max(chosen) <= n:
        raise TvInterpError(f"expected counts of 0 to {n} demonstrations, got {chosen}")

    def patches(values: Tensor, demos: Iterable[int]) -> Variant:
        return tuple(
            Patch(Site(layer, None, "resid_pre", at, demo), values[:, layer, demo])
            for layer in range(adapter.n_layers)
            for demo in demos
        )

    def cuts(demos: Iterable[int]) -> Variant:
        gone = prompts.mask(at) & torch.isin(prompts.demo_ids, torch.tensor(list(demos)))
        kept = ~gone & (prompts.role_ids >= 0)
        return tuple(Cut(layer, head, kept, gone) for layer, head in all_heads(adapter))

    make = {
        "knockout": cuts,
        "mean": lambda demos: patches(mean, demos),
        "resample": lambda demos: patches(others, demos),
    }
    cells = [(each, frozenset(order[:k])) for each in how for order in orders for k in chosen]
    asked = {(each, gone) if gone else None: None for each, gone in cells}  # each set once
    variants: list[Variant] = [make[key[0]](sorted(key[1])) if key else () for key in asked]
    readout = measure.readout(Targets.of(prompts))
    found = run_variants(
        model, prompts, variants, readout, progress=f"without {at}" if progress else None
    )
    place = {key: i for i, key in enumerate(asked)}
    index = torch.tensor([place[cell if cell[1] else None] for cell in cells])
    shape = (len(how), draws, len(chosen), len(prompts))
    values = found[index].reshape(shape).mean(1)  # [how, k, prompt]
    attrs = provenance(adapter) | prompts.provenance
    attrs |= {"metric": measure.name, "at": at, "draws": draws, "corruption": "k of n"}
    return label_scores(
        values.permute(2, 1, 0).numpy(), ("demo", "part"),
        {"demo": np.array(chosen), "part": list(how)},
        unit=measure.unit, total=None, prompts=prompts, attrs=attrs,
    )  # fmt: skip


def share_lost(scores: Scores) -> xr.Dataset:
    """Share of what taking away all n costs that is lost already with k, from `ablate_demos`.

    A gradual loss rises with k; a redundant one stays near 0 until the last.

    Returns:
        ``value``, ``lo``, ``hi`` (95 %, paired) over ``(demo, part)``; NaN where taking away all
        makes no clear difference.
    """
    first, last = scores.data.isel(demo=0, drop=True), scores.data.isel(demo=-1, drop=True)
    parts = []
    for k in range(scores.data.sizes["demo"]):
        lost = first - scores.data.isel(demo=k, drop=True)
        both = xr.concat([lost, first - last], dim="site").assign_coords(site=["lost", "all"])
        both = both.transpose("prompt", "part", "site")
        parts.append(share_of(replace(scores, data=both), "lost", "all"))
    return xr.concat(parts, dim="demo").assign_coords(demo=scores.data["demo"])
