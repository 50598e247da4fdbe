"""Tasks by name; a task's module is imported only when that task is asked for."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import cast

from shared.errors import ConfigError
from shared.tasks.task import Task

BUILT_IN_TASKS = {
    "countdown": "shared.tasks.countdown:Countdown",
    "math": "shared.tasks.math:MathTask",
    "reasoning_gym": "shared.tasks.reasoning_gym:ReasoningGymTask",
}


def load_task(name: str, params: Mapping[str, str | int | float | bool]) -> Task:
    """The task called `name`, or the plug-in at `package.module:Class`, made with `params`.

    Raises:
        ConfigError: no such task, its module cannot be imported, or it refuses `params`.
    """
    factory = _find(name)
    try:
        inspect.signature(factory).bind(**params)
        return factory(**params)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"task.params = {dict(params)!r}: {_first_line(error)}; {name} takes"
            f" {inspect.signature(factory, eval_str=True)}"
        ) from None


def _find(name: str) -> Callable[..., Task]:
    module_name, _, class_name = BUILT_IN_TASKS.get(name, name).partition(":")
    if not module_name or not class_name:
        known = ", ".join([*BUILT_IN_TASKS, "or package.module:Class"])
        raise ConfigError(f"task.name = {name!r}: no such task; known: {known}")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"task.name = {name!r}: cannot be imported ({_first_line(error)}); install it, or"
            " put its folder on PYTHONPATH"
        ) from None
    return cast(Callable[..., Task], found)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
