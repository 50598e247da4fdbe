"""The processes of the scale benchmark that are not the learner: replicas and a verifier.

Many replicas share a process and its event loop, as a cluster's never do; each has its own
connections to Redis, its own gRPC server and its own threads.
"""

from __future__ import annotations

import asyncio
import os
from array import array
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from services.verifier.worker import Worker
from shared.config import Environment, RunConfig, parse_run
from shared.lease import Registry
from shared.process import ServiceArguments, end_with_parent
from shared.records import Outcome, Score
from shared.redis_stream import Streams, open_streams
from shared.stage import adopting_orphans
from tests.rollout.simulated import Simulation, run_simulated

RUN_ID = "scale"
GROUP_SIZE = 8
PROMPT_TOKENS = 64
GROUPS_PER_BATCH = 32
MAX_STALENESS = 3
ANSWER_SECONDS = 120.0
"""For Redis, and for whoever is started, on a machine that does other things too."""

RUN = """
[run]
name = "scale"
num_steps = {num_steps}
[model]
path = "none"
max_length = {max_length}
[rollout]
group_size = {group_size}
max_completion_tokens = {tokens}
max_concurrent_groups = 4
[learner]
groups_per_batch = {groups_per_batch}
max_staleness = {max_staleness}
[evaluation]
every_steps = 0
[network]
call_timeout_seconds = {seconds}
"""


@dataclass(frozen=True, slots=True)
class Place:
    """Where everybody meets; `tokens` a completion has."""

    redis_url: str
    tokens: int

    @property
    def config(self) -> RunConfig:
        """The defaults, but for the sizes of groups and batches."""
        text = RUN.format(
            num_steps=1_000_000,
            max_length=PROMPT_TOKENS + self.tokens + 1,
            group_size=GROUP_SIZE,
            tokens=self.tokens,
            groups_per_batch=GROUPS_PER_BATCH,
            max_staleness=MAX_STALENESS,
            seconds=ANSWER_SECONDS,
        )
        return parse_run(text)

    def streams(self) -> AbstractAsyncContextManager[Streams]:
        """A connection pool of one's own."""
        redis = self.config.redis
        return open_streams(
            self.redis_url,
            run_id=RUN_ID,
            prompts=redis.prompt_bounds,
            groups=redis.group_bounds,
            timeout_seconds=ANSWER_SECONDS,
        )


class NumberTokenizer:
    """No text: prompts of one length, completions of numbers."""

    def encode_prompt(self, text: str) -> array[int]:
        return array("I", range(1, 1 + PROMPT_TOKENS))

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(sum(token_ids))


class ParityPool:
    """Judges at once, in this process: even sums pass."""

    def __init__(self, task: str) -> None:
        self.task = SimpleNamespace(name=task)

    async def score(self, text: str, *, answer: str) -> Score:
        is_even = int(text) % 2 == 0
        return Score(Outcome.PASS if is_even else Outcome.FAIL, float(is_even), "")


def run_replicas(place: Place, simulation: Simulation, orders: Connection) -> None:
    """A process of replicas: names come in lists, each is a replica to start; None ends it."""
    end_with_parent()
    asyncio.run(_run_replicas(place, simulation, orders))


async def _run_replicas(place: Place, simulation: Simulation, orders: Connection) -> None:
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as replicas:
        while (names := await asyncio.to_thread(orders.recv)) is not None:
            for name in names:
                replicas.create_task(_run_replica(place, simulation, name, stop))
        stop.set()


async def _run_replica(
    place: Place, simulation: Simulation, name: str, stop: asyncio.Event
) -> None:
    """With connections of its own: there are as many as in a cluster, and no more in a pool."""
    environment = Environment.read({"REDIS_URL": place.redis_url})
    given = ServiceArguments(place.config, environment, RUN_ID, name, resume=False)
    async with place.streams() as streams:
        await run_simulated(given, stop, streams, simulation)


def run_verifier(place: Place) -> None:
    """A process that is the verifier, with the service's worker and a scorer that costs nothing."""
    end_with_parent()
    asyncio.run(_run_verifier(place))


async def _run_verifier(place: Place) -> None:
    config = place.config
    pool: Any = ParityPool(config.task.name)
    tokenizer: Any = NumberTokenizer()
    async with place.streams() as streams:
        worker = Worker(
            name="verifier-0",
            pool=pool,
            tokenizer=tokenizer,
            rollouts=streams.rollouts,
            scored=streams.scored,
            dead_letter=streams.dead_letter,
            max_concurrent_groups=config.verifier.max_concurrent_groups,
            max_attempts=config.redis.max_attempts,
        )
        registry = Registry(streams.client, prefix=streams.prefix)
        async with (
            registry.hold(
                "verifier",
                "verifier-0",
                address="127.0.0.1:0",
                metrics_address="127.0.0.1:0",
                seconds=config.network.lease_seconds,
            ),
            adopting_orphans(
                worker.adopt, registry, "verifier", idle_seconds=config.redis.reclaim_seconds
            ),
        ):
            await worker.run(asyncio.Event())


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has used so far, and holds now; Linux."""

    cpu_seconds: float
    mebibytes: float
    peak_mebibytes: float
    num_threads: int
    num_files: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        """Read from /proc."""
        folder = Path("/proc") / str(pid)
        status = dict(
            line.split(":", 1) for line in (folder / "status").read_text("utf8").splitlines()
        )
        times = (folder / "stat").read_text("utf8").rpartition(")")[2].split()[11:13]
        return cls(
            cpu_seconds=sum(map(int, times)) / os.sysconf("SC_CLK_TCK"),
            mebibytes=int(status["VmRSS"].split()[0]) / 1024,
            peak_mebibytes=int(status["VmHWM"].split()[0]) / 1024,
            num_threads=int(status["Threads"]),
            num_files=sum(1 for _ in (folder / "fd").iterdir()),
        )
