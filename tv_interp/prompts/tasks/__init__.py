"""Tasks: rules from x to y, as data."""

from .base import PairTask, RuledSample, Sample, Task
from .registry import get_task, list_tasks

__all__ = ["PairTask", "RuledSample", "Sample", "Task", "get_task", "list_tasks"]
