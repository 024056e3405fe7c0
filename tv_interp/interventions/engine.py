"""Run a model under interventions. The only way anything is changed in a run.

A *variant* is a set of patches and cuts that are made in one run. `run_variants` stacks variants
and prompts of equal length in the batch axis, in chunks, and reads a metric off each: nothing is
approximated, and no result depends on the chunks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import ModelError, PromptError
from ..models.adapter import Adapter, Edit, HookName, Read
from ..prompts import Contrast, Prompts
from .sites import Cut, Patch, Site, Variant

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
        pair = (self.corrupted, self.clean)
        return pair if direction == "denoise" else pair[::-1]


def record(model: Any, contrast: Contrast) -> Recorded:
    """Run the clean and the corrupted prompts once and keep what patching needs.

    Raises:
        ModelError: if the model cannot be measured exactly; see `Adapter.of`.
    """
    adapter = Adapter.of(model)
    return Recorded(
        model, contrast, record_run(adapter, contrast.clean), record_run(adapter, contrast.corrupted)
    )


def record_run(adapter: Adapter, prompts: Prompts) -> Run:
    """Run prompts once and keep head outputs and logits."""
    check_fits(adapter, prompts)
    names = [("z", layer) for layer in range(adapter.n_layers)]
    width = int(prompts.lengths.max())
    shape = (len(prompts), adapter.n_layers, width, adapter.n_heads, adapter.d_head)
    z = torch.zeros(shape, dtype=adapter.dtype)
    logits: list[tuple[Tensor, Tensor]] = []
    for rows, tokens in chunks(prompts):
        out, store = adapter.read(tokens, names)
        logits.append((rows, out.cpu()))
        for (_, layer), value in store.items():
            z[rows, layer, : tokens.shape[1]] = value.cpu()
    order = torch.cat([rows for rows, _ in logits]).argsort()
    return Run(prompts, z, torch.cat([out for _, out in logits])[order])


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
    work = []
    for rows, tokens in chunks(prompts, rows_per_run):
        size = max(1, rows_per_run // len(rows))
        work += [
            (rows, tokens, start, variants[start : start + size])
            for start in range(0, len(variants), size)
        ]
    out: Tensor | None = None
    for rows, tokens, start, some in tqdm(work, desc=progress, disable=progress is None, leave=False):
        edits, reads = _edits(adapter, prompts, rows, tokens.shape[1], some)
        logits = adapter.run(tokens.repeat(len(some), 1), edits, reads)
        values = readout(logits, rows.repeat(len(some))).cpu()
        if out is None:
            out = torch.empty(len(variants), len(prompts), dtype=values.dtype)
        out[start : start + len(some), rows] = values.reshape(len(some), len(rows))
    if out is None:
        return torch.empty(0, len(prompts))
    if not out.isfinite().all():
        raise ModelError(
            f"{adapter.name} gives NaN or infinite values under intervention: check its weights, "
            "or load it in float32"
        )
    return out


def _edits(
    adapter: Adapter, prompts: Prompts, rows: Tensor, n_pos: int, variants: Sequence[Variant]
) -> tuple[dict[HookName, Edit], dict[HookName, Read]]:
    """Gather the patches of stacked variants into one edit for each hook point."""
    gathered: dict[tuple[HookName, str], list[tuple[Tensor, ...]]] = defaultdict(list)
    cuts_by_layer: dict[int, Tensor] = {}
    for i, variant in enumerate(variants):
        for change in variant:
            if isinstance(change, Cut):
                cut = change.dest[rows, :n_pos, None] & change.src[rows, None, :n_pos]
                mask = cuts_by_layer.setdefault(
                    change.layer,
                    torch.zeros(
                        len(variants) * len(rows), adapter.n_heads, n_pos, n_pos, dtype=torch.bool
                    ),
                )
                mask[i * len(rows) : (i + 1) * len(rows), change.head] |= cut
            else:
                _check_site(adapter, change.site)
                key = ((change.site.component, change.site.layer), change.mode)
                gathered[key].append(_places(prompts, rows, change, i * len(rows)))
    edits: dict[HookName, Edit] = {}
    reads: dict[HookName, Read] = {}
    by_name: dict[HookName, dict[str, tuple[Tensor, ...]]] = defaultdict(dict)
    for (name, mode), places in gathered.items():
        by_name[name][mode] = tuple(
            torch.cat([p[i] for p in places]).to(adapter.device) for i in range(4)
        )
    for name, modes in by_name.items():
        edits[name] = _patcher(modes)
    for layer, mask in cuts_by_layer.items():
        on_device = mask.to(adapter.device)
        edits["attn_scores", layer] = _cutter(on_device)
        reads["pattern", layer] = _check_cut(adapter, on_device)
    return edits, reads


def _patcher(modes: dict[str, tuple[Tensor, ...]]) -> Edit:
    def edit(activation: Tensor) -> Tensor:
        new = activation.clone()
        for mode, (row, pos, head, value) in modes.items():
            new.index_put_((row, pos, head), value.to(new.dtype), accumulate=mode == "add")
        return new

    return edit


def _cutter(mask: Tensor) -> Edit:
    return lambda scores: scores.masked_fill(mask, float("-inf"))


def _check_cut(adapter: Adapter, mask: Tensor) -> Read:
    def read(pattern: Tensor) -> None:
        if pattern[mask].any():
            raise ModelError(
                f"{adapter.name} discards edits of attention scores, so attention cannot be cut: "
                'load it with backend="hooked", or use patch_sources'
            )

    return read


def _places(prompts: Prompts, rows: Tensor, patch: Patch, offset: int) -> tuple[Tensor, ...]:
    """Get rows in the batch, positions, heads and values of a patch, flat."""
    positions = prompts.positions(patch.site.role)[rows]
    value = patch.value[rows]
    if patch.site.demo is not None:
        positions = positions[:, patch.site.demo]
    if positions.ndim == 1:
        positions, value = positions[:, None], value[:, None]
    if value.shape[:2] != positions.shape:
        raise PromptError(
            f"patch at {patch.site} has values for {tuple(value.shape[:2])} prompts and "
            f"demonstrations, the prompts have {tuple(positions.shape)}"
        )
    row = (torch.arange(len(rows)) + offset)[:, None].expand_as(positions)
    head = torch.full_like(row, patch.site.head)
    return row.flatten(), positions.flatten(), head.flatten(), value.flatten(0, 1)


def _check_site(adapter: Adapter, site: Site) -> None:
    heads = adapter.n_kv_heads if site.component in ("k", "v") else adapter.n_heads
    if site.layer >= adapter.n_layers or site.head >= heads:
        raise ModelError(
            f"{site} is outside of {adapter.name}: it has {adapter.n_layers} layers and {heads} "
            f"heads for {site.component}"
        )


def _take(values: Tensor, positions: Tensor) -> Tensor:
    """Pick ``[prompt, layer, pos, ...]`` at ``[prompt, *demo]``; the layer axis stays second."""
    rows = torch.arange(len(values))
    if positions.ndim == 2:
        return values[rows[:, None], :, positions].transpose(1, 2)
    return values[rows, :, positions]
