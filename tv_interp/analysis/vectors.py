"""Task vectors: residual streams taken from one run and put into another, after arXiv 2406.16007.

* **local vector**: the residual stream after a block at a demonstration's answer.
* **global vector**: the same at ``query_is``.
* **Pos Avg**: mean over the demonstrations of a prompt; **Trial Avg**: mean over prompts.

The paper publishes no code, and its digest leaves the protocol open. Chosen here: the last token of
a role's span, blocks counted from 0 (``resid_post``), replacing rather than adding (as Hendel et
al. 2310.15916), one layer at a time. So results are *after* the paper, not replications of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from ..display import Shown
from ..errors import FileError, ModelError, PromptError, TvInterpError, unknown
from ..interventions.engine import run_variants
from ..interventions.recording import (
    Run,
    batches,
    check_fits,
    check_memory,
    probe_replays,
    record_run,
)
from ..interventions.sites import Head, Patch, Site, Variant
from ..models.adapter import Adapter, Edit, HookName
from ..models.finite import not_finite
from ..models.replay import Layout, Tape
from ..prompts import Prompts, check_prompts
from ..prompts.roles import DEMO_ROLES, parse_role
from ..scores import Metric, Scores, get_metric
from ..scores.metrics import METRICS, Readouts, Targets
from ..scores.scores import load_dataset, save_dataset
from .common import as_sites, label_scores, provenance

DIMS = ("prompt", "layer", "demo", "d_model")
TODD_CLASSES = {
    "demonstration": "x",
    "label": "answer",
    "separator": "is",
    "predictive": "is",
    "structural": "other",
    "end_of_example": "end",
    "query_demonstration": "query_x",
    "query_structural": "other",
    "query_separator": "query_is",
    "query_predictive": "query_is",
}
"""The token classes of Todd et al. 2310.15213 (their code) by our roles. Their separator is what
comes before the last token of the connective, their predictive that last token; here both are the
connective, and what is patched is its last token."""


@dataclass(frozen=True, eq=False)
class Vectors(Shown):
    """Residual streams at one role.

    Attributes:
        data: Over ``layer`` and ``d_model``, and over ``prompt`` and ``demo`` unless averaged. The
            coordinate ``answer [prompt, demo]`` holds the demonstrations' answers.
        role: Where they were taken.
        model: Name of the model they belong to.
        attrs: Provenance as plain values; ``few_shot`` has the metrics of the run they come from.
    """

    data: xr.DataArray
    role: str
    model: str
    attrs: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Refuse unknown or disordered axes."""
        dims = tuple(str(d) for d in self.data.dims)
        wanted = tuple(d for d in DIMS if d in dims)
        if dims != wanted or not {"layer", "d_model"} <= set(dims):
            raise TvInterpError(f"expected dims in the order of {DIMS}, got {dims}")

    def pos_avg(self, by: Literal["all", "class"] = "all") -> Vectors:
        """Average over the demonstrations of each prompt.

        Args:
            by: ``"all"`` drops the demonstration axis, so that the vector fits any number of
                demonstrations. ``"class"`` averages demonstrations with the same answer and keeps
                the axis: otherwise the label's identity is averaged away.

        Raises:
            UnknownName: for another ``by``.
            TvInterpError: if there are no demonstrations, or no prompts for ``"class"``.
        """
        if by not in ("all", "class"):
            raise unknown("average", by, ("all", "class"))
        if "demo" not in self.data.dims:
            raise TvInterpError(
                f"these vectors of {self.role!r} have no demonstrations to average over: Pos Avg "
                "needs a role of demonstrations"
            )
        if by == "all":
            return replace(self, data=self.data.mean("demo"))
        if "prompt" not in self.data.dims:
            raise TvInterpError("the classes differ from prompt to prompt: average them first")
        answers = self.data["answer"].values
        same = (answers[:, :, None] == answers[:, None]).astype(self.data.dtype)
        weights = xr.DataArray(same / same.sum(-1, keepdims=True), dims=("prompt", "demo", "other"))
        mean = (weights * self.data.drop_vars("answer").rename(demo="other")).sum("other")
        return replace(self, data=self.data.copy(data=mean.transpose(*DIMS).values))

    def trial_avg(self) -> Vectors:
        """Average over prompts; the vector then fits any number of prompts.

        Raises:
            TvInterpError: if that was done before.
        """
        if "prompt" not in self.data.dims:
            raise TvInterpError("these vectors are an average over prompts already")
        return replace(self, data=self.data.mean("prompt"))

    def select(self, rows: Sequence[int]) -> Vectors:
        """Keep the vectors of some prompts, in the order given."""
        return replace(self, data=self.data.isel(prompt=list(rows)))

    def save(self, path: str | os.PathLike) -> None:
        """Write to a netCDF file without timestamps.

        Raises:
            FileError: if the file cannot be written.
        """
        about = {"role": self.role, "model": self.model, "attrs": dict(self.attrs)}
        data = xr.Dataset({"vectors": self.data})
        data.attrs = {
            "tv_interp": json.dumps(about | {"format": "tv_interp.Vectors 1"}, sort_keys=True)
        }
        save_dataset(data, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Vectors:
        """Read what `save` wrote.

        Raises:
            FileError: if there is no such file, or it is no file of vectors.
        """
        data = load_dataset(path)
        try:
            about = json.loads(data.attrs["tv_interp"])
            return cls(data["vectors"], about["role"], about["model"], about["attrs"])
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"{path} is no vectors file of tv_interp: {error}") from error

    def __repr__(self) -> str:
        """Axes, role and model."""
        sizes = ", ".join(f"{d} {n}" for d, n in self.data.sizes.items())
        return f"Vectors({self.role!r} of {self.model}; {sizes})"


