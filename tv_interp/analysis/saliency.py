"""Attention saliency: how much each attention weight matters to first order. A screen, no proof.

The saliency of head h from token j to token i is A * dm/dA, the weight times the gradient of the
metric with respect to it (Michel et al. 2019, arXiv 1905.10650; Wang et al. 2023, arXiv
2305.14160): the first-order change of the metric when the weight is scaled, nothing renormalised.
What it shows has to be confirmed by an intervention, `knock_out` or `patch_sources`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import PromptError, unknown
from ..interventions.engine import check_layers
from ..interventions.recording import Run, record_run
from ..models.adapter import Adapter
from ..models.finite import not_finite
from ..prompts import Prompts, check_prompts
from ..scores import Metric, Scores, get_metric
from ..scores.metrics import Targets
from .common import head_coords, label_scores, provenance
from .gradients import Walk, few_rows, some_rows
from .graph import Demos, place_masks, places_of
from .heads import knock_out

LOSS = Metric("loss", "nats", lambda *a: -get_metric("log_prob").compute(*a), lambda vocab: None)
"""Minus the log-probability of the answer."""

Convention = Literal["wang", "dong"]
CONVENTIONS: tuple[Convention, ...] = ("wang", "dong")
FLOWS = ("S_wp", "S_pq", "S_ww")


def saliency_flow(
    model: Any,
    prompts: Prompts,
    *,
    metric: str | Metric = "logit_diff",
    demos: Demos = "joint",
) -> Scores:
    """Sum A * dm/dA, sign kept, over the tokens of each pair of roles, head by head.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode; its parameters may be frozen.
        prompts: Clean prompts.
        metric: A differentiable metric (logit_diff, prob, log_prob), or ``"loss"``: minus log_prob.
        demos: ``"joint"``: roles of all demonstrations together; ``"each"``: one demonstration at
            a time (``answer[2]``).

    Returns:
        Scores over ``(prompt, layer, head, dest, src)``, in the metric's unit: ``dest`` reads,
        ``src`` is read. Positive: more attention there would raise the metric.

    Raises:
        ScoreError: if the metric cannot be differentiated.
        ModelError: if the model discards edits of its attention weights.
        UnknownName: for an unknown metric or ``demos``.
    """
    check_prompts(prompts)
    wanted = _metric(metric)
    places = places_of(prompts, demos)
    masks = place_masks(prompts, places)

    def by_place(saliency: Tensor, rows: Tensor) -> Tensor:
        n = saliency.shape[-1]
        at = masks[rows, :n].to(saliency)
        return torch.einsum("bhij,bid,bjs->bhds", saliency, at, at)

    adapter = Adapter.of(model)
    found = _gather(adapter, prompts, wanted, by_place)
    coords = head_coords(adapter) | {"dest": list(places), "src": list(places)}
    return _label(adapter, prompts, wanted, found, ("layer", "head", "dest", "src"), coords)


def label_flow(
    model: Any,
    prompts: Prompts,
    *,
    convention: Convention = "wang",
    metric: str | Metric = "loss",
) -> Scores:
    """Measure the information flow of "Label words are anchors", layer by layer.

    With label words p_k (the last token of each answer), the last token q, and I the saliency of a
    layer without sign (Wang et al. 2023, arXiv 2305.14160, section 2.1):

    * S_wp: mean of I(p_k, j) over all tokens j before p_k: what label words gather;
    * S_pq: mean of I(q, p_k): what the last token takes from label words;
    * S_ww: mean of I over all other pairs of different tokens.

    Args:
        model: As in `saliency_flow`.
        prompts: Clean prompts with at least one demonstration.
        convention: How a layer's heads become one number: ``"wang"`` takes the absolute value of
            the sum over heads (arXiv 2305.14160), ``"dong"`` the sum of absolute values (the code
            of arXiv 2506.09048). Both take it before the mean over prompts.
        metric: A differentiable metric; the papers take ``"loss"``.

    Returns:
        Scores over ``(prompt, layer, part)``, never negative, with the parts S_wp, S_pq, S_ww.

    Raises:
        ScoreError: if the metric cannot be differentiated.
        PromptError: if the prompts have no demonstrations.
        ModelError: if the model discards edits of its attention weights.
        UnknownName: for an unknown metric or convention.
    """
    check_prompts(prompts)
    if convention not in CONVENTIONS:
        raise unknown("convention", convention, CONVENTIONS)
    wanted = _metric(metric)
    if not prompts.n_demos:
        raise PromptError("label words are in demonstrations, and these prompts have none")
    labels = prompts.positions("answer")

    def flows(saliency: Tensor, rows: Tensor) -> Tensor:
        n = saliency.shape[-1]
        if convention == "wang":
            flow = saliency.sum(1).abs()
        else:
            flow = saliency.abs().sum(1)
        return torch.stack([(flow * w).sum((1, 2)) for w in _pairs(labels[rows], n, flow)], -1)

    adapter = Adapter.of(model)
    found = _gather(adapter, prompts, wanted, flows)
    coords = {"layer": np.arange(adapter.n_layers), "part": list(FLOWS)}
    return _label(adapter, prompts, wanted, found, ("layer", "part"), coords, convention=convention)


def summarize_flow(model: Any, prompts: Prompts, flow: Scores) -> pd.DataFrame:
    """Sum a flow over the heads of each layer, beside what cutting the same attention does.

    Args:
        model: The model.
        prompts: The prompts of the flow.
        flow: What `saliency_flow` gave for them, with demonstrations together.

    Returns:
        One row a layer, means over prompts: the signed saliency ``x->answer`` (answers read
        inputs), ``answer->is`` (the last token reads answers) and ``rest``; and, as ``cut ...``,
        the metric lost when no head of the layer can look there.

    Raises:
        ModelError: if the model discards edits of attention scores.
    """
    mean = flow.mean().sum("head")
    ways = {"x->answer": ("answer", "x"), "answer->is": ("query_is", "answer")}
    columns = {name: mean.sel(dest=d, src=s).values for name, (d, s) in ways.items()}
    columns["rest"] = mean.sum(("dest", "src")).values - sum(columns.values())
    adapter = Adapter.of(model)
    layers = {f"L{la}": [(la, h) for h in range(adapter.n_heads)] for la in adapter.layers}
    for name, (dest, src) in ways.items():
        metric = str(flow.attrs["metric"])
        cut = knock_out(model, prompts, dest=dest, src=src, sets=layers, metric=metric)
        columns[f"cut {name}"] = cut.mean().values
    return pd.DataFrame(columns, index=pd.Index(list(adapter.layers), name="layer"))


def _pairs(labels: Tensor, n: int, like: Tensor) -> list[Float[Tensor, "row dest src"]]:
    """Weigh the pairs of tokens of each flow, so that a sum over all is their mean."""
    below = torch.ones(n, n, dtype=torch.bool).tril(-1)
    label = torch.zeros(len(labels), n, dtype=torch.bool).scatter(1, labels, True)
    last = torch.arange(n) == n - 1
    gather = label[:, :, None] & below
    take = (last[:, None] & below) & label[:, None, :]
    rest = below & ~gather & ~take
    return [m.to(like) / m.sum((1, 2), keepdim=True).clamp(min=1) for m in (gather, take, rest)]


def _metric(metric: str | Metric) -> Metric:
    return LOSS if metric == "loss" else get_metric(metric)


def _gather(
    adapter: Adapter,
    prompts: Prompts,
    metric: Metric,
    reduce: Callable[[Tensor, Tensor], Tensor],
) -> np.ndarray:
    """Reduce each layer's saliency to ``[prompt, layer, ...]``.

    Raises:
        ModelError: if it is NaN or infinite.
    """
    run = record_run(adapter, prompts)
    check_layers(run)
    out: np.ndarray | None = None
    for rows, layer, saliency in _saliency(run, metric):
        part = reduce(saliency, rows).cpu().numpy()
        if out is None:
            out = np.zeros((len(prompts), adapter.n_layers, *part.shape[1:]), dtype=part.dtype)
        out[rows.numpy(), layer] = part
    assert out is not None
    if not np.isfinite(out).all():
        raise not_finite(adapter, "scores")
    return out


def _saliency(
    run: Run, metric: Metric
) -> Iterator[tuple[Tensor, int, Float[Tensor, "row head dest src"]]]:
    """Compute A * dm/dA of all heads, layer by layer: rows, layer, saliency."""
    adapter = run.adapter
    reference = run.logits if metric.name == "kl" else None
    readout = metric.readout(Targets.of(run.prompts, reference))
    leaves = [("pattern", layer) for layer in adapter.layers]
    for rows, tape in run.tapes():
        for some in few_rows(adapter, tape, run.max_memory):
            part = some_rows(tape, some)
            walk = Walk(adapter, part, part.resid[0], readout, rows[some], leaves)
            for name in leaves:
                yield rows[some], name[1], walk.seen[name] * walk.gradients[name]


def _label(
    adapter: Adapter,
    prompts: Prompts,
    metric: Metric,
    found: np.ndarray,
    dims: tuple[str, ...],
    coords: dict[str, Any],
    **attrs: Any,
) -> Scores:
    about = provenance(adapter) | prompts.provenance | {"metric": metric.name}
    return label_scores(
        found,
        dims,
        coords,
        unit=metric.unit,
        total=None,
        prompts=prompts,
        attrs=about | {"method": "saliency"} | attrs,
    )
