"""Convergence against familiarity and complexity: planted slopes are found, thin data refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import tv_interp as tv
from tv_interp.models.load import WEIGHTS
from tv_interp.show.familiarity import explain_convergence, measure_familiarity


def made_rows(noise: float = 0.0):
    """Convergence = relation's own level + .2 per tenfold familiarity + .05 per doubling."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(16):
        answers, shared = 2 ** (1 + i % 4), i >= 8
        for seed in range(3):
            weight = 10.0 ** -rng.uniform(0, 1.7)
            value = 0.5 + 0.2 * np.log10(weight) + 0.03 * seed + rng.normal(0, noise)
            value += 0.05 * np.log2(answers) - 0.3 * shared
            row = {"seed": seed, "relation": f"r{i}", "weight": weight, "answers": answers}
            rows.append(row | {"shared": shared, "convergence": value})
    return rows


@pytest.mark.slow
def test_familiarity_is_found_within_relations_whatever_else_they_are():
    table = explain_convergence(made_rows()).set_index("factor")
    assert table.loc["familiarity", "slope"] == pytest.approx(0.2, abs=1e-6)
    assert table.loc["familiarity", "n"] == 16
    noisy = explain_convergence(made_rows(0.05)).set_index("factor")
    assert (noisy.lo <= noisy.slope).all() and (noisy.slope <= noisy.hi).all()
    assert noisy.loc["familiarity", "lo"] < 0.2 < noisy.loc["familiarity", "hi"]
    assert noisy.loc["familiarity", "lo"] > 0 > noisy.loc["shared", "hi"]


@pytest.mark.slow
def test_relations_without_effect_are_left_out_and_too_few_are_refused():
    rows = made_rows()
    lost = [row | {"convergence": None} if row["relation"] == "r3" else row for row in rows]
    assert explain_convergence(lost).n.tolist() == [15] * 3
    for few in ([], [r for r in rows if r["seed"] == 0], rows[:12]):
        with pytest.raises(tv.TvInterpError, match="five or more relations over two or more"):
            explain_convergence(few)


def test_every_relation_of_a_run_is_measured(tmp_path):
    shutil.copytree(WEIGHTS / "reference-natural", tmp_path / "a")
    config = tmp_path / "a" / "config.json"
    about = json.loads(config.read_text())
    weights = {"month-next": 1.0, "verb-gerund": 0.5}
    about["tv_interp"] |= {"preset": "familiarity", "seed": 3, "familiarity": weights}
    config.write_text(json.dumps(about))
    out = tmp_path / "rows.json"
    measure_familiarity(str(tmp_path), out=str(out), n_demos=6, n_prompts=16)
    first, second = json.loads(out.read_text())
    assert (first["relation"], first["weight"], first["seed"]) == ("month-next", 1.0, 3)
    assert first["shared"] and not second["shared"] and second["answers"] == 32
    assert second["all"] > second["none"] + 0.3 and 0 < second["convergence"] < 1.5
