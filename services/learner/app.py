"""One rank of the learner, wired. Rank 0 runs the loop; the others follow its engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from protos import learner_pb2_grpc as pb_grpc
from services.learner.catch_up import CatchUp
from services.learner.engine import LearnerEngine
from services.learner.inbox import CONSUMER
from services.learner.loop import Learner
from services.learner.outage import Outage
from services.learner.progress import Progress
from services.learner.publisher import OnEngine
from services.learner.service import SERVICE, LearnerServicer
from services.learner.watchdog import Watchdog
from services.learner.wiring import wire_learner
from shared import tracing
from shared.lease import Registry
from shared.metrics import (
    LEARNER_ENTROPY_BOUND,
    describe_process,
    serve_metrics,
    watch_steps,
)
from shared.metrics_server import MetricsServer
from shared.process import ServiceArguments
from shared.redis_connection import Patience, check_server
from shared.redis_stream import open_streams
from shared.rpc import RpcServer, serve
from shared.run_file import keep_run_file

RETRIES = 3
"""Of redis-py, about a second: the loop itself waits out an outage, and says so meanwhile."""


async def run_rank(given: ServiceArguments, stop: asyncio.Event) -> None:
    """The whole life of this rank; the engine has a thread of its own."""
    if given.environment.rank == 0:
        timeout_seconds = given.config.network.call_timeout_seconds
        await check_server(given.redis_url, timeout_seconds=timeout_seconds)
        if given.run_file is not None:
            keep_run_file(given.run_folder, given.run_file)
    loop = asyncio.get_running_loop()
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    async def on_engine(function: Callable[[], Any]) -> Any:
        return await loop.run_in_executor(thread, function)

    config = given.config
    engine = await on_engine(
        lambda: LearnerEngine.start(config, config.model_path, given.environment)
    )
    try:
        if given.environment.rank == 0:
            await _lead(given, stop, engine, on_engine)
        else:
            await on_engine(engine.follow)
    finally:
        if given.environment.rank == 0:
            await on_engine(engine.close)
        thread.shutdown()


async def _lead(
    given: ServiceArguments, stop: asyncio.Event, engine: LearnerEngine, on_engine: OnEngine
) -> None:
    """Rank 0: serve, hold the lease, run the loop."""
    network, redis, environment = given.config.network, given.config.redis, given.environment
    metrics = _serve_metrics(given)
    progress = Progress()
    outage = Outage(given.redis_url, progress)
    async with (
        tracing.exporting(
            environment.traces_endpoint, role="learner", name=given.name, run_id=given.run_id
        ),
        open_streams(
            given.redis_url,
            run_id=given.run_id,
            prompts=redis.prompt_bounds,
            groups=redis.group_bounds,
            timeout_seconds=network.call_timeout_seconds,
            patience=Patience(given.redis_url, seconds=redis.outage_seconds, told=outage.told),
            retries=RETRIES,
        ) as streams,
    ):
        learner = wire_learner(given, streams, engine, on_engine, progress)
        catch_up = CatchUp(learner.publisher)
        registry = Registry(streams.client, prefix=streams.prefix)
        async with _serving(given, learner, catch_up, registry, metrics) as (server, lease):
            async with (
                _watchdog(given, learner, registry).watching(server),
                catch_up.running(f"{given.host}:{server.port}") as catching_up,
            ):
                await _run(learner, outage, {lease, catching_up}, stop, resume=given.resume)
            if given.stays and progress.is_finished:
                await _until_told(stop, lease)


@asynccontextmanager
async def _serving(
    given: ServiceArguments,
    learner: Learner,
    catch_up: CatchUp,
    registry: Registry,
    metrics: MetricsServer,
) -> AsyncIterator[tuple[RpcServer, asyncio.Task[None]]]:
    """The learner's calls are answered and its lease is held; the server, and the lease's task."""
    network = given.config.network
    servicer = LearnerServicer(
        run_id=given.run_id,
        num_steps=given.config.run.num_steps,
        progress=learner.progress,
        publisher=learner.publisher,
        catch_up=catch_up,
    )
    async with (
        serve(
            host=network.host,
            port=network.learner_port,
            port_key="network.learner_port",
            services=[SERVICE],
            add=lambda server: pb_grpc.add_LearnerServicer_to_server(servicer, server),
            tls=given.tls,
        ) as server,
        registry.hold(
            "learner",
            CONSUMER,
            address=f"{given.host}:{server.port}",
            metrics_address=f"{given.host}:{metrics.port}",
            seconds=network.lease_seconds,
        ) as lease,
    ):
        metrics.answer_health(server.is_healthy)
        await server.set_serving(True)
        yield server, lease


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
        learner.journal.close()
        learner.history.close()
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


def _serve_metrics(given: ServiceArguments) -> MetricsServer:
    config = given.config
    describe_process(
        run_id=given.run_id, model=config.model_path, algorithm=config.policy_loss.loss_mode
    )
    if config.entropy.method == "aent":
        band = config.adaptive_entropy
        LEARNER_ENTROPY_BOUND.labels(bound="lower").set(band.entropy_low)
        LEARNER_ENTROPY_BOUND.labels(bound="upper").set(band.entropy_high)
    watch_steps()
    return serve_metrics(
        host=config.network.host,
        port=config.network.metrics_port,
        tls=given.tls,
        token_file=given.environment.metrics_token_file,
    )
