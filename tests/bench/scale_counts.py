"""What grows with the number of replicas, measured without them: their leases and their holdings.

A lease is a key and a holder a consumer with a pending entry: Redis and its clients cannot tell
these from those of living replicas, so here there can be 10,000 of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import NamedTuple

from shared.lease import Registry
from shared.redis_stream import Streams, open_streams
from shared.stream import Bounds
from tests.bench.scale_crew import ANSWER_SECONDS, RUN_ID, Usage
from tests.bench.scale_learner import POLLS, median_ms

LEASE_SECONDS = 3600.0
AT_ONCE = 32


class Count(NamedTuple):
    """One look at so many: milliseconds by the clock, of CPU here, and of CPU in Redis."""

    number: int
    members_ms: float
    members_cpu_ms: float
    members_redis_ms: float
    holders_ms: float
    holders_cpu_ms: float
    holders_redis_ms: float
    depth_ms: float
    depth_cpu_ms: float
    depth_redis_ms: float


async def measure_counts(url: str, redis_pid: int, counts: Sequence[int]) -> list[Count]:
    """One row for each of `counts`, which rise."""
    rows: list[Count] = []
    bounds = Bounds(max(counts) + 1, 1 << 30)
    async with (
        open_streams(
            url, run_id=RUN_ID, prompts=bounds, groups=bounds, timeout_seconds=ANSWER_SECONDS
        ) as streams,
        AsyncExitStack() as leases,
    ):
        registry = Registry(streams.client, prefix=streams.prefix)
        there = 0
        for count in counts:
            for start in range(there, count, AT_ONCE):
                numbers = range(start, min(count, start + AT_ONCE))
                await asyncio.gather(*(_join(streams, registry, leases, each) for each in numbers))
            there = count
            looks = (registry.members, streams.prompts.holders, streams.prompts.depth)
            costs = [each for look in looks for each in await _cost(look, redis_pid)]
            rows.append(Count(count, *costs))
    return rows


async def _join(streams: Streams, registry: Registry, leases: AsyncExitStack, number: int) -> None:
    """One more replica, as far as Redis knows: it holds a lease and one prompt."""
    name = f"replica-{number:05d}"
    await leases.enter_async_context(
        registry.hold(
            "rollout",
            name,
            address="10.0.0.1:50051",
            metrics_address="10.0.0.1:9090",
            seconds=LEASE_SECONDS,
        )
    )
    assert await streams.prompts.put(b"")
    assert await streams.prompts.claim(name, count=1, wait_seconds=ANSWER_SECONDS)


async def _cost(
    look: Callable[[], Awaitable[object]], redis_pid: int
) -> tuple[float, float, float]:
    """Milliseconds of one look: by the clock, of CPU here, of CPU in Redis."""
    here, redis = time.process_time(), Usage.of(redis_pid).cpu_seconds
    clock_ms = await median_ms(look)
    here, redis = time.process_time() - here, Usage.of(redis_pid).cpu_seconds - redis
    return clock_ms, 1000 * here / POLLS, 1000 * redis / POLLS
