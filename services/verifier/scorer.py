"""The scoring process: loads one task, then scores one completion at a time.

It speaks lines of JSON with the `sandbox` that started it, which are no interface of the project:

    -> {"task": name, "params": {...}, "memory_mib": 2048}     once
    <- {"fault": ""}                                           loaded, or why not
    -> [completion, answer]                                    for each
    <- {"outcome": "pass", "reward": 1.0, "detail": "solved"}

Anything may happen to it in between; the sandbox tells from a closed connection that it died.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

from shared.errors import ConfigError
from shared.tasks.registry import load_task
from shared.tasks.task import Task

OUT_OF_MEMORY_EXIT_CODE = 86
MAX_DETAIL_CHARACTERS = 300

_PR_SET_PDEATHSIG = 1


def main(descriptor: int) -> None:
    """Serve the connection with this file descriptor until it is closed."""
    connection = socket.socket(fileno=descriptor)
    requests = map(json.loads, connection.makefile("rb"))
    try:
        for setting in requests:
            _serve(setting, requests, connection.makefile("wb"))
    except MemoryError:
        # What is left of the heap after this is anybody's guess: start over.
        os._exit(OUT_OF_MEMORY_EXIT_CODE)


def _serve(setting: Any, requests: Iterator[Any], replies: BinaryIO) -> None:
    _die_with_parent()
    _limit(memory_mib=setting["memory_mib"])
    try:
        task = load_task(setting["task"], setting["params"])
    except MemoryError:
        raise
    except Exception as error:
        prefix = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        _reply(replies, {"fault": one_line(f"{prefix}{error}")})
        return
    _reply(replies, {"fault": ""})
    for completion, answer in requests:
        _reply(replies, _score(task, completion, answer))


def _score(task: Task, completion: str, answer: str) -> dict[str, str | float]:
    """The task's verdict, or its error as an outcome of its own."""
    try:
        verdict = task.score(completion, answer=answer)
        reward, outcome = float(verdict.reward), "pass" if verdict.is_pass else "fail"
        if not math.isfinite(reward):
            raise ValueError(f"the scorer gave a reward of {reward}")
        return {"outcome": outcome, "reward": reward, "detail": one_line(verdict.detail)}
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:
        detail = one_line(f"{type(error).__name__}: {error}")
        return {"outcome": "error", "reward": 0.0, "detail": detail}


def one_line(text: str) -> str:
    """`text` as one line of bounded length."""
    return " ".join(text[: 2 * MAX_DETAIL_CHARACTERS].split())[:MAX_DETAIL_CHARACTERS]


def _reply(replies: BinaryIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message).encode() + b"\n")
    replies.flush()


def _die_with_parent() -> None:
    """Have the kernel kill this process when the verifier dies, however it dies (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit(*, memory_mib: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib * 2**20, memory_mib * 2**20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
