"""The learner's loop: the run itself, on one screen.

    fill     put prompt groups on `prompts`, as far as admission allows
    take     wait for a batch of scored groups, none staler than the bound
    train    advantage, loss, entropy control, optimiser step           -> policy version v + 1
             meanwhile the next batch is claimed, decoded and prepared
    publish  bring v + 1 to every replica while their generations stay in flight
    record   a row of metrics.jsonl and one of ledger.jsonl; the same values on /metrics
    evaluate, checkpoint   when due; a checkpoint acknowledges what it contains

Consumes scored groups. Waits for them, and while it waits brings late replicas up to date.
Unblocked by verifiers. Stops when the last step is done, or when asked to: then a checkpoint is
written first. The others are written while it trains on.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from services.learner.checkpoint import Checkpoint, newest_checkpoint
from services.learner.evaluation import Evaluator, LawFit
from services.learner.feeder import Feeder
from services.learner.inbox import Inbox, trace_end
from services.learner.ledger import Ledger
from services.learner.measures import StepReport
from services.learner.outage import StopRequestedError
from services.learner.prepared import Preparation, Prepared
from services.learner.progress import Progress
from services.learner.publisher import OnEngine, Publication, Publisher
from services.learner.reconcile import Reconciler
from services.learner.run_record import RunRecord
from services.learner.saver import EngineSnapshot, Saver
from services.learner.telemetry import observe_queues
from shared.config import RunConfig
from shared.errors import CheckpointError, StreamError
from shared.metrics.learner import LEARNER_PHASE
from shared.records import ScoredGroup
from shared.redis_stream import Streams

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1


class TrainingEngine(Protocol):
    """What the loop needs of DeepSpeed; `services.learner.engine.LearnerEngine` is it."""

    def prepare(self, groups: Sequence[ScoredGroup], policy_version: int) -> Prepared: ...

    def train_prepared(self, prepared: Prepared, *, step: int) -> StepReport: ...

    def snapshot(self, *, copies: bool) -> EngineSnapshot: ...

    def load(self, folder: Path) -> None: ...

    def export(self, folder: Path) -> None: ...


@dataclass(slots=True, kw_only=True)
class Learner:
    """The parts of a run, wired by `services.learner.wiring`, and the loop over them."""

    config: RunConfig
    run_folder: Path
    streams: Streams
    ledger: Ledger
    feeder: Feeder
    inbox: Inbox
    reconciler: Reconciler
    evaluator: Evaluator
    law: LawFit
    publisher: Publisher
    engine: TrainingEngine
    on_engine: OnEngine
    record: RunRecord
    progress: Progress
    phases: dict[str, float] = field(default_factory=dict)
    preparation: Preparation = field(init=False)
    saver: Saver = field(init=False)

    def __post_init__(self) -> None:
        self.preparation = Preparation(
            lambda groups, policy_version: self.engine.prepare(groups, policy_version)
        )
        checkpoint = self.config.checkpoint
        self.saver = Saver(
            config=checkpoint,
            root=self._checkpoints,
            snapshot=lambda: self.engine.snapshot(copies=checkpoint.asynchronous),
            on_engine=self.on_engine,
            inbox=self.inbox,
            progress=self.progress,
        )

    async def run(self, *, resume: bool) -> None:
        """From the start, or the newest checkpoint, to the last step; or until asked to stop."""
        try:
            await self._begin(resume=resume)
        except StopRequestedError:
            logger.info("stops before its first step as asked")
            return
        try:
            while self.progress.step < self.config.run.num_steps:
                await self._step()
            with self.progress.awaiting("the last evaluations", self.evaluator.num_missing):
                await self.inbox.take_evaluations(while_waiting=self._wait_for_evaluations)
        except StopRequestedError:
            logger.info("stops at step %d as asked", self.progress.step)
            await self._last_checkpoint()
            return
        await self._last_checkpoint()
        self.progress.enter("exports the model")
        await self.on_engine(lambda: self.engine.export(self.run_folder / "model"))
        self.progress.is_finished = True
        self.progress.enter("has finished")
        logger.info("finished after %d steps", self.progress.step)

    def on_evaluated(self, metrics: dict[str, Any]) -> None:
        """An evaluation is complete: a point of the law, and a row of its own."""
        self.law.add_score(int(metrics["eval_policy_version"]), metrics["eval_score"])
        self.record.write({"step": self.progress.step, **metrics})

    async def _begin(self, *, resume: bool) -> None:
        checkpoint = None
        if resume:
            self.progress.enter("reads the checkpoint to go on from", is_waiting=True)
            # All of it, which may take minutes; leases and health are answered meanwhile.
            checkpoint = await asyncio.to_thread(newest_checkpoint, self._checkpoints)
            if self.progress.is_stopping:
                raise StopRequestedError
        step = checkpoint.step if checkpoint else 0
        state = checkpoint.state if checkpoint else {}
        self.record.cut_to(state.get("journals", {}), state.get("rows"))
        if checkpoint is not None:
            await self._restore(checkpoint)
        if resume:
            await self.reconciler.drop_lost_evaluations(step=step)
        await self._publish()
        if resume:
            await self.inbox.recover()
            await self.reconciler.recover(policy_version=step)
        if checkpoint is None and self.evaluator.is_due(0):
            await self.evaluator.issue(0, policy_version=0)

    async def _step(self) -> None:
        started, before = time.monotonic(), self.progress.policy_version
        step = self.progress.step + 1
        self.phases.clear()
        await self._obey()
        num_groups = self.config.learner.groups_per_batch
        with self.progress.awaiting(f"batch {step}", num_groups) as awaited:
            await self.feeder.fill(policy_version=before)
            with self._phase("wait_data", awaited.activity):
                batch = await self.inbox.take_batch(
                    num_groups, policy_version=before, while_waiting=self._wait_for_groups
                )
        began = time.time()
        report = await self._train(batch, step=step, policy_version=before)
        for group in batch:
            self.ledger.finish(self.ledger.position(group.rollout.prompt.uid))
            trace_end("train", group, began=began, step=step)
        self.record.write_trained(step, batch, policy_version=before)
        self.progress.step_ended(step)
        publication = await self._publish()
        self._learn_entropy(before, report)
        self.record.write_step(
            batch,
            report,
            phases=self.phases,
            seconds=time.monotonic() - started,
            publication=publication,
        )
        if self.evaluator.is_due(step):
            await self.evaluator.issue(step, policy_version=step)
        if step % self.config.checkpoint.every_steps == 0:
            await self._checkpoint()

    async def _train(
        self, batch: Sequence[ScoredGroup], *, step: int, policy_version: int
    ) -> StepReport:
        """The step; meanwhile the groups of the next one are claimed, decoded and prepared."""
        with self._phase("prepare", f"prepares batch {step}"):
            prepared = await self.preparation.of(batch, policy_version=policy_version)

        def prepare_next(groups: Sequence[ScoredGroup]) -> None:
            self.preparation.begin(groups, policy_version=step)

        with (
            self._phase("forward_backward", f"trains step {step}"),
            self.inbox.reading_ahead(self.config.learner.groups_per_batch, then=prepare_next),
        ):
            report: StepReport = await self.on_engine(
                lambda: self.engine.train_prepared(prepared, step=step)
            )
        return report

    def _learn_entropy(self, policy_version: int, report: StepReport) -> None:
        entropy = report.metrics.get("entropy_after_filter", math.nan)
        if math.isfinite(entropy):
            self.law.add_entropy(policy_version, entropy)

    async def _publish(self) -> Publication | None:
        """None if the run is to stop while Redis is away; resumed, it publishes before all else."""
        version = self.progress.policy_version
        try:
            with self._phase("weight_publish", f"publishes version {version}"):
                publication = await self.publisher.publish(version)
        except StopRequestedError:
            return None
        if publication.served:
            logger.info(
                "published version %d to %s in %.2f s, paused for %.3f s",
                version,
                ", ".join(publication.served),
                publication.seconds,
                publication.pause_seconds,
            )
        return publication

    async def _wait_for_groups(self, num_missing: int) -> None:
        """Called about twice a second while no group comes."""
        await self._obey()
        await self._bring_late_replicas_up()
        await self._make_room()
        await self.reconciler.look_if_due(policy_version=self.progress.policy_version)
        self.progress.still_awaits(num_missing)

    async def _bring_late_replicas_up(self) -> None:
        if await self.publisher.is_worth_repeating(self.progress.policy_version):
            await self._publish()

    async def _make_room(self) -> None:
        """Checkpoint early where only that lets the stream go on.

        What was taken stays on `scored` until a checkpoint; groups that dynamic sampling replaces
        are not foreseen in its size.
        """
        if self.saver.is_under_way and await self._is_scored_full():
            await self._settle()
        if self.inbox.num_unacknowledged and await self._is_scored_full():
            logger.info("checkpoints early: `scored` is full of what was taken")
            await self._checkpoint()
            await self._settle()

    async def _is_scored_full(self) -> bool:
        scored = self.streams.scored
        return (await scored.depth()).reaches(scored.bounds)

    async def _wait_for_evaluations(self, _: int) -> None:
        await self._wait_for_groups(self.evaluator.num_missing)

    async def _observe(self) -> None:
        try:
            self.progress.queues = await observe_queues(self.streams)
        except StreamError as error:
            logger.warning("queues not observed: %s", error)

    async def _obey(self) -> None:
        """Do what was asked from outside between two steps.

        Raises:
            StopRequestedError: the run is to stop.
        """
        await self._serve_requests()
        await self._observe()
        while self.progress.is_paused:
            self.progress.rest()
            await asyncio.sleep(POLL_SECONDS)
            await self._bring_late_replicas_up()
            await self._serve_requests()

    async def _serve_requests(self) -> None:
        if self.progress.is_stopping:
            raise StopRequestedError
        if self.progress.checkpoint_requests:
            await self._checkpoint()
        if self.saver.is_written:
            await self._settle()

    async def _checkpoint(self) -> None:
        """Begin a checkpoint of what the run is now; it is written while the loop goes on."""
        step = self.progress.step
        with self._phase("checkpoint", f"takes the checkpoint of step {step}"):
            await asyncio.to_thread(self.record.sync)
            await self.saver.save(
                {
                    "ledger": self.ledger.state_dict(),
                    "evaluator": self.evaluator.state_dict(),
                    "law": self.law.state_dict(),
                    "metrics": self.progress.metrics,
                    "journals": self.record.lengths,
                    "rows": self.record.kept,
                },
                scores=self.law.scores,
            )

    async def _settle(self) -> None:
        """The end of the checkpoint under way; if it failed training goes on to the next one."""
        with self._phase("checkpoint", "waits until the checkpoint is written"):
            try:
                await self.saver.settle()
            except CheckpointError as error:
                logger.error("%s; training goes on", error)

    async def _last_checkpoint(self) -> None:
        """A checkpoint, and it is there when this returns.

        Raises:
            CheckpointError: it could not be written.
        """
        await self._checkpoint()
        with self._phase("checkpoint", f"writes the checkpoint of step {self.progress.step}"):
            await self.saver.settle()

    async def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        try:
            self.ledger.load_state_dict(state["ledger"])
            self.evaluator.load_state_dict(state["evaluator"])
            self.law.load_state_dict(state["law"])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{checkpoint.folder} is of another run or release ({error}); resume with the run"
                " file and the release that wrote it"
            ) from None
        self.record.show(state["metrics"])
        await self.on_engine(lambda: self.engine.load(checkpoint.engine_folder))
        self.progress.step = self.progress.policy_version = checkpoint.step
        logger.info("resumed from %s", checkpoint.folder)

    @contextmanager
    def _phase(self, name: str, activity: str) -> Iterator[None]:
        started = time.monotonic()
        self.progress.enter(activity)
        try:
            yield
        finally:
            spent = time.monotonic() - started
            self.phases[name] = self.phases.get(name, 0.0) + spent
            LEARNER_PHASE.labels(phase=name).inc(spent)

    @property
    def _checkpoints(self) -> Path:
        return self.run_folder / "checkpoints"
