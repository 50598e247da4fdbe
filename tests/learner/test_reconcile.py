"""What Redis lost is issued again, what died is given up, and nothing is trained twice."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.cli.audit import audit
from services.learner.labels import label_of, read_label
from services.learner.reconcile import Reconciler
from shared.codec import decode_prompt_group, encode_scored_group
from shared.dead_letters import bury, put_back
from shared.memory_stream import MemoryStream
from shared.metrics.learner import LEARNER_ABANDONED, LEARNER_REISSUED
from shared.records import GroupUid, Outcome, Purpose
from shared.stream import Entry
from tests.factories import make_prompt, make_scored
from tests.learner.test_inbox import FAILED, Scene, WaitedError, evaluated, give_up

MIXED = (Outcome.PASS, Outcome.FAIL)


@pytest.fixture
async def scene() -> Scene:
    """Four groups are out, on `prompts`; batches are of two."""
    made = Scene()
    await made.feeder.fill(policy_version=0)
    return made


async def again(scene: Scene, reconciler: Reconciler) -> list[tuple[int, int]]:
    """Index and attempt of the training groups that a look issues."""
    before = len(await scene.issued())
    await reconciler.look_if_due(policy_version=0)
    return [(uid.index, uid.attempt) for uid in (await scene.issued())[before:]]


def wipe(stream: MemoryStream) -> None:
    stream._messages.clear()


async def scored_by_somebody(scene: Scene, group: Any) -> None:
    """The group moves on from `prompts` as it would in a run."""
    for entry in await scene.prompts.browse():
        if decode_prompt_group(entry.payload).uid == group.rollout.prompt.uid:
            await scene.prompts.finish(
                entry, output=scene.scored, payload=encode_scored_group(group)
            )


def test_a_label_says_which_group_it_is() -> None:
    prompt = make_prompt(17, epoch=3, attempt=2, purpose=Purpose.EVAL)
    assert read_label(label_of(prompt), run_id="run") == (Purpose.EVAL, prompt.uid)


async def test_what_the_streams_lost_is_issued_again_once(scene: Scene) -> None:
    lost = LEARNER_REISSUED.labels(reason="lost")._value.get()
    wipe(scene.prompts)
    reconciler = scene.make_reconciler()
    assert await again(scene, reconciler) == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert await again(scene, reconciler) == []
    assert LEARNER_REISSUED.labels(reason="lost")._value.get() == lost + 4


async def test_what_is_anywhere_on_its_way_or_in_hand_is_not_lost(scene: Scene) -> None:
    reconciler = scene.make_reconciler()
    await scored_by_somebody(scene, make_scored(0))
    await scored_by_somebody(scene, make_scored(1))
    await scene.prompts.claim("rollout", count=1, wait_seconds=0.1)
    first = (await scene.prompts.browse())[0]
    await scene.prompts.finish(first, output=scene.rollouts, payload=b"sampled")
    found: list[list[tuple[int, int]]] = []

    async def look(missing: int) -> None:
        found.append(await again(scene, reconciler))
        if len(found) == 1:
            wipe(scene.scored)  # groups 0 and 1 are in hand: no stream has them any more
        else:
            raise WaitedError

    with pytest.raises(WaitedError):
        await scene.inbox.take_batch(3, policy_version=0, while_waiting=look)
    assert found == [[], []]


async def test_a_dropped_group_that_lies_on_the_stream_does_not_hide_a_lost_attempt(
    scene: Scene,
) -> None:
    await scored_by_somebody(scene, make_scored(0, versions=(0, 0)))
    with pytest.raises(WaitedError):
        await scene.take(policy_version=3)  # too stale: attempt 1 is issued
    wipe(scene.prompts)
    assert (await scene.scored.depth()).pending == 1
    assert (0, 2) in await again(scene, scene.make_reconciler())


async def test_a_dead_letter_is_tried_again_and_then_given_up(scene: Scene) -> None:
    reconciler = scene.make_reconciler()
    abandoned = LEARNER_ABANDONED.labels(reason="dead_letter")._value.get()

    async def die(attempt: int) -> None:
        (entry,) = [
            entry
            for entry in await scene.prompts.browse()
            if decode_prompt_group(entry.payload).uid == GroupUid("run", 0, 2, attempt)
        ]
        await bury(entry, scene.prompts, scene.dead, error="killed the engine")

    await die(0)
    assert await again(scene, reconciler) == [(2, 1)]
    await die(1)
    assert await again(scene, reconciler) == [(4, 0)]  # the next of the order takes its place
    assert scene.ledger.abandoned == {2}
    assert LEARNER_ABANDONED.labels(reason="dead_letter")._value.get() == abandoned + 1
    assert len(await scene.dead.peek()) == 2  # for a person to look at
    assert scene.ledger.account()["abandoned"] == [[0, 2, 1]]


async def test_a_loss_does_not_count_against_a_group_that_died_before(scene: Scene) -> None:
    reconciler = scene.make_reconciler()
    await bury((await scene.prompts.browse())[2], scene.prompts, scene.dead, error="flaky")
    assert await again(scene, reconciler) == [(2, 1)]
    for attempt in (2, 3, 4):
        wipe(scene.prompts)
        assert (2, attempt) in await again(scene, reconciler)
    assert scene.ledger.abandoned == set()
    assert scene.ledger.failures == {2: 1}


async def test_a_label_of_somebody_else_is_no_group_of_ours(scene: Scene) -> None:
    await scene.rollouts.put(b"what is this", label="a label")
    assert await again(scene, scene.make_reconciler()) == []


async def test_a_dead_letter_that_is_put_back_or_dropped_is_trained_once(scene: Scene) -> None:
    reconciler = scene.make_reconciler()
    entry = (await scene.prompts.browse())[0]
    await bury(entry, scene.prompts, scene.dead, error="flaky")
    assert await again(scene, reconciler) == [(0, 1)]
    (letter,) = await scene.dead.browse()
    await put_back(letter, scene.dead, scene.prompts, timeout_seconds=1.0)
    assert await again(scene, reconciler) == []
    for attempt in (1, 0):
        await scored_by_somebody(scene, make_scored(0, attempt=attempt))
    await scored_by_somebody(scene, make_scored(1))
    assert await scene.take() == [0, 1]
    assert scene.inbox.dropped == {"duplicate": 1}


async def test_a_dropped_dead_letter_does_not_stall_the_run(scene: Scene) -> None:
    entry = (await scene.prompts.browse())[1]
    await bury(entry, scene.prompts, scene.dead, error="flaky")
    await scene.dead.acknowledge([letter.id for letter in await scene.dead.browse()])
    assert await again(scene, scene.make_reconciler()) == [(1, 1)]


async def test_nobody_looks_before_it_is_due_but_at_once_after_another_server_came(
    scene: Scene,
) -> None:
    reconciler = scene.make_reconciler(seconds=3600.0)
    wipe(scene.prompts)
    assert await again(scene, reconciler) == []
    scene.streams.server_name = "restarted"
    assert len(await again(scene, reconciler)) == 4


async def test_a_lost_evaluation_group_is_issued_again_and_a_dead_one_given_up(
    scene: Scene,
) -> None:
    reconciler = scene.make_reconciler()
    await scene.evaluator.issue(5, policy_version=5)
    await scored_by_somebody(scene, evaluated(0, *MIXED))
    with pytest.raises(WaitedError):
        await scene.inbox.take_evaluations(while_waiting=give_up)
    for attempt in (0, 1):
        (entry,) = [
            entry
            for entry in await scene.prompts.browse()
            if decode_prompt_group(entry.payload).uid == GroupUid("run", 5, 1, attempt)
        ]
        await bury(entry, scene.prompts, scene.dead, error="killed the engine")
        assert await again(scene, reconciler) == ([(1, 1)] if attempt == 0 else [])
    (metrics,) = scene.evaluated
    assert (metrics["eval_problems"], metrics["eval_score"]) == (1.0, 0.5)
    assert scene.evaluator.num_under_way == 0


async def test_an_evaluation_of_which_all_groups_died_ends_without_a_score(scene: Scene) -> None:
    reconciler = scene.make_reconciler()
    await scene.evaluator.issue(5, policy_version=5)
    while scene.evaluator.num_under_way:
        for entry in await scene.prompts.browse():
            if decode_prompt_group(entry.payload).purpose is Purpose.EVAL:
                await bury(entry, scene.prompts, scene.dead, error="killed the engine")
        await reconciler.look_if_due(policy_version=0)
    assert scene.evaluated == []


async def test_evaluations_of_a_version_that_a_crash_lost_are_taken_back_wherever_they_are(
    scene: Scene,
) -> None:
    """The run resumes at step 5: what it asked for there goes on, and training groups do."""
    await scene.evaluator.issue(5, policy_version=5)
    kept = scene.evaluator.state_dict()
    await scene.evaluator.issue(10, policy_version=10)
    places = {"rollouts": (5, 0), "scored": (10, 0)}
    for entry in await scene.prompts.browse():
        uid = decode_prompt_group(entry.payload).uid
        for name, place in places.items():
            if (uid.epoch, uid.index) == place:
                lost_or_not = evaluated(uid.index, *MIXED, step=uid.epoch)
                await scene.prompts.finish(
                    entry, output=getattr(scene, name), payload=encode_scored_group(lost_or_not)
                )
    await scene.rollouts.put(b"what is this", label="a label")
    await scene.prompts.claim("rollout", count=2, wait_seconds=0.1)

    scene.evaluator.load_state_dict(kept)
    reconciler = scene.make_reconciler()
    await reconciler.drop_lost_evaluations(step=5)
    await reconciler.recover(policy_version=5)

    on_prompts = sorted((await scene.prompts.labels()).values())
    assert on_prompts == ["eval/5/1/0", *(f"train/0/{index}/0" for index in range(4))]
    assert set((await scene.rollouts.labels()).values()) == {"eval/5/0/0", "a label"}
    assert await scene.scored.labels() == {}
    assert scene.announced == [5]

    await scene.evaluator.issue(10, policy_version=10)
    for index in range(2):
        await scored_by_somebody(scene, evaluated(index, *MIXED, step=10))
    with pytest.raises(WaitedError):
        await scene.inbox.take_evaluations(while_waiting=give_up)
    assert [metrics["eval_step"] for metrics in scene.evaluated] == [10.0]


async def test_a_look_announces_the_version_again(scene: Scene) -> None:
    reconciler = scene.make_reconciler(seconds=3600.0)
    await reconciler.look_if_due(policy_version=3)
    assert scene.announced == []
    scene.streams.server_name = "one that has lost it"
    await reconciler.look_if_due(policy_version=3)
    assert scene.announced == [3]


NUM_STEPS = 4


class Impatient(MemoryStream):
    """Answers at once that there is nothing."""

    async def claim(self, consumer: str, *, count: int, wait_seconds: float) -> list[Entry]:
        return await super().claim(consumer, count=count, wait_seconds=0.0)


def impatient(name: str) -> Impatient:
    return Impatient(name=name, capacity=4096)


@dataclass
class Storm:
    """A run on a Redis that forgets: entries, whole streams, or all since an earlier moment."""

    draw: Random
    num_events: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0

    def __post_init__(self) -> None:
        self.scene = Scene(
            prompts=impatient("prompts"),
            rollouts=impatient("rollouts"),
            scored=impatient("scored"),
            dead=impatient("dead_letter"),
            replace_degenerate=True,
        )
        # What a roll-back brings back to the learner is found without a wait.
        self.scene.inbox = self.scene.make_inbox(lost_seconds=0.0)
        self.reconciler = self.scene.make_reconciler()
        self.earlier: list[dict[str, Any]] = self._contents()

    async def go(self) -> None:
        scene = self.scene
        while self.step < NUM_STEPS:
            await scene.feeder.fill(policy_version=self.step)
            batch = await scene.inbox.take_batch(
                2, policy_version=self.step, while_waiting=self._something_happens
            )
            uids = [group.rollout.prompt.uid for group in batch]
            for uid in uids:
                scene.ledger.finish(scene.ledger.position(uid))
            self.step += 1
            self.rows.append(
                {
                    "step": self.step,
                    "trained": [[uid.epoch, uid.index, uid.attempt] for uid in uids],
                    "problems": [scene.ledger.problem_index(uid) for uid in uids],
                    "staleness": [0] * len(uids),
                    "max_staleness": 1,
                    **scene.ledger.account(),
                }
            )
            if self.draw.random() < 0.3:
                await scene.inbox.acknowledge()

    async def _something_happens(self, missing: int) -> None:
        self.num_events += 1
        assert self.num_events < 5000, "the run stalls"
        if self.num_events < 200:  # then the weather clears
            await self._forget()
        await self._work()
        await self.reconciler.look_if_due(policy_version=self.step)

    async def _forget(self) -> None:
        chance, streams = self.draw.random(), self._streams()
        if chance < 0.05:
            for stream in streams:
                wipe(stream)
        elif chance < 0.15:
            for stream, contents in zip(streams, self.earlier, strict=True):
                stream._messages = copy.deepcopy(contents)
        elif chance < 0.3:
            stream = self.draw.choice(streams)
            for id in list(stream._messages):
                if self.draw.random() < 0.5:
                    del stream._messages[id]
        elif chance < 0.5:
            self.earlier = self._contents()
        elif chance < 0.6:
            for entry in (await self.scene.prompts.browse())[:1]:
                await bury(entry, self.scene.prompts, self.scene.dead, error="poison")
        elif chance < 0.7:
            for letter in (await self.scene.dead.browse())[:1]:
                await put_back(letter, self.scene.dead, self.scene.prompts, timeout_seconds=0.1)

    async def _work(self) -> None:
        entries = await self.scene.prompts.browse()
        for entry in self.draw.sample(entries, min(len(entries), self.draw.randint(0, 3))):
            uid = decode_prompt_group(entry.payload).uid
            group = make_scored(
                uid.index,
                epoch=uid.epoch,
                attempt=uid.attempt,
                outcomes=FAILED if self.draw.random() < 0.2 else MIXED,
                versions=(max(0, self.step - self.draw.randint(0, 2)), self.step),
            )
            payload = encode_scored_group(group)
            await self.scene.prompts.finish(entry, output=self.scene.scored, payload=payload)

    def _streams(self) -> list[MemoryStream]:
        return [self.scene.prompts, self.scene.rollouts, self.scene.scored, self.scene.dead]

    def _contents(self) -> list[dict[str, Any]]:
        return [copy.deepcopy(stream._messages) for stream in self._streams()]


@given(seed=st.integers(0, 10**6))
@settings(max_examples=60)
def test_a_run_on_a_redis_that_forgets_trains_each_place_once_and_ends(seed: int) -> None:
    storm = Storm(Random(seed))
    asyncio.run(storm.go())
    measured = [{"step": row["step"], "seconds": 1.0} for row in storm.rows]
    found = audit(storm.rows, measured, seed=1, num_steps=NUM_STEPS)
    assert found.is_right, found.faults
    assert found.ended["trained"] == 2 * NUM_STEPS
