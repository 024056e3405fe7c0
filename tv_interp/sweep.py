"""Many runs: one measurement over a grid of models, tasks, corruptions, demonstrations and seeds.

Each cell of the grid becomes one file, named by the hash of what it was asked and written whole or
not at all. So a sweep that is stopped, killed or preempted goes on where it was: run it again. What
fails is tried again, then named; it does not stop the rest. Where cells run is a word: ``inline``,
``pool``, ``ray`` or ``slurm``.

    plan = tv.Plan.of(measure="readers", grid={"task": ["country-capital"], "seed": [0, 1, 2]})
    swept = tv.run_sweep(plan, "out/seeds", engine="pool", workers=2)
    swept.dataset()                             # xarray, over cell, prompt, layer and head
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from tqdm import tqdm

from .errors import FileError, TvInterpError, unknown
from .files import make_directory, write_text

if TYPE_CHECKING:
    import xarray as xr

    from .prompts import Task
    from .scores import Scores

Measure = Literal["writers", "readers", "local-paths", "knock-outs", "vectors"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
Engine = Literal["inline", "pool", "ray", "slurm"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
KINDS = {"int": int, "str": str, "str | None": (str, type(None))}
"""What the fields of a cell may be, by annotation."""


@dataclass(frozen=True, order=True)
class Cell:
    """What one run is asked; its hash names its file.

    Attributes:
        measure: ``writers``, ``readers`` (`patch_heads` at ``answer``, at ``query_is``),
            ``local-paths`` (`patch_local_paths`), ``knock-outs`` (`knock_out`: no corruption is
            used) or ``vectors`` (`inject_vectors`: local ones into dummy prompts).
        model: A preset, a directory or a hub name, as for `load_model`; or what ``load`` knows.
        task: Name of a task.
        corruption: As for `Prompts.corrupt`; None for the first of the task's family.
        n_demos: Demonstrations in each prompt.
        n_prompts: Prompts.
        seed: Decides prompts and corruption.
        metric: Name of a metric.
        direction: ``denoise`` or ``noise``.
        template: As for `make_prompts`.
        backend: TransformerLens class, as for `load_model`.
    """

    measure: str
    model: str = "reference"
    task: str = "country-capital"
    corruption: str | None = None
    n_demos: int = 8
    n_prompts: int = 64
    seed: int = 0
    metric: str = "logit_diff"
    direction: str = "denoise"
    template: str | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what no run could mean."""
        for each in fields(self):
            value, kind = getattr(self, each.name), KINDS[str(each.type)]
            if not isinstance(value, kind) or isinstance(value, bool):
                raise TvInterpError(f"expected {each.name} of type {each.type}, got {value!r}")
        if self.measure not in MEASURES:
            raise unknown("measure", self.measure, MEASURES)
        if self.direction not in ("denoise", "noise"):
            raise unknown("direction", self.direction, ("denoise", "noise"))
        for name in ("n_demos", "n_prompts"):
            if getattr(self, name) < 1:
                raise TvInterpError(f"expected {name} of 1 or more, got {getattr(self, name)}")
        if self.seed < 0:
            raise TvInterpError(f"expected seed of 0 or more, got {self.seed}")

    @property
    def key(self) -> str:
        """Hash of what is asked: the same on every machine."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def __str__(self) -> str:
        """Name what differs from the defaults, and always model, task and seed."""
        shown = {"model", "task", "seed"}
        plain = {f.name: f.default for f in fields(self)}
        parts = [
            f"{name}={value}"
            for name, value in asdict(self).items()
            if name != "measure" and (name in shown or value != plain[name])
        ]
        return f"{self.measure}({', '.join(parts)})"


@dataclass(frozen=True)
class Plan:
    """The cells of a sweep.

    Attributes:
        cells: In the order in which they run: by model, so that each is loaded once.
    """

    cells: tuple[Cell, ...]

    @classmethod
    def of(
        cls,
        measure: Measure | Sequence[Measure],
        grid: Mapping[str, Sequence[Any]],
        **settings: Any,
    ) -> Plan:
        """Make the cells of a grid.

        Args:
            measure: What is measured, one name or several.
            grid: Values by field of `Cell`; every combination is a cell.
            **settings: Fields of `Cell` that are the same for all cells.

        Raises:
            UnknownName: if a field or a measure is not known.
            TvInterpError: if a value is not of its field's type, or there are no cells.
        """
        known = [f.name for f in fields(Cell) if f.name != "measure"]
        for name in (*grid, *settings):
            if name not in known:
                raise unknown("field of a cell", name, known)
        if both := set(grid) & set(settings):
            raise TvInterpError(f"{sorted(both)} are in the grid and in the settings: choose one")
        measures = [measure] if isinstance(measure, str) else list(measure)
        for name, values in grid.items():
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise TvInterpError(f"expected a list of values for {name}, got {values!r}")
        cells = {
            Cell(what, **dict(zip(grid, values, strict=True)), **settings)
            for what in measures
            for values in itertools.product(*grid.values())
        }
        if not cells:
            raise TvInterpError("the grid has no cells: give each field at least one value")
        return cls(tuple(sorted(cells, key=lambda c: (c.model, c.backend, str(asdict(c))))))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Plan:
        """Read a plan from a YAML file of ``measure``, ``grid`` and settings.

        The file names things; it cannot run code or say where results go.

        Raises:
            FileError: if it cannot be read, or is no YAML mapping.
            TvInterpError: as `of`.
        """
        import yaml

        try:
            given = yaml.safe_load(Path(path).read_text("utf-8"))
        except OSError as error:
            raise FileError(f"cannot read {path}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise FileError(f"{path} is no YAML file: {reason}") from error
        if not isinstance(given, dict) or not all(isinstance(k, str) for k in given):
            raise FileError(f"expected {path} to hold 'measure:' and 'grid:', got {given!r:.60}")
        given = dict(given)
        measure, grid = given.pop("measure", None), given.pop("grid", {})
        if not isinstance(grid, dict) or not all(isinstance(k, str) for k in grid):
            raise FileError(f"expected grid: of {path} to map fields to lists, got {grid!r:.60}")
        if not isinstance(measure, str) and not (isinstance(measure, list) and measure):
            raise FileError(f"{path} has no measure: one of {', '.join(MEASURES)}")
        return cls.of(measure, grid, **given)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Swept:
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
        from .scores import Scores

        return Scores.load(_file(self.out, cell))

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
        done = [asdict(cell) | {"file": str(_file(self.out, cell))} for cell in self.done]
        return {"out": str(self.out), "reused": self.reused, "done": done, "failed": failed}

    def __str__(self) -> str:
        """Say what is done, and name what failed and why."""
        count = f"{len(self.done)} of {len(self.cells)}"
        lines = [f"{count} cells in {self.out}, {self.reused} of them reused"]
        for cell, reason in self.failed.items():
            lines += [f"failed: {cell}", f"    {reason}"]
        return "\n".join(lines)


@dataclass(frozen=True)
class Job:
    """Cells that one worker runs one after the other, with the model loaded once.

    Attributes:
        cells: Cells of one model.
        out: Directory of the sweep.
        tasks: Tasks that are not shipped, by name.
        load: From a cell to its model.
        retries: How often a cell is tried again.
        backoff: Seconds before the first of these; it doubles.
    """

    cells: tuple[Cell, ...]
    out: Path
    tasks: Mapping[str, Task]
    load: Callable[[Cell], Any]
    retries: int
    backoff: float


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
    todo = [cell for cell in plan.cells if not _file(directory, cell).exists()]
    reused, failed, rounds = len(plan.cells) - len(todo), {}, 0
    run = _RUNNERS[engine]
    with tqdm(
        total=len(plan.cells), initial=reused, desc="sweep", unit="cell", disable=not progress
    ) as bar:
        while todo:
            count = max(1, workers or (1 if engine == "inline" else min(4, os.cpu_count() or 1)))
            # a worker that died took a cell with it: next time each cell is on its own
            sizes = None if rounds == 0 else 1
            jobs = [
                Job(cells, directory, own, loader, retries, backoff)
                for cells in _shares(todo, count, sizes)
            ]
            died: dict[Cell, str] = {}
            try:
                for job, ended in run(jobs, count, dict(options or {})):
                    if isinstance(ended, BaseException):
                        died |= dict.fromkeys(job.cells, f"its worker died: {_line(ended)}")
                    elif ended is not None:
                        failed |= ended
                    bar.update(_finished(directory, plan.cells) - bar.n)
            finally:
                bar.update(_finished(directory, plan.cells) - bar.n)
            todo = [c for c in died if not _file(directory, c).exists() and c not in failed]
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

    from .errors import ScoreError
    from .scores import Scores

    directory = Path(out)
    found = sorted((directory / "cells").glob("*.nc"))
    if cells is not None:
        wanted = {_file(directory, cell) for cell in cells}
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


# ----------------------------------------------------------------------------------- one cell


def measure_cell(model: Any, cell: Cell, task: Task | str) -> Scores:
    """Measure what a cell asks, on a model."""
    import tv_interp as tv

    from .prompts.corruptions import default_corruptions

    prompts = tv.make_prompts(
        model, task, n_demos=cell.n_demos, n_prompts=cell.n_prompts, seed=cell.seed,
        template=cell.template,
    )  # fmt: skip
    options: dict[str, Any] = {"metric": cell.metric}
    if cell.measure == "knock-outs":
        return tv.knock_out(model, prompts, **options)
    if cell.measure == "vectors":
        dummies = prompts.dummies(seed=cell.seed + 1)
        vectors = tv.extract_vectors(model, dummies.clean, at="answer")
        return tv.inject_vectors(model, dummies.corrupted, vectors, **options)
    kind = cell.corruption or default_corruptions(prompts.task)[0]
    contrast = prompts.corrupt(kind, seed=cell.seed + 1)
    options["direction"] = cell.direction
    if cell.measure == "local-paths":
        return tv.patch_local_paths(model, contrast, **options)
    at = "answer" if cell.measure == "writers" else "query_is"
    return tv.patch_heads(model, contrast, at=at, **options)


def _check(cell: Cell, own: Mapping[str, Task]) -> None:
    """Refuse a cell that cannot run, before a model is loaded."""
    from .prompts import get_task
    from .prompts.corruptions import check_corruption
    from .prompts.roles import Template
    from .scores import get_metric

    task = get_task(own.get(cell.task, cell.task))
    get_metric(cell.metric)
    if cell.template is not None:
        Template.parse(cell.template)
    if cell.corruption is not None:
        name = getattr(task, "partner", None)
        partner = get_task(name) if name else None
        check_corruption(cell.corruption, task, partner)


def _load(cell: Cell) -> Any:
    from .models.load import load_model

    return load_model(cell.model, backend=cell.backend)  # type: ignore[arg-type]


def _run(job: Job) -> dict[Cell, str]:
    """Run the cells of a job; hand back what failed.

    Raises:
        FileError: if a result cannot be written.
    """
    return {cell: reason for cell, reason in _run_each(job) if reason}


def _run_each(job: Job) -> Iterator[tuple[Cell, str]]:
    """Run the cells of a job one by one, and say after each why it failed, if it did.

    The model is loaded when it is first needed.
    """
    model: Any = None
    for cell in job.cells:
        scores, reason = None, ""
        for attempt in range(job.retries + 1):
            if _file(job.out, cell).exists():  # another sweep was faster
                break
            try:
                model = job.load(cell) if model is None else model
                scores, reason = measure_cell(model, cell, job.tasks.get(cell.task, cell.task)), ""
                break
            except TvInterpError as error:
                reason = _line(error)
                break
            except Exception as error:  # whatever else a model may do, such as run out of memory
                reason = f"{_line(error)}; {_place(error)}"
                if attempt < job.retries:
                    time.sleep(job.backoff * 2**attempt)
        if scores is not None:
            attrs = dict(scores.attrs) | {"cell": asdict(cell)}
            replace(scores, attrs=attrs).save(_file(job.out, cell))
            (job.out / "failed" / f"{cell.key}.json").unlink(missing_ok=True)
        yield cell, reason


def _file(out: Path, cell: Cell) -> Path:
    return out / "cells" / f"{cell.key}.nc"


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


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, TvInterpError) else f"{type(error).__name__}: {text}"


def _place(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"in {Path(frame.filename).name}, line {frame.lineno}"


# -------------------------------------------------------------------------------- where jobs run

Ended = dict[Cell, str] | BaseException | None
"""What failed in a job, or how its worker died; None while it goes on."""


def _inline(jobs: Sequence[Job], workers: int, options: dict) -> Iterator[tuple[Job, Ended]]:
    for job in jobs:
        for cell, reason in _run_each(job):
            yield job, {cell: reason} if reason else None


def _pool(jobs: Sequence[Job], workers: int, options: dict) -> Iterator[tuple[Job, Ended]]:
    import multiprocessing
    from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
    from concurrent.futures.process import BrokenProcessPool

    context = multiprocessing.get_context("spawn")  # a forked torch may hang
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        running = {pool.submit(_run, job): job for job in jobs}
        try:
            while running:
                ended, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                yield jobs[0], None
                for future in ended:
                    job = running.pop(future)
                    try:
                        yield job, future.result()
                    except BrokenProcessPool as error:
                        yield job, error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _ray(jobs: Sequence[Job], workers: int, options: dict) -> Iterator[tuple[Job, Ended]]:
    ray = _package("ray")
    if not ray.is_initialized():
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    # deaths are counted here, so that the cell that causes them can be told
    remote = ray.remote(**({"num_cpus": 1, "max_retries": 0} | options))(_run)
    running = {remote.remote(job): job for job in jobs}
    try:
        while running:
            ended, _ = ray.wait(list(running), timeout=0.5)
            yield jobs[0], None
            for reference in ended:
                job = running.pop(reference)
                try:
                    yield job, ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except ray.exceptions.RayError as error:
                    yield job, error
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _slurm(jobs: Sequence[Job], workers: int, options: dict) -> Iterator[tuple[Job, Ended]]:
    submitit = _package("submitit")
    executor = submitit.AutoExecutor(
        folder=jobs[0].out / "slurm", cluster=options.pop("cluster", None)
    )
    executor.update_parameters(slurm_array_parallelism=workers, **options)
    running = dict(zip(executor.map_array(_run, jobs), jobs, strict=True))
    try:
        while running:
            time.sleep(0.5)
            yield jobs[0], None
            for task in [task for task in running if task.done()]:
                job = running.pop(task)
                error = task.exception()
                if isinstance(error, TvInterpError):
                    raise error
                yield job, error if error is not None else task.result()
    finally:
        for task in running:
            task.cancel()


def _package(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise TvInterpError(
            f"engine needs the package {name!r}, which is not installed: "
            "pip install 'tv-interp[cluster]'"
        ) from error


_RUNNERS: Mapping[str, Callable[..., Iterator[tuple[Job, Ended]]]] = {
    "inline": _inline,
    "pool": _pool,
    "ray": _ray,
    "slurm": _slurm,
}
