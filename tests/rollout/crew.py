"""Rollout replicas as processes of their own, simulated, that a test may kill and stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

from shared.process import ServiceArguments
from tests.forked import FORKED
from tests.rollout.simulated import Simulation, run_process


class Crew:
    """Starts replicas; all are forked from one process that has imported what they need."""

    def __init__(self) -> None:
        self._processes: dict[str, BaseProcess] = {}

    def start(self, given: ServiceArguments, simulation: Simulation) -> None:
        """A replica under the name that it is given."""
        process = FORKED.Process(target=run_process, args=(given, simulation), daemon=True)
        process.start()
        self._processes[given.name] = process

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send it a signal."""
        pid = self._processes[name].pid
        assert pid is not None
        os.kill(pid, number)

    def end(self) -> None:
        """Nobody is left, in whatever state."""
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.join(10.0)


@contextmanager
def crew_of_replicas() -> Iterator[Crew]:
    """A crew that ends with the context."""
    crew = Crew()
    try:
        yield crew
    finally:
        crew.end()
