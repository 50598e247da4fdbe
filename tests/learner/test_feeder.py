"""Whole runs over in-memory streams: the feeder, the ledger and the inbox with dynamic sampling."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from services.learner.ledger import Ledger
from shared.codec import decode_prompt_group, encode_scored_group
from shared.memory_stream import MemoryStream
from shared.records import Outcome
from shared.stream import Entry
from tests.factories import make_scored
from tests.learner.test_inbox import ERRORS, FAILED, SOLVED, Scene

NUM_STEPS = 4
NUM_PROBLEMS = 8
MIXED = (Outcome.PASS, Outcome.FAIL)
CAPACITY = 4096

Outcomes = tuple[Outcome, Outcome]


@dataclass(frozen=True)
class Setting:
    """A run; the group of a position comes out as `fates[position % len(fates)]`."""

    fates: Sequence[Outcomes]
    groups_per_batch: int = 2
    max_staleness: int = 1
    max_degenerate_batches: int = 2
    seed: int = 0
    burst: int = 1

    @property
    def max_replaced(self) -> int:
        return self.max_degenerate_batches * self.groups_per_batch

    def fate(self, position: int) -> Outcomes:
        return self.fates[position % len(self.fates)]


class ImpatientStream(MemoryStream):
    """Answers at once that there is nothing."""

    async def claim(self, consumer: str, *, count: int, wait_seconds: float) -> list[Entry]:
        return await super().claim(consumer, count=count, wait_seconds=0.0)


class CrashedError(Exception):
    """The learner was killed."""


async def nothing_happens() -> None:
    pass


@dataclass
class Run:
    """The learner's loop without a model; groups come back out of order, `burst` at a time.

    Attributes:
        on_event: called at both ends of a step and whenever no group came.
        batches: the positions of each batch.
        replaced: groups replaced for each batch.
    """

    setting: Setting
    prompts: MemoryStream = field(
        default_factory=lambda: ImpatientStream(name="p", capacity=CAPACITY)
    )
    scored: MemoryStream = field(
        default_factory=lambda: ImpatientStream(name="s", capacity=CAPACITY)
    )
    on_event: Callable[[], Awaitable[None]] = nothing_happens
    step: int = 0
    batches: list[list[int]] = field(default_factory=list)
    replaced: list[int] = field(default_factory=list)
    most_outstanding: int = 0

    def __post_init__(self) -> None:
        self.ledger = Ledger(run_id="run", num_problems=NUM_PROBLEMS, seed=1)
        scene = Scene(
            prompts=self.prompts,
            scored=self.scored,
            ledger=self.ledger,
            run=f"""