def extract_vectors(
    model: Any,
    prompts: Prompts,
    *,
    at: str = "answer",
    heads: Iterable[Site | Head | str] | None = None,
) -> Vectors:
    """Take the residual stream after every block at the last token of a role.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        prompts: The donors.
        at: ``"answer"`` for local vectors, ``"query_is"`` for global ones, or any other role.
        heads: Take instead, in each layer, what these heads together add to the residual stream: 0
            in layers without such a head, and biases left out.

    Returns:
        Vectors over ``(prompt, layer, demo, d_model)``, without ``demo`` for roles outside of
        demonstrations.

    Raises:
        UnknownName: for an unknown role.
        PromptError: if the prompts have no such role, or the model cannot read them.
        ModelError: if the model cannot be measured exactly, or its heads' outputs do not add up in
            the residual stream (a norm behind them).
    """
    adapter = Adapter.of(model)
    check_fits(adapter, prompts)
    by_layer: dict[int, list[int]] = {}
    for site in as_sites(heads, at, adapter) if heads is not None else ():
        by_layer.setdefault(site.layer, []).append(site.at[1])
    if heads is None:
        values, logits = residual_at(adapter, prompts, at, "resid_post")
    else:
        values, logits = _writes_at(adapter, prompts, at, by_layer)
    layers = range(adapter.n_layers)
    coords: dict[str, Any] = {"prompt": np.arange(len(prompts)), "layer": np.arange(len(layers))}
    dims: tuple[str, ...] = ("prompt", "layer", "d_model")
    if values.ndim == 4:
        answers = np.array([[y for _, y in demos] for demos in prompts.demos], dtype=object)
        coords |= {"demo": np.arange(prompts.n_demos), "answer": (("prompt", "demo"), answers)}
        dims = DIMS
    targets, every = Targets.of(prompts), torch.arange(len(prompts))
    attrs = provenance(adapter) | prompts.provenance
    attrs["few_shot"] = {
        name: float(metric.readout(targets)(logits.float(), every).mean())
        for name, metric in METRICS.items()
        if name != "kl"
    }
    if heads is not None:
        attrs["heads"] = [f"L{layer}H{h}" for layer in sorted(by_layer) for h in by_layer[layer]]
    data = xr.DataArray(values.numpy(), dims=dims, coords=coords, name="vectors")
    return Vectors(data, parse_role(at).label, adapter.name, attrs)


def residual_at(
    adapter: Adapter, prompts: Prompts, at: str, component: str
) -> tuple[Float[Tensor, "prompt layer *demo d_model"], Float[Tensor, "prompt vocab"]]:
    """Read a component of every block at the last token of a role, and the logits; on the CPU."""
    names: list[HookName] = [(component, layer) for layer in adapter.layers]

    def read(tokens: Tensor) -> tuple[list[Tensor], Tensor]:
        logits, store = adapter.read(tokens, names)
        return [store[name] for name in names], logits

    return _collect(adapter, prompts, at, read)


