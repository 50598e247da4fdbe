"""Replicas that come late or were left behind, brought up by a stream of the learner's copy."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from protos import learner_pb2 as pb
from protos import learner_pb2_grpc as pb_grpc
from protos import rollout_pb2 as pb_rollout
from services.learner.rounds import MAX_FAILURES
from services.rollout.replica import Event, State
from shared.buckets import Manifest
from shared.codec import decode_rollout_group, encode_prompt_group
from shared.errors import BroadcastError, PeerError
from shared.redis_stream import Streams
from shared.rpc import open_channel
from shared.weight_stream import WeightSource, fetch_weights, weight_chunks
from tests.factories import make_prompt
from tests.learner.publishing import (
    Scene,
    SmallModel,
    replica_arguments,
    scene_of,
    until,
    wait_for_lease,
)
from tests.rollout.crew import crew_of_replicas
from tests.rollout.simulated import Simulation

FIRST_GROUP_SECONDS = 60.0


@pytest.fixture
async def scene(streams: Streams, redis_url: str) -> AsyncIterator[Scene]:
    async with scene_of(streams, redis_url) as made:
        yield made


def run_id_of(streams: Streams) -> str:
    """Of the streams that the fixture opened."""
    return streams.prefix.split("{")[1].split("}")[0]


async def wait_for_rollouts(streams: Streams, num_groups: int) -> list[str]:
    """Names of the replicas that sampled the groups, once so many are there."""
    async with asyncio.timeout(FIRST_GROUP_SECONDS):
        while len(entries := await streams.rollouts.peek()) < num_groups:
            await asyncio.sleep(0.02)
    return [decode_rollout_group(payload).replica for payload in entries]


class BusyEngine:
    """The learner's engine thread, which a test may keep busy."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def run(self, function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def keep_busy(self) -> None:
        self._thread.submit(self.let_go.wait)


@pytest.fixture
def engine() -> Iterator[BusyEngine]:
    made = BusyEngine()
    yield made
    made.let_go.set()


async def test_a_latecomer_serves_while_the_engine_is_busy_and_the_group_is_left_alone(
    streams: Streams, redis_url: str, engine: BusyEngine
) -> None:
    async with scene_of(streams, redis_url, on_engine=engine.run) as scene:
        first = await scene.start("rollout-0")
        await scene.publisher.publish(3)
        engine.keep_busy()
        group = first.engine.group
        async with scene.learner.catching_up():
            late = await scene.start("rollout-1")
            await until(lambda: late.serves(3))
            await until(lambda: scene.learner.serving == {"rollout-0": 3, "rollout-1": 3})
        assert late.holds(scene.model)
        assert first.engine.group is group
        assert late.engine.group is None
        engine.let_go.set()
        assert (await scene.publisher.publish(4)).served == ("rollout-0", "rollout-1")


async def test_a_replica_that_is_killed_and_started_again_soon_hands_in_a_group(
    redis_url: str, streams: Streams, engine: BusyEngine
) -> None:
    given = replica_arguments(
        "rollout-0", run_id=run_id_of(streams), redis_url=redis_url, lease_seconds=5.0
    )
    async with scene_of(streams, redis_url, on_engine=engine.run) as scene:
        await scene.publisher.publish(0)
        engine.keep_busy()
        with crew_of_replicas() as crew:
            async with scene.learner.catching_up():
                for index in range(2):
                    crew.start(given, Simulation())
                    await wait_for_lease(scene.registry, "rollout-0")
                    await streams.prompts.put(encode_prompt_group(make_prompt(index)))
                    names = await wait_for_rollouts(streams, index + 1)
                    assert names == ["rollout-0"] * (index + 1)
                    crew.signal("rollout-0", signal.SIGKILL)
        assert await scene.registry.announced_version() == 0


async def test_one_that_was_left_behind_samples_nothing_new_until_it_is_brought_up(
    scene: Scene,
) -> None:
    bad = await scene.start("rollout-0")
    await scene.publisher.publish(0)
    scene.model.train()
    bad.engine.hang_ups = MAX_FAILURES
    assert (await scene.publisher.publish(1)).failed == ("rollout-0",)
    assert bad.serves(0)  # it does not know yet
    bad.engine.may_swap.clear()
    async with scene.learner.catching_up():
        await until(lambda: bad.replica.state is State.STALE)
        assert bad.replica.policy_version == 0
        bad.engine.may_swap.set()
        await until(lambda: bad.serves(1))
    assert bad.holds(scene.model)


