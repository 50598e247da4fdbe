"""The learner's side of a publication, with a small model in place of DeepSpeed's."""

from __future__ import annotations

import asyncio
import gc
import threading
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from protos import learner_pb2_grpc as pb_grpc
from services.learner.catch_up import CatchUp
from services.learner.fleet import Fleet
from services.learner.progress import Progress
from services.learner.publisher import Publisher
from services.learner.refit import Refitter
from services.learner.service import SERVICE, LearnerServicer
from services.rollout.app import run_replica
from services.rollout.replica import Replica, State
from shared.buckets import Manifest, ParameterSpec
from shared.config import Environment, parse_run
from shared.lease import Registry
from shared.process import ServiceArguments
from shared.redis_stream import Streams
from shared.rpc import serve
from tests.rollout.simulated import STOP_TOKEN_IDS, SimulatedEngine, Simulation

CANARY = array("I", [1, 2, 3])
SWAP_SECONDS = 0.01
TIMEOUT_SECONDS = 20.0

RUN = """
[run]
name = "publishing"
num_steps = 1
[model]
path = "none"
max_length = 64
[rollout]
max_completion_tokens = 8
[network]
lease_seconds = {lease_seconds}
"""


def replica_arguments(
    name: str, *, run_id: str, redis_url: str, lease_seconds: float = 30.0
) -> ServiceArguments:
    """What a rollout replica of these tests is started with."""
    return ServiceArguments(
        config=parse_run(RUN.format(lease_seconds=lease_seconds)),
        environment=Environment.read({"REDIS_URL": redis_url}),
        run_id=run_id,
        name=name,
        resume=False,
    )


class SmallModel:
    """The learner's model; its canary is the sum of all parameters.

    Args:
        sizes: elements of each parameter.
    """

    def __init__(self, *sizes: int) -> None:
        self.parameters = {
            f"layer.{index}": torch.arange(float(size)) / size for index, size in enumerate(sizes)
        }

    def train(self) -> None:
        """Change every parameter."""
        for tensor in self.parameters.values():
            tensor += 1

    def manifest(self) -> Manifest:
        return tuple(
            ParameterSpec(name, "float32", tuple(tensor.shape))
            for name, tensor in self.parameters.items()
        )

    def weights(self) -> Iterator[tuple[str, Any]]:
        yield from self.parameters.items()

    def score_tokens(self, token_ids: Sequence[int]) -> list[float]:
        total = float(sum(tensor.sum() for tensor in self.parameters.values()))
        return [total] * (len(token_ids) - 1)


@dataclass(frozen=True, slots=True)
class LearnerSide:
    """A publisher, and what catches late replicas up, over the leases of a run."""

    model: SmallModel
    registry: Registry
    publisher: Publisher
    catch_up: CatchUp

    @asynccontextmanager
    async def catching_up(self) -> AsyncIterator[None]:
        """With the learner's gRPC server up, and late replicas looked after."""
        servicer = LearnerServicer(
            run_id="publishing",
            num_steps=1,
            progress=Progress(),
            publisher=self.publisher,
            catch_up=self.catch_up,
        )
        async with (
            serve(
                host="127.0.0.1",
                port=0,
                port_key="network.learner_port",
                services=[SERVICE],
                add=lambda server: pb_grpc.add_LearnerServicer_to_server(servicer, server),
            ) as server,
            self.catch_up.running(f"127.0.0.1:{server.port}"),
        ):
            yield

    @property
    def serving(self) -> dict[str, int | None]:
        """What each replica serves, as far as the learner knows."""
        return {peer.name: peer.policy_version for peer in self.publisher.fleet.peers}

    async def close(self) -> None:
        await self.publisher.close()
        # Groups are freed in threads of their own; the next test starts with none of them.
        for thread in threading.enumerate():
            if thread.name == "close-group":
                await asyncio.to_thread(thread.join, 10.0)
        gc.collect()


