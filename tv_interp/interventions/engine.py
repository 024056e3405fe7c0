"""Run a model under interventions. The only way anything is changed in a run.

A *variant* is a set of patches and cuts that are made in one run. Causal masking: a patch at layer
l and position p reaches only layers from l and positions from p on. So the plain run is recorded
once, and for each variant only what it can reach is computed again, by the model's own blocks, with
variants that enter at the same place stacked in the batch axis. Nothing is approximated, and no
result depends on the chunks. Where a model's blocks cannot be called again exactly (a self-test
against the recorded logits says so), every variant takes a full forward pass.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from ..errors import ModelError, PromptError
from ..models.adapter import Adapter, Edit, HookName, Read
from ..prompts import Contrast, Prompts
from .sites import Cut, Patch, Variant

Readout = Callable[[Float[Tensor, "row vocab"], Int[Tensor, " row"]], Float[Tensor, " row"]]
"""Turns logits at the last token, and the prompts they belong to, into one number each."""

ROWS_PER_RUN = 256


@dataclass(frozen=True, eq=False)
class Run:
    """One recorded run over all prompts.

    Attributes:
        prompts: What was run.
        z: Head outputs at every token, ``[prompt, layer, pos, head, d_head]``, on the CPU; zeros
            where padded.
        logits: Logits at the last token, on the CPU.
    """

    prompts: Prompts
    z: Float[Tensor, "prompt layer pos head d_head"]
    logits: Float[Tensor, "prompt vocab"]

    def z_at(self, role: str) -> Float[Tensor, "prompt layer *demo head d_head"]:
        """Get the head outputs at the last token of a role's spans."""
        return _take(self.z, self.prompts.positions(role))


@dataclass(frozen=True, eq=False)
class Recorded:
    """The clean and the corrupted run of a contrast, so that several sweeps share one set-up."""

    model: Any
    contrast: Contrast
    clean: Run
    corrupted: Run

    def sides(self, direction: str) -> tuple[Run, Run]:
        """Get (base, donor): denoising patches clean into corrupted, noising the reverse."""
        if direction == "denoise":
            return self.corrupted, self.clean
        return self.clean, self.corrupted


def record(model: Any, contrast: Contrast) -> Recorded:
    """Run the clean and the corrupted prompts once and keep what patching needs.

    Raises:
        ModelError: if the model cannot be measured exactly; see `Adapter.of`.
    """
    adapter = Adapter.of(model)
    return Recorded(
        model,
        contrast,
        record_run(adapter, contrast.clean),
        record_run(adapter, contrast.corrupted),
    )


def record_run(adapter: Adapter, prompts: Prompts, *, keep_z: bool = True) -> Run:
    """Run prompts once and keep logits and, unless told otherwise, head outputs."""
    check_fits(adapter, prompts)
    names = [("z", layer) for layer in range(adapter.n_layers)] if keep_z else []
    width = int(prompts.lengths.max()) if keep_z else 0
    shape = (len(prompts), adapter.n_layers, width, adapter.n_heads, adapter.d_head)
    z = torch.zeros(shape, dtype=adapter.dtype)
    logits: list[tuple[Tensor, Tensor]] = []
    for rows, tokens in chunks(prompts):
        out, store = adapter.read(tokens, names)
        logits.append((rows, out.cpu()))
        for (_, layer), value in store.items():
            z[rows, layer, : tokens.shape[1]] = value.cpu()
    order = torch.cat([rows for rows, _ in logits]).argsort()
    ordered = torch.cat([out for _, out in logits])[order]
    if ordered.isnan().any():
        raise _not_finite(adapter, "logits")
    return Run(prompts, z, ordered)


def _not_finite(adapter: Adapter, what: str) -> ModelError:
    """Build the error for numbers that mean nothing, with the weight at fault if there is one."""
    named = adapter.model.named_parameters()
    bad = next((name for name, weight in named if not weight.isfinite().all()), None)
    cause = "load it in float32" if bad is None else f"so does its weight {bad!r}"
    return ModelError(f"{adapter.name} gives NaN or infinite {what}: {cause}")


def check_fits(adapter: Adapter, prompts: Prompts) -> None:
    """Refuse prompts that the model cannot read.

    Raises:
        PromptError: if there are none, a token id is outside of the vocabulary, or they are longer
            than the context.
    """
    if len(prompts) == 0:
        raise PromptError("empty selection: expected at least one prompt")
    vocab, n_ctx = adapter.model.cfg.d_vocab, adapter.model.cfg.n_ctx
    if int(prompts.tokens.max()) >= vocab:
        raise PromptError(
            f"token id {int(prompts.tokens.max())} is outside of {adapter.name}'s vocabulary of "
            f"{vocab}: make the prompts for this model with make_prompts(model, ...)"
        )
    if int(prompts.lengths.max()) > n_ctx:
        raise PromptError(
            f"prompts of {int(prompts.lengths.max())} tokens are longer than the context of "
            f"{adapter.name} ({n_ctx}): use fewer demonstrations"
        )