def _writes_at(
    adapter: Adapter, prompts: Prompts, at: str, by_layer: Mapping[int, Sequence[int]]
) -> tuple[Float[Tensor, "prompt layer *demo d_model"], Float[Tensor, "prompt vocab"]]:
    def read(tokens: Tensor) -> tuple[list[Tensor], Tensor]:
        shape = (*tokens.shape, adapter.d_model)
        nothing = torch.zeros(shape, dtype=adapter.dtype)
        tape = adapter.tape(tokens)
        output = _attention_of(adapter, tape, tokens)
        writes = [
            _write_of(adapter, output, layer, by_layer[layer]) if layer in by_layer else nothing
            for layer in adapter.layers
        ]
        return writes, tape.logits[0]

    return _collect(adapter, prompts, at, read)


def _collect(
    adapter: Adapter,
    prompts: Prompts,
    at: str,
    read: Callable[[Tensor], tuple[list[Tensor], Tensor]],
) -> tuple[Float[Tensor, "prompt layer *demo d_model"], Float[Tensor, "prompt vocab"]]:
    """Go through the prompts and pick a role's last tokens out of what is read in each layer.

    Raises:
        ModelError: if the logits, or what is picked, are NaN or infinite.
    """
    positions = prompts.positions(at)
    columns = positions if positions.ndim == 2 else positions[:, None]
    parts, order, logits = [], [], []
    for rows, tokens in batches(adapter, prompts, check_memory(None)):
        index = torch.arange(len(rows))[:, None]
        layers, last = read(tokens)
        logits.append(last.cpu())
        taken = torch.stack([layer.cpu()[index, columns[rows]] for layer in layers], 1)
        if not taken.isfinite().all():  # a last layer's need not reach the logits
            raise not_finite(adapter, f"vectors at {at!r}")
        # half precisions have no place in netCDF
        parts.append(taken.float() if taken.dtype in (torch.float16, torch.bfloat16) else taken)
        order.append(rows)
    back = torch.cat(order).argsort()
    values = torch.cat(parts)[back]
    return values if positions.ndim == 2 else values[:, :, 0], torch.cat(logits)[back]


AttentionOf = Callable[[int, Sequence[int]], Tensor]
"""Attention output of a layer ``[row, pos, d_model]`` with all heads but those named at 0."""


def _attention_of(adapter: Adapter, tape: Tape, tokens: Tensor) -> AttentionOf:
    """Call single blocks of a recorded run again, or the model where they cannot be called."""
    alone = probe_replays(adapter, tape).layers

    def output(layer: int, kept: Sequence[int]) -> Tensor:
        def keep(z: Tensor) -> Tensor:
            new = torch.zeros_like(z)
            new[:, :, kept] = z[:, :, kept]
            return new

        edits: dict[HookName, Edit] = {("z", layer): keep}
        if not alone:
            return adapter.read(tokens, [("attn_out", layer)], edits)[1]["attn_out", layer]
        whole = Layout.suffix(0, tape.n_pos)
        resid = tape.resid[layer]
        return adapter.block(tape, layer, resid, whole, edits=edits, until="attn_out")

    return output


def _write_of(
    adapter: Adapter, output: AttentionOf, layer: int, heads: Sequence[int]
) -> Float[Tensor, "row pos d_model"]:
    """Compute what heads of one layer add to the residual stream, without knowing its weights.

    The block's attention output with all other heads at 0, minus that with all heads at 0. That is
    their write only where outputs add up, which is checked: these heads and all others, or, where
    there are no others, their first and their second half have to make the whole.
    """
    every = list(range(adapter.n_heads))
    others = [head for head in every if head not in heads]
    none, whole = output(layer, []), output(layer, every)
    write = (output(layer, heads) if others else whole) - none
    half = adapter.n_heads // 2
    part, rest = (heads, others) if others else (every[:half], every[half:])
    total = (write + none if others else output(layer, part)) + output(layer, rest) - none
    error = (total - whole).abs().max() / (1 + whole.abs().max())
    if error > (0.05 if adapter.dtype in (torch.bfloat16, torch.float16) else 1e-4):
        raise ModelError(
            f"what heads of layer {layer} of {adapter.name} write does not add up (a norm stands "
            "behind the attention): use patch_together, which exchanges their outputs"
        )
    return write