async def test_what_is_published_during_a_catch_up_is_caught_up_with_next(scene: Scene) -> None:
    await scene.publisher.publish(0)
    slow = await scene.start("rollout-0")
    slow.engine.may_swap.clear()
    async with scene.learner.catching_up():
        await until(slow.engine.is_swapping.is_set)
        scene.model.train()
        publication = await scene.publisher.publish(1)
        assert (publication.served, publication.failed) == ((), ())
        slow.engine.may_swap.set()
        await until(lambda: slow.serves(1))
        assert slow.holds(scene.model)


async def test_a_stream_that_is_read_slowly_is_of_one_version_whatever_is_published_meanwhile(
    streams: Streams, redis_url: str
) -> None:
    model = SmallModel(6 << 20)  # more than what gRPC and the sockets take in
    async with scene_of(streams, redis_url, model=model) as scene, scene.learner.catching_up():
        await scene.publisher.publish(0)
        version = scene.publisher.version
        assert version is not None and version.staged is not None
        before = b"".join(weight_chunks(version.staged))
        with scene.learner.catch_up._offering(version) as ticket:
            received = b""
            async with open_channel(scene.learner.catch_up._address) as channel:
                stub: pb_grpc.LearnerAsyncStub = pb_grpc.LearnerStub(channel)
                async for message in stub.FetchWeights(pb.FetchWeightsRequest(ticket=ticket)):
                    if not received:
                        model.train()
                        await scene.publisher.publish(1)
                    received += message.data
        assert received == before
        newer = scene.publisher.version
        assert newer is not None and newer.staged is not version.staged


async def test_the_copy_is_read_from_the_moment_that_a_replica_is_chosen(scene: Scene) -> None:
    await scene.publisher.publish(0)
    late, version = await scene.start("rollout-0"), scene.publisher.version
    await scene.publisher.fleet.meet()
    async with scene.learner.catching_up():
        catch_up, (peer,) = scene.learner.catch_up, scene.publisher.fleet.peers
        assert version is not None
        catch_up._start(peer, version)
        # It has not been asked yet what it serves, and a publication needs memory already.
        assert scene.publisher._make_room() is not version.staged
        scene.publisher.version = version
        await until(lambda: late.serves(0))
        await until(lambda: not version.num_readers)


async def test_without_a_reader_the_copy_is_made_in_the_same_memory(scene: Scene) -> None:
    await scene.publisher.publish(0)
    first = scene.publisher.version
    await scene.publisher.publish(1)
    assert first is not None and scene.publisher.version is not None
    assert scene.publisher.version.staged is first.staged


async def test_where_no_copy_is_kept_a_latecomer_waits_for_the_next_publication(
    streams: Streams, redis_url: str
) -> None:
    async with scene_of(streams, redis_url, keeps_copy=False) as scene:
        await scene.publisher.publish(0)
        late = await scene.start("rollout-0")
        async with scene.learner.catching_up():
            await until(lambda: scene.learner.serving == {"rollout-0": None})
            assert not scene.learner.catch_up._streams
        await scene.publisher.publish(0)
        assert late.serves(0)


async def test_weights_whose_canary_differs_are_not_served_after_a_stream_either(
    scene: Scene,
) -> None:
    await scene.publisher.publish(0)
    bad = await scene.start("rollout-0")
    bad.engine.damage = True
    async with scene.learner.catching_up():
        await until(lambda: any(peer.num_failures for peer in scene.publisher.fleet.peers))
        assert (bad.replica.state, bad.replica.policy_version) == (State.STALE, 0)
        bad.engine.damage = False
        await until(lambda: bad.serves(0))


