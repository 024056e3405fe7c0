"""Where the jobs of a sweep run: in this process, in a pool, on a Ray cluster, as SLURM jobs.

An engine is a generator: it yields a job and what failed in it once it has ended, or the error that
its worker died of; and None meanwhile, so that progress can be shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, Literal, get_args

from ..errors import TvInterpError
from .cells import Job, run_each, run_job
from .plan import Cell

Engine = Literal["inline", "pool", "ray", "slurm"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
Ended = dict[Cell, str] | BaseException | None
"""What failed in a job, or how its worker died; None while it goes on."""


def _inline(jobs: Sequence[Job], workers: int, options: dict) -> Iterator[tuple[Job, Ended]]:
    for job in jobs:
        for cell, reason in run_each(job):
            yield job, {cell: reason} if reason else None


def _pool(jobs: Sequence[Job], workers: int, options: dict) -> Iterator[tuple[Job, Ended]]:
    import multiprocessing
    from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
    from concurrent.futures.process import BrokenProcessPool

    # a forked torch may hang, so workers are forked from a server that has only imported it: that
    # happens once, and what takes the place of a dead worker starts at once
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(["transformer_lens", "tv_interp.sweep.cells"])
    left, running = list(reversed(jobs)), dict[Future, Job]()
    while left or running:
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            broken = False
            try:
                while (left and not broken) or running:
                    # a worker that dies takes the pool with it: only what runs may be lost
                    while left and not broken and len(running) < workers:
                        job = left.pop()
                        running[pool.submit(run_job, job)] = job
                    ended, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                    yield jobs[0], None
                    for future in ended:
                        job = running.pop(future)
                        try:
                            yield job, future.result()
                        except BrokenProcessPool as error:
                            broken = True
                            yield job, error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _ray(jobs: Sequence[Job], workers: int, options: dict) -> Iterator[tuple[Job, Ended]]:
    ray = _package("ray")
    if not ray.is_initialized():
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    # deaths are counted here, so that the cell that causes them can be told
    remote = ray.remote(**({"num_cpus": 1, "max_retries": 0} | options))(run_job)
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
    running = dict(zip(executor.map_array(run_job, jobs), jobs, strict=True))
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
    try:
        return import_module(name)
    except ImportError as error:
        raise TvInterpError(
            f"engine needs the package {name!r}, which is not installed: "
            "pip install 'tv-interp[cluster]'"
        ) from error


RUNNERS: Mapping[str, Callable[..., Iterator[tuple[Job, Ended]]]] = {
    "inline": _inline,
    "pool": _pool,
    "ray": _ray,
    "slurm": _slurm,
}
