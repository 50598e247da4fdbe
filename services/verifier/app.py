"""One verifier replica, wired: scoring processes, streams, gRPC, lease, and the end in order."""

from __future__ import annotations

import asyncio
import logging

from protos import verifier_pb2_grpc as pb_grpc
from services.verifier.sandbox import ScoringPool
from services.verifier.scoring import check_scorer
from services.verifier.service import SERVICE, VerifierServicer
from services.verifier.worker import Worker
from shared.lease import Registry
from shared.presence import connected, present, show_metrics
from shared.process import ServiceArguments
from shared.redis_connection import check_server
from shared.redis_stream import Streams
from shared.stage import adopting_orphans
from shared.tasks.registry import load_task
from shared.tokenizer import Tokenizer, torch_left_out
from shared.watchdog import watched

logger = logging.getLogger(__name__)


async def serve_verifier(given: ServiceArguments, stop: asyncio.Event) -> None:
    """From the check of the scorer to the last group in flight."""
    config = given.config
    task = load_task(config.task.name, config.task.params)
    await check_server(given.redis_url, timeout_seconds=config.network.call_timeout_seconds)
    with torch_left_out():
        tokenizer = Tokenizer(config.model_path)
    async with (
        ScoringPool(config.task, config.verifier) as pool,
        connected(given, "verifier") as streams,
    ):
        await check_scorer(pool, task)
        worker = Worker(
            name=given.name,
            pool=pool,
            tokenizer=tokenizer,
            rollouts=streams.rollouts,
            scored=streams.scored,
            dead_letter=streams.dead_letter,
            max_concurrent_groups=config.verifier.max_concurrent_groups,
            max_attempts=config.redis.max_attempts,
        )
        await _serve(given, stop, pool, worker, streams)


async def _serve(
    given: ServiceArguments,
    stop: asyncio.Event,
    pool: ScoringPool,
    worker: Worker,
    streams: Streams,
) -> None:
    config = given.config
    servicer = VerifierServicer(name=given.name, pool=pool, worker=worker)
    metrics = show_metrics(given)
    registry = Registry(streams.client, prefix=streams.prefix)
    async with (
        present(
            given,
            "verifier",
            name=given.name,
            service=SERVICE,
            port=config.network.verifier_port,
            add=lambda server: pb_grpc.add_VerifierServicer_to_server(servicer, server),
            registry=registry,
            metrics_address=f"{given.host}:{metrics.port}",
            answer_health=metrics.answer_health,
        ) as (server, lease),
        watched(worker.report, server, "verifier", stall_seconds=config.watchdog.stall_seconds),
    ):
        logger.info("verifier %s listens on port %d", given.name, server.port)
        await _work(given, stop, worker, registry, lease)


async def _work(
    given: ServiceArguments,
    stop: asyncio.Event,
    worker: Worker,
    registry: Registry,
    lease: asyncio.Task[None],
) -> None:
    """Score, and take over what dead verifiers left, until the order to stop; end what is begun.

    Raises:
        StreamError: another process took this replica's name.
    """
    working = asyncio.create_task(worker.run(stop), name="worker")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    try:
        async with adopting_orphans(
            worker.adopt, registry, "verifier", idle_seconds=given.config.redis.reclaim_seconds
        ):
            await asyncio.wait({stopping, working, lease}, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait({working, lease}, return_when=asyncio.FIRST_COMPLETED)
        for ended in (working, lease):
            if ended.done():
                ended.result()
    finally:
        stopping.cancel()
        working.cancel()
