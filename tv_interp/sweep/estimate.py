"""What a sweep will cost, before it runs: two short runs and the cost laws.

Work is counted in operations, of B prompts of S tokens in a model of L layers of H heads and width
D. A token in a layer takes 24 D^2 + 4 D S. A sweep over heads computes, besides the plain runs:

* readers and knock-outs: one token in every layer from the head's on, H L(L+1)/2;
* local paths: the same for the n answers and the last token;
* writers: the n answers in the head's layer, and all tokens from the first answer on in those
  above.

Two runs on few prompts say how many seconds that takes, and how many any call takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from .cells import measure_cell
from .plan import Cell, Plan
from .run import _check, _load

if TYPE_CHECKING:
    import pandas as pd

    from ..prompts import Prompts, Task

FEW, MORE = 4, 16
"""Prompts of the two short runs."""


def estimate_sweep(
    plan: Plan,
    *,
    tasks: Sequence[Task] = (),
    load: Callable[[Cell], Any] | None = None,
) -> pd.DataFrame:
    """Predict time and memory of each cell, from short runs of each model and measure.

    Meant to be right within a factor of 2 on a machine that does nothing else.

    Args:
        plan: What would run.
        tasks: As for `run_sweep`.
        load: As for `run_sweep`.

    Returns:
        A row for each cell, by its key: the fields of `Cell`, ``seconds`` of this process's CPU
        time, and ``bytes`` at the peak, beside the model's weights.

    Raises:
        TvInterpError: if a cell cannot run.
    """
    import pandas as pd

    own = {task.name: task for task in tasks}
    for cell in plan.cells:
        _check(cell, own)
    rows, model, at = {}, None, None
    fits: dict[tuple[str, str], tuple[float, float]] = {}
    for cell in plan.cells:
        if at != (cell.model, cell.backend):
            model, at, fits = (load or _load)(cell), (cell.model, cell.backend), {}
        task = own.get(cell.task, cell.task)
        kind = (cell.measure, cell.metric)
        if kind not in fits:
            fits[kind] = _calibrate(model, cell, task)
        fixed, each = fits[kind]
        operations, memory = _laws(model, cell, task)
        seconds = fixed + each * operations
        rows[cell.key] = asdict(cell) | {"seconds": seconds, "bytes": memory}
    return pd.DataFrame.from_dict(rows, orient="index")


def _calibrate(model: Any, cell: Cell, task: Task | str) -> tuple[float, float]:
    """Measure a cell on few prompts: seconds of any call, and for each operation."""
    points = []
    for n in (FEW, FEW, MORE):  # the first run of a process is slower
        small = replace(cell, n_prompts=min(n, max(cell.n_prompts, FEW)))
        operations, _ = _laws(model, small, task)
        started = time.process_time()
        measure_cell(model, small, task)
        points.append((operations, time.process_time() - started))
    (few, fast), (more, slow) = points[1:]
    if more <= few or slow <= fast:
        return 0.0, slow / more
    each = (slow - fast) / (more - few)
    fixed = max(0.0, fast - each * few)
    return fixed, (slow - fixed) / more


def _laws(model: Any, cell: Cell, task: Task | str) -> tuple[float, float]:
    """Operations and bytes of a cell; its prompts are made for their length alone."""
    import tv_interp as tv

    from ..interventions.recording import MAX_SHARE, call_bytes, tape_bytes
    from ..models.adapter import Adapter

    adapter = Adapter.of(model)
    few = tv.make_prompts(
        model, task, n_demos=cell.n_demos, n_prompts=min(cell.n_prompts, FEW), seed=cell.seed,
        template=cell.template,
    )  # fmt: skip
    n_pos = int(few.lengths.max())
    operations = _tokens(adapter, few, cell.measure) * (
        24 * adapter.d_model**2 + 4 * adapter.d_model * n_pos
    )
    n_runs = 1 if cell.measure in ("knock-outs", "vectors") else 2
    tapes = n_runs * min(cell.n_prompts * tape_bytes(adapter, n_pos), MAX_SHARE)
    step = min(cell.n_prompts * call_bytes(adapter, n_pos, n_pos), MAX_SHARE)
    return cell.n_prompts * operations, tapes + step


def _tokens(adapter: Any, prompts: Prompts, measure: str) -> float:
    """Tokens times layers that one prompt takes."""
    n_pos, n_demos = int(prompts.lengths.max()), prompts.n_demos
    n_layers, n_heads = adapter.n_layers, adapter.n_heads
    plain = n_pos * n_layers
    one = n_layers * (n_layers + 1) / 2
    above = n_layers * (n_layers - 1) / 2
    behind = n_pos - int(prompts.positions("answer").min())
    if measure == "readers":
        return 2 * plain + n_heads * one
    if measure == "knock-outs":
        return plain + n_heads * one
    if measure == "local-paths":
        return 2 * plain + n_heads * (n_demos + 1) * one
    writes = n_demos * n_layers + behind * above
    return 2 * plain + n_heads * writes if measure == "writers" else 4 * plain + writes
