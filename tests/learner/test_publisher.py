"""Publication over real gRPC, real gloo and a real Redis; only the two models are stand-ins."""

from __future__ import annotations

import asyncio
import gc
import secrets
import threading
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from protos import rollout_pb2_grpc as pb_grpc
from services.learner.fleet import Fleet
from services.learner.publisher import Publisher
from services.rollout.replica import Event, Replica, State
from services.rollout.sampler import Sampler
from services.rollout.service import SERVICE, RolloutServicer
from shared.broadcast import BroadcastGroup, GroupSpec, Received, open_group, receive_weights
from shared.buckets import Manifest, ParameterSpec
from shared.errors import BroadcastError, EngineError, StreamError
from shared.lease import Registry
from shared.metrics import WEIGHT_SYNC_OPERATIONS
from shared.redis_stream import Streams
from shared.rpc import serve
from tests.rollout.fake_engine import FakeEngine

TIMEOUT_SECONDS = 5.0
CANARY = array("I", [1, 2, 3])


class TwoTensors:
    """The learner's model: two parameters, and a canary that is their sum."""

    def __init__(self) -> None:
        self.parameters = {"a": torch.arange(1000.0), "b": torch.ones(3, 5)}

    def manifest(self) -> Manifest:
        return tuple(
            ParameterSpec(name, "float32", tuple(tensor.shape))
            for name, tensor in self.parameters.items()
        )

    def weights(self) -> Iterator[tuple[str, Any]]:
        yield from self.parameters.items()

    def score_tokens(self, token_ids: Sequence[int]) -> list[float]:
        return [float(sum(tensor.sum() for tensor in self.parameters.values()))] * 2


class ReceivingEngine(FakeEngine):
    """A replica's model: really receives, and scores the canary with what it has."""

    num_workers = 1

    def __init__(self) -> None:
        super().__init__()
        self.parameters: dict[str, torch.Tensor] = {}
        self.group: BroadcastGroup | None = None
        self.receiving: asyncio.Task[Received] | None = None
        self.damage = False
        self.fails_to_join = False
        self.hang_up_on_begin = False

    async def join_group(self, spec: GroupSpec) -> None:
        if self.fails_to_join:
            raise EngineError("the engine is dead")
        self.group = await asyncio.to_thread(open_group, spec.for_worker(0))

    async def begin_update(self, version: int, manifest: Manifest, *, bucket_bytes: int) -> None:
        assert self.group is not None
        if self.hang_up_on_begin:
            self.group.close()
        self.receiving = asyncio.create_task(
            asyncio.to_thread(receive_weights, self.group, manifest, bucket_bytes=bucket_bytes)
        )

    async def commit_update(
        self, version: int, *, expected_checksum: int | None, timeout_seconds: float
    ) -> Any:
        assert self.receiving is not None
        received = await asyncio.wait_for(self.receiving, timeout_seconds)
        if received.checksum != expected_checksum:
            raise BroadcastError("checksum")
        self.parameters = received.tensors
        self.policy_version = version
        return SimpleNamespace(
            checksum=received.checksum, receive_seconds=0.1, load_seconds=0.1, pause_seconds=0.25
        )

    async def abort_update(self) -> None:
        if self.group is not None:
            self.group.close()

    async def score_tokens(self, token_ids: Any) -> list[float]:
        total = float(sum(tensor.sum() for tensor in self.parameters.values()))
        return [total + (0.5 if self.damage else 0.0)] * 2


@dataclass
class RunningReplica:
    """A rollout servicer that is up and holds a lease."""

    engine: ReceivingEngine
    replica: Replica
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)


class Scene:
    """A learner's publisher and as many replicas as a test starts."""

    def __init__(self, streams: Streams, layout: Literal["pairs", "one"]) -> None:
        self.streams = streams
        self.registry = Registry(streams.client, prefix=streams.prefix)
        self.model = TwoTensors()
        self.replicas: dict[str, RunningReplica] = {}
        self.publisher = Publisher(
            fleet=Fleet(
                self.registry,
                host="127.0.0.1",
                backend="gloo",
                layout=layout,
                timeout_seconds=TIMEOUT_SECONDS,
            ),
            registry=self.registry,
            engine=self.model,
            on_engine=on_engine,
            bucket_bytes=1024,
            timeout_seconds=TIMEOUT_SECONDS,
            canary_token_ids=CANARY,
            canary_tolerance=1e-3,
        )

    async def start(self, name: str) -> RunningReplica:
        engine, replica = ReceivingEngine(), Replica()
        sampler: Any = Sampler(
            name=name,
            engine=engine,
            replica=replica,
            prompts=self.streams.prompts,
            rollouts=self.streams.rollouts,
            dead_letter=self.streams.dead_letter,
            stop_token_ids=(),
            max_concurrent_groups=1,
            max_attempts=1,
        )
        servicer = RolloutServicer(
            name=name,
            engine=engine,
            replica=replica,
            sampler=sampler,
            max_length=16,
        )
        running = RunningReplica(engine, replica)
        server = await running.stack.enter_async_context(
            serve(
                host="127.0.0.1",
                port=0,
                port_key="network.rollout_port",
                services=[SERVICE],
                add=lambda server: pb_grpc.add_RolloutServicer_to_server(servicer, server),
            )
        )
        await running.stack.enter_async_context(
            self.registry.hold(
                "rollout",
                name,
                address=f"127.0.0.1:{server.port}",
                metrics_address="127.0.0.1:0",
                seconds=30.0,
            )
        )
        await replica.handle(Event.READY)
        self.replicas[name] = running
        return running

    async def close(self) -> None:
        await self.publisher.close()
        for running in self.replicas.values():
            if running.engine.group is not None:
                running.engine.group.close()
            await running.stack.aclose()
        # Groups are freed in threads of their own; the next test starts with none of them.
        for thread in threading.enumerate():
            if thread.name == "close-group":
                await asyncio.to_thread(thread.join, 10.0)
        gc.collect()


