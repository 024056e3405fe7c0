"""What the residual stream holds, by role and layer: the rule, the query, or the answer.

Two rules are crossed with two queries, which gives four answers (`tv_interp.prompts.crossing`). The
state of a role after a block is taken from the run in which both differ and put into the plain run.
Which of the four answers comes out says what was in it:

* the other rule's answer to the plain query: the state held the **rule**, the query is elsewhere;
* the plain rule's answer to the other query: it held the **query**;
* the other rule's answer to the other query: it held the **answer**, or rule and query together,
  which no exchange of one state can tell apart.

Beside it, as a screen, a linear decoder: what can be read off a state need not be used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from ..display import Shown, Table, as_text
from ..errors import unknown
from ..interventions.engine import run_variants
from ..interventions.recording import check_memory, record_run
from ..interventions.sites import Patch, Site, Variant
from ..models.adapter import Adapter
from ..prompts import Prompts, Task
from ..prompts.crossing import Crossed, cross
from ..prompts.roles import DEMO_ROLES, parse_role
from ..scores import Scores
from .common import label_scores, provenance
from .positions import roles_of
from .vectors import residual_at

Held = Literal["rule", "query", "answer"]
HELD: tuple[Held, ...] = ("rule", "query", "answer")
DECODED = ("rule", "input", "answer")
N_FOLDS = 5
RIDGE = 0.1
"""Penalty of the decoder, in mean variances of a state's coordinates."""


@dataclass(frozen=True, eq=False, repr=False)
class InformationMap(Shown):
    """What `information_map` found.

    Attributes:
        held: By intervention, for each of ``rule``, ``query`` and ``answer``: effects over
            ``(prompt, layer, role)``, in probability among the four answers. Its total is that of
            the whole run with another rule, with another query, or with both.
        decoded: The screen, for ``rule``, ``input`` and ``answer`` (a demonstration's own at its
            roles, the query's at the query's): accuracy over ``(prompt, layer, role)`` less that of
            a decoder of shuffled labels. A role is NaN, and a quantity is missing, where too few
            states share a word.
        settings: Provenance as plain values; ``right`` is how often the plain run prefers its
            answer among the four.
    """

    held: Mapping[str, Scores]
    decoded: Mapping[str, Scores]
    settings: Mapping[str, Any]

    def share(self, what: Held) -> xr.DataArray:
        """Get the share of its total that each role and layer holds; NaN where there is no total.

        Raises:
            UnknownName: for another ``what``.
        """
        if what not in HELD:
            raise unknown("information", what, HELD)
        scores = self.held[what]
        if scores.total_is_clear():
            return scores.recovered()
        return scores.mean() * np.nan

    def plot(self, *, of: Literal["held", "decoded"] = "held", title: str | None = None) -> Any:
        """Draw role by layer; see `tv_interp.show.plots.plot_information`."""
        from ..show.plots import plot_information

        return plot_information(self, of=of, title=title)

    def _blocks(self):
        s = self.settings
        yield (
            f"{s['task']} on {s['model']}, {s['n_prompts']} prompts: what a state holds, by role, "
            f"where it holds most; the other rule is {s['other']}. The plain run prefers its "
            f"answer of the four in {s['right']:.2f}."
        )
        rows = []
        for role in self.held["rule"].data["role"].values.tolist():
            cells = []
            for what in HELD:
                share = self.share(what).sel(role=role)
                if not share.notnull().any():
                    cells.append("no total")
                    continue
                layer = int(np.abs(share.values).argmax())
                cells.append(f"{float(share[layer]):+.2f} (L{layer})")
            rows.append((role, *cells))
        yield Table(("role", *HELD), rows)

    def __str__(self) -> str:
        """Where each role holds most of each."""
        return as_text(self._blocks())

    def __repr__(self) -> str:
        """Task and model."""
        return f"InformationMap({self.settings['task']!r} on {self.settings['model']!r})"


@dataclass(frozen=True, eq=False)
class Which:
    """Reads how probable three of four answers are among the four; a `Readout`.

    Attributes:
        tokens: ``[prompt, 4]`` first tokens: the plain answer, then those of `HELD`.
    """

    tokens: Int[Tensor, "prompt 4"]

    def __call__(
        self, logits: Float[Tensor, "row vocab"], rows: Int[Tensor, " row"]
    ) -> Float[Tensor, "row 3"]:
        """Read the logits of the whole vocabulary."""
        return self.of_tokens(logits.gather(1, self.tokens[rows].to(logits.device)))

    def of_tokens(self, logits: Float[Tensor, "row 4"]) -> Float[Tensor, "row 3"]:
        """Read the logits of `tokens`."""
        return logits.cpu().double().softmax(-1)[:, 1:]


