"""The learner's process around its loop."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
from prometheus_client import REGISTRY
from transformers import Qwen2Config

from protos import learner_pb2 as pb
from protos import learner_pb2_grpc as pb_grpc
from services.learner.app import _until_told, run_rank
from services.learner.batch import Batch
from services.learner.measures import StepReport
from services.learner.prepared import Prepared
from shared.codec import decode_prompt_group, encode_scored_group
from shared.config import parse_run
from shared.config.environment import Environment
from shared.errors import PeerError, StreamError
from shared.lease import Registry
from shared.metrics.learner import LEARNER_LAST_STEP, LEARNER_STALLED, LEARNER_UNREWARDED
from shared.process import ServiceArguments
from shared.records import ScoredGroup
from shared.redis_stream import Streams
from shared.rpc import call, open_channel
from shared.tokenizer import save_characters
from tests.factories import make_scored
from tests.learner.publishing import SmallModel
from tests.learner.test_saver import open_taken

RUN = """
run = {{name = "app", num_steps = 1, directory = "{folder}"}}
model = {{path = "{folder}/model"}}
rollout = {{group_size = 2}}
learner = {{groups_per_batch = 1}}
evaluation = {{every_steps = 0}}
watchdog = {{stall_seconds = 0.4}}
network = {{learner_port = 0, metrics_port = {port}}}
"""


async def forever() -> None:
    await asyncio.Event().wait()


async def test_a_finished_learner_stays_until_it_is_told_to_end() -> None:
    stop, lease = asyncio.Event(), asyncio.create_task(forever())
    staying = asyncio.create_task(_until_told(stop, lease))
    await asyncio.sleep(0)
    assert not staying.done()
    stop.set()
    await asyncio.wait_for(staying, 60)
    lease.cancel()


async def test_a_finished_learner_ends_when_another_takes_its_name() -> None:
    async def lose() -> None:
        raise StreamError("another process holds the name 'learner'")

    lease = asyncio.create_task(lose())
    with pytest.raises(StreamError, match="another process"):
        await asyncio.wait_for(_until_told(asyncio.Event(), lease), 60)


class StandInEngine(SmallModel):
    """Trains nothing; exports for as long as it may not."""

    def __init__(self) -> None:
        super().__init__(10)
        self.may_export = threading.Event()

    def prepare(self, groups: Sequence[ScoredGroup], policy_version: int) -> Prepared:
        return Prepared(Batch.of([], [], groups), (), b"", ())

    def train_prepared(self, prepared: Prepared, *, step: int) -> StepReport:
        return StepReport({}, {}, {})

    def snapshot(self, *, copies: bool) -> Any:
        return open_taken()

    def export(self, folder: Path) -> None:
        assert self.may_export.wait(60)

    def close(self) -> None:
        pass


@dataclass
class Scene:
    """A run of one step, with nobody but the test to sample and to score."""

    streams: Streams
    given: ServiceArguments
    engine: StandInEngine = field(default_factory=StandInEngine)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    metrics_while_loading: str = ""

    def start_engine(self, *_: Any) -> Any:
        self.metrics_while_loading = self.metrics()
        return self.engine

    def metrics(self) -> str:
        url = f"http://127.0.0.1:{self.given.config.network.metrics_port}/metrics"
        with urlopen(url, timeout=30) as answer:
            return str(answer.read().decode())

    async def shows(self, series: str) -> None:
        """Wait until `/metrics` has this line."""
        await until(lambda: f"\n{series}\n" in self.metrics())

    async def score_one(self) -> None:
        """What a replica and a verifier would do."""
        [entry] = await self.streams.prompts.claim("test", count=1, wait_seconds=30.0)
        scored = make_scored()
        rollout = replace(scored.rollout, prompt=decode_prompt_group(entry.payload))
        payload = encode_scored_group(replace(scored, rollout=rollout))
        assert await self.streams.prompts.finish(entry, output=self.streams.scored, payload=payload)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not await asyncio.to_thread(holds):
            await asyncio.sleep(0.05)


@pytest.fixture
def scene(tmp_path: Path, streams: Streams, redis_url: str) -> Iterator[Scene]:
    save_characters("0123456789+-*/=,> ", end="$", folder=tmp_path / "model")
    Qwen2Config(vocab_size=20, eos_token_id=18).save_pretrained(tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    run_id = streams.prefix.partition("{")[2].partition("}")[0]
    config = parse_run(RUN.format(folder=tmp_path, port=port))
    environment = Environment.read({"REDIS_URL": redis_url})
    given = ServiceArguments(config, environment, run_id, "learner", resume=False, stays=True)
    yield Scene(streams, given)
    for gauge in (LEARNER_STALLED, LEARNER_LAST_STEP, LEARNER_UNREWARDED):
        REGISTRY.unregister(gauge)


@asynccontextmanager
async def learner(scene: Scene) -> AsyncIterator[grpc.aio.Channel]:
    """The learner as a process runs it, and a channel to it once it holds its lease."""
    running = asyncio.create_task(run_rank(scene.given, scene.stop, start=scene.start_engine))
    registry = Registry(scene.streams.client, prefix=scene.streams.prefix)
    try:
        async with asyncio.timeout(60):
            while not (found := await registry.members("learner")) and not running.done():
                await asyncio.sleep(0.02)
        async with open_channel(found[0].address) as channel:
            yield channel
    finally:
        scene.stop.set()
        scene.engine.may_export.set()
        await asyncio.wait_for(running, 60)


async def test_a_finished_learner_that_stays_is_well_and_shows_what_the_streams_hold(
    scene: Scene,
) -> None:
    async with learner(scene) as channel:
        assert "\nisentrope_learner_last_step_timestamp_seconds " in scene.metrics_while_loading
        assert "isentrope_run_info{" in scene.metrics_while_loading
        stub: Any = pb_grpc.LearnerStub(channel)

        async def checkpoint() -> Any:
            request = pb.CheckpointRequest()
            return await call(stub.Checkpoint, request, peer="learner", timeout_seconds=60.0)

        await scene.score_one()
        # The export takes longer than a stall, by both accounts.
        await scene.shows("isentrope_learner_stalled 1.0")
        await scene.shows('isentrope_service_stalled{service="learner"} 1.0')
        asked = asyncio.create_task(checkpoint())
        for _ in range(3):  # calls of one channel arrive in order
            await stub.GetStatus(pb.GetLearnerStatusRequest(), timeout=60.0)
        scene.engine.may_export.set()
        await scene.shows("isentrope_learner_stalled 0.0")
        await scene.shows('isentrope_service_stalled{service="learner"} 0.0')
        with pytest.raises(PeerError, match="the run has ended") as ended:
            await asked
        assert ended.value.status == "ABORTED"
        with pytest.raises(PeerError, match="the checkpoint of step 1 is its last") as refused:
            await checkpoint()
        assert refused.value.status == "FAILED_PRECONDITION"
        await scene.streams.dead_letter.put(b"x")
        await scene.shows('isentrope_queue_lag_messages{stream="dead_letter"} 1.0')