async def on_engine(function: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(function)


both_layouts = pytest.mark.parametrize("layout", ["pairs", "one"])


@pytest.fixture
def layout() -> str:
    return "pairs"


@pytest.fixture
async def scene(streams: Streams, layout: Literal["pairs", "one"]) -> AsyncIterator[Scene]:
    made = Scene(streams, layout)
    yield made
    await made.close()


def holds(running: RunningReplica, model: TwoTensors) -> bool:
    return all(
        torch.equal(running.engine.parameters[name], tensor)
        for name, tensor in model.parameters.items()
    )


@both_layouts
async def test_every_replica_serves_what_the_learner_published(scene: Scene) -> None:
    replicas = [await scene.start("rollout-0"), await scene.start("rollout-1")]
    first = await scene.publisher.publish(0)
    scene.model.parameters["a"] += 1
    second = await scene.publisher.publish(1)
    assert (first.served, second.served) == (("rollout-0", "rollout-1"),) * 2
    assert second.pause_seconds == 0.25
    for running in replicas:
        assert holds(running, scene.model)
        assert (running.replica.state, running.replica.policy_version) == (State.SERVING, 1)
    assert await scene.registry.announced_version() == 1


async def test_without_a_replica_nothing_is_announced(scene: Scene) -> None:
    publication = await scene.publisher.publish(0)
    assert (publication.served, publication.failed) == ((), ())
    assert await scene.registry.announced_version() is None


@both_layouts
async def test_a_replica_whose_canary_differs_must_not_serve(scene: Scene) -> None:
    good, bad = await scene.start("rollout-0"), await scene.start("rollout-1")
    bad.engine.damage = True
    # Both ends count, and here they are one process: the replica first, the learner next.
    rejected = 1 + WEIGHT_SYNC_OPERATIONS.labels(result="canary")._value.get()
    publication = await scene.publisher.publish(0)
    assert (publication.served, publication.failed) == (("rollout-0",), ("rollout-1",))
    assert good.replica.state is State.SERVING
    assert bad.replica.state is State.STALE
    assert WEIGHT_SYNC_OPERATIONS.labels(result="canary")._value.get() == rejected + 1
    assert not await scene.publisher.is_reached(0)


@both_layouts
async def test_a_replica_left_behind_is_brought_up_by_the_next_publication(scene: Scene) -> None:
    bad = await scene.start("rollout-0")
    bad.engine.damage = True
    await scene.publisher.publish(0)
    bad.engine.damage = False
    publication = await scene.publisher.publish(0)
    assert publication.served == ("rollout-0",)
    assert bad.replica.state is State.SERVING


async def test_a_replica_that_hangs_up_does_not_keep_the_others_from_serving(
    scene: Scene,
) -> None:
    good, bad = await scene.start("rollout-0"), await scene.start("rollout-1")
    bad.engine.hang_up_on_begin = True
    publication = await scene.publisher.publish(0)
    assert (publication.served, publication.failed) == (("rollout-0",), ("rollout-1",))
    assert holds(good, scene.model)
    bad.engine.hang_up_on_begin = False
    assert (await scene.publisher.publish(0)).served == ("rollout-1",)


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
    assert not await scene.publisher.is_reached(3)
    assert (await scene.publisher.publish(3)).served == ("rollout-1",)
    assert first.engine.group is group
    assert await scene.publisher.is_reached(3)


@both_layouts
async def test_a_replica_that_left_is_forgotten_and_one_that_came_back_is_new(
    scene: Scene,
) -> None:
    running = await scene.start("rollout-0")
    await scene.publisher.publish(0)
    await running.stack.aclose()
    assert await scene.publisher.is_reached(1)
    assert scene.publisher.replicas == {}
    again = await scene.start("rollout-0")
    assert (await scene.publisher.publish(1)).served == ("rollout-0",)
    assert holds(again, scene.model)


async def test_a_restarted_process_takes_its_name_and_the_old_one_must_stop(
    streams: Streams,
) -> None:
    registry = Registry(streams.client, prefix=streams.prefix)
    addresses = {"address": "h:1", "metrics_address": "h:2", "seconds": 0.3}
    async with (
        registry.hold("rollout", "same", **addresses) as old,  # type: ignore[arg-type]
        registry.hold("rollout", "same", **addresses) as new,  # type: ignore[arg-type]
    ):
        with pytest.raises(StreamError, match="another process holds the name 'same'"):
            await asyncio.wait_for(old, 5.0)
        assert not new.done()
        assert [member.name for member in await registry.members("rollout")] == ["same"]


async def test_a_lease_runs_out_when_its_holder_is_gone(streams: Streams) -> None:
    registry = Registry(streams.client, prefix=streams.prefix)
    name = secrets.token_hex(4)
    async with registry.hold(
        "verifier", name, address="h:1", metrics_address="h:2", seconds=0.2
    ) as task:
        task.cancel()
        async with asyncio.timeout(5.0):
            while await registry.members("verifier"):
                await asyncio.sleep(0.01)
