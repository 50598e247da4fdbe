"""The learner's control plane of the scale benchmark, and what is measured of it; see `scale`.

Publisher, fleet, catch-up, feeder, inbox and ledger are the service's; the model is a list of
tensors, and a step takes no time. What is measured comes in this order:

    first publication   to replicas that are in no group yet
    publications        again and again, while nothing is sampled
    idle                nothing at all: leases, polls, the looks of catch-up
    newcomers           replicas that come one by one, brought up by a stream
    flow                groups through all streams, with no publication between
    training            batch, publication, batch, ... and at last all that is still out
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from services.learner.evaluation import Evaluator
from services.learner.feeder import Feeder
from services.learner.inbox import Inbox, group_staleness
from services.learner.ledger import Ledger
from services.learner.publisher import Publication
from shared.process import end_with_parent
from shared.redis_stream import Streams
from shared.tasks.task import Problem
from tests.bench.scale_crew import (
    ANSWER_SECONDS,
    GROUPS_PER_BATCH,
    MAX_STALENESS,
    RUN_ID,
    NumberTokenizer,
    Place,
    Usage,
)
from tests.bench.scale_point import (
    Case,
    Effort,
    Meter,
    Pids,
    Point,
)
from tests.learner.publishing import LearnerSide, SmallModel, learner_side

NUM_PROBLEMS = 1000
BATCHES_PER_CHECKPOINT = 4
BUCKET_BYTES = 16 << 20
POLLS = 20


def run_learner(
    place: Place,
    case: Case,
    effort: Effort,
    pids: Pids,
    orders: Sequence[Connection],
    answer: Connection,
) -> None:
    """A process that is the learner; sends the Point."""
    end_with_parent()
    torch.set_num_threads(1)
    answer.send(asyncio.run(_measure(place, case, effort, pids, orders)))


async def _measure(
    place: Place, case: Case, effort: Effort, pids: Pids, orders: Sequence[Connection]
) -> Point:
    async with place.streams() as streams:
        learner = learner_side(
            streams,
            layout=case.layout,
            model=SmallModel(*[(1 << 20) // 4] * case.mebibytes),
            timeout_seconds=ANSWER_SECONDS,
            republish_seconds=ANSWER_SECONDS,
            bucket_bytes=BUCKET_BYTES,
        )
        try:
            async with learner.catching_up():
                bench = Bench(place, case, effort, pids, orders, streams, learner)
                return await bench.run()
        finally:
            await learner.close()


class Bench:
    """One learner, and what it is put through."""

    def __init__(
        self,
        place: Place,
        case: Case,
        effort: Effort,
        pids: Pids,
        orders: Sequence[Connection],
        streams: Streams,
        learner: LearnerSide,
    ) -> None:
        self.point = Point(case)
        self._case, self._effort, self._pids, self._orders = case, effort, pids, orders
        self._streams, self._learner = streams, learner
        self._version = 0
        self._meter = Meter(pids)
        config = place.config
        problems = [Problem(str(index), "") for index in range(NUM_PROBLEMS)]
        tokenizer: Any = NumberTokenizer()
        self._ledger = Ledger(run_id=RUN_ID, num_problems=NUM_PROBLEMS, seed=1)
        self._feeder = Feeder(
            config=config,
            ledger=self._ledger,
            prompts=streams.prompts,
            problems=problems,
            tokenizer=tokenizer,
        )
        evaluator = Evaluator(
            config=config,
            run_id=RUN_ID,
            prompts=streams.prompts,
            problems=problems,
            tokenizer=tokenizer,
        )
        self._inbox = Inbox(
            scored=streams.scored,
            dead_letter=streams.dead_letter,
            ledger=self._ledger,
            feeder=self._feeder,
            evaluator=evaluator,
            on_evaluated=lambda metrics: None,
            vocabulary=1 << 31,  # there is no model
            max_length=config.model.max_length,
            max_staleness=MAX_STALENESS,
            max_attempts=config.redis.max_attempts,
            replace_degenerate=False,
            max_degenerate_batches=1,
        )

    async def run(self) -> Point:
        """All of it, in the order that this module's docstring gives."""
        point = self.point
        point.load_average = os.getloadavg()[0]
        await self._gather_replicas()
        started = time.monotonic()
        await self._publish()
        point.first_publish_seconds = time.monotonic() - started
        await self._measure_publications()
        await self._measure_idle()
        for number in range(self._effort.newcomers):
            point.catch_up_seconds.append(await self._bring_up(f"newcomer-{number}"))
        await self._measure_flow()
        await self._measure_training()
        await self._take_the_rest()
        await self._measure_memory()
        point.load_average = max(point.load_average, os.getloadavg()[0])
        point.dropped = dict(self._inbox.dropped)
        return point

    async def _gather_replicas(self) -> None:
        names = [f"replica-{number:04d}" for number in range(self._case.replicas)]
        for index, orders in enumerate(self._orders):
            orders.send(names[index :: len(self._orders)])

        async def all_there() -> bool:
            return len(await self._learner.registry.members("rollout")) == len(names)

        await until(all_there, poll_seconds=0.2)

    async def _publish(self) -> Publication:
        publication = await self._learner.publisher.publish(self._version)
        self.point.failed_refits += len(publication.failed)
        return publication

    async def _measure_publications(self) -> None:
        done: list[Publication] = []
        self._meter.read()
        for _ in range(self._effort.publications):
            self._learner.model.train()
            self._version += 1
            done.append(await self._publish())
        spent = self._meter.read()
        self.point.publish_seconds = [each.seconds for each in done]
        self.point.publish_cpu = {part: cpu / len(done) for part, cpu in spent.items()}
        parts = {
            "begin": [_begin_seconds(each) for each in done],
            "gather": [each.gather_seconds for each in done],
            "broadcast": [each.broadcast_seconds for each in done],
            "load": [each.load_seconds for each in done],
        }
        self.point.publish_parts = {name: statistics.median(each) for name, each in parts.items()}

    async def _measure_idle(self) -> None:
        self._meter.read()
        started = time.monotonic()
        await asyncio.sleep(self._effort.idle_seconds)
        seconds, spent = time.monotonic() - started, self._meter.read()
        self.point.idle_cpu = {part: cpu / seconds for part, cpu in spent.items()}
        self.point.members_ms = await median_ms(self._learner.registry.members)

    async def _bring_up(self, name: str) -> float:
        """Seconds from a newcomer's lease to the learner's knowing that it serves."""
        registry, publisher = self._learner.registry, self._learner.publisher
        self._orders[0].send([name])

        async def is_there() -> bool:
            return name in {member.name for member in await registry.members("rollout")}

        async def serves() -> bool:
            return publisher.versions.get(name) == self._version

        await until(is_there)
        started = time.monotonic()
        await until(serves)
        return time.monotonic() - started

    async def _measure_flow(self) -> None:
        await self._train_a_batch()  # the streams fill
        self._meter.read()
        started, before = time.monotonic(), self.point.num_trained
        while time.monotonic() - started < self._effort.flow_seconds:
            await self._train_a_batch()
        spent, seconds = self._meter.read(), time.monotonic() - started
        count = self.point.num_trained - before
        self.point.groups_per_second = count / seconds
        self.point.group_cpu_ms = {part: 1000 * cpu / count for part, cpu in spent.items()}
        self.point.holders_ms = await median_ms(self._streams.prompts.holders)

    async def _measure_training(self) -> None:
        started, before = time.monotonic(), self.point.num_trained
        for _ in range(self._effort.training_batches):
            await self._train_a_batch()
            self._version += 1
            self._learner.model.train()
            await self._publish()
        count = self.point.num_trained - before
        self.point.training_groups_per_second = count / (time.monotonic() - started)

    async def _train_a_batch(self) -> None:
        await self._feeder.fill(policy_version=self._version)
        await self._take(GROUPS_PER_BATCH)
        if self.point.num_trained % (BATCHES_PER_CHECKPOINT * GROUPS_PER_BATCH) == 0:
            await self._inbox.acknowledge()

    async def _take_the_rest(self) -> None:
        """Whatever is out comes in, or is lost."""
        try:
            while self._ledger.num_outstanding:
                await self._take(min(GROUPS_PER_BATCH, self._ledger.num_outstanding))
        except TimeoutError:
            self.point.num_lost = self._ledger.num_outstanding
        await self._inbox.acknowledge()

    async def _take(self, count: int) -> None:
        async with asyncio.timeout(ANSWER_SECONDS):
            batch = await self._inbox.take_batch(
                count, policy_version=self._version, while_waiting=_wait
            )
        for group in batch:
            staleness = group_staleness(group, self._version)
            self.point.most_staleness = max(self.point.most_staleness, staleness)
            self.point.num_violations += staleness > MAX_STALENESS
            self._ledger.finish(self._ledger.position(group.rollout.prompt.uid))
        self.point.num_trained += len(batch)

    async def _measure_memory(self) -> None:
        redis = await self._streams.client.info()
        learner, pids = Usage.of(os.getpid()), self._pids
        self.point.memory = {
            "learner_mib": learner.mebibytes,
            "learner_peak_mib": learner.peak_mebibytes,
            "learner_threads": learner.num_threads,
            "learner_files": learner.num_files,
            "redis_mib": Usage.of(pids.redis).mebibytes,
            "redis_streams_mib": redis["used_memory_peak"] / 2**20,
            "redis_clients": redis["connected_clients"],
            "replicas_mib": sum(Usage.of(pid).mebibytes for pid in pids.replicas),
            "replicas_threads": sum(Usage.of(pid).num_threads for pid in pids.replicas),
        }


def _begin_seconds(publication: Publication) -> float:
    rest = publication.gather_seconds + publication.broadcast_seconds + publication.load_seconds
    return publication.seconds - rest


async def until(condition: Callable[[], Awaitable[bool]], *, poll_seconds: float = 0.02) -> None:
    """Wait until the condition holds.

    Raises:
        TimeoutError: it does not for ANSWER_SECONDS.
    """
    async with asyncio.timeout(ANSWER_SECONDS):
        while not await condition():
            await asyncio.sleep(poll_seconds)


async def median_ms(ask: Callable[[], Awaitable[object]]) -> float:
    """Milliseconds by the clock of one answer."""
    seconds = []
    for _ in range(POLLS):
        started = time.perf_counter()
        await ask()
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)


async def _wait(num_missing: int) -> None:
    """Nothing else is to be done while no group comes."""
