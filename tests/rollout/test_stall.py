"""A replica tells a wait for the learner from an engine that stands still, in status and health."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import rollout_pb2 as pb
from protos import rollout_pb2_grpc as pb_grpc
from services.rollout.app import run_replica
from services.rollout.replica import Replica
from services.rollout.service import SERVICE
from shared.codec import encode_prompt_group
from shared.config import Environment, parse_run
from shared.lease import Registry
from shared.process import ServiceArguments
from shared.redis_stream import Streams
from shared.rpc import PROGRESS, open_channel
from tests.factories import make_prompt
from tests.rollout.simulated import STOP_TOKEN_IDS, SimulatedEngine, Simulation

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
BOUND = 0.4
RUN = f"""
[run]
name = "r"
num_steps = 1
[model]
path = "none"
[watchdog]
stall_seconds = {BOUND}
"""


@dataclass
class Scene:
    """A replica that runs, and what a caller sees of it."""

    engine: SimulatedEngine
    replica: Replica
    channel: Any

    async def serve(self, version: int) -> None:
        """What a publication comes to."""
        self.engine.policy_version = version
        await self.replica.swapped(version)
        await self.replica.judged(version, is_confirmed=True)

    async def status(self) -> pb.GetRolloutStatusResponse:
        stub: pb_grpc.RolloutAsyncStub = pb_grpc.RolloutStub(self.channel)
        return await stub.GetStatus(pb.GetRolloutStatusRequest(), timeout=60.0)

    async def health(self, name: str) -> Any:
        stub: Any = health_pb2_grpc.HealthStub(self.channel)
        request = health_pb2.HealthCheckRequest(service=name)
        return (await stub.Check(request, timeout=60.0)).status

    async def is_stuck(self) -> bool:
        return bool(await self.health(PROGRESS) == NOT_SERVING)

    async def until_it_says(self, pattern: str) -> pb.GetRolloutStatusResponse:
        async def says() -> bool:
            return re.fullmatch(pattern, (await self.status()).activity) is not None

        await until(says)
        return await self.status()


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60.0):
        while not await holds():
            await asyncio.sleep(0.02)


@asynccontextmanager
async def running(
    streams: Streams, simulation: Simulation, *, run: str = RUN
) -> AsyncIterator[Scene]:
    given = ServiceArguments(parse_run(run), Environment.read({}), "r", "rollout-0", resume=False)
    engine, replica, stop = SimulatedEngine(simulation), Replica(), asyncio.Event()
    task = asyncio.create_task(
        run_replica(
            given, stop, engine, streams, replica=replica, stop_token_ids=STOP_TOKEN_IDS,
            metrics_address="",
        )
    )  # fmt: skip
    registry = Registry(streams.client, prefix=streams.prefix)

    async def is_there() -> bool:
        assert not task.done(), task.result()
        return bool(await registry.members("rollout"))

    try:
        await until(is_there)
        (member,) = await registry.members("rollout")
        async with open_channel(member.address) as channel:
            yield Scene(engine, replica, channel)
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await engine.shutdown()


@pytest.mark.integration
async def test_a_replica_without_a_learner_says_so_and_is_well(streams: Streams) -> None:
    async with running(streams, Simulation()) as scene:

        async def is_past_the_bound() -> bool:
            return (await scene.status()).progress_age_seconds > 1.5 * BOUND

        await until(is_past_the_bound)
        status = await scene.status()
        says = r"waits for the learner for \d+ s: stale, has no version yet"
        assert re.fullmatch(says, status.activity)
        assert status.stuck_seconds == 0
        health = [await scene.health(name) for name in ("", SERVICE, PROGRESS)]
        assert health == [SERVING] * 3
        await scene.serve(3)
        await scene.until_it_says(r"waits for prompts for \d+ s")
        await scene.replica.swapped(4)
        await scene.until_it_says(r"waits for the learner for \d+ s: stale, has version 4")


@pytest.mark.integration
async def test_an_engine_that_samples_nothing_is_told_in_status_and_health(
    streams: Streams,
) -> None:
    async with running(streams, Simulation(seconds_per_completion=3600.0)) as scene:
        await scene.serve(0)
        await streams.prompts.put(encode_prompt_group(make_prompt()))
        await until(scene.is_stuck)
        status = await scene.status()
        assert re.fullmatch(r"samples 1 group, the oldest for \d+ s", status.activity)
        assert status.stuck_seconds >= BOUND
        assert [await scene.health(name) for name in ("", SERVICE)] == [SERVING, SERVING]


@pytest.mark.integration
async def test_a_replica_that_waits_for_room_or_for_a_version_is_well(streams: Streams) -> None:
    async with running(streams, Simulation()) as scene:
        await scene.serve(0)
        while await streams.rollouts.put(b"in the way"):
            pass
        await streams.prompts.put(encode_prompt_group(make_prompt()))
        await scene.until_it_says(r"waits for room on `rollouts` for \d+ s")
        for entry in await streams.rollouts.browse():
            await streams.rollouts.acknowledge([entry.id])
        await scene.until_it_says(r"waits for prompts for \d+ s")
        await streams.prompts.put(encode_prompt_group(make_prompt(min_policy_version=5)))
        says = r"waits for the learner for \d+ s: it has not brought version 5"
        assert (await scene.until_it_says(says)).stuck_seconds == 0
        assert not await scene.is_stuck()