def function_vector(
    model: Any, prompts: Prompts, heads: Iterable[Site | Head | str], *, at: str = "query_is"
) -> Vectors:
    """Build a function vector: what chosen heads write at ``query_is``, averaged and summed.

    After Todd et al. 2310.15213: the mean over prompts of each head's output, through its output
    matrix, summed over heads. Add it to the residual stream (``inject_vectors(..., mode="add")``).

    Args:
        model: As in `extract_vectors`.
        prompts: Clean few-shot prompts.
        heads: The heads, usually those with the largest read effects.
        at: Role.

    Returns:
        The same vector at every layer, over ``(layer, d_model)``.

    Raises:
        UnknownName: for an unknown role.
        ModelError: as `extract_vectors`.
    """
    written = extract_vectors(model, prompts, at=at, heads=heads).trial_avg()
    total = written.data.sum("layer")
    return replace(written, data=total.expand_dims(layer=written.data["layer"]).copy())


Layers = Literal["all"] | int | Sequence[int]
How = Literal["each", "joint"]
Mode = Literal["replace", "add"]


@overload
def inject_vectors(
    model: Any, prompts: Prompts, vectors: Vectors, *, at: str | None = None,
    layers: Layers = "all", how: How = "each", mode: Mode = "replace",
    metric: str | Metric = "accuracy", run: Run | None = None, progress: bool = False,
) -> Scores: ...  # fmt: skip


@overload
def inject_vectors(
    model: Any, prompts: Prompts, vectors: Vectors, *, at: str | None = None,
    layers: Layers = "all", how: How = "each", mode: Mode = "replace",
    metric: tuple[str | Metric, ...], run: Run | None = None, progress: bool = False,
) -> dict[str, Scores]: ...  # fmt: skip


def inject_vectors(
    model: Any,
    prompts: Prompts,
    vectors: Vectors,
    *,
    at: str | None = None,
    layers: Layers = "all",
    how: How = "each",
    mode: Mode = "replace",
    metric: str | Metric | tuple[str | Metric, ...] = "accuracy",
    run: Run | None = None,
    progress: bool = False,
) -> Scores | dict[str, Scores]:
    """Put vectors into prompts and measure what the model then answers, layer by layer.

    Row i of the vectors goes into prompt i; vectors without prompts (Trial Avg) go into all, and
    vectors without demonstrations (Pos Avg) into all demonstrations.

    Args:
        model: The model they come from.
        prompts: The recipients: zero-shot, dummy or few-shot prompts.
        vectors: From `extract_vectors`.
        at: Role in the recipients; None for the vectors' own.
        layers: The sweep: every layer, one, or several.
        how: ``"each"`` layer in a run of its own, or all in one ``"joint"`` run.
        mode: ``"replace"`` the residual stream, or ``"add"`` to it.
        metric: Name of a metric; not ``kl``, which has no reference here. A tuple of metrics is
            read off the same runs, so several cost one sweep.
        run: The recipients' own run from `record_run`, so that several sweeps share it; None
            records it.
        progress: Whether to show a progress bar.

    Returns:
        The metric's **value** (no difference) over ``(prompt, layer)``, or ``(prompt, site)`` with
        one entry for ``"joint"``. ``attrs`` has its reference lines as numbers: ``recipient``
        (nothing injected), ``zero_shot``, ``few_shot`` (the donors as they are), ``chance``. For a
        tuple of metrics, one of these for each by its name.

    Raises:
        UnknownName: for an unknown role, mode, way or metric.
        TvInterpError: for a layer outside of the model, or vectors of another model; if there is no
            metric.
        PromptError: if vectors and prompts differ in number, or in demonstrations.
    """
    check_prompts(prompts)
    adapter = Adapter.of(model)
    several = isinstance(metric, tuple)
    metrics = [get_metric(each) for each in (metric if several else (metric,))]
    if not metrics:
        raise TvInterpError("empty selection: expected at least one metric")
    for kind, given, known in (("mode", mode, ("replace", "add")), ("how", how, ("each", "joint"))):
        if given not in known:
            raise unknown(kind, given, known)
    role = parse_role(vectors.role if at is None else at).label
    chosen = _layers(adapter, layers)
    _check_model(adapter, prompts, vectors)
    value = _fitted(prompts, vectors, role)
    patches = [
        Patch(Site(layer, None, "resid_post", role), value[:, layer], mode) for layer in chosen
    ]
    variants: list[Variant] = (
        [tuple(patches)] if how == "joint" else [(patch,) for patch in patches]
    )
    readouts = Readouts.of(metrics, Targets.of(prompts))
    if run is None:
        run = record_run(adapter, prompts)
    label = f"into {role}" if progress else None
    values = run_variants(model, prompts, variants, readouts, run=run, progress=label)
    every = torch.arange(len(prompts))
    recipient = readouts(run.logits, every).mean(0).tolist()
    zero_shot = recipient
    if prompts.n_demos:  # then the labels are answer and foil alone
        labels = torch.stack([prompts.answer, prompts.foil], 1)
        alone = Readouts.of(metrics, Targets(prompts.answer, prompts.foil, labels))
        zero_shot = alone(run.zero_shot, every).mean(0).tolist()
    about = provenance(adapter) | prompts.provenance
    about |= {
        "at": role, "taken_at": vectors.role, "mode": mode,
        "donors": {k: vectors.attrs[k] for k in ("task", "n_demos", "seed") if k in vectors.attrs},
    }  # fmt: skip
    dims, coords = ("layer",), {"layer": np.array(chosen)}
    if how == "joint":
        dims, coords = ("site",), {"site": ["+".join(f"L{layer}" for layer in chosen)]}
    found = {}
    for i, each in enumerate(metrics):
        attrs = about | {
            "metric": each.name,
            "recipient": recipient[i],
            "zero_shot": zero_shot[i],
            "few_shot": vectors.attrs.get("few_shot", {}).get(each.name),
            "chance": each.chance(adapter.model.cfg.d_vocab),
        }
        found[each.name] = label_scores(
            values[..., i].T.numpy(), dims, coords, unit=each.unit, total=None, prompts=prompts,
            attrs=attrs,
        )  # fmt: skip
    return found if several else found[metrics[0].name]


