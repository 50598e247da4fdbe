"""Tasks: where prompts come from, and how a completion is scored.

A task is one file here, or a `package.module:Class` of your own that satisfies `Task`.
"""

from shared.tasks.registry import BUILT_IN_TASKS, load_task
from shared.tasks.task import DemonstratedTask, Problem, Split, Task, Verdict

__all__ = [
    "BUILT_IN_TASKS",
    "DemonstratedTask",
    "Problem",
    "Split",
    "Task",
    "Verdict",
    "load_task",
]
