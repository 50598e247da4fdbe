"""One rollout replica, wired: engine, streams, gRPC, lease, and the end of them in order."""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Callable
from typing import Protocol

from protos import rollout_pb2_grpc as pb_grpc
from services.rollout.announced import Announced
from services.rollout.concurrency import Concurrency, surely_fitting
from services.rollout.engine import VllmEngine
from services.rollout.keeper import Keeper
from services.rollout.replica import Event, Replica
from services.rollout.sampler import Sampler
from services.rollout.service import SERVICE, RolloutServicer, UpdatableEngine
from services.rollout.vllm_launch import EngineSettings
from shared.config import RunConfig
from shared.device import find_device
from shared.errors import EngineError
from shared.lease import Registry
from shared.metrics_server import Ask
from shared.presence import connected, present, show_metrics
from shared.process import ServiceArguments
from shared.redis_connection import check_server
from shared.redis_partials import RedisPartials
from shared.redis_stream import Streams
from shared.stage import adopting_orphans
from shared.stream import PROMPTS
from shared.tokenizer import Tokenizer
from shared.watchdog import watched

logger = logging.getLogger(__name__)

_LAST_SAVE_SECONDS = 5.0


class ReplicaEngine(UpdatableEngine, Protocol):
    """What a replica needs of vLLM; `services.rollout.engine.VllmEngine` is it."""

    @property
    def kv_cache_tokens(self) -> int: ...

    async def wait_until_dead(self) -> None: ...


async def serve_replica(given: ServiceArguments, stop: asyncio.Event) -> None:
    """From loading the engine to the last group in flight.

    The engine's process is forked, so it comes before everything that starts threads; what can be
    wrong with the run is looked at even before, since loading takes long.
    """
    await check_server(given.redis_url, timeout_seconds=given.config.network.call_timeout_seconds)
    tokenizer = Tokenizer(given.config.model_path)
    engine = await VllmEngine.start(_settings(given))
    try:
        await serve_engine(
            given, stop, engine, replica=Replica(), stop_token_ids=tokenizer.stop_token_ids
        )
    finally:
        await engine.shutdown()


async def serve_engine(
    given: ServiceArguments,
    stop: asyncio.Event,
    engine: ReplicaEngine,
    *,
    replica: Replica,
    stop_token_ids: tuple[int, ...],
) -> None:
    """What a process does with the engine that it loaded: metrics, streams, one replica."""
    metrics = show_metrics(given)
    async with connected(given, "rollout") as streams:
        await run_replica(
            given,
            stop,
            engine,
            streams,
            replica=replica,
            stop_token_ids=stop_token_ids,
            metrics_address=f"{given.host}:{metrics.port}",
            answer_health=metrics.answer_health,
        )


async def run_replica(
    given: ServiceArguments,
    stop: asyncio.Event,
    engine: ReplicaEngine,
    streams: Streams,
    *,
    replica: Replica,
    stop_token_ids: tuple[int, ...],
    metrics_address: str,
    answer_health: Callable[[Ask], None] | None = None,
) -> None:
    """A replica's life, from a loaded engine to the last group in flight.

    Args:
        answer_health: is given what says how the replica does, once that is known.
    Raises:
        EngineError: the engine ended.
        StreamError: another process took this replica's name.
    """
    config = given.config
    registry = Registry(streams.client, prefix=streams.prefix)
    sampler = _sampler(given, engine, streams, replica, registry, stop_token_ids)
    servicer = RolloutServicer(
        name=given.name,
        engine=engine,
        replica=replica,
        sampler=sampler,
        max_length=config.model.max_length,
        tls_folder=None if given.tls is None else str(given.tls.folder),
    )
    # Before the lease: the learner calls whoever holds one.
    await replica.handle(Event.READY)
    async with (
        present(
            given,
            "rollout",
            name=given.name,
            service=SERVICE,
            port=config.network.rollout_port,
            add=lambda server: pb_grpc.add_RolloutServicer_to_server(servicer, server),
            registry=registry,
            metrics_address=metrics_address,
            answer_health=answer_health,
        ) as (server, lease),
        watched(sampler.report, server, "rollout", stall_seconds=config.watchdog.stall_seconds),
        adopting_orphans(
            sampler.adopt, registry, "rollout", idle_seconds=config.redis.reclaim_seconds
        ),
    ):
        logger.info("replica %s listens on port %d", given.name, server.port)
        await _until_the_end(sampler, stop, replica, engine, lease)
    await replica.handle(Event.FINISHED)


def _sampler(
    given: ServiceArguments,
    engine: ReplicaEngine,
    streams: Streams,
    replica: Replica,
    registry: Registry,
    stop_token_ids: tuple[int, ...],
) -> Sampler:
    config = given.config
    return Sampler(
        name=given.name,
        engine=engine,
        replica=replica,
        announced=Announced(
            registry.announced_version,
            replica=replica,
            max_staleness=config.learner.max_staleness,
            patience_seconds=config.redis.reclaim_seconds,
        ),
        prompts=streams.prompts,
        rollouts=streams.rollouts,
        dead_letter=streams.dead_letter,
        stop_token_ids=stop_token_ids,
        concurrency=_concurrency(config, engine),
        keeper=Keeper(
            RedisPartials(streams.client, prefix=streams.prefix, stream=PROMPTS),
            consumer=given.name,
            replica=replica,
            every_tokens=config.rollout.partial_tokens,
            max_staleness=config.learner.max_staleness,
        ),
        max_attempts=config.redis.max_attempts,
        reclaim_seconds=config.redis.reclaim_seconds,
        drain_seconds=config.rollout.drain_seconds,
    )


def _concurrency(config: RunConfig, engine: ReplicaEngine) -> Concurrency:
    """Begins with the groups that fit whatever they become; measured pressure decides on more."""
    rollout = config.rollout
    fitting = surely_fitting(
        engine.kv_cache_tokens, group_size=rollout.group_size, max_tokens=config.model.max_length
    )
    return Concurrency(initial=fitting, maximum=rollout.max_concurrent_groups)


async def _until_the_end(
    sampler: Sampler,
    stop: asyncio.Event,
    replica: Replica,
    engine: ReplicaEngine,
    lease: asyncio.Task[None],
) -> None:
    """Sample until the order to stop, then until the groups in flight are through.

    Raises:
        EngineError: the engine's process ended.
        StreamError: another process took this replica's name.
    """
    sampling = asyncio.create_task(sampler.run(), name="sampler")
    stopping = asyncio.create_task(stop.wait())
    death = asyncio.create_task(engine.wait_until_dead())
    try:
        await asyncio.wait({stopping, death, sampling, lease}, return_when=asyncio.FIRST_COMPLETED)
        if not lease.done():
            if not replica.is_ending:
                await replica.handle(Event.DRAIN)
            await asyncio.wait({sampling, death, lease}, return_when=asyncio.FIRST_COMPLETED)
        if death.done():
            # The groups in flight save what this process knows of them, and end.
            await asyncio.wait({sampling}, timeout=_LAST_SAVE_SECONDS)
            raise EngineError("the engine's process ended; others go on with the groups in flight")
        for task in (sampling, lease):
            if task.done():
                task.result()
    finally:
        sampling.cancel()
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
