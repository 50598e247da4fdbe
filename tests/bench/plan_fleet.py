"""A run of real service code with engines and training of a set speed: to hold a plan against.

Learner loop, feeder, inbox, publisher, samplers, verifier, leases, gRPC and Redis are the system's
own. Only an engine's tokens and the optimiser step are waiting: completions have random lengths
and a set time a token, whatever else is in work, and a step has a set time a token. What the run
writes is what any run writes, so that `isentrope plan --from` reads it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from services.cli.plan.rates import Lengths
from services.learner.batch import Batch
from services.learner.evaluation import Evaluator, LawFit
from services.learner.feeder import Feeder
from services.learner.inbox import group_staleness
from services.learner.ledger import Ledger
from services.learner.loop import Learner
from services.learner.measures import StepReport, reward_metrics
from services.learner.prepared import Prepared
from services.learner.progress import Progress
from services.learner.run_record import RunRecord
from services.learner.wiring import intake
from services.rollout.app import run_replica
from services.rollout.replica import Replica
from services.verifier.worker import Worker
from shared.config import Environment, RunConfig, parse_run
from shared.metrics.quantities import LearnerGauges
from shared.process import ServiceArguments
from shared.records import Completion, Outcome, Score, ScoredGroup
from shared.redis_server import embedded_redis
from shared.redis_stream import Streams, open_streams
from shared.tasks.task import Problem
from tests.bench.scale_crew import NumberTokenizer
from tests.learner.publishing import LearnerSide, learner_side
from tests.rollout.simulated import STOP_TOKEN_IDS, SimulatedEngine, Simulation

RUN_ID = "plan"
NUM_PROBLEMS = 1000
VOCABULARY = 1000
ANSWER_SECONDS = 120.0
SECONDS_PER_TOKEN = 0.004
TRAIN_SECONDS_PER_TOKEN = 0.0002
VERIFY_SECONDS = 0.01
LENGTHS = Lengths(mean=250.0, sigma=0.5, maximum=1000)

RUN = """
[run]
name = "plan"
num_steps = {num_steps}
[model]
path = "none"
max_length = 2048
[rollout]
num_replicas = {num_replicas}
group_size = 4
max_completion_tokens = 1000
max_concurrent_groups = 2
partial_tokens = 0
[learner]
groups_per_batch = 8
max_staleness = {max_staleness}
[evaluation]
every_steps = 0
[network]
lease_seconds = 60.0
call_timeout_seconds = 120.0
"""


@dataclass(frozen=True, slots=True)
class Case:
    """One fleet; `speed` is how many times faster everything is than the constants say."""

    num_replicas: int
    max_staleness: int
    num_steps: int
    speed: float = 1.0

    def __str__(self) -> str:
        return f"{self.num_replicas} replicas, max_staleness {self.max_staleness}"


class PacedEngine(SimulatedEngine):
    """An engine with a set time a token; counts the time in which it has work."""

    def __init__(self, name: str, *, speed: float) -> None:
        super().__init__(Simulation(), name=name)
        self.name = name
        self._token_seconds = SECONDS_PER_TOKEN / speed
        self._busy_seconds = 0.0
        self._num_under_way = 0
        self._busy_since = 0.0

    async def generate(self, prompt_token_ids: Sequence[int], **how: Any) -> Completion:
        """A completion of random length."""
        length = LENGTHS.draw(self._random)
        # Read by the base before it first waits, so that requests do not mix.
        self.simulation = replace(
            self.simulation,
            tokens_per_completion=length,
            seconds_per_completion=length * self._token_seconds,
        )
        if not self._num_under_way:
            self._busy_since = time.monotonic()
        self._num_under_way += 1
        try:
            return await super().generate(prompt_token_ids, **how)
        finally:
            self._num_under_way -= 1
            if not self._num_under_way:
                self._busy_seconds += time.monotonic() - self._busy_since

    def busy_seconds(self, now: float) -> float:
        """With a completion under way, so far."""
        return self._busy_seconds + (now - self._busy_since if self._num_under_way else 0.0)

    def progress(self, request_id: str, *, start: int) -> Completion | None:
        """Nothing is saved of a completion under way."""
        return None


class SleepingTraining:
    """In place of DeepSpeed: a step that takes a time for each token.

    Attributes:
        busy_at_step: when the training of each step began, and how long engines had been busy.
    """

    def __init__(self, engines: Sequence[PacedEngine], *, speed: float) -> None:
        self._token_seconds = TRAIN_SECONDS_PER_TOKEN / speed
        self.busy_at_step: list[tuple[float, float]] = []
        self._engines = engines

    def prepare(self, groups: Sequence[ScoredGroup], policy_version: int) -> Prepared:
        """The groups alone."""
        return Prepared(Batch.of([], [], groups), (), b"", ())

    def train_prepared(self, prepared: Prepared, *, step: int) -> StepReport:
        """Wait as long as training would take."""
        groups, policy_version = prepared.batch.groups, step - 1
        now = time.monotonic()
        busy = sum(engine.busy_seconds(now) for engine in self._engines)
        self.busy_at_step.append((now, busy))
        lengths = [len(each.token_ids) for group in groups for each in group.rollout.completions]
        time.sleep(sum(lengths) * self._token_seconds)
        ages = Counter(
            group_staleness(group, policy_version)
            for group in groups
            for _ in group.rollout.completions
        )
        metrics = {"tokens": float(sum(lengths)), "completions": float(len(lengths))}
        return StepReport(reward_metrics(groups) | metrics, {"staleness": sorted(ages.items())}, {})

    def snapshot(self, *, copies: bool) -> NoState:
        """Nothing is worth keeping."""
        return NoState()

    def load(self, folder: Path) -> None:
        """Nothing was kept."""

    def export(self, folder: Path) -> None:
        """Nothing was learnt."""


class NoState:
    """What `SleepingTraining` is at any moment."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing was held."""

    def write(self, folder: Path) -> None:
        """An empty folder."""
        folder.mkdir()


