"""The parts of a run, made of its configuration and handed to each other."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any, Literal

from transformers import AutoConfig

from services.learner.engine import LearnerEngine
from services.learner.evaluation import Evaluator, LawFit
from services.learner.feeder import Feeder
from services.learner.fleet import Fleet
from services.learner.inbox import Inbox
from services.learner.ledger import Ledger
from services.learner.loop import Learner
from services.learner.progress import Progress
from services.learner.publisher import OnEngine, Publisher
from services.learner.reconcile import Reconciler
from services.learner.refit import Refitter
from services.learner.run_record import RunRecord
from shared.config import RunConfig
from shared.device import find_device
from shared.lease import Registry
from shared.metrics.learner import learner_gauges
from shared.process import ServiceArguments
from shared.redis_stream import Streams
from shared.tasks.registry import load_task
from shared.tasks.task import Problem
from shared.tokenizer import Tokenizer

CANARY_TOKENS = 32


def wire_learner(
    given: ServiceArguments,
    streams: Streams,
    engine: LearnerEngine,
    on_engine: OnEngine,
    progress: Progress,
) -> Learner:
    """The loop of rank 0, with everything that it works on."""
    config = given.config
    task = load_task(config.task.name, config.task.params)
    tokenizer = Tokenizer(config.model_path, use_chat_template=config.model.use_chat_template)
    problems = task.problems("train")
    ledger, feeder, evaluator = _supply(given, streams, problems, task.problems("eval"), tokenizer)
    inbox, reconciler = intake(
        config,
        streams,
        ledger,
        feeder,
        evaluator,
        vocabulary=_vocabulary(config.model_path),
        on_evaluated=lambda metrics: learner.on_evaluated(metrics),
    )
    canary = _canary(problems, tokenizer, max_length=config.model.max_length)
    law = LawFit(config.law)
    learner = Learner(
        config=config,
        run_folder=given.run_folder,
        streams=streams,
        ledger=ledger,
        feeder=feeder,
        inbox=inbox,
        reconciler=reconciler,
        evaluator=evaluator,
        law=law,
        publisher=_publisher(given, streams, engine, on_engine, canary),
        engine=engine,
        on_engine=on_engine,
        record=_record(given, ledger, inbox, law, progress),
        progress=progress,
    )
    return learner


def _supply(
    given: ServiceArguments,
    streams: Streams,
    problems: Sequence[Problem],
    eval_problems: Sequence[Problem],
    tokenizer: Tokenizer,
) -> tuple[Ledger, Feeder, Evaluator]:
    """What issues prompts, and what keeps the account of them."""
    config = given.config
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
        problems=eval_problems,
        tokenizer=tokenizer,
    )
    return ledger, feeder, evaluator


def intake(
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
        announce=_registry(streams).announce_version,
        on_evaluated=on_evaluated,
        seconds=config.redis.reconcile_seconds,
        max_attempts=config.redis.max_attempts,
    )
    return inbox, reconciler


def _record(
    given: ServiceArguments, ledger: Ledger, inbox: Inbox, law: LawFit, progress: Progress
) -> RunRecord:
    return RunRecord(
        config=given.config,
        folder=given.run_folder,
        ledger=ledger,
        inbox=inbox,
        law=law,
        gauges=learner_gauges(),
        progress=progress,
    )


def _publisher(
    given: ServiceArguments,
    streams: Streams,
    engine: LearnerEngine,
    on_engine: OnEngine,
    canary_token_ids: array[int],
) -> Publisher:
    weights, backend = given.config.weights, _backend(given.config)
    registry = _registry(streams)
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
        min_bytes_per_second=weights.min_mib_per_second * 2**20,
        canary_token_ids=canary_token_ids,
        canary_tolerance=given.config.canary_tolerance,
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


def _registry(streams: Streams) -> Registry:
    return Registry(streams.client, prefix=streams.prefix, patience=streams.patience)


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
