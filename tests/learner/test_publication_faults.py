"""A replica's process is killed or stopped at each point of a publication; the others serve.

Real processes with the real code of the rollout service around an engine in memory, real signals,
real gloo, real gRPC, a real Redis.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Literal

import pytest

from shared.metrics.weights import WEIGHT_SYNC_OPERATIONS
from shared.redis_stream import open_streams
from shared.stream import Bounds
from tests.learner.publishing import (
    LearnerSide,
    SmallModel,
    learner_side,
    replica_arguments,
    until,
    wait_for_lease,
)
from tests.rollout.crew import Crew, crew_of_replicas
from tests.rollout.simulated import ACTIONS, POINTS, Fault, Simulation

pytestmark = pytest.mark.integration

TIMEOUT_SECONDS = 10.0
HASTY_SECONDS = 3.0
"""Where deadlines must pass before it goes on; those who live must meet them on a busy machine."""

REPUBLISH_SECONDS = 60.0
BOUND_SECONDS = 90.0
"""Of a publication with one bad member: both rounds with every deadline in them."""

PARAMETER_SIZE = 2 << 20
"""In elements: what no socket takes in while its reader stands still."""

Layout = Literal["pairs", "one"]

LAYOUTS: tuple[Layout, ...] = ("pairs", "one")
WAITED_FOR = {Fault("kill", "bucket"), *(Fault("stop", point) for point in POINTS)}
FAULTS = [Fault(action, point) for action, point in itertools.product(ACTIONS, POINTS)]


@pytest.fixture
def crew() -> Iterator[Crew]:
    with crew_of_replicas() as started:
        yield started


@asynccontextmanager
async def learner_of_a_run(
    redis_url: str, run_id: str, layout: Layout, fault: Fault
) -> AsyncIterator[LearnerSide]:
    bounds = Bounds(8, 1000)
    async with open_streams(
        redis_url, run_id=run_id, prompts=bounds, groups=bounds, timeout_seconds=60.0
    ) as streams:
        made = learner_side(
            streams,
            layout=layout,
            model=SmallModel(*[PARAMETER_SIZE] * 3),
            timeout_seconds=HASTY_SECONDS if fault in WAITED_FOR else TIMEOUT_SECONDS,
            republish_seconds=REPUBLISH_SECONDS,
            bucket_bytes=4 * PARAMETER_SIZE,
        )
        yield made
        await made.close()


def failed_refits() -> float:
    return float(
        sum(
            WEIGHT_SYNC_OPERATIONS.labels(result=result)._value.get()
            for result in ("error", "timeout")
        )
    )


async def publish_with_a_bad_member(
    crew: Crew, redis_url: str, layout: Layout, fault: Fault
) -> None:
    run_id = f"faults-{secrets.token_hex(4)}"
    good, bad = (f"good-0-{layout}", f"good-1-{layout}"), f"bad-{layout}"
    async with learner_of_a_run(redis_url, run_id, layout, fault) as learner:
        for name in (*good, bad):
            simulation = Simulation(fault=fault if name == bad else None)
            crew.start(replica_arguments(name, run_id=run_id, redis_url=redis_url), simulation)
        for name in (*good, bad):
            await wait_for_lease(learner.registry, name)

        publication = await asyncio.wait_for(learner.publisher.publish(7), BOUND_SECONDS)
        assert (publication.served, publication.failed) == (good, (bad,))
        assert publication.retries
        assert learner.serving == {**dict.fromkeys(good, 7), bad: None}
        assert await learner.registry.announced_version() == 7

        if fault.action == "stop":
            crew.signal(bad, signal.SIGCONT)
            async with learner.catching_up():
                await until(lambda: learner.serving[bad] == 7)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.action}-{fault.point}")
async def test_a_member_that_dies_or_stalls_is_named_and_left_behind_and_the_rest_serves(
    crew: Crew, redis_url: str, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    before = failed_refits()
    async with asyncio.TaskGroup() as both:
        for layout in LAYOUTS:
            both.create_task(publish_with_a_bad_member(crew, redis_url, layout, fault))
    messages = [record.message for record in caplog.records]
    for layout in LAYOUTS:
        assert any(message.startswith(f"left bad-{layout} behind") for message in messages)
    # Nobody else is blamed, also where what one member does breaks the transfer of all.
    assert not [message for message in messages if message.startswith("left good")]
    assert failed_refits() - before >= len(LAYOUTS)