class SleepingPool:
    """In place of the sandbox: a verdict after a set time."""

    task = SimpleNamespace(name="countdown")

    async def score(self, text: str, *, answer: str) -> Score:
        await asyncio.sleep(VERIFY_SECONDS)
        is_even = int(text) % 2 == 0
        return Score(Outcome.PASS if is_even else Outcome.FAIL, float(is_even), "")


def run_fleet(case: Case, folder: Path) -> float:
    """Make the run, with its folder there; the share of time that replicas had nothing in work."""
    folder.mkdir(parents=True)
    text = RUN.format(
        num_steps=case.num_steps,
        num_replicas=case.num_replicas,
        max_staleness=case.max_staleness,
    )
    (folder / "run.toml").write_text(text, "utf8")
    with embedded_redis(folder) as url:
        return asyncio.run(_run(case, parse_run(text), folder, url))


async def _run(case: Case, config: RunConfig, folder: Path, url: str) -> float:
    names = [f"replica-{number}" for number in range(case.num_replicas)]
    engines = [PacedEngine(name, speed=case.speed) for name in names]
    training, stop = SleepingTraining(engines, speed=case.speed), asyncio.Event()
    async with _streams(config, url) as streams:
        side = learner_side(
            streams, timeout_seconds=ANSWER_SECONDS, republish_seconds=ANSWER_SECONDS
        )
        learner = _learner(config, folder, streams, side, training)
        crew = [asyncio.create_task(_replica(config, url, engine, stop)) for engine in engines]
        crew.append(asyncio.create_task(_verifier(config, streams, stop)))
        try:
            await _wait_for_leases(side, case.num_replicas)
            await learner.run(resume=False)
        finally:
            stop.set()
            await asyncio.gather(*crew)
            await side.close()
    return _idle_share(training, case)


def _idle_share(training: SleepingTraining, case: Case) -> float:
    """From the step that a plan begins with to the last one."""
    (began, busy_before), (ended, busy) = (
        training.busy_at_step[case.max_staleness + 2],
        training.busy_at_step[-1],
    )
    return 1 - (busy - busy_before) / (ended - began) / case.num_replicas


@asynccontextmanager
async def _streams(config: RunConfig, url: str) -> AsyncIterator[Streams]:
    async with open_streams(
        url,
        run_id=RUN_ID,
        prompts=config.redis.prompt_bounds,
        groups=config.redis.group_bounds,
        timeout_seconds=ANSWER_SECONDS,
    ) as streams:
        yield streams


async def _wait_for_leases(side: LearnerSide, count: int) -> None:
    async with asyncio.timeout(ANSWER_SECONDS):
        while len(await side.registry.members("rollout")) < count:
            await asyncio.sleep(0.05)


def _learner(
    config: RunConfig,
    folder: Path,
    streams: Streams,
    side: LearnerSide,
    training: SleepingTraining,
) -> Learner:
    problems = [Problem(str(index), "") for index in range(NUM_PROBLEMS)]
    tokenizer: Any = NumberTokenizer()
    ledger = Ledger(run_id=RUN_ID, num_problems=NUM_PROBLEMS, seed=1)
    parts: dict[str, Any] = {
        "config": config,
        "prompts": streams.prompts,
        "problems": problems,
        "tokenizer": tokenizer,
    }
    feeder = Feeder(ledger=ledger, **parts)
    evaluator = Evaluator(run_id=RUN_ID, **parts)
    inbox, reconciler = intake(
        config,
        streams,
        ledger,
        feeder,
        evaluator,
        vocabulary=VOCABULARY,
        on_evaluated=lambda metrics: None,
    )
    law, progress = LawFit(config.law), Progress()
    return Learner(
        config=config,
        run_folder=folder,
        streams=streams,
        ledger=ledger,
        feeder=feeder,
        inbox=inbox,
        reconciler=reconciler,
        evaluator=evaluator,
        law=law,
        publisher=side.publisher,
        engine=training,
        on_engine=asyncio.to_thread,
        record=RunRecord(
            config=config,
            folder=folder,
            ledger=ledger,
            inbox=inbox,
            law=law,
            gauges=LearnerGauges(),
            progress=progress,
        ),
        progress=progress,
    )


async def _replica(config: RunConfig, url: str, engine: PacedEngine, stop: asyncio.Event) -> None:
    environment = Environment.read({"REDIS_URL": url})
    given = ServiceArguments(config, environment, RUN_ID, engine.name, resume=False)
    try:
        async with _streams(config, url) as streams:
            await run_replica(
                given,
                stop,
                engine,
                streams,
                replica=Replica(),
                stop_token_ids=STOP_TOKEN_IDS,
                metrics_address="127.0.0.1:0",
            )
    finally:
        await engine.shutdown()


async def _verifier(config: RunConfig, streams: Streams, stop: asyncio.Event) -> None:
    pool: Any = SleepingPool()
    tokenizer: Any = NumberTokenizer()
    worker = Worker(
        name="verifier-0",
        pool=pool,
        tokenizer=tokenizer,
        rollouts=streams.rollouts,
        scored=streams.scored,
        dead_letter=streams.dead_letter,
        max_concurrent_groups=config.verifier.max_concurrent_groups,
        max_attempts=config.redis.max_attempts,
    )
    await worker.run(stop)
