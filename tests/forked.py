"""Processes for tests, forked from one that has imported what they need: a server, by worker.

Importing torch, DeepSpeed and gRPC takes a processor five seconds; a fork of who has them, none.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

FORKED: ForkServerContext = multiprocessing.get_context("forkserver")
"""Python has one such server a process, which imports for all when the first asks for a fork."""

FORKED.set_forkserver_preload(
    [
        "deepspeed",
        "services.learner.app",
        "tests.bench.scale_learner",
        "tests.integration.recorded_run",
        "tests.integration.test_learner_engine",
        "tests.rollout.simulated",
    ]
)


def start_server() -> None:
    """Have it import the above, whatever somebody else of this process tells it later."""
    forkserver.ensure_running()


class Forked:
    """A process that does some work; what it prints is in a file, so that it waits for no reader.

    Args:
        printed: the file.
        work: a function of a module, which is called with what is given; its end is the process's.
    """

    def __init__(self, printed: Path, work: Callable[..., object], *given: object) -> None:
        self._printed = printed
        printed.touch()
        self._process = FORKED.Process(target=_work, args=(printed, work, given), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    @property
    def printed(self) -> str:
        return self._printed.read_text("utf8", "replace")

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def ended(self, *, seconds: float) -> int:
        """Its exit status, once it has one; fails if that takes longer."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, self.printed
        return self._process.exitcode

    def close(self) -> None:
        """It is no more, in whatever state it was."""
        self._process.kill()
        self._process.join(10.0)


def redirect_output(path: Path) -> None:
    """What this process prints from now on goes to the end of this file."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.close(log)


def _work(printed: Path, work: Callable[..., object], given: Sequence[object]) -> None:
    redirect_output(printed)
    work(*given)
