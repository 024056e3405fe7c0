"""Where heads matter: every head at every role or token, one at a time."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import numpy as np
import torch

from ..errors import PromptError, unknown
from ..interventions.recording import Recorded
from ..interventions.sites import Patch, Site, Variant
from ..prompts import Contrast, Prompts, check_contrast
from ..prompts.roles import ROLE_NAMES
from ..scores import Metric, Scores
from .common import Direction, Experiment, all_heads, head_coords

By = Literal["role", "token"]
BY: tuple[By, ...] = ("role", "token")


def patch_positions(
    model: Any,
    contrast: Contrast,
    *,
    by: By = "role",
    direction: Direction = "denoise",
    metric: str | Metric = "logit_diff",
    recorded: Recorded | None = None,
    progress: bool = False,
) -> Scores:
    """Exchange each head's output at each role, or at each token.

    Cells that cannot differ are not run: tokens before the first at which any clean and corrupted
    prompt differ, and the last layer away from the last token.

    Args:
        model: As in `patch_heads`.
        contrast: As in `patch_heads`.
        by: ``"role"``: at the last tokens of all spans of a role together. ``"token"``: at one
            token of the prompt; all prompts must be of one length.
        direction: As in `patch_heads`.
        metric: As in `patch_heads`.
        recorded: As in `patch_heads`.
        progress: As in `patch_heads`.

    Returns:
        Scores over ``(prompt, layer, head, role)`` or ``(prompt, layer, head, dest)``, dest being
        the token's number. A cell of ``by="role"`` is what `patch_heads` gives for that role.

    Raises:
        UnknownName: for an unknown ``by``, direction or metric.
        PromptError: if prompts of several lengths are swept by token.
    """
    check_contrast(contrast)
    if by not in BY:
        raise unknown("by", by, BY)
    prompts = contrast.clean
    lengths = prompts.lengths.unique().tolist()
    if by == "token" and len(lengths) > 1:
        raise PromptError(
            f"prompts of {lengths} tokens have no common tokens: sweep by='role', or select "
            "prompts of one length"
        )
    run = Experiment(model, contrast, recorded, direction, metric, "query_is")
    places: list[Any] = list(range(lengths[0])) if by == "token" else roles_of(prompts)
    ours, theirs = (p.tokens[:, : lengths[0]] for p in (prompts, contrast.corrupted))
    differ = (ours != theirs).any(0)  # without padding, which may be of other widths
    before = int(differ.int().argmax()) if differ.any() else 0
    variants: list[Variant] = []
    for place in places:
        role = place if by == "role" else "query_is"
        at = None if by == "role" else torch.full((len(prompts), 1), place)
        if at is not None and place < before:
            variants += [()] * len(all_heads(run.adapter))
            continue
        z = run.donor.z_at(role if at is None else at)
        for layer, head in all_heads(run.adapter):
            value = z[:, layer, ..., head, :]
            variants.append((Patch(Site(layer, head, "z", role), value, positions=at),))
    effects = run.effects(variants, f"{direction} by {by}" if progress else None)
    n_layers, n_heads = run.adapter.n_layers, run.adapter.n_heads
    effects = effects.reshape(len(contrast), len(places), n_layers, n_heads)
    coords = head_coords(run.adapter)
    dim = "role" if by == "role" else "dest"
    dims = ("layer", "head", dim)
    return run.scores(np.moveaxis(effects, 1, -1), dims, coords | {dim: places}, at=by)


def roles_of(prompts: Prompts) -> list[str]:
    """List the roles that have one span in every prompt, or one in every demonstration."""
    found = []
    for name in ROLE_NAMES:
        with contextlib.suppress(PromptError):
            prompts.positions(name)
            found.append(name)
    return found
