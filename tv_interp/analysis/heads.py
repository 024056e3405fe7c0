"""Who writes, who reads, and from what: one head's output exchanged between two runs.

Definitions. m is the metric at ``query_is``, C the clean run, D the corrupted one.

* **write effect** of head h: m(D with z_h at the answer positions from C) - m(D).
* **read effect** of head h: the same with z_h at ``query_is``.
* **source split**: z = sum over keys j of A_j v_j, so what was exchanged can be split by the role
  of j, and into the part of attention and the part of values.
* **knockout**: attention from one role to another is taken away; the softmax renormalises.

References: Zhang & Nanda 2309.16042 (metrics, corruptions), Heimersheim & Nanda 2404.15255
(directions).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import ModelError, PromptError, ScoreError, TvInterpError, unknown
from ..interventions.engine import check_layers, run_variants
from ..interventions.recording import Recorded, Run, check_memory, record_run
from ..interventions.sites import Cut, Head, Patch, Site, Variant
from ..models.adapter import Adapter, Edit
from ..models.replay import Layout, Tape
from ..prompts import Contrast, Prompts, check_contrast, check_prompts
from ..prompts.roles import DEMO_ROLES, ROLE_NAMES, Role, parse_role
from ..scores import Metric, Scores, get_metric
from ..scores.metrics import Targets
from .common import (
    Direction,
    Experiment,
    all_heads,
    as_sites,
    head_coords,
    label_scores,
    provenance,
)

Part = Literal["pattern", "q", "k", "value", "interaction", "both", "kv"]
PARTS: tuple[Part, ...] = ("pattern", "q", "k", "value", "interaction", "both", "kv")


def patch_heads(
    model: Any,
    contrast: Contrast,
    *,
    at: str = "answer",
    direction: Direction = "denoise",
    metric: str | Metric = "logit_diff",
    demos: Literal["joint", "each"] = "joint",
    recorded: Recorded | None = None,
    progress: bool = False,
) -> Scores:
    """Exchange each head's output at one role: who writes (``answer``), who reads (``query_is``).

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        contrast: Clean and corrupted prompts.
        at: Role whose last token is patched.
        direction: ``"denoise"`` patches the clean output into the corrupted run (what suffices),
            ``"noise"`` the corrupted output into the clean run (what is needed).
        metric: Name of a metric.
        demos: ``"joint"`` patches all demonstrations in one run, ``"each"`` one at a time.
        recorded: The two runs from `record`; None records them.
        progress: Whether to show a progress bar.

    Returns:
        Scores over ``(prompt, layer, head)``, and ``demo`` for ``"each"``, in the metric's unit.
        Positive: the head carries the task at this role.

    Raises:
        UnknownName: for an unknown role, direction or metric.
        PromptError: if the prompts have no such role.
        ModelError: if the model cannot be measured exactly.
    """
    if demos not in ("joint", "each"):
        raise unknown("demos", demos, ("joint", "each"))
    run = Experiment(model, contrast, recorded, direction, metric, at)
    z = run.donor.z_at(at)
    each = range(contrast.clean.n_demos) if demos == "each" else (None,)
    if demos == "each" and parse_role(at) not in DEMO_ROLES:
        raise PromptError(f"demos='each' needs a role of demonstrations, got {at!r}: use 'joint'")
    variants: list[Variant] = []
    for layer, head in all_heads(run.adapter):
        value = z[:, layer, ..., head, :]
        for demo in each:
            site = Site(layer, head, "z", at, demo)
            variants.append((Patch(site, value if demo is None else value[:, demo]),))
    n_layers, n_heads = run.adapter.n_layers, run.adapter.n_heads
    shape = (len(contrast), n_layers, n_heads, len(each))
    label = f"{direction} {at}" if progress else None
    effects = run.effects(variants, label).reshape(shape)
    coords = head_coords(run.adapter)
    if demos == "joint":
        return run.scores(effects[..., 0], ("layer", "head"), coords, demos=demos)
    return run.scores(
        effects, ("layer", "head", "demo"), coords | {"demo": np.array(each)}, demos=demos
    )


def patch_local_paths(
    model: Any,
    contrast: Contrast,
    *,
    at: str = "answer",
    direction: Direction = "denoise",
    metric: str | Metric = "logit_diff",
    recorded: Recorded | None = None,
    progress: bool = False,
) -> Scores:
    """Measure how much of what each head writes at a role reaches the last token directly.

    The **local path effect**: as the write effect, but every token other than those of the role
    and the last one stays as it was, so what the head wrote cannot travel through them. It is
    another quantity than the write effect, not a faster way to it.

    Args:
        model: As in `patch_heads`.
        contrast: As in `patch_heads`.
        at: As in `patch_heads`.
        direction: As in `patch_heads`.
        metric: As in `patch_heads`.
        recorded: As in `patch_heads`.
        progress: As in `patch_heads`.

    Returns:
        Scores over ``(prompt, layer, head)`` with ``effect="local path"`` in their attributes.

    Raises:
        ModelError: if the model's blocks cannot be called by themselves; and as `patch_heads`.
    """
    check_contrast(contrast)
    run = Experiment(model, contrast, recorded, direction, metric, at)
    z, heads = run.donor.z_at(at), all_heads(run.adapter)
    variants = [(Patch(Site(la, h, "z", at), z[:, la, ..., h, :]),) for la, h in heads]
    label = f"local {direction} {at}" if progress else None
    effects = run.effects(variants, label, others="frozen")
    n_layers, n_heads = run.adapter.n_layers, run.adapter.n_heads
    return run.scores(
        effects.reshape(len(contrast), n_layers, n_heads),
        ("layer", "head"),
        head_coords(run.adapter),
        effect="local path",
    )


def patch_together(
    model: Any,
    contrast: Contrast,
    sets: Mapping[str, Iterable[Site | Head]],
    *,
    at: str = "answer",
    direction: Direction = "denoise",
    metric: str | Metric = "logit_diff",
    recorded: Recorded | None = None,
    progress: bool = False,
) -> Scores:
    """Exchange the outputs of several heads at one role in the same run.

    Args:
        sets: Heads by the name of their set; an empty set has effect 0.
        model: As in `patch_heads`, and so are the others.
        contrast: As in `patch_heads`.
        at: As in `patch_heads`.
        direction: As in `patch_heads`.
        metric: As in `patch_heads`.
        recorded: As in `patch_heads`.
        progress: As in `patch_heads`.

    Returns:
        Scores over ``(prompt, site)``, where site is the name of the set.

    Raises:
        TvInterpError: if a head is outside of the model; and as `patch_heads`.
    """
    run = Experiment(model, contrast, recorded, direction, metric, at)
    z = run.donor.z_at(at)
    variants: list[Variant] = []
    for heads in sets.values():
        members = list(heads)
        sites = as_sites(members, at, run.adapter) if members else []
        variants.append(tuple(Patch(s, z[:, s.layer, ..., s.head, :]) for s in sites))
    effects = run.effects(variants, f"{at} sets" if progress else None)
    return run.scores(effects, ("site",), {"site": list(sets)})


def patch_sources(
    model: Any,
    contrast: Contrast,
    *,
    at: str = "query_is",
    heads: Iterable[Site | Head | str] | None = None,
    roles: Sequence[str] | None = None,
    parts: Sequence[Part] = PARTS,
    direction: Direction = "denoise",
    metric: str | Metric = "logit_diff",
    recorded: Recorded | None = None,
    progress: bool = False,
) -> Scores:
    """Split a head's effect by the role of what it attends to, and by attention and value.

    With A, v of the base run and A', v' of the donor run, the change of z at keys of role s is

    ============ ================================================================================
    part         change of z
    ============ ================================================================================
    pattern      sum over s of (A' - A) v
    q            the same with A' from the donor's queries and the base's keys
    k            with the donor's keys at s alone, the softmax recomputed: sum over **all** keys
    value        sum over s of A (v' - v)
    interaction  sum over s of (A' - A)(v' - v)
    both         sum over s of A' v' - A v = pattern + value + interaction
    kv           the donor's keys and values at s alone, the softmax recomputed: over all keys
    ============ ================================================================================

    pattern, value and interaction add up to both, and both adds up over roles to the exchange of
    the whole z: exactly in z, not in the metric. Role ``all`` takes all keys, so the remainder in
    the metric is ``all`` minus the sum over the other roles.

    Args:
        model: As in `patch_heads`.
        contrast: As in `patch_heads`.
        at: Role at which the head's output is exchanged.
        heads: Which heads; None for all.
        roles: Which source roles; None for all that occur, and ``all``. At a demonstration's token,
            x, is, answer and end are those of its own demonstration, ``earlier`` is everything in
            the demonstrations before it, and ``carried`` everything but its own answer.
        parts: Which parts.
        direction: As in `patch_heads`.
        metric: As in `patch_heads`.
        recorded: As in `patch_heads`.
        progress: As in `patch_heads`.

    Returns:
        Scores over ``(prompt, role, part, site)``.

    Raises:
        UnknownName: for an unknown role or part.
        ModelError: if a head's output is not its attention pattern times its values.
    """
    for part in parts:
        if part not in PARTS:
            raise unknown("part", part, PARTS)
    run = Experiment(model, contrast, recorded, direction, metric, at)
    sites = as_sites(all_heads(run.adapter) if heads is None else heads, at, run.adapter)
    masks = source_masks(contrast.clean, at)
    wanted = [r for r in masks if r != "carried"] if roles is None else list(roles)
    for role in wanted:
        if role not in masks:
            raise unknown("source role", role, masks)
    changes = _source_changes(run, sites, {r: masks[r] for r in wanted}, parts)
    variants: list[Variant] = [
        (Patch(site, changes[role, part, site], "add"),)
        for role in wanted
        for part in parts
        for site in sites
    ]
    effects = run.effects(variants, f"sources {at}" if progress else None)
    effects = effects.reshape(len(contrast), len(wanted), len(parts), len(sites))
    coords = {"role": wanted, "part": list(parts), "site": [str(s) for s in sites]}
    return run.scores(effects, ("role", "part", "site"), coords)


def source_masks(prompts: Prompts, at: str) -> dict[str, Bool[Tensor, "prompt dest src"]]:
    """Mark the keys of each source role, as seen from each token of a role.

    Args:
        prompts: The prompts.
        at: Role of the attending token; dest is the demonstration, or one for other roles.

    Returns:
        Masks by role name; roles without any token are left out. See `patch_sources` for the names.
    """
    roles, demos = prompts.role_ids[:, None], prompts.demo_ids[:, None]
    if parse_role(at) in DEMO_ROLES:
        own = demos == torch.arange(prompts.n_demos)[None, :, None]
        earlier = (demos >= 0) & (demos < torch.arange(prompts.n_demos)[None, :, None])
        masks = {role.label: own & (roles == role) for role in DEMO_ROLES}
        masks["earlier"] = earlier
        masks["bos"] = (roles == Role.bos).expand_as(own)
        masks["other"] = (own & (roles == Role.other)).expand_as(own)
        masks["carried"] = (roles >= 0) & ~masks["answer"]
    else:
        masks = {ROLE_NAMES[role]: roles == role for role in Role}
    position = prompts.positions(at)
    position = position if position.ndim == 2 else position[:, None]
    visible = torch.arange(prompts.tokens.shape[1]) <= position[..., None]
    masks["all"] = (roles >= 0).expand(len(prompts), position.shape[1], -1)
    masks = {name: mask & visible for name, mask in masks.items()}
    return {name: mask for name, mask in masks.items() if mask.any()}


def _source_changes(
    run: Experiment,
    sites: Sequence[Site],
    masks: Mapping[str, Tensor],
    parts: Sequence[Part],
) -> dict[tuple[str, str, Site], Tensor]:
    """Compute the change of z for each role, part and site, ``[prompt, *demo, d_head]``."""
    check_layers(run.base)
    adapter, positions = run.adapter, run.contrast.clean.positions(run.at)
    flat = positions.ndim == 1
    positions = positions[:, None] if flat else positions
    shape = (*positions.shape, adapter.d_head)
    out = {
        (role, part, site): torch.zeros(shape, dtype=adapter.dtype)
        for role in masks
        for part in parts
        for site in sites
    }
    inputs = [what for what, of in (("q", {"q"}), ("k", {"k", "kv"})) if of & set(parts)]
    runs = zip(run.base.tapes(), run.donor.tapes(), strict=True)
    for (rows, tape), (_, other) in runs:
        for layer, demo in product(sorted({s.layer for s in sites}), range(shape[1])):
            here = [site for site in sites if site.layer == layer]
            heads = [site.at[1] for site in here]
            look = _Look(run.base, tape, other, layer, positions[rows, demo], inputs)
            a_q = look.with_queries() if "q" in inputs else look.base
            for role, mask in masks.items():
                m = mask[rows, demo, : tape.n_pos].to(adapter.device)
                a_k = look.with_keys(m) if "k" in inputs else look.base
                mixture = look.mixture(heads, m, a_q, a_k)
                for part in parts:
                    for site, change in zip(here, mixture.change(part).unbind(1), strict=True):
                        out[role, part, site][rows, demo] = change.cpu()
    return {key: value[:, 0] for key, value in out.items()} if flat else out


class _Look:
    """What one layer's heads see from one token of each prompt, in two runs.

    Attributes:
        base: Attention of the base run, ``[row, head, src]``.
        donor: Attention of the donor run.
    """

    def __init__(
        self,
        run: Run,
        base: Tape,
        donor: Tape,
        layer: int,
        where: Tensor,
        inputs: Sequence[str] = ("q", "k"),
    ) -> None:
        """Call the block at these tokens alone, or at all where it cannot be.

        Args:
            run: The base run.
            base: Some of its prompts.
            donor: The same of the other run.
            layer: Which block.
            where: Position of the attending token, ``[row]``.
            inputs: Which of q and k of the donor are wanted.
        """
        self.adapter, self.layer, self.tapes = run.adapter, layer, (base, donor)
        tokens = where.unique() if run.replays.groups else torch.arange(base.n_pos)
        self.layout = Layout.frozen(tokens)
        self.slot = torch.searchsorted(tokens, where.contiguous()).to(self.adapter.device)
        self.v, self.v_donor = (self._values(tape) for tape in self.tapes)
        self.v = self.v.contiguous()  # each part mixes it
        both, seen = self._attend(self.tapes, reads=inputs)
        self.base, self.donor = both.chunk(2)
        self.theirs = {what: seen[what].chunk(2)[1] for what in inputs}
        row = torch.arange(len(where), device=self.adapter.device)
        self._check_attention(base.z[layer][row, where.to(self.adapter.device)])

    def with_queries(self) -> Tensor:
        """Attention of the base run with the donor's queries."""
        return self._attend(self.tapes[:1], {"q": lambda q: self.theirs["q"]})[0]

    def with_keys(self, mask: Bool[Tensor, "row src"]) -> Tensor:
        """Attention of the base run with the donor's keys where marked, the softmax recomputed."""
        own = mask[:, self.layout.tokens.to(mask.device)][..., None, None]
        front = None
        if len(self.layout.front):
            front = self.adapter.exchanged(*self.tapes, self.layer, self.layout, mask)
        edit: Edit = lambda k: torch.where(own, self.theirs["k"], k)  # noqa: E731
        return self._attend(self.tapes[:1], {"k": edit}, front)[0]

    def mixture(self, heads: Sequence[int], mask: Tensor, a_q: Tensor, a_k: Tensor) -> _Mixture:
        """Look at some heads."""
        groups = [self.adapter.kv_head(head) for head in heads]
        rows = [a[:, heads] for a in (self.base, self.donor, a_q, a_k)]
        a, a_donor, a_q, a_k = rows
        v, v_donor = self.v, self.v_donor
        if groups != list(range(v.shape[1])):
            v, v_donor = v[:, groups], v_donor[:, groups]
        return _Mixture(mask[:, None], a, a_donor, a_q, a_k, v, v_donor)

    def _attend(
        self,
        tapes: Sequence[Tape],
        edits: Mapping[str, Edit] | None = None,
        front: tuple[Tensor, Tensor] | None = None,
        reads: Sequence[str] = (),
    ) -> tuple[Float[Tensor, "row head src"], dict[str, Tensor]]:
        """Call the block on runs, one below the other, until it knows what it attends to.

        Returns:
            Attention with each key at its position, and what is read: the block's q, k or both.
        """
        seen: dict[str, Tensor] = {}
        tokens = self.layout.tokens.to(self.adapter.device)
        if front is None and len(self.layout.front):
            front = self.adapter.keys_in_front(tapes, self.layer, self.layout)
        pattern = self.adapter.block(
            tapes[0],
            self.layer,
            torch.cat([tape.resid[self.layer][:, tokens] for tape in tapes]),
            self.layout,
            front=front,
            edits={(w, self.layer): edit for w, edit in (edits or {}).items()},
            reads={(w, self.layer): lambda a, w=w: seen.update({w: a}) for w in reads},
            until="pattern",
        )
        slot, n_pos = self.slot.repeat(len(tapes)), tapes[0].n_pos
        ours = pattern[torch.arange(len(pattern), device=pattern.device), :, slot]
        if self.layout.is_plain and ours.shape[-1] == n_pos:
            return ours, seen
        out = pattern.new_zeros(*ours.shape[:2], n_pos)
        out[..., self.layout.keys.to(out.device)] = ours
        return out, seen

    def _values(self, tape: Tape) -> Float[Tensor, "row kv_head src d_head"]:
        if tape.has_keys:
            return self.adapter.recorded_values(tape, self.layer).transpose(1, 2)
        name = ("v", self.layer)
        return self.adapter.read_block(tape, self.layer, [name])[name].transpose(1, 2)

    def _check_attention(self, z: Float[Tensor, "row head d_head"]) -> None:
        """Check that a head's recorded output is its attention pattern times its values."""
        adapter, v = self.adapter, self.v
        if adapter.n_kv_heads < adapter.n_heads:
            v = v.repeat_interleave(adapter.n_heads // adapter.n_kv_heads, 1)
        ours = _mix(self.base, v)
        error = (ours - z).abs().max() / (1 + z.abs().max())
        if error > (0.05 if z.dtype in (torch.bfloat16, torch.float16) else 1e-4):
            raise ModelError(
                f"layer {self.layer} of {adapter.name}: a head's output differs from pattern @ v "
                f"by {error:.1g}, so its sources cannot be split exactly; use patch_heads"
            )


class _Mixture(NamedTuple):
    """Attention of some heads from one token of each prompt, and their values, in two runs.

    Attributes:
        mask: ``[row, 1, src]`` keys of a role.
        a: ``[row, head, src]`` attention of the base run.
        a_donor: Attention of the donor run.
        a_q: Attention with the donor's queries and the base's keys.
        a_k: Attention with the base's queries, and the donor's keys at the role.
        v: ``[row, head, src, d_head]`` values of the base run.
        v_donor: Values of the donor run.
    """

    mask: Tensor
    a: Tensor
    a_donor: Tensor
    a_q: Tensor
    a_k: Tensor
    v: Tensor
    v_donor: Tensor

    def change(self, part: Part) -> Float[Tensor, "row head d_head"]:
        """Compute the change of z; see `patch_sources`."""
        match part:
            case "pattern":
                return _mix((self.a_donor - self.a) * self.mask, self.v)
            case "q":
                return _mix((self.a_q - self.a) * self.mask, self.v)
            case "k":
                return _mix(self.a_k - self.a, self.v)
            case "value":
                return _mix(self.a * self.mask, self.v_donor - self.v)
            case "interaction":
                moved = self.a_donor - self.a
                return _mix(moved * self.mask, self.v_donor - self.v)
            case "both":
                theirs = _mix(self.a_donor * self.mask, self.v_donor)
                return theirs - _mix(self.a * self.mask, self.v)
            case "kv":
                moved = _mix(self.a_k - self.a, self.v)
                return moved + _mix(self.a_k * self.mask, self.v_donor - self.v)


def _mix(
    weights: Float[Tensor, "row head src"], values: Float[Tensor, "row head src d_head"]
) -> Float[Tensor, "row head d_head"]:
    return (weights[:, :, None] @ values)[:, :, 0]


def knock_out(
    model: Any,
    prompts: Prompts,
    *,
    dest: str = "query_is",
    src: str = "answer",
    sets: Mapping[str, Iterable[Site | Head]] | None = None,
    demos: Sequence[int] | None = None,
    metric: str | Metric = "logit_diff",
    recorded: Run | None = None,
    max_memory: float | None = None,
    progress: bool = False,
) -> Scores:
    """Cut attention from one role to another, head by head or for sets of heads.

    Needs clean prompts only. Scores at the cut are set to minus infinity, so the softmax
    renormalises over what is left; all tokens of both roles are meant, not only the last.

    Args:
        model: A HookedTransformer or TransformerBridge in eval mode.
        prompts: Clean prompts.
        dest: Role that may no longer look.
        src: Role that it may no longer look at.
        sets: Heads that are cut together, by name; None for each head alone; an empty set has
            effect 0.
        demos: Cut only what is in these demonstrations, for a src of demonstrations; None for all.
        metric: Name of a metric; ``kl`` compares with the run that is not cut.
        recorded: The run of these prompts, such as ``record(model, contrast).clean``; None
            records it.
        max_memory: As in `record`, where it is recorded here.
        progress: Whether to show a progress bar.

    Returns:
        Scores over ``(prompt, layer, head)``, or ``(prompt, site)`` for sets: m(clean) - m(cut), in
        the metric's unit. Positive: the attention is needed. The total is m(clean) minus the
        metric's chance level.

    Raises:
        UnknownName: for an unknown role or metric.
        TvInterpError: if a token is left with nothing to attend to.
        ModelError: if the model discards edits of attention scores.
    """
    check_prompts(prompts)
    adapter = Adapter.of(model)
    metric = get_metric(metric)
    clean = recorded
    if clean is None:
        clean = record_run(adapter, prompts, max_memory=check_memory(max_memory) / 2)
    if clean.prompts is not prompts or clean.adapter.model is not model:
        raise ScoreError(
            "recorded= belongs to another model or other prompts: take it from "
            "record(model, contrast).clean for knock_out(model, contrast.clean)"
        )
    readout = metric.readout(Targets.of(prompts, clean.logits if metric.name == "kl" else None))
    value = readout(clean.logits, torch.arange(len(prompts)))
    dest_mask, src_mask = prompts.mask(dest), prompts.mask(src)
    for role, mask in ((dest, dest_mask), (src, src_mask)):
        if not mask.any(1).all():
            raise PromptError(f"a prompt has no {role!r} token (template {prompts.template!r})")
    if demos is not None:
        if not set(demos) <= set(range(prompts.n_demos)):
            raise TvInterpError(
                f"demos {list(demos)} are not all within 0..{prompts.n_demos - 1}: they are "
                "counted from 0"
            )
        src_mask = src_mask & torch.isin(prompts.demo_ids, torch.tensor(list(demos)))
    groups: list[list[Head]] = [[head] for head in all_heads(adapter)]
    if sets is not None:
        members = [list(heads) for heads in sets.values()]
        groups = [[s.at for s in as_sites(m, dest, adapter)] if m else [] for m in members]
    variants: list[Variant] = [
        tuple(Cut(layer, head, dest_mask, src_mask) for layer, head in group) for group in groups
    ]
    label = f"cut {dest} <- {src}" if progress else None
    values = run_variants(
        model, prompts, variants, readout, run=clean, max_memory=clean.max_memory, progress=label
    )
    chance = metric.chance(adapter.model.cfg.d_vocab)
    attrs = provenance(adapter) | prompts.provenance
    attrs |= {"corruption": "knockout", "dest": dest, "src": src, "metric": metric.name, "at": dest}
    if demos is not None:
        attrs["demos"] = list(demos)
    effects: Float[np.ndarray, "prompt variant"] = (value - values).T.numpy()
    dims: tuple[str, ...] = ("site",)
    coords: dict[str, Any] = {"site": list(sets or [])}
    if sets is None:
        effects = effects.reshape(len(prompts), adapter.n_layers, adapter.n_heads)
        dims = ("layer", "head")
        coords = head_coords(adapter)
    return label_scores(
        effects, dims, coords, unit=metric.unit,
        total=None if chance is None else value - chance, prompts=prompts, attrs=attrs,
    )  # fmt: skip