async def test_weights_with_another_checksum_are_neither_loaded_nor_served(scene: Scene) -> None:
    await scene.publisher.publish(0)
    running, refitter = await scene.start("rollout-0"), scene.publisher.refitter
    await scene.publisher.fleet.meet()
    (peer,) = scene.publisher.fleet.peers
    peer.is_taken = True  # by this test
    async with scene.learner.catching_up():
        version = scene.publisher.version
        assert version is not None
        with scene.learner.catch_up._offering(version) as ticket:
            source = WeightSource(scene.learner.catch_up._address, ticket, 60.0)
            await refitter.begin(peer, 0, version.manifest, source=source)
            wrong = replace(version, checksum=version.checksum ^ 1)
            with pytest.raises(PeerError, match="ABORTED"):
                await refitter.commit(peer, wrong, wait_seconds=60.0)
        serve = pb_rollout.ServeRequest(policy_version=0)
        with pytest.raises(PeerError, match="version 0 is not loaded"):
            await peer.ask(peer.stub.Serve, serve, timeout_seconds=60.0)
    assert (running.replica.state, running.engine.parameters) == (State.STALE, {})
    assert peer.policy_version is None


async def test_one_that_was_only_lost_sight_of_is_not_refitted(scene: Scene) -> None:
    running = await scene.start("rollout-0")
    await scene.publisher.publish(0)
    held = running.engine.parameters
    async with scene.learner.catching_up():
        key = f"{scene.streams.prefix}lease:rollout:rollout-0"
        lease = await scene.streams.client.getdel(key)
        await until(lambda: not scene.learner.serving)
        await scene.streams.client.set(key, lease)
        await until(lambda: scene.learner.serving == {"rollout-0": 0})
    assert running.engine.parameters is held
    assert running.serves(0)


async def test_whose_lease_ends_is_not_waited_for_any_longer(
    streams: Streams, redis_url: str
) -> None:
    async with scene_of(streams, redis_url, timeout_seconds=120.0) as scene:
        good = await scene.start("good")
        with crew_of_replicas() as crew:
            given = replica_arguments(
                "bad", run_id=run_id_of(streams), redis_url=redis_url, lease_seconds=3.0
            )
            crew.start(given, Simulation())
            await wait_for_lease(scene.registry, "bad")
            async with scene.learner.catching_up():
                await scene.publisher.publish(0)
                await until(lambda: scene.learner.serving == {"bad": 0, "good": 0})
                crew.signal("bad", signal.SIGSTOP)
                publication = await asyncio.wait_for(scene.publisher.publish(1), 60.0)
    assert publication.failed == ("bad",)
    assert good.replica.policy_version == 1


async def test_a_catch_up_that_ended_is_not_served_any_more(scene: Scene) -> None:
    async with scene.learner.catching_up():
        await scene.publisher.publish(0)
        source = WeightSource(scene.learner.catch_up._address, "of yesterday", 60.0)
        with pytest.raises(BroadcastError, match="NOT_FOUND: the ticket is not good any more"):
            await asyncio.to_thread(fetch_weights, source, (), bucket_bytes=1024)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((1000, 16, 5), "ended in the bucket"), ((1000,), "longer than its manifest")],
)
async def test_a_stream_that_is_not_of_the_manifest_is_refused(
    scene: Scene, sizes: tuple[int, ...], message: str
) -> None:
    manifest: Manifest = SmallModel(*sizes).manifest()
    async with scene.learner.catching_up():
        await scene.publisher.publish(0)
        version = scene.publisher.version
        assert version is not None
        with scene.learner.catch_up._offering(version) as ticket:
            source = WeightSource(scene.learner.catch_up._address, ticket, 60.0)
            with pytest.raises(BroadcastError, match=message):
                await asyncio.to_thread(fetch_weights, source, manifest, bucket_bytes=1024)


async def test_a_commit_that_the_learner_gave_up_leaves_a_replica_that_knows_what_it_holds(
    scene: Scene,
) -> None:
    running = await scene.start("rollout-0")
    publisher = scene.publisher
    await publisher.publish(0)
    (peer,) = publisher.fleet.peers
    running.engine.may_swap.clear()
    publishing = asyncio.create_task(publisher.publish(1))
    await until(running.engine.is_swapping.is_set)
    publishing.cancel()
    await asyncio.sleep(0.2)  # the replica hears of it
    running.engine.may_swap.set()
    await until(lambda: running.replica.policy_version == 1)
    assert running.replica.state is State.STALE
    assert peer.policy_version == 0
    await running.replica.handle(Event.LEFT_BEHIND)
    assert (await publisher.publish(2)).served == ("rollout-0",)
