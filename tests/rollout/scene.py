"""A sampler with everything around it, on streams and an engine in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from services.rollout.announced import Announced
from services.rollout.concurrency import Concurrency
from services.rollout.keeper import Keeper
from services.rollout.replica import Replica
from services.rollout.sampler import Sampler
from shared.codec import decode_rollout_group
from shared.memory_partials import MemoryPartials
from shared.memory_stream import MemoryStream
from shared.partials import Partials
from shared.records import RolloutGroup
from tests.rollout.fake_engine import FakeEngine


def stream(name: str) -> MemoryStream:
    return MemoryStream(name=name, capacity=64)


@dataclass
class Scene:
    """One replica. Two of them share the streams and the store.

    Attributes:
        announced: the version that the learner has announced.
        times_asked: how often the replica has asked for it.
    """

    name: str = "rollout-0"

    engine: FakeEngine = field(default_factory=FakeEngine)
    replica: Replica = field(default_factory=Replica)
    prompts: MemoryStream = field(default_factory=lambda: stream("prompts"))
    rollouts: MemoryStream = field(default_factory=lambda: stream("rollouts"))
    dead: MemoryStream = field(default_factory=lambda: stream("dead_letter"))

    partial_tokens: int = 0
    max_staleness: int = 9
    max_concurrent_groups: int = 2
    drain_seconds: float = 30.0
    reclaim_seconds: float = 30.0
    announced: int | None = None
    store: Partials | None = None

    def __post_init__(self) -> None:
        self.times_asked = 0
        self.partials = self.store or MemoryPartials(self.prompts)
        self.sampler = Sampler(
            name=self.name,
            engine=self.engine,
            replica=self.replica,
            announced=Announced(
                self._ask,
                replica=self.replica,
                max_staleness=self.max_staleness,
                patience_seconds=self.reclaim_seconds,
            ),
            prompts=self.prompts,
            rollouts=self.rollouts,
            dead_letter=self.dead,
            stop_token_ids=(9,),
            concurrency=Concurrency(initial=2, maximum=self.max_concurrent_groups),
            keeper=Keeper(
                self.partials,
                consumer=self.name,
                replica=self.replica,
                every_tokens=self.partial_tokens,
                max_staleness=self.max_staleness,
            ),
            max_attempts=3,
            reclaim_seconds=self.reclaim_seconds,
            drain_seconds=self.drain_seconds,
        )

    async def serve(self, version: int = 0) -> None:
        self.engine.policy_version = version
        await self.replica.swapped(version)
        await self.replica.judged(version, is_confirmed=True)

    async def _ask(self) -> int | None:
        self.times_asked += 1
        return self.announced

    async def results(self) -> list[RolloutGroup]:
        return [decode_rollout_group(payload) for payload in await self.rollouts.peek()]


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until the condition holds."""
    async with asyncio.timeout(60.0):
        while not condition():
            await asyncio.sleep(0.001)