def information_map(
    model: Any,
    prompts: Prompts,
    *,
    other: str | Task | None = None,
    roles: Sequence[str] | None = None,
    seed: int = 1,
    max_memory: float | None = None,
    progress: bool = False,
) -> InformationMap:
    """Measure what each role's residual stream holds after each block: rule, query or answer.

    Demonstrations come before the query, so their states hold nothing of it, exactly.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        prompts: Plain prompts; see `cross` for which can be crossed.
        other: The other relation; None for the task's partner. Categorization gets other labels.
        roles: Which; None for all that every prompt has. The last tokens of all a role's spans are
            exchanged together, so what sits at earlier tokens of a long input is not seen.
        seed: Decides other queries and labels, folds and shuffles.
        max_memory: As in `record`.
        progress: Whether to show progress.

    Returns:
        The maps. Each has its own family of tests (roles times layers) for `Scores.significant`. A
        probability is no logit: an exchange that moves the answers' logits half the way shows as
        little, so a small share says that the state does not decide alone.

    Raises:
        UnknownName: for an unknown role or other task.
        PromptError: if the prompts cannot be crossed or lack a role.
        ModelError: if the model cannot be measured exactly.
    """
    adapter, crossed = Adapter.of(model), cross(prompts, other=other, seed=seed)
    plain = crossed.plain
    names = roles_of(plain) if roles is None else [parse_role(role).label for role in roles]
    budget = check_memory(max_memory)
    every = torch.arange(len(plain))
    readout = Which(crossed.answers)
    run = record_run(adapter, plain, max_memory=budget / 2)
    base = readout(run.logits, every)
    whole = [
        readout(record_run(adapter, each, max_memory=budget / 4, replays=run.replays).logits, every)
        for each in crossed[1:]
    ]
    states = {
        role: torch.stack([residual_at(adapter, p, role, "resid_post")[0] for p in crossed], 1)
        for role in names
    }
    variants: list[Variant] = [
        (Patch(Site(layer, None, "resid_post", role), states[role][:, 3, layer]),)
        for layer in adapter.layers
        for role in names
    ]
    label = "information" if progress else None
    values = run_variants(
        model, plain, variants, readout, run=run, max_memory=budget / 2, progress=label
    )
    effects = (values - base).transpose(0, 1).numpy()  # [prompt, variant, held]
    effects = effects.reshape(len(plain), adapter.n_layers, len(names), len(HELD))
    coords = {"layer": np.arange(adapter.n_layers), "role": names}
    partner = "other labels" if plain.task.family == "categorization" and other is None else other
    partner = getattr(partner, "name", partner) or getattr(plain.task, "partner", None)
    attrs = provenance(adapter) | plain.provenance | {"other": str(partner), "seed": seed}
    attrs |= {"metric": "probability among the four answers"}
    held = {
        what: label_scores(
            effects[..., i], ("layer", "role"), coords, unit="probability among four answers",
            total=whole[i][:, i] - base[:, i], prompts=plain, attrs=attrs | {"information": what},
        )
        for i, what in enumerate(HELD)
    }  # fmt: skip
    right = float((base.sum(-1) < 0.5).double().mean())
    decoded = _decode(crossed, states, coords, attrs, seed)
    return InformationMap(held, decoded, attrs | {"right": right})


# -------------------------------------------------------------------------------------- the screen


