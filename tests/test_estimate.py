"""A dry run says within a factor of 2 what a sweep takes."""

from __future__ import annotations

import functools
import json
import time

import pytest
from conftest import KINDS, tiny_model
from random_models import words
from test_storing import peak

import tv_interp as tv
from tv_interp import cli
from tv_interp.errors import TvInterpError
from tv_interp.sweep.cells import measure_cell
from tv_interp.sweep.estimate import estimate_sweep
from tv_interp.sweep.plan import MEASURES, Plan

TASK = tv.Task.from_pairs({w: words()[30 + i] for i, w in enumerate(words()[3:28])}, name="words")
SHAPES = {"small": {}, "deep": {"n_layers": 8}, "wide": {"hidden_size": 252}}


@functools.cache
def model(shape: str):
    return tiny_model("llama", KINDS[0], **SHAPES[shape])


def plan(measure, **how) -> Plan:
    how = {"n_prompts": 96, "n_demos": 12, "task": "words", "corruption": "answers"} | how
    return Plan.of(measure, {}, **how)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_the_time_of_a_sweep_is_predicted_within_a_factor_of_two(shape):
    held = model(shape)
    for measure in ("readers", "writers", "local-paths"):
        ratios = []
        for _ in range(3):  # other processes share the caches
            cell = plan(measure).cells[0]
            told = estimate_sweep(Plan((cell,)), tasks=[TASK], load=lambda cell: held)
            started = time.process_time()
            measure_cell(held, cell, TASK)
            ratios.append(float(told.seconds.iloc[0]) / (time.process_time() - started))
            if 0.5 <= ratios[-1] <= 2:
                break
        print(f"{shape} {measure}: predicted / measured {ratios}")
        assert 0.5 <= ratios[-1] <= 2


@pytest.mark.slow
def test_the_peak_of_memory_is_predicted_within_a_factor_of_two():
    held = model("small")
    cell = plan("readers", n_prompts=500, n_demos=20).cells[0]
    told = estimate_sweep(Plan((cell,)), tasks=[TASK], load=lambda cell: held)
    used = peak(lambda: measure_cell(held, cell, TASK))
    print(f"predicted {told.bytes.iloc[0] / 2**20:.0f} MiB, measured {used / 2**20:.0f} MiB")
    assert 0.5 <= float(told.bytes.iloc[0]) / used <= 2


def test_every_cell_has_a_row_and_more_work_costs_more(monkeypatch):
    held = model("small")
    small = plan(list(MEASURES), n_prompts=6, n_demos=2).cells
    large = plan(list(MEASURES), n_prompts=600, n_demos=8).cells
    asked = Plan((*small, *large))
    table = estimate_sweep(asked, tasks=[TASK], load=lambda cell: held)
    assert list(table.index) == [cell.key for cell in asked.cells]
    for ours, theirs in zip(small, large, strict=True):
        assert 0 < table.seconds[ours.key] < table.seconds[theirs.key]
        assert 0 < table.bytes[ours.key] < table.bytes[theirs.key]
    with pytest.raises(TvInterpError, match="unknown task 'nothing'"):
        estimate_sweep(plan("readers", task="nothing"), load=lambda cell: held)


def test_the_command_says_what_it_would_cost_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tv_interp.sweep.estimate._load", lambda cell: tv.load_model("reference"))
    path, out = tmp_path / "plan.yaml", tmp_path / "out"
    path.write_text("{measure: readers, grid: {seed: [0, 1]}, n_prompts: 4, n_demos: 3}")
    cli.main(["sweep", str(path), "--out", str(out), "--dry-run", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["cells"] == 2 and told["seconds"] >= 0 and told["bytes"] > 0
    assert not out.exists()
