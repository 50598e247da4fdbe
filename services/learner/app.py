"""One rank of the learner, wired. Rank 0 runs the loop; the others follow its engine."""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from transformers import AutoConfig

from protos import learner_pb2_grpc as pb_grpc
from services.learner.catch_up import CatchUp
from services.learner.engine import LearnerEngine
from services.learner.evaluation import Evaluator, LawFit
from services.learner.feeder import Feeder
from services.learner.fleet import Fleet
from services.learner.inbox import CONSUMER, Inbox
from services.learner.journal import Journal
from services.learner.ledger import Ledger
from services.learner.loop import Learner
from services.learner.outage import Outage
from services.learner.progress import Progress
from services.learner.publisher import OnEngine, Publisher
from services.learner.reconcile import Reconciler
from services.learner.refit import Refitter
from services.learner.service import SERVICE, LearnerServicer
from services.learner.watchdog import Watchdog
from shared import tracing
from shared.config import RunConfig
from shared.device import find_device
from shared.lease import Registry
from shared.metrics import (
    LEARNER_ENTROPY_BOUND,
    describe_process,
    learner_gauges,
    serve_metrics,
    watch_steps,
)
from shared.metrics_server import MetricsServer
from shared.process import ServiceArguments
from shared.redis_connection import Patience, check_server
from shared.redis_stream import Streams, open_streams
from shared.rpc import serve
from shared.run_file import keep_run_file
from shared.tasks.registry import load_task
from shared.tasks.task import Problem
from shared.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

CANARY_TOKENS = 32

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
    config, network, redis = given.config, given.config.network, given.config.redis
    metrics = _serve_metrics(given)
    progress = Progress()
    outage = Outage(given.redis_url, progress)
    async with (
        tracing.exporting(
            given.environment.traces_endpoint, role="learner", name=given.name, run_id=given.run_id
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
        learner = _wire(given, streams, engine, on_engine, progress)
        catch_up = CatchUp(learner.publisher)
        servicer = LearnerServicer(
            run_id=given.run_id,
            num_steps=config.run.num_steps,
            progress=learner.progress,
            publisher=learner.publisher,
            catch_up=catch_up,
        )
        registry = Registry(streams.client, prefix=streams.prefix)
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
            watchdog = Watchdog(
                progress=learner.progress,
                streams=streams.impatient(),
                registry=registry,
                publisher=learner.publisher,
                stall_seconds=config.watchdog.stall_seconds,
            )
            async with (
                watchdog.watching(server),
                catch_up.running(f"{given.host}:{server.port}") as catching_up,
            ):
                await _run(learner, outage, {lease, catching_up}, stop, resume=given.resume)
            if given.stays and learner.progress.is_finished:
                await _until_told(stop, lease)


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


def _wire(
    given: ServiceArguments,
    streams: Streams,
    engine: LearnerEngine,
    on_engine: OnEngine,
    progress: Progress,
) -> Learner:
    config = given.config
    task = load_task(config.task.name, config.task.params)
    problems = task.problems("train")
    tokenizer = Tokenizer(config.model_path, use_chat_template=config.model.use_chat_template)
    registry = Registry(streams.client, prefix=streams.prefix, patience=streams.patience)
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
    inbox, reconciler = _intake(
        config,
        streams,
        ledger,
        feeder,
        evaluator,
        vocabulary=_vocabulary(config.model_path),
        on_evaluated=lambda metrics: learner.on_evaluated(metrics),
    )
    learner = Learner(
        config=config,
        run_folder=given.run_folder,
        streams=streams,
        ledger=ledger,
        feeder=feeder,
        inbox=inbox,
        reconciler=reconciler,
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
        progress=progress,
    )
    return learner


def _intake(
    config: RunConfig,
    streams: Streams,
    ledger: Ledger,
    feeder: Feeder,
    evaluator: Evaluator,
    *,
    vocabulary: int,
    on_evaluated: Callable[[dict[str, Any]], None],
) -> tuple[Inbox, Reconciler]:
    """What takes groups, and what sees that those which are out can still come."""
    inbox = Inbox(
        scored=streams.scored,
        dead_letter=streams.dead_letter,
        ledger=ledger,
        feeder=feeder,
        evaluator=evaluator,
        on_evaluated=on_evaluated,
        vocabulary=vocabulary,
        max_length=config.model.max_length,
        max_staleness=config.learner.max_staleness,
        max_attempts=config.redis.max_attempts,
        replace_degenerate=config.advantage.dynamic_sampling,
        max_degenerate_batches=config.advantage.max_degenerate_batches,
    )
    reconciler = Reconciler(
        streams=streams,
        ledger=ledger,
        feeder=feeder,
        evaluator=evaluator,
        inbox=inbox,
        on_evaluated=on_evaluated,
        seconds=config.redis.reconcile_seconds,
        max_attempts=config.redis.max_attempts,
    )
    return inbox, reconciler


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
        tls=given.tls,
    )
    refitter = Refitter(
        bucket_bytes=weights.bucket_mib * 2**20,
        timeout_seconds=weights.timeout_seconds,
        canary_token_ids=canary_token_ids,
        canary_tolerance=weights.canary_tolerance,
    )
    return Publisher(
        fleet=fleet,
        refitter=refitter,
        registry=registry,
        engine=engine,
        on_engine=on_engine,
        republish_seconds=weights.republish_seconds,
        keeps_copy=weights.catch_up == "stream",
    )


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


def _vocabulary(model_path: str) -> int:
    """Ids that the model's embedding has: more than its tokenizer knows, as a rule."""
    return int(AutoConfig.from_pretrained(model_path).get_text_config().vocab_size)


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
