"""Programs compiled by tracr: the truth about their edges is not ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import has_hooked

import tv_interp as tv

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_hooked(), reason="written for HookedTransformer"),
]


@pytest.mark.parametrize("program", ["reverse", "lookup"])
def test_the_model_is_the_compiled_program(program):
    from tracr_models import compiled, word_ids

    case = compiled(program, 32)
    with torch.no_grad():
        logits = case.model(case.contrast.clean.tokens)[:, -1]
        words = case.model.tokenizer(" ".join(case.example["words"][1:]), return_tensors="pt")
        theirs = torch.tensor(case.example["logits"])
        ours = case.model(words["input_ids"])[0, -1, word_ids(case.model.tokenizer)]
    assert torch.equal(logits.argmax(-1), case.contrast.answer)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("program", "n"), [("reverse", (2, 18)), ("lookup", (3, 12))])
def test_exact_edges_are_the_true_ones_under_the_ablation_of_the_truth(program, n):
    """No edge besides has an effect. Without one edge alone, `lookup` can do without some."""
    from tracr_models import compiled

    case = compiled(program, 8)
    for ablation, expected in zip(("corrupted", "zero"), n, strict=True):
        mean = tv.score_edges(case.model, case.contrast, method="exact", ablation=ablation).mean()
        mean = mean.to_series()
        found = set(mean.index[mean.abs() > 1e-3 * mean.abs().max()])
        true = case.truths[ablation].edges
        assert found <= true and len(found) == expected
        # what a head falls back on when nothing matches: here something always does
        assert all("embed@bos" in edge or ".q@" in edge for edge in true - found)


def test_recovery_depends_on_the_ablation_that_the_truth_is_stated_for(monkeypatch):
    """As in the literature: one program, one method, 1.0 or far less."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from bench_recovery import Compiled, judge

    found = {
        (truth, ablation): judge(Compiled("reverse", truth, ablation), ["exact, noise", "EAP"])
        for truth in ("corrupted", "zero")
        for ablation in ("corrupted", "zero")
    }
    for truth in ("corrupted", "zero"):
        exact = found[truth, truth]["exact, noise"]
        assert min(exact["nodes AUC"], exact["edges AUC"], exact["edges AP"]) > 0.999
        assert found[truth, truth]["EAP"]["edges AUC"] > 0.95
    for method in ("exact, noise", "EAP"):
        assert found["zero", "corrupted"][method]["edges AUC"] < 0.6


def test_attention_in_both_directions_is_refused():
    """As tracr compiles it where it is not told otherwise: a patch would reach back."""
    from tracr_models import compiled

    case = compiled("reverse", 4)
    case.model.cfg.attention_dir = "bidirectional"
    with pytest.raises(tv.TvInterpError, match="attends in both directions"):
        tv.score_edges(case.model, case.contrast)
