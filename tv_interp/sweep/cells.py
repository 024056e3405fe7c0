"""One cell of a sweep after the other: measured, tried again, written whole."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TvInterpError
from .plan import Cell

if TYPE_CHECKING:
    from ..prompts import Task
    from ..scores import Scores


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


def measure_cell(model: Any, cell: Cell, task: Task | str) -> Scores:
    """Measure what a cell asks, on a model."""
    import tv_interp as tv

    from ..prompts.corruptions import default_corruptions

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


def run_job(job: Job) -> dict[Cell, str]:
    """Run the cells of a job; hand back what failed.

    Raises:
        FileError: if a result cannot be written.
    """
    return {cell: reason for cell, reason in run_each(job) if reason}


def run_each(job: Job) -> Iterator[tuple[Cell, str]]:
    """Run the cells of a job one by one, and say after each why it failed, if it did.

    The model is loaded when it is first needed.
    """
    model: Any = None
    for cell in job.cells:
        scores, reason = None, ""
        for attempt in range(job.retries + 1):
            if cell_file(job.out, cell).exists():  # another sweep was faster
                break
            try:
                model = job.load(cell) if model is None else model
                scores, reason = measure_cell(model, cell, job.tasks.get(cell.task, cell.task)), ""
                break
            except TvInterpError as error:
                reason = one_line(error)
                break
            except Exception as error:  # whatever else a model may do, such as run out of memory
                reason = f"{one_line(error)}; {_place(error)}"
                if attempt < job.retries:
                    time.sleep(job.backoff * 2**attempt)
        if scores is not None:
            attrs = dict(scores.attrs) | {"cell": asdict(cell)}
            replace(scores, attrs=attrs).save(cell_file(job.out, cell))
            (job.out / "failed" / f"{cell.key}.json").unlink(missing_ok=True)
        yield cell, reason


def cell_file(out: Path, cell: Cell) -> Path:
    """Name the file of a finished cell."""
    return out / "cells" / f"{cell.key}.nc"


def one_line(error: BaseException) -> str:
    """Say an error in one line, with its type where it is not one of ours."""
    text = " ".join(str(error).split())
    return text if isinstance(error, TvInterpError) else f"{type(error).__name__}: {text}"


def _place(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"in {Path(frame.filename).name}, line {frame.lineno}"
