"""Sweeps: one file a cell, whole or not there; killed, crashed and bad cells lose nothing."""

from __future__ import annotations

import errno
import functools
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import KINDS, tiny_model

import tv_interp as tv
from tv_interp import cli
from tv_interp.errors import FileError, ScoreError, TvInterpError
from tv_interp.scores import Scores
from tv_interp.sweep.compare import compare_heads, depth_profile
from tv_interp.sweep.plan import Cell, Plan
from tv_interp.sweep.run import load_sweep, run_sweep


@functools.cache
def reference():
    torch.set_num_threads(1)
    return tv.load_model("reference")


def held(cell: Cell):
    """Give every cell the one model that this process holds."""
    return reference()


LIGHT = tv.Task.from_pairs({f"w{i}": f"w{i + 20}" for i in range(12)}, name="light")
"""A task that a tiny model reads: for tests of what happens around a cell, not in it."""


@functools.cache
def light(cell: Cell | None):
    """Give every cell the same tiny random model; None will do for a cell."""
    return tiny_model("gpt2", KINDS[-1], n_layers=2)


def plan(n_seeds: int = 3, **settings: Any) -> Plan:
    settings = {"n_prompts": 4, "n_demos": 3} | settings
    measure = settings.pop("measure", "readers")
    return Plan.of(measure, {"seed": list(range(n_seeds))}, **settings)


