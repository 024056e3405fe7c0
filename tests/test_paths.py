"""Paths, by every way and into every input, equal the plain loop of hooks."""

from __future__ import annotations

import itertools

import naive
import numpy as np
import pytest
import torch
from conftest import KINDS, precise, tiny_model
from random_models import ARCHITECTURES
from test_exact import TOLERANCE, a_contrast, agree

import tv_interp as tv
from tv_interp.analysis.paths import THROUGH, VIA

SENDERS, READER = [(0, 1), (1, 2)], (2, 3)  # with a layer between, and without


@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_paths_equal_the_plain_loop(arch, kind, dtype, through):
    """From demonstrations of different length, both ways, by keys, values, both, and queries."""
    model = tiny_model(arch, kind, dtype)
    direction = "denoise" if dtype == torch.float32 else "noise"
    with precise(dtype):
        contrast = a_contrast(arch, kind, "rugged")
        found = tv.patch_paths(
            model,
            contrast,
            senders=SENDERS,
            receivers=[READER],
            via=VIA,
            through=through,
            direction=direction,
        )
        assert found.attrs["through"] == through
        paths = [(s, READER, via) for s, via in itertools.product(SENDERS, ("k", "v", "kv"))]
        paths = paths if dtype == torch.float32 else paths[1:3]
        expected = naive.patch_paths(model, contrast, paths, direction=direction, through=through)
        ours = [found.data.values[:, SENDERS.index(s), 0, VIA.index(via)] for s, _, via in paths]
        agree(f"paths through {through}", np.stack(ours, 1), expected, dtype)
        # The last token asks with its own query, which no demonstration's message reaches.
        assert abs(found.data.sel(via="q")).max() < TOLERANCE[dtype]


@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_paths_from_the_last_token_reach_queries(arch, through, kind):
    dtype, where = torch.float64, dict(sender_at="query_is", through=through)
    model, contrast = tiny_model(arch, kind, dtype), a_contrast(arch, kind, "plain")
    paths = [(SENDERS[0], READER, via) for via in VIA]
    with precise(dtype):
        found = tv.patch_paths(
            model, contrast, senders=SENDERS, receivers=[READER], via=VIA, **where
        )
        expected = naive.patch_paths(model, contrast, paths, **where)
    agree(f"paths from query_is through {through}", found.data[:, 0, 0], expected, dtype)
    assert abs(found.data.sel(via="q")).max() > 1e-5


def test_ways_differ_where_there_is_something_between():
    """Otherwise the tests above would compare the same thing three times."""
    model, contrast = tiny_model("gpt2", KINDS[0]), a_contrast("gpt2", KINDS[0], "rugged")
    direct, mlp, position = (
        tv.patch_paths(model, contrast, senders=[(0, 1)], receivers=[READER], through=through).data
        for through in THROUGH
    )
    for one, other in itertools.combinations((direct, mlp, position), 2):
        assert abs(one - other).max() > 1e-3


def test_unknown_ways_are_refused(planted_contrast):
    model, contrast = planted_contrast
    with pytest.raises(tv.TvInterpError, match="unknown through 'mpl': did you mean 'mlp'"):
        tv.patch_paths(model, contrast, receivers=[(2, 1)], through="mpl")
    with pytest.raises(tv.TvInterpError, match="no path between the chosen senders"):
        tv.patch_paths(model, contrast, senders=[(3, 0)], receivers=[(2, 1)])


@pytest.fixture
def planted_contrast():
    from tv_interp.models import planted

    case = planted.build("write_then_read")
    clean = tv.make_prompts(case.model, case.task, n_demos=3, n_prompts=4)
    return case.model, clean.corrupt("inputs")