[run]
name = "run"
num_steps = {NUM_STEPS}
[warmup]
[learner]
groups_per_batch = {self.setting.groups_per_batch}
max_staleness = {self.setting.max_staleness}
""",
            replace_degenerate=True,
            max_degenerate_batches=self.setting.max_degenerate_batches,
        )
        self.inbox, self.feeder = scene.inbox, scene.feeder
        self.reconciler = scene.make_reconciler()

    async def go(self) -> None:
        while self.step < NUM_STEPS:
            await self.feeder.fill(policy_version=self.step)
            await self._observe()
            batch = await self.inbox.take_batch(
                self.setting.groups_per_batch,
                policy_version=self.step,
                while_waiting=self._wait,
            )
            positions = [self.ledger.position(group.rollout.prompt.uid) for group in batch]
            self.batches.append(positions)
            self.replaced.append(self.inbox.num_replaced)
            for position in positions:
                self.ledger.finish(position)
            self.step += 1
            await self._observe()

    async def recover(self, state: str) -> None:
        """Begin at a checkpoint, with whatever the streams hold."""
        self.ledger.load_state_dict(json.loads(state))
        self.step = self.ledger.num_trained // self.setting.groups_per_batch
        await self.inbox.recover()
        await self.reconciler.recover(policy_version=self.step)

    async def _wait(self, missing: int) -> None:
        await self._observe()
        await self.prompts.claim("rollout", count=CAPACITY, wait_seconds=0.0)
        waiting = await self.prompts.pending("rollout")
        assert waiting, f"deadlock: {missing} groups missing, none on its way"
        for entry in sorted(waiting, key=self._slowness)[: self.setting.burst]:
            uid = decode_prompt_group(entry.payload).uid
            group = make_scored(
                uid.index,
                epoch=uid.epoch,
                attempt=uid.attempt,
                outcomes=self.setting.fate(self.ledger.position(uid)),
                versions=(self.step, self.step),
            )
            await self.prompts.finish(entry, output=self.scored, payload=encode_scored_group(group))

    def _slowness(self, entry: Entry) -> float:
        uid = decode_prompt_group(entry.payload).uid
        return Random(f"{self.setting.seed}/{uid.epoch}/{uid.index}/{uid.attempt}").random()

    async def _observe(self) -> None:
        self.most_outstanding = max(self.most_outstanding, self.ledger.num_outstanding)
        await self.on_event()


@st.composite
def made_settings(draw: st.DrawFn, *fates: Outcomes) -> Setting:
    return Setting(
        fates=draw(
            st.lists(st.sampled_from(fates), min_size=1, max_size=12).filter(
                lambda chosen: set(chosen) != {ERRORS}
            )
        ),
        groups_per_batch=draw(st.integers(1, 3)),
        max_staleness=draw(st.integers(0, 2)),
        max_degenerate_batches=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 9)),
        burst=draw(st.integers(1, 4)),
    )


def assert_batches_are_right(run: Run) -> None:
    """Full, no position twice, and degenerate only after the cap."""
    assert [len(batch) for batch in run.batches] == [run.setting.groups_per_batch] * NUM_STEPS
    trained = [position for batch in run.batches for position in batch]
    assert len(set(trained)) == len(trained) == run.ledger.num_trained
    for batch, replaced in zip(run.batches, run.replaced, strict=True):
        assert replaced <= run.setting.max_replaced
        if replaced < run.setting.max_replaced:
            assert {run.setting.fate(position) for position in batch} == {MIXED}


@given(setting=made_settings(MIXED, SOLVED, FAILED, ERRORS))
def test_a_run_trains_full_batches_that_teach_and_loses_no_group(setting: Setting) -> None:
    run = Run(setting)
    asyncio.run(run.go())
    assert_batches_are_right(run)
    assert run.most_outstanding <= (setting.max_staleness + 1) * setting.groups_per_batch
    ledger = run.ledger
    assert (ledger.num_outstanding, ledger.done) == (0, set())
    assert ledger.num_skipped == sum(run.replaced)
    assert ledger.frontier == ledger.num_trained + ledger.num_skipped + len(ledger.abandoned)
    assert ledger.frontier == ledger.cursor
    trained = {position for batch in run.batches for position in batch}
    for position in set(range(ledger.frontier)) - trained - ledger.abandoned:
        assert setting.fate(position) in (SOLVED, FAILED)


def test_a_task_that_is_all_failed_comes_to_its_end_at_the_price_of_the_cap() -> None:
    run = Run(Setting(fates=[FAILED], max_degenerate_batches=3))
    asyncio.run(run.go())
    assert run.replaced == [6] * NUM_STEPS
    assert run.ledger.num_trained == 2 * NUM_STEPS
    assert run.ledger.num_skipped == 6 * NUM_STEPS


@dataclass
class Killer:
    """Writes a checkpoint at one event of a run and kills it at a later one, or at its end."""

    run: Run
    checkpoint_at: int
    crash_at: int
    is_acknowledged: bool
    state: str = ""
    num_events: int = 0

    async def strike(self) -> None:
        if self.num_events == self.checkpoint_at:
            self.state = json.dumps(self.run.ledger.state_dict())
            if self.is_acknowledged:
                await self.run.inbox.acknowledge()
        if self.num_events == self.crash_at:
            raise CrashedError
        self.num_events += 1


async def killed(setting: Setting, data: st.DataObject) -> Killer:
    """A run that is dead; its checkpoint, of any moment, may not have been acknowledged."""
    counted = Killer(Run(setting), checkpoint_at=-1, crash_at=-1, is_acknowledged=False)
    counted.run.on_event = counted.strike
    await counted.run.go()
    checkpoint_at = data.draw(st.integers(0, counted.num_events - 1), label="checkpoint at")
    killer = Killer(
        Run(setting),
        checkpoint_at=checkpoint_at,
        crash_at=data.draw(st.integers(checkpoint_at, counted.num_events - 1), label="crash at"),
        is_acknowledged=data.draw(st.booleans(), label="acknowledged"),
    )
    killer.run.on_event = killer.strike
    try:
        await killer.run.go()
    except CrashedError:
        return killer
    raise AssertionError("the crash is at an event of the run")


async def resumed(dead: Killer, run: Run) -> Run:
    """The run again from its checkpoint; what it trained since then is forgotten."""
    await run.recover(dead.state)
    run.batches = dead.run.batches[: run.step]
    run.replaced = dead.run.replaced[: run.step]
    await run.go()
    return run


@given(setting=made_settings(MIXED, SOLVED, FAILED), data=st.data())
def test_a_run_resumed_from_any_moment_takes_the_batches_it_would_have_taken(
    setting: Setting, data: st.DataObject
) -> None:
    whole = Run(setting)
    asyncio.run(whole.go())

    async def interrupted() -> Run:
        dead = await killed(setting, data)
        return await resumed(dead, Run(setting, dead.run.prompts, dead.run.scored))

    run = asyncio.run(interrupted())
    assert run.batches == whole.batches
    assert run.replaced == whole.replaced
    assert run.ledger.num_skipped == whole.ledger.num_skipped
    assert (run.ledger.frontier, run.ledger.num_outstanding) == (whole.ledger.frontier, 0)


@given(setting=made_settings(MIXED, SOLVED, FAILED, ERRORS), data=st.data())
def test_a_run_whose_streams_were_wiped_still_trains_full_batches_that_teach(
    setting: Setting, data: st.DataObject
) -> None:
    async def interrupted() -> Run:
        return await resumed(await killed(setting, data), Run(setting))

    run = asyncio.run(interrupted())
    assert_batches_are_right(run)
    assert run.ledger.num_outstanding == 0
