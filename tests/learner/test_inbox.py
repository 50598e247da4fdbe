from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from services.learner.evaluation import Evaluator
from services.learner.feeder import Feeder
from services.learner.inbox import LOST_SECONDS, Inbox, group_staleness, is_degenerate
from services.learner.labels import label_of
from services.learner.ledger import Ledger
from services.learner.reconcile import Reconciler
from shared.codec import decode_prompt_group, encode_scored_group
from shared.config import parse_run
from shared.dead_letters import decode_dead_letter
from shared.memory_stream import MemoryStream, MemoryStreams
from shared.metrics.learner import LEARNER_DEGENERATE, LEARNER_DROPPED
from shared.records import GroupUid, Outcome, Purpose, ScoredGroup
from shared.tasks.task import Problem
from tests.factories import make_scored

RUN = """
[run]
name = "run"
num_steps = 4
[warmup]
[learner]
groups_per_batch = 2
max_staleness = 1
[evaluation]
num_problems = 2
group_size = 2
"""

ERRORS = (Outcome.ERROR, Outcome.TIMEOUT)
SOLVED = (Outcome.PASS, Outcome.PASS)
FAILED = (Outcome.FAIL, Outcome.FAIL)


class OneTokenACharacter:
    """Encodes text without a model."""

    stop_token_ids = (0,)

    def encode_prompt(self, text: str) -> Any:
        from array import array

        return array("I", map(ord, text))


class WaitedError(Exception):
    """Nothing came."""


async def give_up(missing: int) -> None:
    raise WaitedError(missing)


def stream(name: str) -> MemoryStream:
    return MemoryStream(name=name, capacity=64)


@dataclass
class Scene:
    """An inbox over in-memory streams, with a real ledger, feeder and evaluator."""

    prompts: MemoryStream = field(default_factory=lambda: stream("prompts"))
    rollouts: MemoryStream = field(default_factory=lambda: stream("rollouts"))
    scored: MemoryStream = field(default_factory=lambda: stream("scored"))
    dead: MemoryStream = field(default_factory=lambda: stream("dead_letter"))
    ledger: Ledger = field(default_factory=lambda: Ledger(run_id="run", num_problems=8, seed=1))
    evaluated: list[dict[str, Any]] = field(default_factory=list)
    announced: list[int] = field(default_factory=list)
    run: str = RUN
    replace_degenerate: bool = False
    max_degenerate_batches: int = 10

    def __post_init__(self) -> None:
        problems = [Problem(str(number), "") for number in range(8)]
        config: Any = parse_run(self.run)
        tokenizer: Any = OneTokenACharacter()
        self.feeder = Feeder(
            config=config,
            ledger=self.ledger,
            prompts=self.prompts,
            problems=problems,
            tokenizer=tokenizer,
        )
        self.evaluator = Evaluator(
            config=config,
            run_id="run",
            prompts=self.prompts,
            problems=problems,
            tokenizer=tokenizer,
        )
        self.inbox = self.make_inbox()
        self.streams = MemoryStreams(self.prompts, self.rollouts, self.scored, self.dead)

    def make_reconciler(self, *, seconds: float = 0.0) -> Reconciler:
        return Reconciler(
            streams=self.streams,
            ledger=self.ledger,
            feeder=self.feeder,
            evaluator=self.evaluator,
            inbox=self.inbox,
            announce=self.announce,
            on_evaluated=self.evaluated.append,
            seconds=seconds,
            max_attempts=2,
        )

    def make_inbox(self, *, lost_seconds: float = LOST_SECONDS) -> Inbox:
        return Inbox(
            scored=self.scored,
            dead_letter=self.dead,
            ledger=self.ledger,
            feeder=self.feeder,
            evaluator=self.evaluator,
            on_evaluated=self.evaluated.append,
            vocabulary=1000,
            max_length=32,
            max_staleness=1,
            max_attempts=2,
            replace_degenerate=self.replace_degenerate,
            max_degenerate_batches=self.max_degenerate_batches,
            lost_seconds=lost_seconds,
        )

    async def announce(self, policy_version: int) -> None:
        self.announced.append(policy_version)

    async def arrive(self, *groups: ScoredGroup) -> None:
        for group in groups:
            label = label_of(group.rollout.prompt)
            await self.scored.put(encode_scored_group(group), label=label)

    async def take(self, policy_version: int = 0, count: int = 2) -> list[int]:
        batch = await self.inbox.take_batch(
            count, policy_version=policy_version, while_waiting=give_up
        )
        return [group.rollout.prompt.uid.index for group in batch]

    async def issued(self) -> Sequence[GroupUid]:
        return [decode_prompt_group(payload).uid for payload in await self.prompts.peek()]


@pytest.fixture
async def scene() -> Scene:
    made = Scene()
    await made.feeder.fill(policy_version=0)
    return made


