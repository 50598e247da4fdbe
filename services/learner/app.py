"""One rank of the learner, wired. Rank 0 runs the loop; the others follow its engine."""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from protos import learner_pb2_grpc as pb_grpc
from services.learner.engine import LearnerEngine
from services.learner.evaluation import Evaluator, LawFit
from services.learner.feeder import Feeder
from services.learner.fleet import Fleet
from services.learner.inbox import CONSUMER, Inbox
from services.learner.journal import Journal
from services.learner.ledger import Ledger
from services.learner.loop import Learner, Progress
from services.learner.publisher import OnEngine, Publisher
from services.learner.service import SERVICE, LearnerServicer
from shared.config import RunConfig
from shared.device import find_device
from shared.lease import Registry
from shared.metrics import (
    LEARNER_ENTROPY_BOUND,
    describe_process,
    learner_gauges,
    serve_metrics,
)
from shared.process import ServiceArguments
from shared.redis_connection import check_server
from shared.redis_stream import Streams, open_streams
from shared.rpc import serve
from shared.stream import Bounds
from shared.tasks.registry import load_task
from shared.tasks.task import Problem
from shared.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

CANARY_TOKENS = 32


async def run_rank(given: ServiceArguments, stop: asyncio.Event) -> None:
    """The whole life of this rank; the engine has a thread of its own."""
    if given.environment.rank == 0:
        timeout_seconds = given.config.network.call_timeout_seconds
        await check_server(given.redis_url, timeout_seconds=timeout_seconds)
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
    config, network, redis = given.config, given.config.network, given.config.redis
    metrics_port = _serve_metrics(given)
    async with open_streams(
        given.redis_url,
        run_id=given.run_id,
        prompts=Bounds(redis.max_prompts, redis.max_prompts_bytes),
        groups=Bounds(redis.max_groups, redis.max_groups_bytes),
        timeout_seconds=network.call_timeout_seconds,
    ) as streams:
        learner = _wire(given, streams, engine, on_engine)
        servicer = LearnerServicer(
            run_id=given.run_id,
            num_steps=config.run.num_steps,
            progress=learner.progress,
            publisher=learner.publisher,
        )
        registry = Registry(streams.client, prefix=streams.prefix)
        async with (
            serve(
                host=network.host,
                port=network.learner_port,
                port_key="network.learner_port",
                services=[SERVICE],
                add=lambda server: pb_grpc.add_LearnerServicer_to_server(servicer, server),
            ) as server,
            registry.hold(
                "learner",
                CONSUMER,
                address=f"{given.host}:{server.port}",
                metrics_address=f"{given.host}:{metrics_port}",
                seconds=network.lease_seconds,
            ) as lease,
        ):
            await server.set_serving(True)
            await _run(learner, lease, stop, resume=given.resume)


async def _run(
    learner: Learner, lease: asyncio.Task[None], stop: asyncio.Event, *, resume: bool
) -> None:
    """The loop until its end; a signal asks it to stop, a lost lease ends it at once."""

    async def ask_to_stop() -> None:
        await stop.wait()
        learner.progress.is_stopping = True

    asking = asyncio.create_task(ask_to_stop())
    running = asyncio.create_task(learner.run(resume=resume), name="loop")
    try:
        await asyncio.wait({running, lease}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        else:
            lease.result()
    finally:
        for task in (asking, running):
            task.cancel()
        learner.journal.close()
        learner.history.close()
        await learner.publisher.close()


def _wire(
    given: ServiceArguments, streams: Streams, engine: LearnerEngine, on_engine: OnEngine
) -> Learner:
    config = given.config
    task = load_task(config.task.name, config.task.params)
    problems = task.problems("train")
    tokenizer = Tokenizer(config.model_path, use_chat_template=config.model.use_chat_template)
    registry = Registry(streams.client, prefix=streams.prefix)
    ledger = Ledger(run_id=given.run_id, num_problems=len(problems), seed=config.run.seed)
    feeder = Feeder(
        config=config,
        ledger=ledger,
        prompts=streams.prompts,
        problems=problems,
        tokenizer=tokenizer,
    )
    evaluator = Evaluator(
        config=config,
        run_id=given.run_id,
        prompts=streams.prompts,
        problems=task.problems("eval"),
        tokenizer=tokenizer,
    )
    inbox = Inbox(
        scored=streams.scored,
        dead_letter=streams.dead_letter,
        ledger=ledger,
        feeder=feeder,
        evaluator=evaluator,
        on_evaluated=lambda metrics: learner.on_evaluated(metrics),
        max_staleness=config.learner.max_staleness,
        max_attempts=config.redis.max_attempts,
        replace_degenerate=config.advantage.dynamic_sampling,
        max_degenerate_batches=config.advantage.max_degenerate_batches,
    )
    learner = Learner(
        config=config,
        run_folder=given.run_folder,
        streams=streams,
        ledger=ledger,
        feeder=feeder,
        inbox=inbox,
        evaluator=evaluator,
        law=LawFit(config.law),
        publisher=_publisher(
            given,
            registry,
            engine,
            on_engine,
            _canary(problems, tokenizer, max_length=config.model.max_length),
        ),
        engine=engine,
        on_engine=on_engine,
        journal=Journal(given.run_folder / "metrics.jsonl"),
        history=Journal(given.run_folder / "ledger.jsonl"),
        gauges=learner_gauges(),
        progress=Progress(),
    )
    return learner


def _publisher(
    given: ServiceArguments,
    registry: Registry,
    engine: LearnerEngine,
    on_engine: OnEngine,
    canary_token_ids: array[int],
) -> Publisher:
    weights, backend = given.config.weights, _backend(given.config)
    fleet = Fleet(
        registry,
        host=given.host,
        backend=backend,
        layout="pairs" if backend == "gloo" else "one",
        timeout_seconds=weights.timeout_seconds,
    )
    return Publisher(
        fleet=fleet,
        registry=registry,
        engine=engine,
        on_engine=on_engine,
        bucket_bytes=weights.bucket_mib * 2**20,
        timeout_seconds=weights.timeout_seconds,
        canary_token_ids=canary_token_ids,
        canary_tolerance=weights.canary_tolerance,
    )


def _serve_metrics(given: ServiceArguments) -> int:
    config = given.config
    describe_process(
        run_id=given.run_id, model=config.model_path, algorithm=config.policy_loss.loss_mode
    )
    if config.entropy.method == "aent":
        band = config.adaptive_entropy
        LEARNER_ENTROPY_BOUND.labels(bound="lower").set(band.entropy_low)
        LEARNER_ENTROPY_BOUND.labels(bound="upper").set(band.entropy_high)
    return serve_metrics(host=config.network.host, port=config.network.metrics_port)


def _backend(config: RunConfig) -> Literal["gloo", "nccl"]:
    if config.weights.backend == "auto":
        return "nccl" if find_device() == "cuda" else "gloo"
    return config.weights.backend


def _canary(problems: Sequence[Problem], tokenizer: Tokenizer, *, max_length: int) -> array[int]:
    """A few prompts in a row: text that the policy knows well enough to be sure of."""
    token_ids = array("I")
    for problem in problems[:CANARY_TOKENS]:
        token_ids.extend(tokenizer.encode_prompt(problem.prompt))
    # An engine that scores a prompt wants room for a token after it.
    return token_ids[: min(CANARY_TOKENS, max_length - 1)]
