"""Models that differ in one thing: measured from their directories, held against the baseline."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest
from scipy import stats

import tv_interp as tv
from tv_interp.files import write_rows
from tv_interp.models.load import WEIGHTS
from tv_interp.show.arms import (
    REDUNDANCY,
    compare_arms,
    measure_arms,
    plot_arms,
    show_arms,
)
from tv_interp.show.phenomena import KINDS, WITHOUT

HERE = [kind for kind in KINDS if kind != "separator"]  # of prompts without one
TASKS = ["verb-gerund", "country-capital"]


def row(arm, seed, task, kind, gain=0.0, value=None):
    known = {"arm": arm, "seed": seed, "task": task, "kind": kind}
    if kind == WITHOUT:
        return known | {"value": value}
    return known | {"gain_value": gain, "by_layer": [gain + 0.1] * 5, "recipient": 0.1}


def made_rows():
    """Arms whose gains differ by .4, .5 and .6 over three seeds, on two tasks."""
    rows = []
    for seed, apart in enumerate((0.4, 0.5, 0.6)):
        for task, shift in zip(TASKS, (-0.1, 0.1), strict=True):
            for kind in HERE:
                rows.append(row("arm-nothing", seed, task, kind, 0.2 + shift))
                rows.append(row("arm-heads", seed, task, kind, 0.2 + shift + apart))
            rows.append(row("arm-nothing", seed, task, WITHOUT, value=[1.0, 0.5, 0.25, 0.0]))
            rows.append(row("arm-heads", seed, task, WITHOUT, value=[0.8, 0.8, 0.6, 0.0]))
    return rows


def test_arms_are_compared_seed_by_seed_over_the_means_of_tasks():
    table = compare_arms(made_rows()).set_index(["quantity", "arm"])
    found = table.loc[("global", "arm-heads")]
    low, high = stats.t.interval(0.95, 2, 0.5, 0.1 / np.sqrt(3))
    assert found["mean"] == pytest.approx(0.7) and found["difference"] == pytest.approx(0.5)
    assert (found["lo"], found["hi"]) == (pytest.approx(low), pytest.approx(high))
    assert found["n"] == 3
    assert table.loc[("global", "arm-nothing"), "mean"] == pytest.approx(0.2)
    alone = [*made_rows(), row("arm-separator", 0, TASKS[0], "separator", 0.3)]
    (found,) = compare_arms(alone).query("quantity == 'separator'").to_dict("records")
    assert found["mean"] == pytest.approx(0.3) and np.isnan(found["difference"])
    redundancy = table.loc[(REDUNDANCY, slice(None)), "mean"].to_dict()
    assert redundancy[(REDUNDANCY, "arm-nothing")] == pytest.approx(0.375)
    assert redundancy[(REDUNDANCY, "arm-heads")] == pytest.approx(0.875)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(tv.TvInterpError, match="expected rows of the arm 'arm-none', got"):
        compare_arms(made_rows(), baseline="arm-none")
    few = [r for r in made_rows() if r["seed"] == 0 or r["arm"] == "arm-nothing"]
    with pytest.raises(tv.TvInterpError, match="expected two or more seeds of 'arm-heads'"):
        compare_arms(few)
    with pytest.raises(tv.TvInterpError, match="expected rows of measure_arms"):
        plot_arms([])


@pytest.mark.slow
def test_a_table_and_a_figure_are_made_of_the_file(tmp_path, capsys):
    write_rows(tmp_path / "arms.json", made_rows())
    show_arms(str(tmp_path / "arms.json"), figure=str(tmp_path / "arms.svg"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| quantity | arm | mean | n | difference | lo | hi |"
    assert "| global | arm-heads | 0.70 | 3 | 0.50 | 0.25 | 0.75 |" in lines
    assert "| global | arm-nothing | 0.20 | 3 |  |  |  |" in lines
    assert "gain by the global vector" in (tmp_path / "arms.svg").read_text()
    (tmp_path / "other.json").write_text('{"a": 1}')
    for name, message in (("none.json", "cannot read"), ("other.json", "expected a file of rows")):
        with pytest.raises(tv.TvInterpError, match=message):
            show_arms(str(tmp_path / name))


def test_the_figure_has_a_line_for_each_arm_and_a_thin_one_for_each_seed():
    lines: Any = plot_arms(made_rows()).data
    thick = [t for t in lines if t.mode == "lines+markers" and t.name == "arm-heads"]
    assert len(thick) == 4 and len(lines) == 4 * 2 * (1 + 3)
    np.testing.assert_allclose(thick[0].y, np.full(5, 0.7))
    np.testing.assert_allclose(thick[3].y, [0.8, 0.8, 0.6, 0.0])


@pytest.mark.slow
def test_finished_runs_are_measured_from_their_directories(tmp_path, capsys):
    with pytest.raises(tv.TvInterpError, match="expected directories of finished runs in"):
        measure_arms(str(tmp_path))
    shutil.copytree(WEIGHTS / "reference-natural", tmp_path / "a")
    with pytest.raises(tv.TvInterpError, match="finished runs in .* --preset arm-heads --seed 0"):
        measure_arms(str(tmp_path))  # another preset's run
    config = tmp_path / "a" / "config.json"
    about = json.loads(config.read_text())
    about["tv_interp"] |= {"preset": "arm-heads", "seed": 7}
    config.write_text(json.dumps(about))
    measure_arms(str(tmp_path), out=str(tmp_path / "arms.json"), n_prompts=8, tasks=TASKS)
    rows = json.loads((tmp_path / "arms.json").read_text())
    assert {(r["arm"], r["seed"]) for r in rows} == {("arm-heads", 7)}
    assert [r["kind"] for r in rows] == [*HERE, WITHOUT] * 2
    assert capsys.readouterr().out == "arm-heads seed 7\n"