async def test_admission_lets_out_staleness_plus_one_batches_and_no_more(scene: Scene) -> None:
    assert [uid.index for uid in await scene.issued()] == [0, 1, 2, 3]
    assert await scene.feeder.fill(policy_version=0) == 0
    scene.ledger.finish(0)
    assert await scene.feeder.fill(policy_version=1) == 1


async def test_the_feeder_stops_when_the_whole_run_is_issued(scene: Scene) -> None:
    for position in range(8):
        if position in scene.ledger.outstanding:
            scene.ledger.finish(position)
        await scene.feeder.fill(policy_version=0)
    assert len(await scene.issued()) == 4 * 2


async def test_a_batch_is_taken_in_the_order_of_arrival(scene: Scene) -> None:
    await scene.arrive(make_scored(2), make_scored(0), make_scored(1))
    assert await scene.take() == [2, 0]


async def test_a_duplicate_is_dropped_whether_trained_or_in_the_same_batch(scene: Scene) -> None:
    scene.ledger.finish(0)
    await scene.arrive(make_scored(0), make_scored(1), make_scored(1, attempt=1), make_scored(2))
    assert await scene.take() == [1, 2]
    assert scene.inbox.dropped == {"duplicate": 2}


async def test_a_stale_group_is_dropped_counted_and_issued_again(scene: Scene) -> None:
    await scene.arrive(
        make_scored(0, versions=(3, 1)), make_scored(1, versions=(3, 2)), make_scored(2)
    )
    with pytest.raises(WaitedError):
        await scene.take(policy_version=3)
    assert scene.inbox.dropped == {"stale": 2}
    assert [(uid.index, uid.attempt) for uid in (await scene.issued())[4:]] == [(0, 1), (2, 1)]


async def test_the_bound_itself_is_still_trained_on(scene: Scene) -> None:
    await scene.arrive(make_scored(0, versions=(2, 2)), make_scored(1, versions=(3, 2)))
    assert await scene.take(policy_version=3) == [0, 1]


async def test_a_group_without_two_verdicts_is_issued_again_and_at_last_given_up(
    scene: Scene,
) -> None:
    await scene.arrive(make_scored(0, outcomes=ERRORS), make_scored(0, attempt=1, outcomes=ERRORS))
    with pytest.raises(WaitedError):
        await scene.take()
    assert scene.inbox.dropped == {"incomplete_group": 2}
    assert scene.ledger.abandoned == {0}
    assert (await scene.issued())[-1].index == 4  # its place in the batch goes to another prompt


async def test_a_failure_that_is_read_again_does_not_count_against_a_later_attempt(
    scene: Scene,
) -> None:
    scene.ledger.reissue(0)
    await scene.arrive(make_scored(0, outcomes=ERRORS), make_scored(0, attempt=1), make_scored(1))
    assert await scene.take() == [0, 1]
    assert scene.ledger.abandoned == set()
    assert len(await scene.issued()) == 4  # and it is not issued a third time


async def test_a_stale_group_that_was_overtaken_by_a_later_attempt_is_not_issued_again(
    scene: Scene,
) -> None:
    scene.ledger.reissue(0)
    await scene.arrive(make_scored(0), make_scored(0, attempt=1, versions=(3, 3)))
    with pytest.raises(WaitedError):
        await scene.take(policy_version=3)
    assert scene.inbox.dropped == {"stale": 1}
    assert len(await scene.issued()) == 4


async def test_nothing_is_acknowledged_before_a_checkpoint(scene: Scene) -> None:
    await scene.arrive(make_scored(0), make_scored(1))
    await scene.take()
    assert (await scene.scored.depth()).pending == 2
    await scene.inbox.acknowledge()
    assert (await scene.scored.depth()).pending == 0


async def test_groups_of_a_batch_that_was_not_completed_stay_pending(scene: Scene) -> None:
    await scene.arrive(make_scored(0))
    with pytest.raises(WaitedError):
        await scene.take()
    await scene.inbox.acknowledge()
    assert (await scene.scored.depth()).pending == 1


async def test_after_a_crash_pending_groups_come_first_in_their_old_order(scene: Scene) -> None:
    await scene.arrive(make_scored(1), make_scored(0))
    await scene.take()
    await scene.arrive(make_scored(2))
    scene.inbox = scene.make_inbox()
    await scene.inbox.recover()
    assert await scene.take(count=3) == [1, 0, 2]


async def test_a_group_whose_claim_was_never_answered_is_found(scene: Scene) -> None:
    await scene.arrive(make_scored(0), make_scored(1))
    await scene.scored.claim("learner", count=1, wait_seconds=0.1)  # this reply was lost
    scene.inbox = scene.make_inbox(lost_seconds=0.0)
    assert await scene.take(count=2) == [0, 1]


