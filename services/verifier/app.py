"""One verifier replica, wired: scoring processes, streams, gRPC, lease, and the end in order."""

from __future__ import annotations

import asyncio
import logging

from protos import verifier_pb2_grpc as pb_grpc
from services.verifier.sandbox import ScoringPool
from services.verifier.scoring import check_scorer
from services.verifier.service import SERVICE, VerifierServicer
from services.verifier.worker import Worker
from shared import tracing
from shared.lease import Registry
from shared.metrics import describe_process, serve_metrics
from shared.process import ServiceArguments
from shared.redis_connection import check_server
from shared.redis_stream import Streams, open_streams
from shared.rpc import serve
from shared.stage import adopt_orphans
from shared.tasks.registry import load_task
from shared.tokenizer import Tokenizer
from shared.watchdog import watched

logger = logging.getLogger(__name__)


async def serve_verifier(given: ServiceArguments, stop: asyncio.Event) -> None:
    """From the check of the scorer to the last group in flight."""
    config, redis = given.config, given.config.redis
    task = load_task(config.task.name, config.task.params)
    await check_server(given.redis_url, timeout_seconds=config.network.call_timeout_seconds)
    tokenizer = Tokenizer(config.model_path)
    async with (
        ScoringPool(config.task, config.verifier) as pool,
        tracing.exporting(
            given.environment.traces_endpoint, role="verifier", name=given.name, run_id=given.run_id
        ),
        open_streams(
            given.redis_url,
            run_id=given.run_id,
            prompts=redis.prompt_bounds,
            groups=redis.group_bounds,
            timeout_seconds=config.network.call_timeout_seconds,
        ) as streams,
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
    network, stall_seconds = given.config.network, given.config.watchdog.stall_seconds
    servicer = VerifierServicer(name=given.name, pool=pool, worker=worker)
    describe_process(
        run_id=given.run_id,
        model=given.config.model_path,
        algorithm=given.config.policy_loss.loss_mode,
    )
    metrics = serve_metrics(
        host=network.host,
        port=network.metrics_port,
        tls=given.tls,
        token_file=given.environment.metrics_token_file,
    )
    registry = Registry(streams.client, prefix=streams.prefix)
    async with (
        serve(
            host=network.host,
            port=network.verifier_port,
            port_key="network.verifier_port",
            services=[SERVICE],
            add=lambda server: pb_grpc.add_VerifierServicer_to_server(servicer, server),
            tls=given.tls,
        ) as server,
        registry.hold(
            "verifier",
            given.name,
            address=f"{given.host}:{server.port}",
            metrics_address=f"{given.host}:{metrics.port}",
            seconds=network.lease_seconds,
        ) as lease,
        watched(worker.report, server, "verifier", stall_seconds=stall_seconds),
    ):
        metrics.answer_health(server.is_healthy)
        await server.set_serving(True)
        logger.info("verifier %s listens on port %d", given.name, server.port)
        working = asyncio.create_task(worker.run(stop), name="worker")
        adopting = asyncio.create_task(
            adopt_orphans(
                worker.adopt, registry, "verifier", idle_seconds=given.config.redis.reclaim_seconds
            ),
            name="adopter",
        )
        stopping = asyncio.create_task(stop.wait(), name="stop")
        try:
            await asyncio.wait({stopping, working, lease}, return_when=asyncio.FIRST_COMPLETED)
            adopting.cancel()
            await asyncio.wait({working, lease}, return_when=asyncio.FIRST_COMPLETED)
            for ended in (working, lease):
                if ended.done():
                    ended.result()
        finally:
            stopping.cancel()
            adopting.cancel()
            working.cancel()
