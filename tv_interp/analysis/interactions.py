"""Is the joint effect of two heads more or less than the sum of their effects?"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from ..errors import TvInterpError
from ..interventions.recording import Recorded
from ..interventions.sites import Head, Patch, Site, Variant
from ..prompts import Contrast
from ..scores import Metric, Scores
from .common import Direction, Experiment, as_sites


def patch_interactions(
    model: Any,
    contrast: Contrast,
    *,
    heads: Iterable[Site | Head | str],
    at: str = "query_is",
    direction: Direction = "denoise",
    metric: str | Metric = "logit_diff",
    recorded: Recorded | None = None,
    progress: bool = False,
) -> Scores:
    """Measure the exact interaction of every pair of heads at one role.

    The interaction of a and b is the effect of exchanging both minus the sum of their single
    effects. Where both effects are positive: above 0, each does more beside the other (AND: what
    one head does needs the other's share); below 0, one does what the other would have done (OR:
    redundancy). Two heads that act alone have 0 in a metric that is linear in what they add. At
    ``query_is`` a pair costs one token's way through the layers above it.

    Args:
        model: As in `patch_heads`.
        contrast: As in `patch_heads`.
        heads: Two heads or more, such as ``readers.top(30)``.
        at: As in `patch_heads`.
        direction: As in `patch_heads`. Denoising sees redundancy between heads that suffice alone,
            noising between heads that are needed together.
        metric: As in `patch_heads`.
        recorded: As in `patch_heads`.
        progress: As in `patch_heads`.

    Returns:
        Scores over ``(prompt, site)``; site is the pair, as in ``L2H0.z@query_is +
        L3H1.z@query_is``, and ``effect="interaction"`` is in their attributes.

    Raises:
        TvInterpError: if there are fewer than two heads, or one is outside of the model.
    """
    run = Experiment(model, contrast, recorded, direction, metric, at)
    sites = as_sites(heads, at, run.adapter)
    if len(sites) < 2:
        raise TvInterpError(f"expected two heads or more, got {[str(s) for s in sites]}")
    z = run.donor.z_at(at)
    patch = {site: Patch(site, z[:, site.layer, ..., site.head, :]) for site in sites}
    pairs = list(itertools.combinations(sites, 2))
    variants: list[Variant] = [(patch[site],) for site in sites]
    variants += [(patch[a], patch[b]) for a, b in pairs]
    effects = run.effects(variants, f"pairs {at}" if progress else None)
    alone = {site: effects[:, i] for i, site in enumerate(sites)}
    joint = effects[:, len(sites) :].copy()
    for i, (a, b) in enumerate(pairs):
        joint[:, i] -= alone[a] + alone[b]
    names = [f"{a} + {b}" for a, b in pairs]
    return run.scores(joint, ("site",), {"site": names}, effect="interaction")
