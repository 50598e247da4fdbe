"""The learner says whom it waits for: real streams, leases and gRPC."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import REGISTRY, CollectorRegistry

from protos import learner_pb2 as pb
from protos import learner_pb2_grpc as pb_grpc
from services.learner.progress import Progress
from services.learner.publisher import Publisher
from services.learner.service import SERVICE, LearnerServicer
from services.learner.watchdog import Watchdog
from shared.lease import Registry
from shared.metrics.learner import LEARNER_STALLED, watch_steps
from shared.redis_server import embedded_redis
from shared.redis_stream import Streams, open_streams
from shared.rpc import PROGRESS, open_channel, serve
from shared.stream import Bounds

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def watchdog_of(streams: Streams, progress: Progress, *, stall_seconds: float = 300.0) -> Watchdog:
    replicas = {"rollout-0": 7, "rollout-1": None}
    publisher = cast(Publisher, SimpleNamespace(versions=replicas, unanswered={}))
    return Watchdog(
        progress=progress,
        streams=streams,
        registry=Registry(streams.client, prefix=streams.prefix),
        publisher=publisher,
        stall_seconds=stall_seconds,
    )


@asynccontextmanager
async def there(streams: Streams, role: Any, name: str) -> AsyncIterator[None]:
    registry = Registry(streams.client, prefix=streams.prefix)
    async with registry.hold(role, name, address="", metrics_address="", seconds=30.0):
        yield


async def said(streams: Streams, *, missing: int = 3, policy_version: int = 9) -> str:
    """The sentence; how long it took until now is left aside."""
    progress = Progress(step=40, policy_version=policy_version)
    with progress.awaiting("batch 41", 8):
        progress.still_awaits(missing)
        await watchdog_of(streams, progress).look()
        return re.sub(r"for \d+ s", "for N s", progress.sentence)


async def test_the_verifier_that_has_the_groups_is_named(streams: Streams) -> None:
    for _ in range(3):
        await streams.rollouts.put(b"x")
    async with there(streams, "verifier", "verifier-2"):
        await streams.rollouts.claim("verifier-2", count=3, wait_seconds=0.1)
        assert await said(streams) == "waits for batch 41: 3 of 8 groups are at verifier-2 for N s"
        assert await said(streams, missing=5) == (
            "waits for batch 41: 5 of 8 groups are missing; 3 are at verifier-2 for N s"
        )


async def test_the_replica_that_has_the_groups_is_named_with_what_it_serves(
    streams: Streams,
) -> None:
    for _ in range(3):
        await streams.prompts.put(b"x")
    async with there(streams, "rollout", "rollout-0"):
        await streams.prompts.claim("rollout-0", count=3, wait_seconds=0.1)
        expected = "3 of 8 groups are at rollout-0 for N s, which serves version 7 of 9"
        assert await said(streams) == f"waits for batch 41: {expected}"
        assert await said(streams, policy_version=7) == (
            "waits for batch 41: 3 of 8 groups are at rollout-0 for N s"
        )


async def test_a_role_without_a_lease_is_named(streams: Streams) -> None:
    for _ in range(8):
        await streams.prompts.put(b"x")
    assert await said(streams, missing=8) == (
        "waits for batch 41: 8 of 8 groups wait in `prompts`; no rollout replica holds a lease"
    )
    async with there(streams, "rollout", "rollout-1"):
        assert await said(streams, missing=8) == (
            "waits for batch 41: 8 of 8 groups wait in `prompts`; no replica serves, rollout-1 is"
            " stale"
        )


async def test_an_empty_redis_is_named(streams: Streams) -> None:
    assert await said(streams) == (
        "waits for batch 41: 3 of 8 groups are in no stream: Redis lost them, and the learner"
        " issues them again"
    )
    await streams.dead_letter.put(b"x")
    assert "and 1 in `dead_letter`: `isentrope dead-letters` shows why" in await said(streams)


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60.0):
        while not await holds():
            await asyncio.sleep(0.02)


@pytest.mark.integration
async def test_a_redis_that_stands_still_is_named_and_so_is_the_culprit_after_it(
    tmp_path: Path,
) -> None:
    with embedded_redis(tmp_path) as url:
        bounds = Bounds(8, 1000)
        async with open_streams(
            url, run_id="r", prompts=bounds, groups=bounds, timeout_seconds=60.0
        ) as streams:
            server = int((await streams.client.info("server"))["process_id"])
            progress = Progress()
            watchdog = watchdog_of(streams, progress)
            os.kill(server, signal.SIGSTOP)
            try:
                with progress.awaiting("batch 1", 8):
                    progress.enter("publishes version 0")
                    await watchdog.look()
                    waiting = progress.sentence
            finally:
                os.kill(server, signal.SIGCONT)
            redis = r"Redis has not answered for \d+ s \(no answer\)"
            missing = f"waits for batch 1: 8 of 8 groups are missing; {redis}"
            assert re.fullmatch(missing, waiting)
            assert re.fullmatch(rf"publishes version 0, \d+ s; {redis}", progress.sentence)
            assert progress.report().stuck_seconds == 0
            with progress.awaiting("batch 1", 8):
                await watchdog.look()
                assert "are in no stream" in progress.sentence


async def test_no_step_for_too_long_is_said_once_a_bound_with_the_sentence(
    streams: Streams, caplog: pytest.LogCaptureFixture
) -> None:
    progress = Progress()
    watchdog = watchdog_of(streams, progress, stall_seconds=300.0)

    def judge(age: float) -> tuple[bool, float]:
        progress.stepped_at -= age - progress.seconds_without_step
        watchdog.judge()
        return progress.is_stalled, LEARNER_STALLED._value.get()

    with progress.awaiting("batch 41", 8) as awaited:
        progress.explain(awaited, "waits for batch 41: 3 of 8 groups are at verifier-2 for 300 s")
        judged = [judge(age) for age in (10, 290, 301, 302, 590, 601)]
    assert judged == [(False, 0), (False, 0), (True, 1), (True, 1), (True, 1), (True, 1)]
    warnings = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert [text.partition(":")[0] for text in warnings] == [
        "no step for 301 s", "no step for 601 s",
    ]  # fmt: skip
    assert warnings[0].endswith(": 3 of 8 groups are at verifier-2 for 300 s")
    progress.step_ended(41)
    watchdog.judge()
    assert (progress.is_stalled, LEARNER_STALLED._value.get()) == (False, 0)


async def test_the_replica_that_an_update_waits_for_is_named_and_is_to_blame(
    streams: Streams,
) -> None:
    progress = Progress(step=8)
    watchdog = watchdog_of(streams, progress)
    unanswered = watchdog._publisher.unanswered
    progress.enter("publishes version 8")
    progress.since -= 30
    for seconds, sentence, is_stuck in [
        (1.0, r"publishes version 8, 3\d s", True),
        (28.0, r"publishes version 8, 3\d s; rollout-1 has not answered for 28 s", False),
    ]:
        unanswered.update({"rollout-0": 0.5, "rollout-1": seconds})
        await watchdog.look()
        assert re.fullmatch(sentence, progress.sentence)
        assert (progress.report().stuck_seconds > 0) == is_stuck
    progress.enter("waits for batch 9", is_waiting=True)
    await watchdog.look()
    assert re.fullmatch(r"waits for batch 9, \d+ s", progress.sentence)


async def test_a_pause_and_the_end_of_a_run_are_no_stall(streams: Streams) -> None:
    progress = Progress()
    watchdog = watchdog_of(streams, progress)
    progress.stepped_at -= 400
    progress.rest()
    watchdog.judge()
    assert not progress.is_stalled
    assert progress.report().stuck_seconds == 0
    progress.enter("has finished")
    progress.is_finished = True
    progress.since = progress.stepped_at = 0.0
    watchdog.judge()
    assert not progress.is_stalled
    assert progress.report().stuck_seconds == 0


@pytest.mark.integration
async def test_waiting_for_others_stalls_the_run_but_only_its_own_work_the_learner(
    streams: Streams,
) -> None:
    """A learner whose rollout replicas are not there, and then one whose step does not end."""
    progress = Progress(step=2)
    watchdog = watchdog_of(streams, progress, stall_seconds=0.3)
    nobody = cast(Any, SimpleNamespace(replicas={}))
    servicer = LearnerServicer(
        run_id="r", num_steps=9, progress=progress, publisher=nobody, catch_up=nobody
    )
    for _ in range(8):
        await streams.prompts.put(b"x")
    serving = serve(
        host="127.0.0.1",
        port=0,
        port_key="port",
        services=[SERVICE],
        add=lambda server: pb_grpc.add_LearnerServicer_to_server(servicer, server),
    )
    async with serving as server, open_channel(f"127.0.0.1:{server.port}") as channel:
        stub: Any = pb_grpc.LearnerStub(channel)
        health: Any = health_pb2_grpc.HealthStub(channel)

        async def status() -> Any:
            return await stub.GetStatus(pb.GetLearnerStatusRequest(), timeout=60.0)

        async def is_stalled() -> bool:
            return bool((await status()).is_stalled)

        async def is_sick() -> bool:
            request = health_pb2.HealthCheckRequest(service=PROGRESS)
            return bool((await health.Check(request, timeout=60.0)).status == NOT_SERVING)

        async with watchdog.watching(server):
            with progress.awaiting("batch 3", 8):
                await until(is_stalled)
                answer = await status()
                assert answer.activity == (
                    "waits for batch 3: 8 of 8 groups wait in `prompts`; no rollout replica holds"
                    " a lease"
                )
                assert answer.seconds_without_step >= 0.3
                assert not await is_sick()
            progress.step_ended(3)
            progress.enter("trains step 4")
            await until(is_sick)
            assert (await status()).activity.startswith("trains step 4, ")
            assert REGISTRY.get_sample_value(
                "isentrope_service_stalled", {"service": "learner"}
            ) == 1.0  # fmt: skip
            progress.step_ended(4)
            with progress.awaiting("batch 5", 8):

                async def is_well() -> bool:
                    return not await is_sick()

                await until(is_well)


def test_the_learner_alone_has_the_metrics_of_its_steps_and_has_them_from_the_start() -> None:
    name = "isentrope_learner_last_step_timestamp_seconds"
    assert REGISTRY.get_sample_value(name) is None
    registry, before = CollectorRegistry(), time.time()
    watch_steps(registry)
    assert registry.get_sample_value("isentrope_learner_stalled") == 0
    started = registry.get_sample_value(name)
    assert started is not None and started >= before
    Progress().step_ended(1)
    ended = registry.get_sample_value(name)
    assert ended is not None and ended > started


def test_what_is_awaited_stays_so_while_the_loop_does_something_else() -> None:
    progress = Progress()
    with progress.awaiting("batch 41", 8) as awaited:
        assert progress.is_waiting
        progress.enter("publishes version 40")
        assert not progress.is_waiting
        assert progress.sentence == "publishes version 40, 0 s"
        progress.explain(awaited, "waits for batch 41: ...")
        assert progress.sentence == "waits for batch 41: ..."
        progress.still_awaits(2)
        assert progress.is_waiting and progress.awaited is not None
        assert (progress.awaited.num_missing, progress.awaited.num_wanted) == (2, 8)
        progress.explain(awaited, "waits for batch 41: closer")
        assert progress.sentence == "waits for batch 41: closer"
        progress.rest()
        progress.explain(awaited, "waits for batch 41: nobody wants it now")
        assert progress.sentence == "is paused on request, 0 s"
        progress.still_awaits(2)
        assert progress.sentence == "waits for batch 41, 0 s"
    progress.explain(awaited, "too late")
    assert progress.sentence == "waits for batch 41, 0 s"