async def test_an_entry_whose_reply_was_lost_is_found_while_others_keep_coming(
    scene: Scene,
) -> None:
    await scene.arrive(*(make_scored(index) for index in range(6)))
    await scene.scored.claim("learner", count=1, wait_seconds=0.1)  # this reply was lost
    scene.inbox = scene.make_inbox(lost_seconds=0.0)
    assert 0 in await scene.take(count=3)


async def test_an_entry_that_cannot_be_read_goes_to_dead_letter(scene: Scene) -> None:
    await scene.scored.put(b"poison")
    await scene.arrive(make_scored(0), make_scored(1))
    assert await scene.take() == [0, 1]
    (letter,) = map(decode_dead_letter, await scene.dead.peek())
    assert (letter.stream, letter.payload, letter.deliveries) == ("scored", b"poison", 1)
    assert letter.error


async def test_while_dead_letters_are_full_the_loop_is_asked_and_may_stop(scene: Scene) -> None:
    for _ in range(64):
        assert await scene.dead.put(b"in the way")
    await scene.scored.put(b"poison")
    with pytest.raises(WaitedError):
        await asyncio.wait_for(scene.take(count=1), 60.0)
    assert await scene.scored.peek() == [b"poison"]
    (letter, *_) = await scene.dead.claim("a person", count=1, wait_seconds=0.1)
    await scene.dead.acknowledge([letter.id])
    scene.inbox = scene.make_inbox()
    await scene.inbox.recover()
    await scene.arrive(make_scored(0))
    assert await scene.take(count=1) == [0]
    assert decode_dead_letter((await scene.dead.peek())[-1]).payload == b"poison"


def evaluated(problem: int, *outcomes: Outcome, attempt: int = 0, step: int = 5) -> ScoredGroup:
    return make_scored(
        problem,
        epoch=step,
        attempt=attempt,
        purpose=Purpose.EVAL,
        outcomes=outcomes,
        versions=(step, step),
    )


async def test_an_evaluation_is_summed_up_when_its_last_problem_is_back(scene: Scene) -> None:
    await scene.evaluator.issue(5, policy_version=5)
    await scene.arrive(
        evaluated(0, Outcome.PASS, Outcome.PASS),
        evaluated(0, Outcome.FAIL, Outcome.FAIL, attempt=1),
        evaluated(1, Outcome.PASS, Outcome.FAIL),
    )
    await scene.inbox.take_evaluations(while_waiting=give_up)
    (metrics,) = scene.evaluated
    assert metrics["eval_score"] == pytest.approx(0.75)
    assert metrics["eval_stderr"] == pytest.approx(0.25)
    assert metrics["eval_pass_at_k"] == 1.0
    assert metrics["eval_policy_version"] == 5


async def test_evaluation_groups_are_never_trained_on(scene: Scene) -> None:
    await scene.evaluator.issue(5, policy_version=5)
    await scene.arrive(evaluated(0, Outcome.PASS, Outcome.FAIL), make_scored(0), make_scored(1))
    assert await scene.take() == [0, 1]


async def test_a_resumed_evaluation_asks_only_for_what_is_nowhere(scene: Scene) -> None:
    await scene.evaluator.issue(5, policy_version=5)
    await scene.arrive(evaluated(1, Outcome.PASS, Outcome.FAIL))
    with pytest.raises(WaitedError):
        await scene.inbox.take_evaluations(while_waiting=give_up)
    for wiped, expected in ((Scene(), [(5, 0, 1)]), (Scene(prompts=scene.prompts), [])):
        wiped.evaluator.load_state_dict(json.loads(json.dumps(scene.evaluator.state_dict())))
        before = len(await wiped.issued())
        await wiped.make_reconciler().recover(policy_version=5)
        again = [uid for uid in (await wiped.issued())[before:] if uid.epoch == 5]
        assert [(uid.epoch, uid.index, uid.attempt) for uid in again] == expected


def test_the_staleness_of_a_group_is_that_of_its_worst_token() -> None:
    assert group_staleness(make_scored(versions=(7, 4)), 8) == 4


def scored(*rewards: float, errors: int = 0) -> ScoredGroup:
    """A group with these rewards, the last `errors` of which were never judged."""
    judged = len(rewards) - errors
    group = make_scored(
        outcomes=[Outcome.FAIL] * judged + [Outcome.ERROR] * errors, versions=[0] * len(rewards)
    )
    scores = [
        replace(score, reward=reward) for score, reward in zip(group.scores, rewards, strict=True)
    ]
    return replace(group, scores=tuple(scores))


@pytest.mark.parametrize(
    "group",
    [
        scored(0.0, -0.0),
        scored(0.1, 0.1, 0.1),
        scored(0.5, math.nan, 0.5),
        scored(0.5, math.inf),
        scored(math.nan, math.nan),
        scored(1.0, 1.0, 0.0, errors=1),
    ],
)
def test_a_group_without_two_different_usable_rewards_is_degenerate(group: ScoredGroup) -> None:
    assert is_degenerate(group)


