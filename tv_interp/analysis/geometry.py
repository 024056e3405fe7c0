"""What the states at a role encode, and whether it is used: dPCA, Mahalanobis distance, ablation.

Demixed PCA after Kobak et al., eLife 2016 5:e10989: states are averaged by condition, the averages
split into marginalisations (each factor, and their interaction), and each marginalisation is fitted
by a reduced-rank regression from the full states, in closed form and without a regularizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ScoreError, TvInterpError
from ..interventions.recording import batches, check_memory
from ..models.adapter import Adapter, Edit, HookName
from ..prompts import Prompts
from ..scores import Scores, get_metric
from ..scores.metrics import Targets
from .common import label_scores, provenance

# ------------------------------------------------------------------------------------------ dPCA


@dataclass(frozen=True, eq=False)
class Demixed:
    """A demixed PCA.

    Attributes:
        decoders: ``[d_model, component]`` by marginalisation: project centred states on these.
        encoders: ``[d_model, component]``, orthonormal: the axes along which the factor moves the
            state.
        explained: Share of the total variance of the condition means that each component explains.
        shares: Share of that variance that belongs to each marginalisation; they add up to 1.
        mean: ``[d_model]`` mean of the condition means.
    """

    decoders: Mapping[str, Float[np.ndarray, "d_model component"]]
    encoders: Mapping[str, Float[np.ndarray, "d_model component"]]
    explained: Mapping[str, Float[np.ndarray, " component"]]
    shares: Mapping[str, float]
    mean: Float[np.ndarray, " d_model"]


def demix(
    states: Float[np.ndarray, "sample d_model"],
    factors: Mapping[str, Sequence[Any]],
    *,
    n_components: int = 3,
    noise: Literal["none", "pooled"] = "pooled",
) -> Demixed:
    """Fit a demixed PCA of two factors.

    For each marginalisation, the D of rank q and the orthonormal F that minimise
    ``|X_phi - F D X|^2``: with B = X_phi X' (X X')^-1, F are the first q left singular vectors of B
    X, and D = F' B. X holds the centred condition means, and for ``"pooled"`` the deviations of
    the samples from them too, which keeps decoders away from noise.

    Args:
        states: One state a sample.
        factors: Names and each sample's level of exactly two factors; every pair of levels has to
            occur. The interaction is named ``first:second``.
        n_components: Components of each marginalisation, at most.
        noise: ``"none"`` fits the condition means alone, as the package dPCA 1.0.5 does without
            a regularizer.

    Raises:
        TvInterpError: if there are not two factors, or a pair of levels does not occur.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> a, b = rng.integers(2, size=200), rng.integers(3, size=200)
        >>> x = rng.standard_normal((200, 5)) * .01
        >>> x[:, 0] += a
        >>> abs(demix(x, {"a": a, "b": b}).encoders["a"][0, 0]).round(3)
        np.float64(1.0)
    """
    if len(factors) != 2:
        raise TvInterpError(f"expected two factors, got {list(factors)}")
    names = list(factors)
    pairs = [np.unique(np.asarray(codes), return_inverse=True) for codes in factors.values()]
    levels, codes = [level.tolist() for level, _ in pairs], [code for _, code in pairs]
    means = np.zeros((len(levels[0]), len(levels[1]), states.shape[1]))
    deviations = np.zeros(states.shape)
    for i, j in np.ndindex(*means.shape[:2]):
        here = (codes[0] == i) & (codes[1] == j)
        if not here.any():
            raise TvInterpError(
                f"no state with {names[0]} {levels[0][i]!r} and {names[1]} {levels[1][j]!r}: "
                "every pair of levels has to occur; take more prompts or fewer levels"
            )
        means[i, j] = states[here].mean(0)
        # every condition counts alike, however many samples it has
        deviations[here] = (states[here] - means[i, j]) / np.sqrt(here.sum())
    mean = means.mean((0, 1))
    centred = means - mean
    first, second = centred.mean(1, keepdims=True), centred.mean(0, keepdims=True)
    parts = {
        names[0]: np.broadcast_to(first, means.shape),
        names[1]: np.broadcast_to(second, means.shape),
        ":".join(names): centred - first - second,
    }
    X = centred.reshape(-1, states.shape[1]).T  # [d_model, condition]
    total = (X**2).sum()
    gram = X @ X.T
    if noise == "pooled":
        gram = gram + deviations.T @ deviations
    inverse = np.linalg.pinv(gram, rcond=1e-10, hermitian=True)
    decoders, encoders, explained, shares = {}, {}, {}, {}
    for name, part in parts.items():
        P = part.reshape(-1, states.shape[1]).T
        B = P @ X.T @ inverse
        # singular vectors of B X over all columns of X, through its Gram matrix
        values, vectors = np.linalg.eigh(B @ gram @ B.T)
        order = np.argsort(values)[::-1][:n_components]
        order = order[values[order] > 1e-10 * max(values.max(), 1e-300)]
        F = vectors[:, order]
        D = F.T @ B
        scores = D @ X
        encoders[name], decoders[name] = F, D.T
        explained[name] = np.array(
            [
                (total - ((X - np.outer(F[:, c], scores[c])) ** 2).sum()) / total
                for c in range(len(order))
            ]
        )
        shares[name] = float((P**2).sum() / total)
    return Demixed(decoders, encoders, explained, shares, mean)


# ----------------------------------------------------------------------------------- Mahalanobis


def ledoit_wolf(centred: Float[np.ndarray, "sample d_model"]) -> float:
    """Compute the shrinkage towards a multiple of the identity of Ledoit and Wolf (2004).

    J. Multivariate Analysis 88:365, their optimal weight of ``tr(S)/d I`` against S.
    """
    n, d = centred.shape
    S = centred.T @ centred / n
    target = np.trace(S) / d
    distance = ((S - target * np.eye(d)) ** 2).sum()
    spread = ((centred**2).sum(1) ** 2).sum() / n**2 - (S**2).sum() / n
    return float(np.clip(spread / distance, 0, 1)) if distance > 0 else 1.0


def mahalanobis(
    states: Float[np.ndarray, "sample d_model"],
    classes: Sequence[Any],
    *,
    shrinkage: float | Literal["auto"] = "auto",
) -> float:
    """Compute the mean Mahalanobis distance between class means.

    The covariance is that within classes, pooled, S, shrunk to ``(1 - s) S + s tr(S)/d I``.

    Args:
        states: One state a sample.
        classes: Class of each sample; two or more classes.
        shrinkage: s from 0 to 1, or ``"auto"`` for Ledoit and Wolf's.

    Returns:
        Distance, in within-class standard deviations, mean over pairs of classes.

    Raises:
        ScoreError: if there are fewer than two classes, the shrinkage is not between 0 and 1, or
            there are too few samples for the covariance.
    """
    names = sorted(set(classes))
    labels = np.array([names.index(c) for c in classes])
    if len(names) < 2:
        raise ScoreError(f"expected two classes or more, got {len(names)}")
    n, d = states.shape
    degrees = n - len(names)
    if degrees < 1 or (shrinkage == 0 and degrees < d):
        raise ScoreError(
            f"{n} states in {len(names)} classes are too few for a covariance of {d} dimensions: "
            f"expected {d + len(names)} or more; take more prompts, or shrinkage='auto'"
        )
    if shrinkage != "auto" and not 0 <= shrinkage <= 1:
        raise ScoreError(f"expected a shrinkage from 0 to 1 or 'auto', got {shrinkage!r}")
    means = np.stack([states[labels == c].mean(0) for c in range(len(names))])
    centred = states - means[labels]
    s = ledoit_wolf(centred) if shrinkage == "auto" else shrinkage
    S = centred.T @ centred / degrees
    S = (1 - s) * S + s * np.trace(S) / d * np.eye(d)
    pairs = np.triu_indices(len(names), 1)
    apart = means[pairs[0]] - means[pairs[1]]
    return float(np.sqrt((apart * np.linalg.solve(S, apart.T).T).sum(1)).mean())


# --------------------------------------------------------------------------- subspaces, ablated


class Subspace(NamedTuple):
    """Directions that are taken out of the residual stream, layer by layer.

    Attributes:
        bases: ``[d_model, direction]`` orthonormal columns, by layer.
        weights: ``[direction]`` how much of each is taken out, 1 for all, by layer.
        mean: ``[layer, d_model]`` what takes its place.
    """

    bases: tuple[Float[np.ndarray, "d_model direction"], ...]
    weights: tuple[Float[np.ndarray, " direction"], ...]
    mean: Float[np.ndarray, "layer d_model"]

    def removed(self, states: Float[np.ndarray, "sample layer d_model"]) -> np.ndarray:
        """Compute the variance that is taken out of states, by layer."""
        out = []
        for layer, (basis, weight) in enumerate(zip(self.bases, self.weights, strict=True)):
            centred = states[:, layer] - self.mean[layer]
            out.append((((centred @ basis) * weight) ** 2).sum(1).mean())
        return np.array(out)


def random_subspace(
    like: Subspace,
    states: Float[np.ndarray, "sample layer d_model"],
    *,
    match: Literal["rank", "variance"],
    seed: int = 0,
) -> Subspace:
    """Draw a random subspace of the same rank, or one that takes out as much variance.

    For ``"variance"`` random orthonormal directions are added until they take out as much; the last
    is taken out in part.

    Raises:
        TvInterpError: for another ``match``.
    """
    if match not in ("rank", "variance"):
        raise TvInterpError(f"expected match='rank' or match='variance', got {match!r}")
    rng = np.random.default_rng([seed, 11])
    wanted = like.removed(states)
    bases, weights = [], []
    for layer, basis in enumerate(like.bases):
        d = basis.shape[0]
        directions = np.linalg.qr(rng.standard_normal((d, d)))[0]
        weight = np.ones(d)
        if match == "rank":
            n = basis.shape[1]
        else:
            centred = states[:, layer] - like.mean[layer]
            each = ((centred @ directions) ** 2).mean(0)
            n = min(int(np.searchsorted(each.cumsum(), wanted[layer])) + 1, d)
            rest = wanted[layer] - each[: n - 1].sum()
            weight[n - 1] = np.sqrt(np.clip(rest / each[n - 1], 0, 1))
        bases.append(directions[:, :n])
        weights.append(weight[:n])
    return Subspace(tuple(bases), tuple(weights), like.mean)


def ablate_subspaces(
    model: Any,
    prompts: Prompts,
    subspaces: Mapping[str, Subspace],
    *,
    at: str = "answer",
    layers: Literal["each", "from"] = "from",
    metric: str = "accuracy",
) -> Scores:
    """Take subspaces out of the residual stream at a role: h <- h - U U' (h - mean).

    Unlike a patch, what is put there depends on the run itself, so this runs whole forward passes.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        prompts: Clean prompts.
        subspaces: By name.
        at: Role; its last tokens are changed, after each block.
        layers: ``"each"`` layer alone, or ``"from"`` each one on: from 0 on is all layers.
        metric: Name of a metric.

    Returns:
        Values over ``(prompt, layer, site)``; site ``none`` is the plain run.

    Raises:
        TvInterpError: for other ``layers``, or a subspace of another model.
        UnknownName: for an unknown role or metric.
    """
    adapter, measure = Adapter.of(model), get_metric(metric)
    every = range(adapter.n_layers)
    if layers not in ("each", "from"):
        raise TvInterpError(f"expected layers='each' or 'from', got {layers!r}")
    width = adapter.model.cfg.d_model
    for name, subspace in subspaces.items():
        shape = (len(subspace.bases), subspace.mean.shape[1])
        if shape != (adapter.n_layers, width):
            raise TvInterpError(
                f"subspace {name!r} has {shape[0]} layers of d_model {shape[1]}, {adapter.name} "
                f"has {adapter.n_layers} of {width}: fit it on the same model"
            )
    runs = [[layer] if layers == "each" else list(every[layer:]) for layer in every]
    positions = prompts.positions(at)
    positions = positions if positions.ndim == 2 else positions[:, None]
    readout = measure.readout(Targets.of(prompts))
    values = np.zeros((len(prompts), len(runs), len(subspaces) + 1))
    for rows, tokens in batches(adapter, prompts, check_memory(None)):
        where = (torch.arange(len(rows))[:, None], positions[rows])
        plain, here = adapter.read(tokens, [])[0], rows.numpy()
        values[here, :, 0] = readout(plain, rows).numpy()[:, None]
        for s, subspace in enumerate(subspaces.values(), 1):
            for r, chosen in enumerate(runs):
                edits: dict[HookName, Edit] = {
                    ("resid_post", layer): _projector(subspace, layer, where) for layer in chosen
                }
                values[here, r, s] = readout(adapter.read(tokens, [], edits)[0], rows).numpy()
    attrs = provenance(adapter) | prompts.provenance
    attrs |= {"metric": measure.name, "at": at, "corruption": f"subspace, {layers}"}
    return label_scores(
        values, ("layer", "site"),
        {"layer": np.arange(adapter.n_layers), "site": ["none", *subspaces]},
        unit=measure.unit, total=None, prompts=prompts, attrs=attrs,
    )  # fmt: skip


def _projector(subspace: Subspace, layer: int, where: tuple[Tensor, Tensor]) -> Edit:
    basis = torch.from_numpy(subspace.bases[layer])
    weight = torch.from_numpy(subspace.weights[layer])
    mean = torch.from_numpy(subspace.mean[layer])

    def edit(resid: Tensor) -> Tensor:
        new = resid.clone()
        h = resid[where].double().cpu()
        part = (((h - mean) @ basis) * weight) @ basis.T
        new[where] = (h - part).to(resid)
        return new

    return edit