def _layers(adapter: Adapter, layers: Literal["all"] | int | Sequence[int]) -> list[int]:
    if isinstance(layers, str):
        if layers != "all":
            raise unknown("layers", layers, ("all",))
        return list(range(adapter.n_layers))
    chosen = [layers] if isinstance(layers, int) else [int(layer) for layer in layers]
    if not chosen:
        raise TvInterpError("empty selection: expected at least one layer")
    for layer in chosen:
        if not 0 <= layer < adapter.n_layers:
            raise TvInterpError(
                f"layer {layer} is outside of {adapter.name}: expected 0 to {adapter.n_layers - 1}"
            )
    return chosen


def _check_model(adapter: Adapter, prompts: Prompts, vectors: Vectors) -> None:
    width = adapter.model.cfg.d_model
    there = (vectors.data.sizes["layer"], vectors.data.sizes["d_model"])
    if there != (adapter.n_layers, width):
        raise TvInterpError(
            f"vectors of {vectors.model} have {there[0]} layers of d_model {there[1]}, "
            f"{adapter.name} has {adapter.n_layers} of {width}: extract them from the same model"
        )
    if vectors.model != adapter.name:
        raise TvInterpError(
            f"vectors of {vectors.model} do not fit {adapter.name}: extract them from the same "
            "model"
        )


def _fitted(prompts: Prompts, vectors: Vectors, role: str) -> Float[Tensor, "prompt layer *demo d"]:
    """Bring vectors to the recipients' prompts and demonstrations."""
    data = vectors.data
    into_demos = parse_role(role) in DEMO_ROLES
    if "prompt" in data.dims and data.sizes["prompt"] != len(prompts):
        raise PromptError(
            f"vectors of {data.sizes['prompt']} prompts and {len(prompts)} recipients: row i goes "
            "into prompt i, so take as many with select(...), or one for all with trial_avg()"
        )
    if "demo" in data.dims and not into_demos:
        raise PromptError(
            f"vectors of {vectors.role!r} have one for each demonstration, and {role!r} is one "
            "token: average them with pos_avg()"
        )
    if "demo" in data.dims and data.sizes["demo"] != prompts.n_demos:
        raise PromptError(
            f"donors have {data.sizes['demo']} demonstrations, the recipients {prompts.n_demos}: "
            f"use donors of {prompts.n_demos} (make_prompts(n_demos=...), keep_demos), or "
            "pos_avg(), which fits any number"
        )
    value = torch.from_numpy(np.ascontiguousarray(data.values))
    if "prompt" not in data.dims:
        value = value.expand(len(prompts), *value.shape)
    if into_demos and "demo" not in data.dims:
        value = value[:, :, None].expand(-1, -1, prompts.n_demos, -1)
    return value
