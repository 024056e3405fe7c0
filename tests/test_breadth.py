"""Further architectures: each capability is exact, or refused by name with the reason."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from random_models import OTHERS

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import breadth  # noqa: E402


@pytest.mark.parametrize("arch", OTHERS)
def test_every_capability_is_exact_or_refused_with_the_reason(arch):
    held = [model for name, model in breadth.models(arch) if name == "TransformerBridge"]
    assert len(held) == 1 and not isinstance(held[0], str), held
    refused = {}
    for what, ask in breadth.CAPABILITIES.items():
        verdict, why = breadth.judge(held[0], ask)
        assert verdict in ("exact", "refused"), (what, verdict, why)
        if verdict == "refused":
            refused[what] = why
    assert set(refused) <= {"knock-outs"}
    assert all("discards edits of attention scores" in why for why in refused.values())
    assert bool(refused) == (arch in ("gptj", "opt"))


def test_a_wrong_number_is_seen():
    model = dict(breadth.models("qwen3"))["TransformerBridge"]
    wrong = lambda m, c: [x + e for x, e in zip(breadth.CAPABILITIES["readers"](m, c), (0, 1e-3))]  # noqa: E731, B905
    verdict, _ = breadth.judge(model, wrong)  # type: ignore[arg-type]
    assert verdict == "WRONG"
