"""One rollout replica, wired: engine, streams, gRPC, lease, and the end of them in order."""

from __future__ import annotations

import asyncio
import logging
import zlib

from protos import rollout_pb2_grpc as pb_grpc
from services.rollout.engine import EngineSettings, VllmEngine
from services.rollout.replica import Event, Replica
from services.rollout.sampler import Sampler
from services.rollout.service import SERVICE, RolloutServicer
from shared.device import find_device
from shared.errors import EngineError
from shared.lease import Registry
from shared.metrics import describe_process, serve_metrics
from shared.process import ServiceArguments
from shared.redis_connection import check_server
from shared.redis_stream import Streams, open_streams
from shared.rpc import serve
from shared.stage import adopt_orphans
from shared.stream import Bounds
from shared.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


async def serve_replica(given: ServiceArguments, stop: asyncio.Event) -> None:
    """From loading the engine to the last group in flight.

    The engine's process is forked, so it comes before everything that starts threads; what can be
    wrong with the run is looked at even before, since loading takes long.
    """
    await check_server(given.redis_url, timeout_seconds=given.config.network.call_timeout_seconds)
    tokenizer = Tokenizer(given.config.model_path)
    engine = await VllmEngine.start(_settings(given))
    try:
        redis = given.config.redis
        async with open_streams(
            given.redis_url,
            run_id=given.run_id,
            prompts=Bounds(redis.max_prompts, redis.max_prompts_bytes),
            groups=Bounds(redis.max_groups, redis.max_groups_bytes),
            timeout_seconds=given.config.network.call_timeout_seconds,
        ) as streams:
            await _serve(given, stop, engine, streams, tokenizer.stop_token_ids)
    finally:
        await engine.shutdown()


async def _serve(
    given: ServiceArguments,
    stop: asyncio.Event,
    engine: VllmEngine,
    streams: Streams,
    stop_token_ids: tuple[int, ...],
) -> None:
    config = given.config
    replica = Replica()
    sampler = Sampler(
        name=given.name,
        engine=engine,
        replica=replica,
        prompts=streams.prompts,
        rollouts=streams.rollouts,
        dead_letter=streams.dead_letter,
        stop_token_ids=stop_token_ids,
        max_concurrent_groups=config.rollout.max_concurrent_groups,
        max_attempts=config.redis.max_attempts,
    )
    servicer = RolloutServicer(
        name=given.name,
        engine=engine,
        replica=replica,
        sampler=sampler,
        max_length=config.model.max_length,
    )
    describe_process(
        run_id=given.run_id, model=config.model_path, algorithm=config.policy_loss.loss_mode
    )
    metrics_port = serve_metrics(host=config.network.host, port=config.network.metrics_port)
    registry = Registry(streams.client, prefix=streams.prefix)
    async with (
        serve(
            host=config.network.host,
            port=config.network.rollout_port,
            port_key="network.rollout_port",
            services=[SERVICE],
            add=lambda server: pb_grpc.add_RolloutServicer_to_server(servicer, server),
        ) as server,
        registry.hold(
            "rollout",
            given.name,
            address=f"{given.host}:{server.port}",
            metrics_address=f"{given.host}:{metrics_port}",
            seconds=config.network.lease_seconds,
        ) as lease,
    ):
        await replica.handle(Event.READY)
        await server.set_serving(True)
        logger.info("replica %s listens on port %d", given.name, server.port)
        sampling = asyncio.create_task(sampler.run(), name="sampler")
        adopting = asyncio.create_task(
            adopt_orphans(
                sampler.adopt, registry, "rollout", idle_seconds=config.redis.reclaim_seconds
            ),
            name="adopter",
        )
        try:
            await _until_the_end(stop, replica, engine, sampling, lease)
        finally:
            adopting.cancel()
            sampling.cancel()
    await replica.handle(Event.FINISHED)


async def _until_the_end(
    stop: asyncio.Event,
    replica: Replica,
    engine: VllmEngine,
    sampling: asyncio.Task[None],
    lease: asyncio.Task[None],
) -> None:
    """Wait for the order to stop, then for the groups in flight; or for what must not happen.

    Raises:
        EngineError: the engine's process ended.
        StreamError: another process took this replica's name.
    """
    stopping = asyncio.create_task(stop.wait())
    death = asyncio.create_task(engine.wait_until_dead())
    try:
        await asyncio.wait({stopping, death, sampling, lease}, return_when=asyncio.FIRST_COMPLETED)
        if not death.done() and not lease.done():
            if not replica.is_ending:
                await replica.handle(Event.DRAIN)
            await asyncio.wait({sampling, death, lease}, return_when=asyncio.FIRST_COMPLETED)
        if death.done():
            raise EngineError("the engine's process ended; the groups in flight are sampled again")
        for task in (sampling, lease):
            if task.done():
                task.result()
    finally:
        stopping.cancel()
        death.cancel()


def _settings(given: ServiceArguments) -> EngineSettings:
    config, rollout, device = given.config, given.config.rollout, find_device()
    return EngineSettings(
        model_path=config.model_path,
        dtype=config.model.dtype,
        max_model_len=config.model.max_length,
        max_num_seqs=rollout.max_concurrent_groups * rollout.group_size,
        # Equal seeds would make replicas sample the same completions.
        seed=zlib.crc32(f"{config.run.seed}/{given.run_id}/{given.name}".encode()),
        device=device,
        kv_cache_bytes=rollout.kv_cache_mib * 2**20 if device == "cpu" else None,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        tensor_parallel_size=rollout.tensor_parallel_size,
        threads=rollout.threads,
        enforce_eager=rollout.enforce_eager or device == "cpu",
        start_timeout_seconds=config.network.start_timeout_seconds,
    )
