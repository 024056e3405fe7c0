"""Prompts where a contrast belongs, or the reverse, end in one clear error in every function."""

from __future__ import annotations

import pytest
from conftest import KINDS, tiny_model

import tv_interp as tv
from tv_interp.errors import PromptError

TAKES_PROMPTS = {
    "ablate_demos": {},
    "extract_vectors": {},
    "function_vector": {"heads": [(1, 0)]},
    "information_map": {},
    "knock_out": {"dest": "query_is", "src": "answer"},
    "label_flow": {},
    "leave_one_out": {},
    "saliency_flow": {},
}
TAKES_CONTRAST = {
    "discover_circuit": {"n_edges": 3},
    "head_geometry": {"heads": ["L1H0.z@answer"], "at": "answer"},
    "head_vectors": {"heads": ["L1H0.z@answer"], "at": "answer"},
    "patch_heads": {},
    "patch_interactions": {"heads": ["L1H0.z@query_is", "L1H1.z@query_is"]},
    "patch_local_paths": {},
    "patch_paths": {"receivers": ["L1H0.z@query_is"]},
    "patch_positions": {},
    "patch_sources": {"at": "answer"},
    "patch_together": {"sets": {"a": [(1, 0)]}},
    "prune_edges": {"threshold": 0.1},
    "rank_heads": {"k": 2},
    "record": {},
    "score_edges": {},
}


@pytest.mark.parametrize("name", [*TAKES_PROMPTS, *TAKES_CONTRAST])
def test_prompts_and_contrasts_are_not_mistaken_for_each_other(name):
    model = tiny_model("llama", KINDS[0])
    task = tv.Task.from_pairs({f"w{i}": f"w{i + 20}" for i in range(20)})
    prompts = tv.make_prompts(model, task, n_demos=3, n_prompts=4)
    contrast = prompts.corrupt("answers")
    function = getattr(tv, name)
    others = TAKES_PROMPTS.get(name, TAKES_CONTRAST.get(name))
    wrong = contrast if name in TAKES_PROMPTS else prompts
    told = r"got a Contrast.*\.clean" if name in TAKES_PROMPTS else "a Contrast, got Prompts: make"
    with pytest.raises(PromptError, match=told):
        function(model, wrong, **others)
    with pytest.raises(PromptError, match="got str: make"):
        function(model, "France is", **others)
