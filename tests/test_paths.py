"""Paths through MLPs: equal to a plain loop of hooks in which all attention is put back."""

from __future__ import annotations

import pytest
import torch
from conftest import KINDS, tiny_model
from random_models import ARCHITECTURES, words

import tv_interp as tv


def naive_mlp_path(model, contrast, row, sender, receiver, via):
    """Patch w, let MLPs respond with attention frozen, give the result to r alone."""
    n = int(contrast.clean.lengths[row])
    clean, corrupted = (p.tokens[row, None, :n] for p in (contrast.clean, contrast.corrupted))
    places = contrast.clean.positions("answer")[row]
    (layer, head), (to, reader) = sender, receiver
    layers = range(model.cfg.n_layers)
    keep = {f"blocks.{i}.hook_attn_out" for i in layers} | {f"blocks.{to}.hook_resid_pre"}
    keep |= {f"blocks.{to}.attn.hook_{x}" for x in "qkv"} | {f"blocks.{layer}.attn.hook_z"}
    _, base = model.run_with_cache(corrupted, names_filter=lambda name: name in keep)
    _, donor = model.run_with_cache(clean, names_filter=lambda name: name in keep)
    seen = {}

    def exchange(z, hook):
        z = z.clone()
        z[:, places, head] = donor[f"blocks.{layer}.attn.hook_z"][:, places, head]
        return z

    def put(name):
        return lambda x, hook: base[name].clone()

    def only_at_answers(out, hook):
        new = base[f"blocks.{layer}.hook_attn_out"].clone()
        new[:, places] = out[:, places]
        return new

    def note(key):
        def hook_fn(x, hook):
            seen[key] = x.detach().clone()

        return hook_fn

    between = [f"blocks.{i}.hook_attn_out" for i in range(layer + 1, to)]
    freeze = [(name, put(name)) for name in between]
    model.run_with_hooks(
        corrupted,
        fwd_hooks=[
            (f"blocks.{layer}.attn.hook_z", exchange),
            (f"blocks.{layer}.hook_attn_out", only_at_answers),
            *freeze,
            (f"blocks.{to}.hook_resid_pre", note("resid")),
        ],
    )

    def deliver(x, hook):
        new = base[f"blocks.{to}.hook_resid_pre"].clone()
        new[:, places] = seen["resid"][:, places]
        return new

    others = [f"blocks.{to}.attn.hook_{x}" for x in "qkv" if x not in via]
    model.run_with_hooks(
        corrupted,
        fwd_hooks=[
            (f"blocks.{to}.hook_resid_pre", deliver),
            *((name, put(name)) for name in others),
            (f"blocks.{to}.attn.hook_z", note("z")),
        ],
    )

    def read(z, hook):
        z = z.clone()
        z[:, -1, reader] = seen["z"][:, -1, reader]
        return z

    patched = model.run_with_hooks(corrupted, fwd_hooks=[(f"blocks.{to}.attn.hook_z", read)])
    plain = model(corrupted)
    answer, foil = int(contrast.answer[row]), int(contrast.foil[row])
    return float((patched - plain)[0, -1, answer] - (patched - plain)[0, -1, foil])


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_paths_through_mlps_equal_the_plain_loop(arch, kind):
    model = tiny_model(arch, kind)
    names = [w for w in words() if w.startswith("w")]
    task = tv.Task.from_pairs(dict(zip(names[:20], names[20:40], strict=True)))
    clean = tv.make_prompts(model, task, n_demos=3, n_prompts=2, template="{x} is {y} ")
    contrast = clean.corrupt("answers")
    found = tv.patch_paths(
        model, contrast, senders=[(0, 1), (1, 2)], receivers=[(2, 3)], via="kv", through="mlp"
    )
    with torch.no_grad():
        for i, sender in enumerate([(0, 1), (1, 2)]):
            for row in range(2):
                expected = naive_mlp_path(model, contrast, row, sender, (2, 3), "kv")
                assert float(found.data.values[row, i, 0, 0]) == pytest.approx(expected, abs=1e-5)
    assert abs(found.data.values).max() > 1e-3  # the comparison is not of zeros


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
