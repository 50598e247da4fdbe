"""One rank of the learner, wired. Rank 0 runs the loop; the others follow its engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from protos import learner_pb2_grpc as pb_grpc
from services.learner.catch_up import CatchUp
from services.learner.engine import LearnerEngine
from services.learner.loop import Learner
from services.learner.outage import Outage
from services.learner.progress import Progress
from services.learner.publisher import OnEngine
from services.learner.ranks import REASSURE_SECONDS
from services.learner.reader import CONSUMER
from services.learner.saver import unanswered
from services.learner.service import SERVICE, LearnerServicer
from services.learner.watchdog import Watchdog
from services.learner.wiring import wire_learner
from shared.errors import CheckpointError, EngineError
from shared.lease import Registry
from shared.metrics.learner import LEARNER_ENTROPY_BOUND, watch_steps
from shared.metrics_server import MetricsServer
from shared.presence import Presence, connected, present, show_metrics
from shared.process import ServiceArguments
from shared.redis_connection import Patience, check_server
from shared.run_file import keep_run_file

logger = logging.getLogger(__name__)

RETRIES = 3
"""Of redis-py, about a second: the loop itself waits out an outage, and says so meanwhile."""


async def run_rank(
    given: ServiceArguments,
    stop: asyncio.Event,
    *,
    start: Callable[..., LearnerEngine] = LearnerEngine.start,
) -> None:
    """The whole life of this rank; the engine has a thread of its own.

    Args:
        start: loads the model, which may take long; rank 0 serves metrics meanwhile.
    """
    metrics = None
    if given.environment.rank == 0:
        metrics = _show_metrics(given)
        timeout_seconds = given.config.network.call_timeout_seconds
        await check_server(given.redis_url, timeout_seconds=timeout_seconds)
        if given.run_file is not None:
            keep_run_file(given.run_folder, given.run_file)
    loop = asyncio.get_running_loop()
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    async def on_engine(function: Callable[[], Any]) -> Any:
        return await loop.run_in_executor(thread, function)

    config = given.config
    engine = await on_engine(lambda: start(config, config.model_path, given.environment))
    try:
        if metrics is not None:
            async with reassuring(engine, on_engine, seconds=REASSURE_SECONDS):
                await _lead(given, stop, engine, on_engine, metrics)
        else:
            await on_engine(engine.follow)
    finally:
        if metrics is not None:
            await on_engine(engine.close)
        thread.shutdown()


@asynccontextmanager
async def reassuring(
    engine: LearnerEngine, on_engine: OnEngine, *, seconds: float
) -> AsyncIterator[None]:
    """Within it the other ranks hear every so often that rank 0 is there, between its calls."""

    async def reassure() -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await on_engine(engine.reassure)
            except EngineError as error:
                # The next step ends the run for it.
                logger.error("%s", error)
                return

    task = asyncio.create_task(reassure(), name="reassures ranks")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def _lead(
    given: ServiceArguments,
    stop: asyncio.Event,
    engine: LearnerEngine,
    on_engine: OnEngine,
    metrics: MetricsServer,
) -> None:
    """Rank 0: serve, hold the lease, run the loop."""
    progress = Progress()
    outage = Outage(given.redis_url, progress)
    async with connected(
        given,
        "learner",
        patience=Patience(
            given.redis_url, seconds=given.config.redis.outage_seconds, told=outage.told
        ),
        retries=RETRIES,
    ) as streams:
        learner = wire_learner(given, streams, engine, on_engine, progress)
        catch_up = CatchUp(learner.publisher)
        registry = Registry(streams.client, prefix=streams.prefix)
        async with (
            _present(given, learner, catch_up, registry, metrics) as (server, lease),
            _watchdog(given, learner, registry).watching(server),
        ):
            async with catch_up.running(f"{given.host}:{server.port}") as catching_up:
                await _run(learner, outage, {lease, catching_up}, stop, resume=given.resume)
            if given.stays and progress.is_finished:
                await _until_told(stop, lease)


def _present(
    given: ServiceArguments,
    learner: Learner,
    catch_up: CatchUp,
    registry: Registry,
    metrics: MetricsServer,
) -> AbstractAsyncContextManager[Presence]:
    servicer = LearnerServicer(
        run_id=given.run_id,
        num_steps=given.config.run.num_steps,
        progress=learner.progress,
        publisher=learner.publisher,
        catch_up=catch_up,
    )
    return present(
        given,
        "learner",
        name=CONSUMER,
        service=SERVICE,
        port=given.config.network.learner_port,
        add=lambda server: pb_grpc.add_LearnerServicer_to_server(servicer, server),
        registry=registry,
        metrics_address=f"{given.host}:{metrics.port}",
        answer_health=metrics.answer_health,
    )


def _watchdog(given: ServiceArguments, learner: Learner, registry: Registry) -> Watchdog:
    return Watchdog(
        progress=learner.progress,
        streams=learner.streams.impatient(),
        registry=registry,
        publisher=learner.publisher,
        stall_seconds=given.config.watchdog.stall_seconds,
    )


async def _run(
    learner: Learner,
    outage: Outage,
    beside: set[asyncio.Task[None]],
    stop: asyncio.Event,
    *,
    resume: bool,
) -> None:
    """The loop until its end; a signal asks it to stop.

    Args:
        beside: what ends only by an error, a lost lease say; the loop then ends at once.
    """

    async def ask_to_stop() -> None:
        await stop.wait()
        learner.progress.is_stopping = True

    asking = asyncio.create_task(ask_to_stop())
    running = outage.loop = asyncio.create_task(learner.run(resume=resume), name="loop")
    try:
        done, _ = await asyncio.wait({running, *beside}, return_when=asyncio.FIRST_COMPLETED)
        for task in {running} & done or done:
            task.result()
    finally:
        for task in (asking, running):
            task.cancel()
        for asked in unanswered(learner.progress.checkpoint_requests):
            asked.set_exception(CheckpointError("the run has ended"))
        learner.record.close()
        learner.preparation.drop()
        await learner.inbox.close()
        await learner.saver.close()
        await learner.publisher.close()


async def _until_told(stop: asyncio.Event, lease: asyncio.Task[None]) -> None:
    """Wait for the order to end; status, health and metrics are answered meanwhile.

    Raises:
        StreamError: another process took the learner's name.
    """
    told = asyncio.create_task(stop.wait())
    await asyncio.wait({told, lease}, return_when=asyncio.FIRST_COMPLETED)
    told.cancel()
    if lease.done():
        lease.result()


def _show_metrics(given: ServiceArguments) -> MetricsServer:
    if given.config.entropy.method == "aent":
        band = given.config.adaptive_entropy
        LEARNER_ENTROPY_BOUND.labels(bound="lower").set(band.entropy_low)
        LEARNER_ENTROPY_BOUND.labels(bound="upper").set(band.entropy_high)
    watch_steps()
    return show_metrics(given)