@pytest.mark.parametrize(
    "group", [scored(0.0, 1.0), scored(0.1, 0.1, 0.1 + 1e-16 + 1e-17), scored(0.5, math.nan, 0.25)]
)
def test_two_usable_rewards_that_differ_teach(group: ScoredGroup) -> None:
    assert not is_degenerate(group)


@pytest.fixture
async def dynamic() -> Scene:
    """Replaces degenerate groups: two at most for a batch of two."""
    made = Scene(replace_degenerate=True, max_degenerate_batches=1)
    await made.feeder.fill(policy_version=0)
    return made


def degenerate_total(reason: str) -> float:
    return float(LEARNER_DEGENERATE.labels(reason=reason)._value.get())


async def test_without_dynamic_sampling_degenerate_groups_are_trained_on(scene: Scene) -> None:
    await scene.arrive(make_scored(0, outcomes=SOLVED), make_scored(1, outcomes=FAILED))
    assert await scene.take() == [0, 1]
    assert scene.inbox.num_replaced == 0


async def test_a_degenerate_group_is_replaced_by_the_next_of_the_order(dynamic: Scene) -> None:
    await dynamic.arrive(make_scored(0, outcomes=SOLVED), make_scored(1))
    with pytest.raises(WaitedError):
        await dynamic.take()
    assert [uid.index for uid in await dynamic.issued()] == [0, 1, 2, 3, 4]
    assert dynamic.ledger.is_done(0)
    assert dynamic.ledger.num_trained == 0
    assert dynamic.ledger.num_outstanding == 4


async def test_a_replaced_group_is_counted_once_and_as_what_it_was(dynamic: Scene) -> None:
    correct, wrong = degenerate_total("all_correct"), degenerate_total("all_wrong")
    completions = LEARNER_DROPPED.labels(reason="degenerate")._value.get()
    await dynamic.arrive(make_scored(0, outcomes=SOLVED), make_scored(1, outcomes=FAILED))
    # The cap is reached: these two are trained on, and counted with their step.
    await dynamic.arrive(make_scored(2, outcomes=SOLVED), make_scored(3, outcomes=FAILED))
    assert await dynamic.take() == [2, 3]
    assert degenerate_total("all_correct") == correct + 1
    assert degenerate_total("all_wrong") == wrong + 1
    assert dynamic.inbox.dropped == {"degenerate": 2}
    assert LEARNER_DROPPED.labels(reason="degenerate")._value.get() == completions + 4


async def test_after_the_cap_degenerate_groups_are_taken_with_one_warning_a_batch(
    dynamic: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        await dynamic.arrive(*(make_scored(index, outcomes=FAILED) for index in range(4)))
        assert await dynamic.take() == [2, 3]
    assert dynamic.inbox.num_replaced == 2
    (record,) = caplog.records
    assert "advantage.max_degenerate_batches = 1" in record.getMessage()
    assert "advantage.dynamic_sampling" in record.getMessage()
    assert record.getMessage().startswith("2 of 2 groups")


async def test_the_cap_is_of_each_batch_and_a_batch_that_teaches_is_not_warned_of(
    dynamic: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    for first in (0, 4):
        await dynamic.arrive(*(make_scored(first + i, outcomes=FAILED) for i in range(2)))
        await dynamic.arrive(make_scored(first + 2), make_scored(first + 3))
        with caplog.at_level(logging.WARNING):
            assert await dynamic.take() == [first + 2, first + 3]
        assert dynamic.inbox.num_replaced == 2
        for position in (first + 2, first + 3):
            dynamic.ledger.finish(position)
        await dynamic.feeder.fill(policy_version=0)
    assert not caplog.records


async def test_a_replaced_group_is_acknowledged_with_the_next_checkpoint(dynamic: Scene) -> None:
    await dynamic.arrive(make_scored(0, outcomes=FAILED), make_scored(1))
    with pytest.raises(WaitedError):
        await dynamic.take()
    assert (await dynamic.scored.depth()).pending == 2
    await dynamic.inbox.acknowledge()
    assert (await dynamic.scored.depth()).pending == 1


async def test_a_stale_or_repeated_degenerate_group_is_dropped_as_such(dynamic: Scene) -> None:
    await dynamic.arrive(
        make_scored(0, outcomes=FAILED, versions=(0, 0)),
        make_scored(1, outcomes=FAILED, versions=(2, 2)),
        make_scored(1, outcomes=FAILED, versions=(2, 2)),
    )
    with pytest.raises(WaitedError):
        await dynamic.take(policy_version=2)
    assert dynamic.inbox.dropped == {"stale": 1, "degenerate": 1, "duplicate": 1}