def chunks(prompts: Prompts, most: int = ROWS_PER_RUN) -> Iterator[tuple[Tensor, Tensor]]:
    """Go through prompts of equal length, at most so many at a time: rows and their tokens."""
    for rows, tokens in prompts.buckets():
        yield from zip(rows.split(most), tokens.split(most), strict=True)


def run_variants(
    model: Any,
    prompts: Prompts,
    variants: Sequence[Variant],
    readout: Readout,
    *,
    rows_per_run: int = ROWS_PER_RUN,
    progress: str | None = None,
) -> Float[Tensor, "variant prompt"]:
    """Run prompts under each variant and read a number off the logits at the last token.

    Args:
        model: The model.
        prompts: What to run.
        variants: The interventions; an empty variant is the plain run.
        readout: From logits and prompt numbers to one number each.
        rows_per_run: Most prompts times variants in one run of the model; decides memory only.
        progress: Label of a progress bar; None for none.

    Raises:
        ModelError: if the model discards an edit, or a hook never fires.
    """
    adapter = Adapter.of(model)
    check_fits(adapter, prompts)
    for variant in variants:
        for change in variant:
            _check_change(adapter, change)
    out: Tensor | None = None
    batches = list(chunks(prompts, rows_per_run))
    bar = tqdm(
        total=len(batches) * len(variants), desc=progress, disable=progress is None, leave=False
    )
    resumes: bool | None = None
    for rows, tokens in batches:
        tape = adapter.tape(tokens)
        resumes = _replay_is_exact(adapter, tape) if resumes is None else resumes
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, variant in enumerate(variants):
            groups[_entry(prompts, rows, variant, tape, resumes, adapter)].append(i)
        for (layer, start), members in sorted(groups.items()):
            share = tokens.shape[1] / (tokens.shape[1] - start)
            size = max(1, int(rows_per_run * share) // len(rows))
            for at in range(0, len(members), size):
                some = members[at : at + size]
                edits, reads = _edits(
                    adapter, prompts, rows, (start, tokens.shape[1]), [variants[i] for i in some]
                )
                if layer == adapter.n_layers:
                    logits = tape.logits[0].repeat(len(some), 1)
                elif resumes:
                    which = torch.arange(len(rows)).repeat(len(some))
                    logits = adapter.replay(tape, layer, start, which, edits=edits, reads=reads)
                else:
                    logits = adapter.run(tokens.repeat(len(some), 1), edits, reads)
                values = readout(logits, rows.repeat(len(some))).cpu()  # type: ignore[arg-type]
                if out is None:
                    out = torch.empty(len(variants), len(prompts), dtype=values.dtype)
                out[torch.tensor(some)[:, None], rows] = values.reshape(len(some), len(rows))
                bar.update(len(some))
    bar.close()
    if out is None:
        return torch.empty(0, len(prompts))
    if not out.isfinite().all():
        raise _not_finite(adapter, "values under intervention")
    return out


def _entry(
    prompts: Prompts, rows: Tensor, variant: Variant, tape: Any, resumes: bool, adapter: Adapter
) -> tuple[int, int]:
    """Get the first layer and position that a variant changes in any of these prompts.

    Causal masking: nothing before either can change. An empty variant enters after the last layer.
    """
    if not resumes:
        return 0, 0
    layers, starts = [adapter.n_layers], []
    for change in variant:
        if isinstance(change, Cut):
            layers.append(change.layer)
            starts.append(int(change.dest[rows].int().argmax(1).min()))
        else:
            layers.append(change.site.layer)
            starts.append(int(_positions(prompts, rows, change).min()))
    return min(layers), min(starts) if starts and tape.resumes_anywhere else 0


def _replay_is_exact(adapter: Adapter, tape: Any) -> bool:
    """Test that blocks called again from a middle layer and position give the recorded logits."""
    rows = torch.arange(min(2, len(tape.resid[0]))) if tape.resid else torch.arange(0)
    if len(tape.resid) != adapter.n_layers:
        return _warn_slow(adapter)
    middle = tape.resid[0].shape[1] // 2 if tape.resumes_anywhere else 0
    last = tape.resid[0].shape[1] - 1 if tape.resumes_anywhere else 0
    expected = tape.logits[0][rows.to(adapter.device)].float()
    tolerance = 0.02 if adapter.dtype in (torch.bfloat16, torch.float16) else 1e-4
    for start in {middle, last}:
        try:
            logits = adapter.replay(tape, adapter.n_layers // 2, start, rows)
        except Exception:  # any failure of a block called by itself means the slow way
            return _warn_slow(adapter)
        assert logits is not None
        error = (logits.float() - expected).abs().max() / (1 + expected.abs().max())
        if not error <= tolerance:
            return _warn_slow(adapter)
    return True


def _warn_slow(adapter: Adapter) -> bool:
    warnings.warn(
        f"the blocks of {adapter.name} cannot be run from a middle layer and position exactly, so "
        "every intervention takes a full forward pass: the numbers are the same, only slower",
        stacklevel=4,
    )
    return False


def _edits(
    adapter: Adapter,
    prompts: Prompts,
    rows: Tensor,
    window: tuple[int, int],
    variants: Sequence[Variant],
) -> tuple[dict[HookName, Edit], dict[HookName, Read]]:
    """Gather the patches of stacked variants into one edit for each hook point.

    Args:
        adapter: The model.
        prompts: All prompts.
        rows: Those in this batch.
        window: First position that runs, and the prompts' length.
        variants: The interventions, each over all rows, stacked in the batch axis.
    """
    start, n_pos = window
    gathered: dict[HookName, dict[str, list[tuple[Tensor, ...]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    cuts: dict[int, Tensor] = {}
    for i, variant in enumerate(variants):
        here = slice(i * len(rows), (i + 1) * len(rows))
        for change in variant:
            if isinstance(change, Cut):
                shape = (len(variants) * len(rows), adapter.n_heads, n_pos - start, n_pos)
                mask = cuts.setdefault(change.layer, torch.zeros(shape, dtype=torch.bool))
                dest, src = change.dest[rows, start:n_pos], change.src[rows, :n_pos]
                mask[here, change.head] |= dest[:, :, None] & src[:, None]
            else:
                name = (change.site.component, change.site.layer)
                places = _places(prompts, rows, change, here.start, start)
                gathered[name][change.mode].append(places)
    edits: dict[HookName, Edit] = {}
    reads: dict[HookName, Read] = {}
    for name, modes in gathered.items():
        edits[name] = _patcher(
            {
                mode: tuple(
                    torch.cat(parts).to(adapter.device) for parts in zip(*each, strict=True)
                )
                for mode, each in modes.items()
            }
        )
    for layer, mask in cuts.items():
        mask = mask.to(adapter.device)
        edits["attn_scores", layer] = _cutter(adapter, mask)
        reads["pattern", layer] = _check_cut(adapter, mask)
    return edits, reads


def _patcher(modes: dict[str, tuple[Tensor, ...]]) -> Edit:
    def edit(activation: Tensor) -> Tensor:
        new = activation.clone()
        for mode, (*where, value) in modes.items():
            new.index_put_(tuple(where), value.to(new.dtype), accumulate=mode == "add")
        return new

    return edit


def _cutter(adapter: Adapter, mask: Tensor) -> Edit:
    def edit(scores: Tensor) -> Tensor:
        new = scores.masked_fill(mask, float("-inf"))
        # what the model masks itself is -inf or the smallest number, depending on its class
        if (new.amax(-1) <= torch.finfo(scores.dtype).min / 2).any():
            raise ModelError(
                "the cut leaves a token nothing to attend to within the sliding window of "
                f"{adapter.name}: cut fewer roles"
            )
        return new

    return edit


def _check_cut(adapter: Adapter, mask: Tensor) -> Read:
    def read(pattern: Tensor) -> None:
        if pattern[mask].any():
            raise ModelError(
                f"{adapter.name} discards edits of attention scores, so attention cannot be cut: "
                'load it with backend="hooked", or use patch_sources'
            )

    return read


def _positions(prompts: Prompts, rows: Tensor, patch: Patch) -> Int[Tensor, "row demo"]:
    """Get the positions of a patch, one column for roles outside of demonstrations."""
    positions = prompts.positions(patch.site.role)[rows]
    if patch.site.demo is not None:
        positions = positions[:, patch.site.demo]
    return positions if positions.ndim == 2 else positions[:, None]


def _places(
    prompts: Prompts, rows: Tensor, patch: Patch, offset: int, start: int
) -> tuple[Tensor, ...]:
    """Get rows in the batch, positions, heads and values of a patch, flat."""
    positions = _positions(prompts, rows, patch)
    value = patch.value[rows]
    value = value if value.ndim == 3 else value[:, None]
    if value.shape[:2] != positions.shape:
        raise PromptError(
            f"patch at {patch.site} has values for {tuple(value.shape[:2])} prompts and "
            f"demonstrations, the prompts have {tuple(positions.shape)}"
        )
    row = (torch.arange(len(rows)) + offset)[:, None].expand_as(positions)
    where = (row.flatten(), positions.flatten() - start)
    if patch.site.head is not None:
        where += (torch.full_like(where[0], patch.site.head),)
    return *where, value.flatten(0, 1)


def _check_change(adapter: Adapter, change: Patch | Cut) -> None:
    """Refuse a change outside of the model.

    Raises:
        ModelError: naming the site and the model's size.
    """
    if isinstance(change, Cut):
        component, name = "z", f"L{change.layer}H{change.head}"
        layer, head = change.layer, change.head
    else:
        component, name = change.site.component, str(change.site)
        layer, head = change.site.layer, change.site.head
    heads = adapter.n_kv_heads if component in ("k", "v") else adapter.n_heads
    if layer >= adapter.n_layers or (head or 0) >= heads:
        raise ModelError(
            f"{name} is outside of {adapter.name}: it has {adapter.n_layers} layers and {heads} "
            f"heads for {component}"
        )


def _take(values: Tensor, positions: Tensor) -> Tensor:
    """Pick ``[prompt, layer, pos, ...]`` at ``[prompt, *demo]``; the layer axis stays second."""
    rows = torch.arange(len(values))
    if positions.ndim == 2:
        return values[rows[:, None], :, positions].transpose(1, 2)
    return values[rows, :, positions]