def files(out) -> dict[str, tuple[int, int]]:
    """Identity and time of each finished cell: a cell that runs again gets others."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in Path(out, "cells").glob("*")}


# ------------------------------------------------------------------------------------- the plan


def test_a_grid_is_every_combination_once_and_by_model():
    grid = {"model": ["b", "a"], "seed": [0, 1], "task": ["digit", "digit"]}
    cells = Plan.of(["readers", "writers"], grid).cells
    assert len(cells) == 8 == len(set(cells))
    assert [c.model for c in cells] == ["a"] * 4 + ["b"] * 4


def test_a_key_is_the_hash_of_what_is_asked_and_nothing_else():
    one = Cell("readers", seed=1)
    assert one.key == Cell(measure="readers", seed=1).key != Cell("readers", seed=2).key
    assert len(one.key) == 20
    assert set(one.key) <= set("0123456789abcdef")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measure": "reader"}, "unknown measure 'reader': did you mean 'readers'"),
        ({"seeds": 3}, "unknown field of a cell 'seeds': did you mean 'seed'"),
        ({"n_demos": "4"}, "expected n_demos of type int, got '4'"),
        ({"n_demos": True}, "expected n_demos of type int, got True"),
        ({"n_prompts": 0}, "expected n_prompts of 1 or more, got 0"),
        ({"seed": -1}, "expected seed of 0 or more, got -1"),
        ({"direction": "both"}, "unknown direction 'both'"),
        ({"grid": {"seed": 3}}, "expected a list of values for seed, got 3"),
        ({"grid": {"task": "digit"}}, "expected a list of values for task, got 'digit'"),
        ({"grid": {"seed": []}}, "the grid has no cells"),
        ({"grid": {"seed": [0]}, "seed": 1}, "in the grid and in the settings"),
    ],
)
def test_a_bad_plan_is_refused(change, message):
    given = {"measure": "readers", "grid": {}} | change
    with pytest.raises(TvInterpError, match=message):
        Plan.of(given.pop("measure"), given.pop("grid"), **given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("measure: [", "is no YAML file"),
        ("- 1", "to hold 'measure:' and 'grid:'"),
        ("grid: {seed: [0]}", "has no measure"),
        ("{measure: readers, grid: [1]}", "to map fields to lists"),
        ("{measure: readers, out: ../elsewhere}", "unknown field of a cell 'out'"),
        ("{measure: readers, load: os.system}", "unknown field of a cell 'load'"),
        ("measure: !!python/object/apply:os.system ['touch hacked']", "is no YAML file"),
        (b"\xff\xfe\x00", "is no YAML file"),
    ],
)
def test_a_bad_file_is_refused_and_runs_nothing(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "plan.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TvInterpError, match=message):
        Plan.load(path)
    assert not (tmp_path / "hacked").exists()


def test_a_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(FileError, match="cannot read .*nothing.yaml: No such file"):
        Plan.load(tmp_path / "nothing.yaml")


def test_names_in_a_plan_are_checked_before_a_model_is_loaded(tmp_path):
    def never(cell):
        raise AssertionError("loaded")

    cases: list[tuple[dict[str, Any], str]] = [
        ({"task": "digits"}, "unknown task 'digits'"),
        ({"metric": "logits"}, "unknown metric"),
        ({"corruption": "labels"}, "exchanges the two labels"),
        ({"template": "{x}"}, "expected a template"),
    ]
    for settings, message in cases:
        with pytest.raises(TvInterpError, match=message):
            run_sweep(plan(**settings), tmp_path / "out", load=never)
    assert not (tmp_path / "out").exists()
    with pytest.raises(TvInterpError, match="unknown engine 'threads'"):
        run_sweep(plan(), tmp_path / "out", engine="threads")  # type: ignore[arg-type]


def test_names_that_look_like_paths_stay_inside_the_directory(tmp_path):
    task = tv.Task.from_pairs({f"w{i}": f"v{i}" for i in range(9)}, name="../../escaped")
    swept = run_sweep(
        plan(1, task="../../escaped"), tmp_path / "in", tasks=[task], load=held, retries=0
    )
    assert len(swept.failed) == 1  # the model does not know these words
    assert {p.name for p in tmp_path.iterdir()} == {"in"}
    assert "escaped" not in " ".join(map(str, tmp_path.rglob("*")))


# ------------------------------------------------------------------------------------ the results


@pytest.mark.parametrize(
    ("measure", "dims"),
    [
        ("readers", ("prompt", "layer", "head")),
        ("writers", ("prompt", "layer", "head")),
        ("local-paths", ("prompt", "layer", "head")),
        ("knock-outs", ("prompt", "layer", "head")),
        ("vectors", ("prompt", "layer")),
    ],
)
def test_a_cell_is_what_the_function_gives(tmp_path, measure, dims):
    model = reference()
    swept = run_sweep(plan(1, measure=measure), tmp_path, load=held)
    scores = swept.load(swept.cells[0])
    clean = tv.make_prompts(model, "country-capital", n_demos=3, n_prompts=4, seed=0)
    contrast = clean.corrupt("task", seed=1)
    dummies = clean.dummies(seed=1)
    expected = {
        "readers": lambda: tv.patch_heads(model, contrast, at="query_is"),
        "writers": lambda: tv.patch_heads(model, contrast, at="answer"),
        "local-paths": lambda: tv.patch_local_paths(model, contrast),
        "knock-outs": lambda: tv.knock_out(model, clean),
        "vectors": lambda: tv.inject_vectors(
            model, dummies.corrupted, tv.extract_vectors(model, dummies.clean), metric="logit_diff"
        ),
    }[measure]()
    assert scores.data.dims == dims
    np.testing.assert_array_equal(scores.data.values, expected.data.values)
    assert scores.attrs["cell"]["measure"] == measure


def test_cells_combine_into_one_dataset_with_every_field_as_a_coordinate(tmp_path):
    swept = run_sweep(plan(3), tmp_path, load=held)
    data = swept.dataset()
    assert dict(data.sizes) == {"cell": 3, "prompt": 4, "layer": 5, "head": 4}
    for cell in swept.cells:
        there = data.sel(cell=cell.key)
        assert int(there.seed) == cell.seed and there.task.item() == "country-capital"
        np.testing.assert_array_equal(there.effect, swept.load(cell).data)
        np.testing.assert_array_equal(there.total, swept.load(cell).total)
    by_seed = data.swap_dims(cell="seed").effect.mean(("prompt", "head"))
    assert by_seed.sel(seed=1).dims == ("layer",)


def test_cells_of_other_sizes_are_filled_with_nan(tmp_path):
    small, large = plan(1), plan(1, n_prompts=6)
    swept = run_sweep(Plan((*small.cells, *large.cells)), tmp_path, load=held)
    data = swept.dataset().swap_dims(cell="n_prompts")
    assert data.effect.sel(n_prompts=4).isel(prompt=slice(4, None)).isnull().all()
    assert data.effect.sel(n_prompts=6).notnull().all()


def test_cells_of_other_measures_are_not_combined(tmp_path):
    swept = run_sweep(plan(1, measure=["readers", "vectors"]), tmp_path, load=held)
    with pytest.raises(ScoreError, match="different axes or units .* one measure"):
        swept.dataset()
    assert load_sweep(tmp_path, swept.cells[:1]).sizes["cell"] == 1


def test_a_directory_without_cells_or_with_a_broken_one_is_said(tmp_path):
    with pytest.raises(FileError, match="no finished cells in"):
        load_sweep(tmp_path)
    swept = run_sweep(plan(1), tmp_path, load=held)
    next((tmp_path / "cells").iterdir()).write_bytes(b"nonsense")
    with pytest.raises(FileError, match="is corrupt or no netCDF file"):
        swept.dataset()


# -------------------------------------------------------------------------------------- failures


def test_finished_cells_are_not_run_again_and_new_ones_are(tmp_path):
    run_sweep(plan(2), tmp_path, load=held)
    before = files(tmp_path)
    swept = run_sweep(plan(3), tmp_path, load=held)
    assert swept.reused == 2 and len(files(tmp_path)) == 3
    assert before.items() <= files(tmp_path).items()


def test_one_bad_cell_does_not_stop_the_rest_and_is_named(tmp_path):
    both = Plan.of("readers", {"n_demos": [3, 500], "seed": [0, 1]}, n_prompts=4)
    swept = run_sweep(both, tmp_path, load=held)
    assert sorted(c.n_demos for c in swept.failed) == [500, 500]
    assert [c.n_demos for c in swept.done] == [3, 3]
    text = str(swept)
    assert "2 of 4 cells" in text and "n_demos=500" in text and "has inputs for at most" in text
    said = [json.loads(p.read_text()) for p in (tmp_path / "failed").iterdir()]
    assert {s["cell"]["seed"] for s in said} == {0, 1}
    assert swept.dataset().sizes["cell"] == 2


def test_a_passing_fault_is_tried_again_and_bad_input_is_not(tmp_path):
    calls: list[str] = []

    def flaky(cell):
        calls.append("load")
        if len(calls) < 3:
            raise RuntimeError("CUDA out of memory")
        return reference()

    swept = run_sweep(plan(1), tmp_path / "a", load=flaky, retries=2, backoff=0.01)
    assert not swept.failed and len(calls) == 3
    calls.clear()
    swept = run_sweep(plan(1), tmp_path / "b", load=flaky, retries=1, backoff=0.01)
    (reason,) = swept.failed.values()
    assert reason.startswith("RuntimeError: CUDA out of memory; in test_sweep.py, line")
    swept = run_sweep(plan(1), tmp_path / "b", load=held)  # a later run mends it
    assert not swept.failed and not list((tmp_path / "b" / "failed").iterdir())
    calls.clear()

    def bad(cell):
        calls.append("load")
        raise TvInterpError("no such model")

    swept = run_sweep(plan(1), tmp_path / "c", load=bad, retries=5)
    assert len(calls) == 1 and list(swept.failed.values()) == ["no such model"]


def test_retries_wait_twice_as_long_each_time(tmp_path, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)

    def broken(cell):
        raise OSError("the network is gone")

    run_sweep(plan(1), tmp_path, load=broken, retries=3, backoff=0.5)
    assert waits == [0.5, 1.0, 2.0]


def test_a_full_disk_is_one_clear_error_and_loses_no_finished_cell(tmp_path, monkeypatch):
    run_sweep(plan(2), tmp_path, load=held)
    before = files(tmp_path)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(xr.Dataset, "to_netcdf", full)
    with pytest.raises(FileError, match="cannot write .*nc: No space left on device"):
        run_sweep(plan(4), tmp_path, load=held)
    assert files(tmp_path) == before
    monkeypatch.undo()
    assert run_sweep(plan(4), tmp_path, load=held).reused == 2


def light_plan(n_seeds: int) -> Plan:
    return plan(n_seeds, task="light")


def _in_a_process(out, n_seeds: int = 12) -> Any:
    """Run a sweep in a fork, which needs no imports."""
    light(None)
    process = multiprocessing.get_context("fork").Process(
        target=run_sweep,
        args=(light_plan(n_seeds), out),
        kwargs=LIGHTLY,
    )
    process.start()
    return process


LIGHTLY: dict[str, Any] = {"load": lambda cell: light(None), "tasks": [LIGHT]}


@pytest.mark.slow
def test_a_sweep_killed_at_twenty_random_moments_loses_nothing_and_repeats_nothing(tmp_path):
    whole = run_sweep(light_plan(12), tmp_path / "whole", **LIGHTLY).dataset()
    out, rng, seen = tmp_path / "killed", random.Random(0), {}
    started = time.monotonic()
    first = _in_a_process(out, 2)
    first.join()
    cost = (time.monotonic() - started) / 2
    kills = 0
    for _ in range(20):
        process = _in_a_process(out)
        time.sleep(rng.uniform(0, 1.2 * cost))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
            kills += 1
        process.join()
        now = files(out)
        done = {name: v for name, v in now.items() if name.endswith(".nc")}
        assert seen.items() <= done.items()  # nothing that was finished ran again
        for name in done.keys() - seen.keys():
            Scores.load(out / "cells" / name)  # nothing half-written has a final name
        seen = done
    assert kills >= 10
    last = run_sweep(light_plan(12), out, **LIGHTLY)
    assert last.reused == len(seen) and not last.failed
    xr.testing.assert_identical(last.dataset(), whole)


def test_two_sweeps_in_one_directory_at_once_do_not_disturb_each_other(tmp_path):
    whole = run_sweep(light_plan(6), tmp_path / "whole", **LIGHTLY).dataset()
    both = [_in_a_process(tmp_path / "shared", 6) for _ in range(2)]
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert not list((tmp_path / "shared").rglob("*.partial"))
    xr.testing.assert_identical(load_sweep(tmp_path / "shared"), whole)


class DiesOnce:
    """Loads the reference model, but kills its process the first time it is asked."""

    def __init__(self, mark: Path, seed: int | None = None) -> None:
        self.mark, self.seed = mark, seed

    def __call__(self, cell: Cell):
        torch.set_num_threads(1)
        if self.seed is None and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.seed == cell.seed:
            os.kill(os.getpid(), signal.SIGKILL)
        return tv.load_model("reference")


@pytest.mark.slow
def test_a_pool_survives_a_killed_worker(tmp_path):
    load = DiesOnce(tmp_path / "died")
    swept = run_sweep(plan(4), tmp_path / "out", engine="pool", workers=2, load=load)
    assert (tmp_path / "died").exists() and not swept.failed
    xr.testing.assert_identical(
        swept.dataset(), run_sweep(plan(4), tmp_path / "whole", load=held).dataset()
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2])
def test_a_cell_that_kills_every_worker_is_named_and_the_rest_is_done(tmp_path, seed):
    load = DiesOnce(tmp_path / "died", seed=seed)
    swept = run_sweep(plan(3), tmp_path / "out", engine="pool", workers=2, retries=1, load=load)
    assert [c.seed for c in swept.failed] == [seed]
    assert "its worker died" in next(iter(swept.failed.values()))
    assert swept.dataset().sizes["cell"] == 2


@pytest.mark.slow
def test_ray_runs_cells_on_two_workers_and_survives_a_killed_one(tmp_path):
    ray = pytest.importorskip("ray")
    variables = {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        runtime_env={"env_vars": variables},
    )
    try:
        load = DiesOnce(tmp_path / "died")
        swept = run_sweep(plan(4), tmp_path / "out", engine="ray", workers=2, load=load)
    finally:
        ray.shutdown()
    assert (tmp_path / "died").exists() and not swept.failed
    xr.testing.assert_identical(
        swept.dataset(), run_sweep(plan(4), tmp_path / "whole", load=held).dataset()
    )


@pytest.mark.slow
def test_slurm_jobs_run_through_submitit(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    options = {"cluster": "local", "timeout_min": 5}
    swept = run_sweep(plan(2), tmp_path / "out", engine="slurm", workers=1, options=options)
    assert not swept.failed
    assert swept.dataset().sizes["cell"] == 2


@pytest.mark.parametrize(("engine", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_an_engine_that_is_not_installed_is_said(tmp_path, monkeypatch, engine, package):
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TvInterpError, match=f"needs the package '{package}'.*pip install"):
        run_sweep(plan(1), tmp_path, engine=engine)


def test_the_command_runs_a_file_and_names_what_failed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tv_interp.sweep.run._load", held)
    path, out = tmp_path / "plan.yaml", tmp_path / "out"
    path.write_text(
        "measure: [readers, vectors]\ngrid: {n_demos: [3, 500]}\nn_prompts: 4\nseed: 1\n"
    )
    with pytest.raises(SystemExit) as stop:
        cli.main(["sweep", str(path), "--out", str(out)])
    assert stop.value.code == 1
    text = capsys.readouterr().out
    assert "2 of 4 cells" in text and "n_demos=500" in text
    assert {p.name for p in out.glob("*.nc")} == {"readers-logit_diff.nc", "vectors-logit_diff.nc"}
    with pytest.raises(SystemExit):
        cli.main(["sweep", str(path), "--out", str(out), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["reused"] == 2 and len(said["failed"]) == 2


# -------------------------------------------------------------------------------------- compare


def made_up(effects: dict[str, np.ndarray], **fields: list) -> xr.Dataset:
    """Cells of one prompt whose total is 1, by name."""
    deepest = max(e.shape[0] for e in effects.values())
    array = np.full((len(effects), 1, deepest, next(iter(effects.values())).shape[1]), np.nan)
    for i, effect in enumerate(effects.values()):
        array[i, 0, : len(effect)] = effect
    total = ("cell", "prompt"), np.ones((len(effects), 1))
    data = xr.Dataset({"effect": (("cell", "prompt", "layer", "head"), array), "total": total})
    named = {"task": list(effects), "model": ["m"] * len(effects)} | fields
    return data.assign_coords({k: ("cell", v) for k, v in named.items()})


def test_tasks_that_share_their_heads_are_told_from_those_that_do_not():
    rng = np.random.default_rng(0)
    noise = [rng.normal(size=(8, 8)) * 0.01 for _ in range(3)]
    for same in noise[:2]:
        same[2, 1], same[3, 0], same[5, 7] = 1.0, -0.9, 0.5
    noise[2][0, :3] = 1.0
    table = compare_heads(made_up(dict(zip("abc", noise, strict=True))), k=3)
    first = table.iloc[0]
    assert (first.one, first.two, first.shared, first.heads) == ("a", "b", 3, "L2H1 L3H0 L5H7")
    assert first.expected == 9 / 64
    assert first.p == pytest.approx(1 / 41664)  # one of 64 over 3 choices
    assert first.q == pytest.approx(3 / 41664)
    assert (table.shared[1:] == 0).all() and (table.p[1:] == 1).all()


def test_depth_is_relative_and_models_of_other_sizes_are_compared():
    shallow, deep = np.zeros((2, 3)), np.zeros((8, 3))
    shallow[1, 0], deep[6, 1], deep[1, 2] = 2.0, -3.0, 1.0
    data = made_up({"s": shallow, "d": deep}, model=["small", "large"])
    table = depth_profile(data, bins=2)
    assert table.loc["small"].tolist() == [0, 1, 0.75]
    assert table.loc["large"].tolist() == pytest.approx([0.25, 0.75, (3 * 6.5 + 1.5) / 32])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "expected k between 1 and 4 heads, got 0"),
        ({"by": "tasks"}, r"expected by= to be one of .*'task'.* got 'tasks'"),
        ({"by": "model"}, "the cells have one value of model"),
    ],
)
def test_a_comparison_that_means_nothing_is_refused(change, message):
    data = made_up({"a": np.ones((2, 2)), "b": np.ones((2, 2))})
    with pytest.raises(ScoreError, match=message):
        compare_heads(data, **({"k": 1} | change))


def test_heads_of_other_models_are_not_compared():
    data = made_up({"a": np.ones((2, 2)), "b": np.ones((2, 2))}, model=["m", "n"])
    with pytest.raises(ScoreError, match="several models .* depth_profile"):
        compare_heads(data, k=1)
    with pytest.raises(ScoreError, match="expected bins of 1 or more"):
        depth_profile(data, bins=0)
    with pytest.raises(ScoreError, match="over layer and head"):
        compare_heads(data.isel(head=0), k=1)
