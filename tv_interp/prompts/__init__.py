"""Prompts in which every token knows its role."""

from .build import Contrast, Prompts, check_contrast, check_prompts, make_prompts
from .roles import Role
from .tasks import Sample, Task, get_task, list_tasks

__all__ = [
    "Contrast",
    "Prompts",
    "Role",
    "Sample",
    "Task",
    "check_contrast",
    "check_prompts",
    "get_task",
    "list_tasks",
    "make_prompts",
]
