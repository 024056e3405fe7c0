"""Run the cells of a plan that are not finished yet, and combine those that are.

Each cell becomes one file, named by the hash of what it was asked and written whole or not at all.
So a sweep that is stopped, killed or preempted goes on where it was: run it again. What fails is
tried again, then named; it does not stop the rest.

    plan = tv.Plan.of("readers", {"task": ["country-capital"], "seed": [0, 1, 2]})
    swept = tv.run_sweep(plan, "out/seeds", engine="pool", workers=2)
    swept.dataset()                             # xarray, over cell, prompt, layer and head
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..display import Shown
from ..errors import FileError, unknown
from ..files import make_directory, write_text
from .cells import Job, cell_file, one_line
from .engines import ENGINES, RUNNERS, Engine
from .plan import Cell, Plan

if TYPE_CHECKING:
    import xarray as xr

    from ..prompts import Task
    from ..scores import Scores


@dataclass(frozen=True, repr=False)
class Swept(Shown):
    """What a sweep left behind.

    Attributes:
        out: Its directory.
        cells: All cells of the plan.
        reused: How many had been finished before.
        failed: What went wrong, by cell.
    """

    out: Path
    cells: tuple[Cell, ...]
    reused: int = 0
    failed: Mapping[Cell, str] = field(default_factory=dict)

    def load(self, cell: Cell) -> Scores:
        """Read the scores of one cell.

        Raises:
            FileError: if it is not finished, or its file is corrupt.
        """
        from ..scores import Scores

        return Scores.load(cell_file(self.out, cell))

    def dataset(self) -> xr.Dataset:
        """Combine the finished cells; see `load_sweep`."""
        return load_sweep(self.out, self.cells)

    @property
    def done(self) -> tuple[Cell, ...]:
        """Cells that are finished."""
        return tuple(cell for cell in self.cells if cell not in self.failed)

    def to_dict(self) -> dict[str, Any]:
        """Get plain values for JSON."""
        failed = [asdict(cell) | {"error": reason} for cell, reason in self.failed.items()]
        done = [asdict(cell) | {"file": str(cell_file(self.out, cell))} for cell in self.done]
        return {"out": str(self.out), "reused": self.reused, "done": done, "failed": failed}

    def __str__(self) -> str:
        """Say what is done, and name what failed and why."""
        count = f"{len(self.done)} of {len(self.cells)}"
        lines = [f"{count} cells in {self.out}, {self.reused} of them reused"]
        for cell, reason in self.failed.items():
            lines += [f"failed: {cell}", f"    {reason}"]
        return "\n".join(lines)


def run_sweep(
    plan: Plan,
    out: str | os.PathLike,
    *,
    engine: Engine = "inline",
    workers: int | None = None,
    retries: int = 2,
    backoff: float = 1.0,
    tasks: Sequence[Task] = (),
    load: Callable[[Cell], Any] | None = None,
    options: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Swept:
    """Run the cells of a plan that are not finished yet.

    Args:
        plan: What to run.
        out: Directory: one file a cell in ``cells/``, and one a failure in ``failed/``. Two sweeps
            may share it at the same time.
        engine: ``"inline"`` in this process, ``"pool"`` in processes of this machine, ``"ray"`` on
            a Ray cluster, ``"slurm"`` as an array of SLURM jobs (submitit).
        workers: How many at a time, each with a model of its own; None for the engine's choice.
        retries: How often a cell that failed, or whose worker died, is tried again. Bad input is
            not: it would fail again.
        backoff: Seconds before the first retry; doubles with each.
        tasks: Tasks of your own, which cells name; a changed task needs a new name.
        load: From a cell to its model, for models that have no name; None for `load_model`. Other
            engines than ``inline`` must be able to pickle it.
        options: What the engine is told beyond that: for ``ray`` options of a remote function, such
            as ``{"num_gpus": 1}``; for ``slurm`` parameters of `submitit.AutoExecutor`, such as
            ``{"slurm_partition": "gpu"}``, and ``"cluster"``.
        progress: Whether to show progress and an estimate.

    Returns:
        What is done and what failed; `Swept.dataset` combines it.

    Raises:
        UnknownName: if the engine, or a task, metric or corruption of a cell is not known.
        FileError: if results cannot be written, as on a full disk: then the sweep stops, and what
            had been finished stays.
        TvInterpError: if the engine's package is not installed.
    """
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    own = {task.name: task for task in tasks}
    for cell in plan.cells:
        _check(cell, own)
    directory = make_directory(out)
    make_directory(directory / "cells")
    make_directory(directory / "failed")
    loader = load or _load
    todo = [cell for cell in plan.cells if not cell_file(directory, cell).exists()]
    reused, failed, rounds = len(plan.cells) - len(todo), {}, 0
    run = RUNNERS[engine]
    count = max(1, workers or (1 if engine == "inline" else min(4, os.cpu_count() or 1)))
    with tqdm(
        total=len(plan.cells), initial=reused, desc="sweep", unit="cell", disable=not progress
    ) as bar:
        while todo:
            # a worker that died took cells with it: next time each is a job of its own, and the
            # last time none runs beside another, so that the one at fault is told
            size = None if rounds == 0 else 1
            if 0 < rounds == retries:
                count = 1
            jobs = [
                Job(cells, directory, own, loader, retries, backoff)
                for cells in _shares(todo, count, size)
            ]
            died: dict[Cell, str] = {}
            try:
                for job, ended in run(jobs, count, dict(options or {})):
                    if isinstance(ended, BaseException):
                        died |= dict.fromkeys(job.cells, f"its worker died: {one_line(ended)}")
                    elif ended is not None:
                        failed |= ended
                    bar.update(_finished(directory, plan.cells) - bar.n)
            finally:
                bar.update(_finished(directory, plan.cells) - bar.n)
            todo = [c for c in died if not cell_file(directory, c).exists() and c not in failed]
            rounds += 1
            if rounds > retries:
                failed |= {cell: died[cell] for cell in todo}
                break
    for cell, reason in failed.items():
        text = json.dumps({"cell": asdict(cell), "error": reason}, indent=2)
        write_text(directory / "failed" / f"{cell.key}.json", text + "\n")
    return Swept(directory, plan.cells, reused, failed)


def load_sweep(out: str | os.PathLike, cells: Iterable[Cell] | None = None) -> xr.Dataset:
    """Combine the finished cells of a sweep.

    Args:
        out: Its directory.
        cells: Which cells; None for every one in the directory. Those that are not finished are
            left out.

    Returns:
        Dataset of ``effect`` over cell, prompt and the measure's axes, and ``total`` over cell and
        prompt. Every field of `Cell` is a coordinate of cell. Where cells differ in size (models of
        other depth, fewer prompts) the rest is NaN.

    Raises:
        FileError: if there is none, or a file is corrupt.
        ScoreError: if cells have other axes or units: combine one measure at a time.
    """
    import numpy as np
    import xarray as xr

    from ..errors import ScoreError
    from ..scores import Scores

    directory = Path(out)
    found = sorted((directory / "cells").glob("*.nc"))
    if cells is not None:
        wanted = {cell_file(directory, cell) for cell in cells}
        found = [path for path in found if path in wanted]
    if not found:
        raise FileError(
            f"no finished cells in {directory}: run run_sweep(plan, {str(out)!r}) first"
        )
    scores = [Scores.load(path) for path in found]
    try:
        about = [Cell(**s.attrs["cell"]) for s in scores]
    except (KeyError, TypeError) as error:
        raise FileError(f"{directory} has files that no sweep wrote: {error}") from error
    kinds = {(s.data.dims, s.unit) for s in scores}
    if len(kinds) > 1:
        raise ScoreError(
            f"the cells have different axes or units {sorted(map(str, kinds))}: combine one "
            "measure and metric at a time with load_sweep(out, cells)"
        )
    parts = []
    for each in scores:
        total = np.full(each.data.sizes["prompt"], np.nan) if each.total is None else each.total
        parts.append(xr.Dataset({"effect": each.data, "total": ("prompt", np.asarray(total))}))
    data = xr.concat(parts, "cell", join="outer")
    for each in fields(Cell):
        values = [getattr(cell, each.name) for cell in about]
        values = ["" if v is None else v for v in values]
        data = data.assign_coords({each.name: ("cell", values)})
    data = data.assign_coords(cell=[cell.key for cell in about])
    return data.assign_attrs(unit=scores[0].unit)


def _check(cell: Cell, own: Mapping[str, Task]) -> None:
    """Refuse a cell that cannot run, before a model is loaded."""
    from ..prompts import get_task
    from ..prompts.corruptions import check_corruption
    from ..prompts.roles import Template
    from ..scores import get_metric

    task = get_task(own.get(cell.task, cell.task))
    get_metric(cell.metric)
    if cell.template is not None:
        Template.parse(cell.template)
    if cell.corruption is not None:
        name = getattr(task, "partner", None)
        partner = get_task(name) if name else None
        check_corruption(cell.corruption, task, partner)


def _load(cell: Cell) -> Any:
    from ..models.load import load_model

    return load_model(cell.model, backend=cell.backend)  # type: ignore[arg-type]


def _finished(out: Path, cells: Iterable[Cell]) -> int:
    there = {path.stem for path in (out / "cells").glob("*.nc")}
    return sum(cell.key in there for cell in cells)


def _shares(cells: Sequence[Cell], n: int, size: int | None) -> list[tuple[Cell, ...]]:
    """Split cells into shares of one model each, about one a worker or of a given size."""
    by_model: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        by_model[cell.model, cell.backend].append(cell)
    out = []
    for same in by_model.values():
        each = size or -(-len(same) // n)
        out += [tuple(same[i : i + each]) for i in range(0, len(same), each)]
    return out