def _decode(
    crossed: Crossed,
    states: Mapping[str, Float[Tensor, "prompt run layer *demo d_model"]],
    coords: Mapping[str, Any],
    attrs: Mapping[str, Any],
    seed: int,
) -> dict[str, Scores]:
    """Decode rule, input and answer from the states of all four runs, prompts held out."""
    n_prompts, n_layers = len(crossed.plain), len(coords["layer"])
    rng = np.random.default_rng([seed, 17])
    fold = rng.permutation(np.arange(n_prompts) % N_FOLDS)
    found = np.full((len(DECODED), n_prompts, n_layers, len(coords["role"])), np.nan)
    for r, role in enumerate(coords["role"]):
        x = states[role].float().numpy()
        x = x[:, :, :, None] if x.ndim == 4 else x  # [prompt, run, layer, place, d_model]
        words = {name: _words_at(crossed, role, name) for name in DECODED}
        size = x.shape[0], x.shape[1], x.shape[3]
        usable = {k: v for k, v in words.items() if v is not None and _shared(v, fold)}
        shuffled = {k: _shuffle(v, rng) for k, v in usable.items()}
        which = np.repeat(fold, size[1] * size[2])
        codes = [v.ravel() for v in (*usable.values(), *shuffled.values())]
        for layer in range(n_layers) if usable else ():
            flat = x[:, :, layer].reshape(-1, x.shape[-1])
            hits = _ridge_hits(flat, codes, which).reshape(len(codes), n_prompts, -1).mean(-1)
            for i, name in enumerate(usable):
                found[DECODED.index(name), :, layer, r] = hits[i] - hits[i + len(usable)]
    return {
        name: label_scores(
            found[i], ("layer", "role"), coords, unit="accuracy above shuffled labels", total=None,
            prompts=crossed.plain, attrs=dict(attrs) | {"decoded": name},
        )
        for i, name in enumerate(DECODED)
        if np.isfinite(found[i]).any()
    }  # fmt: skip


def _words_at(crossed: Crossed, role: str, what: str) -> Int[np.ndarray, "prompt run place"] | None:
    """Number the words that a decoder is asked for; None where they mean nothing across prompts."""
    if parse_role(role).label in ("bos", "other"):
        return None
    in_demo = parse_role(role) in DEMO_ROLES
    if what == "rule":
        if crossed.plain.task.family == "categorization":
            return None  # labels are drawn anew for each prompt
        n = crossed.plain.n_demos if in_demo else 1
        return np.broadcast_to([[0], [1], [0], [1]], (len(crossed.plain), 4, n)).copy()
    pick: Callable[[Any], list[str]]
    if in_demo:
        part = 0 if what == "input" else 1
        pick = lambda sample: [pair[part] for pair in sample.demos]  # noqa: E731
    else:
        pick = lambda sample: [sample.query if what == "input" else sample.answer]  # noqa: E731
    words = np.array([[pick(s) for s in p.samples] for p in crossed], dtype=object)
    words = words.swapaxes(0, 1)
    return np.unique(words.astype(str), return_inverse=True)[1].reshape(words.shape)


def _shared(codes: Int[np.ndarray, "prompt run place"], fold: Int[np.ndarray, " prompt"]) -> bool:
    """Whether most states have a word that other folds show too, so that it can be learnt."""
    folds = np.broadcast_to(fold[:, None, None], codes.shape)
    seen = np.zeros((codes.max() + 1, N_FOLDS), dtype=bool)
    seen[codes.ravel(), folds.ravel()] = True
    return bool((seen.sum(1) > 1)[codes].mean() > 0.5 and len(np.unique(codes)) > 1)


def _shuffle(
    codes: Int[np.ndarray, "prompt run place"], rng: np.random.Generator
) -> Int[np.ndarray, "prompt run place"]:
    return rng.permutation(codes.ravel()).reshape(codes.shape)


def _ridge_hits(
    states: Float[np.ndarray, "sample d_model"],
    questions: Sequence[Int[np.ndarray, " sample"]],
    fold: Int[np.ndarray, " sample"],
) -> Float[np.ndarray, "question sample"]:
    """Mark the states whose class a ridge regression on one-hot classes of other prompts finds."""
    hits = np.zeros((len(questions), len(states)))
    onehots = [np.eye(codes.max() + 1, dtype=states.dtype)[codes] for codes in questions]
    ends = np.cumsum([each.shape[1] for each in onehots])[:-1]
    targets = np.concatenate(onehots, 1)
    for k in range(N_FOLDS):
        here = fold == k
        x, y = states[~here], targets[~here]
        mean, level = x.mean(0), y.mean(0)
        x = x - mean
        gram = x.T @ x
        gram[np.diag_indices_from(gram)] += RIDGE * np.trace(gram) / len(gram) + 1e-12
        weights = np.linalg.solve(gram, x.T @ (y - level))
        guesses = np.split((states[here] - mean) @ weights + level, ends, axis=1)
        for i, (guess, codes) in enumerate(zip(guesses, questions, strict=True)):
            hits[i, here] = guess.argmax(1) == codes[here]
    return hits