def learner_side(
    streams: Streams,
    *,
    layout: Literal["pairs", "one"] = "pairs",
    model: SmallModel | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
    republish_seconds: float = 60.0,
    min_bytes_per_second: float = 100 * 2.0**20,
    bucket_bytes: int = 1024,
    keeps_copy: bool = True,
    on_engine: Callable[[Callable[[], Any]], Any] = asyncio.to_thread,
) -> LearnerSide:
    """Over the leases of `streams`, with gloo on the loopback."""
    model = model or SmallModel(1000, 15)
    registry = Registry(streams.client, prefix=streams.prefix)
    publisher = Publisher(
        fleet=Fleet(
            registry,
            host="127.0.0.1",
            backend="gloo",
            layout=layout,
            timeout_seconds=timeout_seconds,
        ),
        refitter=Refitter(
            bucket_bytes=bucket_bytes,
            timeout_seconds=timeout_seconds,
            min_bytes_per_second=min_bytes_per_second,
            canary_token_ids=CANARY,
            canary_tolerance=1e-3,
        ),
        registry=registry,
        engine=model,
        on_engine=on_engine,
        republish_seconds=republish_seconds,
        keeps_copy=keeps_copy,
    )
    return LearnerSide(model, registry, publisher, CatchUp(publisher))


@dataclass(frozen=True, slots=True)
class RunningReplica:
    """A whole replica in this process, and the way to stop it."""

    engine: SimulatedEngine
    replica: Replica
    stop: asyncio.Event
    running: asyncio.Task[None]

    def holds(self, model: SmallModel) -> bool:
        """Whether it samples from the learner's weights."""
        return all(
            torch.equal(self.engine.parameters[name], tensor)
            for name, tensor in model.parameters.items()
        )

    def serves(self, policy_version: int) -> bool:
        """Whether it samples new groups, from this version."""
        state, version = self.replica.state, self.replica.policy_version
        return (state, version) == (State.SERVING, policy_version)

    async def end(self) -> None:
        """Drain it; calling it again is harmless."""
        self.stop.set()
        await self.running
        await self.engine.shutdown()


class Scene:
    """A learner's publisher and as many replicas as a test starts."""

    def __init__(self, streams: Streams, redis_url: str, learner: LearnerSide) -> None:
        self.streams = streams
        self.learner = learner
        self.publisher, self.model = learner.publisher, learner.model
        self.registry = learner.registry
        self._redis_url = redis_url
        self._replicas: list[RunningReplica] = []

    async def start(
        self, name: str, simulation: Simulation | None = None, *, lease_seconds: float = 30.0
    ) -> RunningReplica:
        """A replica that holds its lease."""
        engine = SimulatedEngine(simulation or Simulation(swap_seconds=SWAP_SECONDS), name=name)
        replica, stop = Replica(), asyncio.Event()
        given = replica_arguments(
            name, run_id="publishing", redis_url=self._redis_url, lease_seconds=lease_seconds
        )
        running = asyncio.create_task(
            run_replica(
                given,
                stop,
                engine,
                self.streams,
                replica=replica,
                stop_token_ids=STOP_TOKEN_IDS,
                metrics_address="127.0.0.1:0",
            )
        )
        started = RunningReplica(engine, replica, stop, running)
        self._replicas.append(started)
        await wait_for_lease(self.registry, name)
        return started

    async def close(self) -> None:
        """All replicas, then the learner's side."""
        await asyncio.gather(*(started.end() for started in self._replicas))
        await self.learner.close()


@asynccontextmanager
async def scene_of(streams: Streams, redis_url: str, **choices: Any) -> AsyncIterator[Scene]:
    """A scene that ends with the context; `choices` are those of `learner_side`."""
    scene = Scene(streams, redis_url, learner_side(streams, **choices))
    try:
        yield scene
    finally:
        await scene.close()


async def wait_for_lease(registry: Registry, name: str) -> None:
    """Wait until a replica of this name is there."""
    async with asyncio.timeout(60.0):
        while name not in {member.name for member in await registry.members("rollout")}:
            await asyncio.sleep(0.01)


async def until(condition: Callable[[], object], *, seconds: float = 60.0) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)
