"""The ranks of a learner as processes, that a test waits for; they meet at a port of their own."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.forked import Forked

ADAPTER_PACKAGES = Path(sys.prefix) / "lora"
"""Where deploy/setup.sh puts peft, apart from what every process may import."""

JOB_SECONDS = 240.0

Job = Callable[[str, Path, Path], None]


class RankProcesses:
    """Starts ranks, forked from a process that has imported DeepSpeed; ends what still runs.

    Args:
        work: what each rank does: a job by its name, in a folder, with a model.
    """

    def __init__(self, work: Job) -> None:
        self._work = work
        self._started: list[Forked] = []

    def start(self, job: str, folder: Path, model: Path, *, num_ranks: int) -> list[Forked]:
        place = {"WORLD_SIZE": str(num_ranks), "MASTER_PORT": str(free_port())}
        ranks = []
        for rank in range(num_ranks):
            given = (self._work, {**place, "RANK": str(rank)}, job, folder, model)
            ranks.append(Forked(folder / f"printed-{job}-{rank}", _be_a_rank, *given))
        self._started += ranks
        return ranks

    def run(self, job: str, folder: Path, model: Path, *, num_ranks: int) -> None:
        """Start them, and wait until all are done; fails unless all are well."""
        for rank in self.start(job, folder, model, num_ranks=num_ranks):
            assert rank.ended(seconds=JOB_SECONDS) == 0, rank.printed

    def close(self) -> None:
        """Nobody is left."""
        for rank in self._started:
            rank.close()


@contextmanager
def ranks_of(work: Job) -> Iterator[RankProcesses]:
    """Ranks that end with the context."""
    processes = RankProcesses(work)
    try:
        yield processes
    finally:
        processes.close()


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def _be_a_rank(
    work: Job, environment: Mapping[str, str], job: str, folder: Path, model: Path
) -> None:
    os.environ.update(environment)
    sys.path.append(str(ADAPTER_PACKAGES))
    work(job, folder, model)
