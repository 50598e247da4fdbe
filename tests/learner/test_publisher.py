"""Publication over real gRPC, real gloo and a real Redis; only the two models are stand-ins."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator
from typing import Literal

import pytest

from services.learner.publisher import CROWD
from services.learner.rounds import MAX_FAILURES
from services.rollout.replica import State
from shared.codec import encode_prompt_group
from shared.errors import StreamError
from shared.lease import Registry
from shared.metrics.weights import (
    SYNC_RESULTS,
    WEIGHT_SYNC_OPERATIONS,
    WEIGHT_SYNC_PAUSE,
    WEIGHT_SYNC_RETRIES,
)
from shared.redis_stream import Streams
from tests.factories import make_prompt
from tests.learner.publishing import (
    SWAP_SECONDS,
    TIMEOUT_SECONDS,
    Scene,
    SmallModel,
    scene_of,
    until,
)
from tests.rollout.simulated import Simulation

both_layouts = pytest.mark.parametrize("layout", ["pairs", "one"])
without_copy = pytest.mark.parametrize("keeps_copy", [False])


@pytest.fixture
def layout() -> str:
    return "pairs"


@pytest.fixture
def keeps_copy() -> bool:
    return True


@pytest.fixture
async def scene(
    streams: Streams, redis_url: str, layout: Literal["pairs", "one"], keeps_copy: bool
) -> AsyncIterator[Scene]:
    async with scene_of(streams, redis_url, layout=layout, keeps_copy=keeps_copy) as made:
        yield made


def refits(result: str) -> float:
    """Of all replicas, so far."""
    return float(WEIGHT_SYNC_OPERATIONS.labels(result=result)._value.get())


@both_layouts
async def test_every_replica_serves_what_the_learner_published(scene: Scene) -> None:
    replicas = [await scene.start("rollout-0"), await scene.start("rollout-1")]
    first = await scene.publisher.publish(0)
    scene.model.train()
    paused = WEIGHT_SYNC_PAUSE._value.get()
    second = await scene.publisher.publish(1)
    assert (first.served, second.served) == (("rollout-0", "rollout-1"),) * 2
    assert second.pause_seconds >= SWAP_SECONDS
    assert WEIGHT_SYNC_PAUSE._value.get() - paused <= 2 * second.pause_seconds + 1e-9
    for running in replicas:
        assert running.holds(scene.model)
        assert running.serves(1)
    assert await scene.registry.announced_version() == 1


async def test_without_a_replica_nothing_is_announced(scene: Scene) -> None:
    publication = await scene.publisher.publish(0)
    assert (publication.served, publication.failed) == ((), ())
    assert await scene.registry.announced_version() is None


@both_layouts
async def test_a_replica_whose_canary_differs_must_not_serve(scene: Scene) -> None:
    good, bad = await scene.start("rollout-0"), await scene.start("rollout-1")
    bad.engine.damage = True
    # Both ends are this process, and only one of them counts.
    before = {result: refits(result) for result in SYNC_RESULTS}
    publication = await scene.publisher.publish(0)
    assert (publication.served, publication.failed) == (("rollout-0",), ("rollout-1",))
    assert good.replica.state is State.SERVING
    assert bad.replica.state is State.STALE
    counted = {result: refits(result) - before[result] for result in SYNC_RESULTS}
    assert counted == {"ok": 1, "error": 0, "timeout": 0, "canary": 1}
    assert scene.learner.serving == {"rollout-0": 0, "rollout-1": None}


@both_layouts
@without_copy
async def test_a_replica_left_behind_is_brought_up_by_the_next_publication(scene: Scene) -> None:
    bad = await scene.start("rollout-0")
    bad.engine.damage = True
    await scene.publisher.publish(0)
    bad.engine.damage = False
    publication = await scene.publisher.publish(0)
    assert publication.served == ("rollout-0",)
    assert bad.replica.state is State.SERVING


@without_copy
async def test_a_replica_whose_model_was_damaged_by_a_load_takes_no_group_until_it_serves_again(
    scene: Scene,
) -> None:
    bad = await scene.start("rollout-0")
    await scene.publisher.publish(0)
    bad.engine.misloads = MAX_FAILURES
    assert (await scene.publisher.publish(1)).failed == ("rollout-0",)
    assert bad.replica.state is State.STALE
    await scene.streams.prompts.put(encode_prompt_group(make_prompt(group_size=1)))
    assert (await scene.publisher.publish(1)).served == ("rollout-0",)
    assert await scene.streams.rollouts.claim("verifier-0", count=1, wait_seconds=30.0)
    assert await scene.streams.dead_letter.peek() == []


@without_copy
async def test_a_replica_that_hangs_up_does_not_keep_the_others_from_serving(
    scene: Scene,
) -> None:
    good, bad = await scene.start("rollout-0"), await scene.start("rollout-1")
    bad.engine.hang_ups = MAX_FAILURES
    publication = await scene.publisher.publish(0)
    assert (publication.served, publication.failed) == (("rollout-0",), ("rollout-1",))
    assert good.holds(scene.model)
    assert (await scene.publisher.publish(0)).served == ("rollout-1",)


async def test_who_was_not_reached_is_tried_again_in_the_same_publication(scene: Scene) -> None:
    await scene.start("rollout-0")
    unlucky = await scene.start("rollout-1")
    unlucky.engine.hang_ups = 1
    retries = WEIGHT_SYNC_RETRIES._value.get()
    publication = await scene.publisher.publish(0)
    assert (publication.served, publication.failed) == (("rollout-0", "rollout-1"), ())
    assert publication.retries == WEIGHT_SYNC_RETRIES._value.get() - retries == 1
    assert unlucky.holds(scene.model)


async def test_a_broadcast_is_repeated_for_a_crowd_of_newcomers_and_where_no_copy_is_kept(
    scene: Scene, streams: Streams, redis_url: str
) -> None:
    await scene.start("rollout-0")
    assert not await scene.publisher.is_worth_repeating(0)
    async with scene_of(streams, redis_url, keeps_copy=False) as other:
        assert await other.publisher.is_worth_repeating(0)
        await other.publisher.publish(0)
        assert not await other.publisher.is_worth_repeating(0)
    await asyncio.gather(*(scene.start(f"rollout-{index}") for index in range(1, CROWD)))
    assert await scene.publisher.is_worth_repeating(0)
    await scene.publisher.publish(0)
    assert not await scene.publisher.is_worth_repeating(0)


async def test_who_failed_just_now_does_not_hold_up_the_next_publication(scene: Scene) -> None:
    await scene.start("rollout-0")
    bad = await scene.start("rollout-1")
    bad.engine.damage = True
    await scene.publisher.publish(0)
    publication = await scene.publisher.publish(1)
    assert (publication.served, publication.failed) == (("rollout-0",), ())
    assert bad.replica.state is State.STALE


async def test_past_its_bound_a_publication_tries_nobody_again(
    streams: Streams, redis_url: str
) -> None:
    async with scene_of(streams, redis_url, republish_seconds=1e-9) as scene:
        (await scene.start("rollout-0")).engine.hang_ups = 1
        publication = await scene.publisher.publish(0)
        assert (publication.retries, publication.failed) == (0, ("rollout-0",))


async def test_past_its_bound_a_group_of_all_is_not_formed_again_without_its_culprit(
    streams: Streams, redis_url: str
) -> None:
    async with scene_of(
        streams, redis_url, layout="one", timeout_seconds=1.0, republish_seconds=1e-9
    ) as scene:
        await scene.start("rollout-0")
        (await scene.start("rollout-1")).engine.fails_to_join = True
        assert (await scene.publisher.publish(0)).served == ()


async def test_a_slow_replica_holds_the_others_up_once_and_is_then_brought_up_by_streams(
    streams: Streams, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with scene_of(
        streams, redis_url, model=SmallModel(*[64] * 12), bucket_bytes=1, timeout_seconds=3.0
    ) as scene:
        good = await scene.start("good")
        slow = await scene.start("slow", Simulation(bucket_seconds=0.4))
        publication = await scene.publisher.publish(0)
        assert (publication.served, publication.failed) == (("good",), ("slow",))
        assert publication.retries == 0
        assert "left slow behind while receiving" in caplog.text
        assert "slow peer: most others waited for it for 3 s in all" in caplog.text
        for peer in scene.publisher.fleet.peers:
            peer.rests_until = 0.0
        publication = await scene.publisher.publish(1)
        assert (publication.served, publication.failed) == (("good",), ())
        async with scene.learner.catching_up():
            await until(lambda: slow.serves(1) and good.serves(1))


async def test_another_round_has_no_more_time_than_is_left_of_the_publication(
    streams: Streams, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with scene_of(
        streams,
        redis_url,
        model=SmallModel(*[64] * 12),
        bucket_bytes=1,
        timeout_seconds=6.0,
        republish_seconds=3.0,
    ) as scene:
        running = await scene.start("rollout-0", Simulation(bucket_seconds=0.4))
        running.engine.hang_ups = 1
        publication = await scene.publisher.publish(0)
        assert (publication.retries, publication.failed) == (1, ("rollout-0",))
    assert re.search(r"slow peer: not through after [0-3]\.\d s", caplog.text)


async def test_the_phases_of_a_publication_are_told_apart(scene: Scene) -> None:
    await scene.start("rollout-0")
    told = await scene.publisher.publish(0)
    phases = (told.gather_seconds, told.broadcast_seconds, told.load_seconds)
    assert min(phases) > 0
    assert sum(phases) < told.seconds
    assert told.load_seconds > told.pause_seconds >= SWAP_SECONDS


@both_layouts
async def test_a_replica_that_cannot_join_is_left_behind_within_the_deadline(scene: Scene) -> None:
    await scene.start("rollout-0")
    (await scene.start("rollout-1")).engine.fails_to_join = True
    publication = await asyncio.wait_for(scene.publisher.publish(0), 4 * TIMEOUT_SECONDS)
    assert (publication.served, publication.failed) == (("rollout-0",), ("rollout-1",))


async def test_a_latecomer_gets_the_current_version_and_the_others_are_left_alone(
    scene: Scene,
) -> None:
    first = await scene.start("rollout-0")
    await scene.publisher.publish(3)
    group = first.engine.group
    await scene.start("rollout-1")
    assert (await scene.publisher.publish(3)).served == ("rollout-1",)
    assert first.engine.group is group
    assert scene.learner.serving == {"rollout-0": 3, "rollout-1": 3}


@both_layouts
async def test_a_replica_that_left_is_forgotten_and_one_that_came_back_is_new(
    scene: Scene,
) -> None:
    running = await scene.start("rollout-0")
    await scene.publisher.publish(0)
    await running.end()
    assert (await scene.publisher.publish(1)).served == ()
    assert scene.publisher.replicas == {}
    again = await scene.start("rollout-0")
    assert (await scene.publisher.publish(1)).served == ("rollout-0",)
    assert again.holds(scene.model)


async def test_a_restarted_process_takes_its_name_and_the_old_one_must_stop(
    streams: Streams,
) -> None:
    registry = Registry(streams.client, prefix=streams.prefix)
    addresses = {"address": "h:1", "metrics_address": "h:2", "seconds": 3.0}
    async with (
        registry.hold("rollout", "same", **addresses) as old,  # type: ignore[arg-type]
        registry.hold("rollout", "same", **addresses) as new,  # type: ignore[arg-type]
    ):
        with pytest.raises(StreamError, match="another process holds the name 'same'"):
            await asyncio.wait_for(old, 60.0)
        assert not new.done()
        assert [member.name for member in await registry.members("rollout")] == ["same"]


async def test_a_lease_runs_out_when_its_holder_is_gone(streams: Streams) -> None:
    registry = Registry(streams.client, prefix=streams.prefix)
    name = secrets.token_hex(4)
    async with registry.hold(
        "verifier", name, address="h:1", metrics_address="h:2", seconds=0.2
    ) as task:
        task.cancel()
        async with asyncio.timeout(60.0):
            while await registry.members("verifier"):
                await asyncio.sleep(0.01)
