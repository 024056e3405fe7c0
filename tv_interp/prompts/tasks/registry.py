"""Find a task by name."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache

from ...errors import PromptError, unknown
from .base import PairTask, Task
from .bijection import bijection_tasks
from .categorization import categorization_tasks
from .knowledge import knowledge_tasks
from .lookup import LookUp


@cache
def _tasks() -> dict[str, Task]:
    tasks = [*knowledge_tasks(), *categorization_tasks(), *bijection_tasks(), LookUp()]
    return {task.name: task for task in tasks}


def get_task(name: str | Task) -> Task:
    """Get a shipped task by name; a task object is handed back as it is.

    Raises:
        UnknownName: if there is no such task; the message has the nearest names.
        PromptError: if it is neither a name nor an object with name, family and sample.

    Example:
        >>> get_task("country-capital")
        PairTask('country-capital', family='knowledge', 45 pairs)
    """
    if not isinstance(name, str):
        if not all(hasattr(name, each) for each in ("name", "family", "sample")):
            raise PromptError(
                f"expected a task (name, family, sample) or the name of one, got {name!r}: "
                "make one with Task.from_pairs, or see list_tasks()"
            )
        return name
    if name not in _tasks():
        raise unknown("task", name, _tasks())
    return _tasks()[name]


def list_tasks(family: str | None = None) -> list[str]:
    """List the names of the shipped tasks, of one family or of all.

    Raises:
        UnknownName: if there is no such family.

    Example:
        >>> list_tasks("categorization")
        ['simple-string', 'digit', '2d-data']
    """
    families = {task.family for task in _tasks().values()}
    if family is not None and family not in families:
        raise unknown("family", family, families)
    return [name for name, task in _tasks().items() if family in (None, task.family)]


def unrelated_answers(task: Task) -> tuple[str, ...]:
    """List the answers of all other shipped relations that are no answer of this one.

    Empty for tasks that are no shipped relation (categorization, look-up, user pairs).
    """
    if _tasks().get(task.name) is not task or not isinstance(task, PairTask):
        return ()
    return answers_without(task.answers)


def answers_without(words: Collection[str]) -> tuple[str, ...]:
    """List the answers of all shipped relations that are none of some words."""
    every = (y for task in _tasks().values() if isinstance(task, PairTask) for y in task.answers)
    return tuple(dict.fromkeys(y for y in every if y not in set(words)))
