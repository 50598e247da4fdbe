from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from services.verifier.sandbox import ScoringPool
from services.verifier.scoring import check_scorer, score_group
from services.verifier.worker import Worker
from shared.codec import decode_scored_group, encode_rollout_group
from shared.config.services import TaskConfig, VerifierConfig
from shared.dead_letters import decode_dead_letter
from shared.errors import StartError
from shared.memory_stream import MemoryStream
from shared.records import Completion, Outcome, RolloutGroup, ScoredGroup, VersionRun
from shared.stream import Depth
from shared.tasks.countdown import Countdown
from shared.tokenizer import Tokenizer, save_characters
from tests.factories import make_prompt
from tests.verifier.waiting import until

SOLUTION, CUT_OFF, WRONG = "1+2=3,3+3=6$", "1+2=3,3+3=6", "1+2=3,3*3=9$"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    save_characters(Countdown.alphabet, end=Countdown.end, folder=folder)
    return Tokenizer(str(folder))


@pytest.fixture
async def pool() -> AsyncIterator[ScoringPool]:
    async with ScoringPool(TaskConfig(), VerifierConfig()) as made:
        yield made


def make_group(
    tokenizer: Tokenizer, texts: Sequence[str] = (SOLUTION, WRONG), *, index: int = 0
) -> RolloutGroup:
    prompt = replace(make_prompt(index, group_size=len(texts)), answer="1 2 3>6")
    completions = tuple(
        Completion(
            token_ids=tokenizer.encode_prompt(text),
            behaviour_logprobs=array("f", [-1.0] * len(text)),
            version_runs=(VersionRun(0, len(text)),),
            is_truncated=not text.endswith("$"),
        )
        for text in texts
    )
    return RolloutGroup(prompt, completions, "rollout-0", time.time())


class Scene:
    """A worker between streams in memory, and the order to stop."""

    def __init__(self, pool: ScoringPool, tokenizer: Tokenizer, *, capacity: int = 64) -> None:
        self.rollouts = MemoryStream(name="rollouts", capacity=64)
        self.scored = MemoryStream(name="scored", capacity=capacity)
        self.dead = MemoryStream(name="dead_letter", capacity=64)
        self.stop = asyncio.Event()
        self.worker = Worker(
            name="verifier-0",
            pool=pool,
            tokenizer=tokenizer,
            rollouts=self.rollouts,
            scored=self.scored,
            dead_letter=self.dead,
            max_concurrent_groups=2,
            max_attempts=3,
        )

    async def run_until(self, condition: Callable[[], Awaitable[bool]]) -> None:
        """Run the worker until the condition holds, then stop it in order."""
        running = asyncio.create_task(self.worker.run(self.stop))
        await until(condition)
        self.stop.set()
        await running

    async def is_done(self) -> bool:
        return await self.rollouts.depth() == Depth(waiting=0, pending=0)

    async def results(self) -> list[ScoredGroup]:
        return [decode_scored_group(payload) for payload in await self.scored.peek()]


@pytest.fixture
def scene(pool: ScoringPool, tokenizer: Tokenizer) -> Scene:
    return Scene(pool, tokenizer)


async def test_a_group_gets_one_score_per_completion_in_order(
    pool: ScoringPool, tokenizer: Tokenizer
) -> None:
    group = make_group(tokenizer, [WRONG, SOLUTION, CUT_OFF, SOLUTION])
    scored = await score_group(pool, tokenizer, group, verifier="v")
    outcomes = [score.outcome for score in scored.scores]
    assert outcomes == [Outcome.FAIL, Outcome.PASS, Outcome.FAIL, Outcome.PASS]
    assert [score.reward for score in scored.scores] == [0.0, 1.0, 0.0, 1.0]
    assert (scored.rollout, scored.verifier) == (group, "v")
    assert 0 <= time.time() - scored.scored_at < 60


async def test_a_group_of_another_task_is_an_error_and_no_zero(
    pool: ScoringPool, tokenizer: Tokenizer
) -> None:
    group = make_group(tokenizer)
    group = replace(group, prompt=replace(group.prompt, task="math"))
    scored = await score_group(pool, tokenizer, group, verifier="v")
    assert [score.outcome for score in scored.scores] == [Outcome.ERROR] * 2
    assert scored.scores[0].detail == "v scores 'countdown', not 'math'"


async def test_the_check_passes_for_a_scorer_that_works(pool: ScoringPool) -> None:
    await check_scorer(pool, Countdown())


async def test_the_check_refuses_a_scorer_that_rejects_a_known_solution(pool: ScoringPool) -> None:
    class Careless(Countdown):
        end = "!"

    with pytest.raises(StartError, match=r"its own solution '.*!' of '.*=' is scored fail"):
        await check_scorer(pool, Careless())


async def test_groups_go_from_rollouts_to_scored(scene: Scene, tokenizer: Tokenizer) -> None:
    groups = [make_group(tokenizer, index=index) for index in range(7)]
    for group in groups:
        await scene.rollouts.put(encode_rollout_group(group))
    await scene.run_until(scene.is_done)
    results = await scene.results()
    assert {result.rollout.prompt.uid.index for result in results} == set(range(7))
    assert all(result.rollout == groups[result.rollout.prompt.uid.index] for result in results)
    assert all(result.scores[0].outcome is Outcome.PASS for result in results)
    assert (scene.worker.groups_scored, scene.worker.completions_scored) == (7, 14)


async def test_what_is_no_group_goes_to_the_dead_letters_and_the_rest_is_scored(
    scene: Scene, tokenizer: Tokenizer
) -> None:
    await scene.rollouts.put(b"\xff no protobuf")
    await scene.rollouts.put(encode_rollout_group(make_group(tokenizer)))
    await scene.run_until(scene.is_done)
    (letter,) = map(decode_dead_letter, await scene.dead.peek())
    assert (letter.stream, letter.payload) == ("rollouts", b"\xff no protobuf")
    assert letter.error
    assert len(await scene.results()) == 1


async def test_a_group_that_was_delivered_too_often_is_given_up(
    scene: Scene, tokenizer: Tokenizer
) -> None:
    payload = encode_rollout_group(make_group(tokenizer))
    await scene.rollouts.put(payload)
    await scene.rollouts.claim("gone", count=1, wait_seconds=0.1)
    for _ in range(2):
        await scene.rollouts.pending("gone")
    await scene.worker.adopt(idle_seconds=0.0, alive=[])
    await scene.run_until(scene.is_done)
    (letter,) = map(decode_dead_letter, await scene.dead.peek())
    assert (letter.payload, letter.deliveries) == (payload, 4)
    assert "delivered 4 times and never finished" in letter.error
    assert await scene.results() == []


async def test_what_this_name_left_pending_is_scored_first(
    scene: Scene, tokenizer: Tokenizer
) -> None:
    for index in range(3):
        await scene.rollouts.put(encode_rollout_group(make_group(tokenizer, index=index)))
    await scene.rollouts.claim("verifier-0", count=2, wait_seconds=0.1)
    await scene.run_until(scene.is_done)
    results = await scene.results()
    assert len(results) == 3
    assert {result.rollout.prompt.uid.index for result in results[:2]} == {0, 1}


async def test_only_groups_of_dead_verifiers_are_adopted(
    scene: Scene, tokenizer: Tokenizer
) -> None:
    for index in range(2):
        await scene.rollouts.put(encode_rollout_group(make_group(tokenizer, index=index)))
    await scene.rollouts.claim("dead", count=1, wait_seconds=0.1)
    await scene.rollouts.claim("alive", count=1, wait_seconds=0.1)
    await scene.worker.adopt(idle_seconds=0.0, alive=["alive", "verifier-0"])

    async def adopted_is_done() -> bool:
        return (await scene.rollouts.depth()).pending == 1

    await scene.run_until(adopted_is_done)
    assert [result.rollout.prompt.uid.index for result in await scene.results()] == [0]


async def test_a_full_output_makes_the_worker_wait_and_loses_nothing(
    pool: ScoringPool, tokenizer: Tokenizer
) -> None:
    scene = Scene(pool, tokenizer, capacity=1)
    for index in range(3):
        await scene.rollouts.put(encode_rollout_group(make_group(tokenizer, index=index)))
    taken: list[ScoredGroup] = []

    async def take_slowly() -> bool:
        entries = await scene.scored.claim("learner", count=1, wait_seconds=0.01)
        taken.extend(decode_scored_group(entry.payload) for entry in entries)
        assert (await scene.scored.depth()).pending <= 1
        await scene.scored.acknowledge([entry.id for entry in entries])
        return len(taken) == 3

    await scene.run_until(take_slowly)
    assert sorted(each.rollout.prompt.uid.index for each in taken) == [0, 1, 2]


async def test_no_more_groups_are_claimed_than_there_are_places(
    pool: ScoringPool, tokenizer: Tokenizer
) -> None:
    scene = Scene(pool, tokenizer, capacity=1)
    await scene.scored.put(b"in the way")
    for index in range(5):
        await scene.rollouts.put(encode_rollout_group(make_group(tokenizer, index=index)))

    async def is_stuck() -> bool:
        return await scene.rollouts.depth() == Depth(waiting=3, pending=2)

    running = asyncio.create_task(scene.worker.run(scene.stop))
    await until(is_stuck)
    await scene.worker.adopt(idle_seconds=0.0, alive=[])
    assert await is_stuck()
    running.cancel()


async def test_an_order_to_stop_finishes_what_is_in_flight_and_claims_nothing_more(
    scene: Scene, tokenizer: Tokenizer
) -> None:
    texts = [SOLUTION] * 200
    for index in range(4):
        await scene.rollouts.put(encode_rollout_group(make_group(tokenizer, texts, index=index)))

    async def has_claimed() -> bool:
        return (await scene.rollouts.depth()).pending == 2

    await scene.run_until(has_claimed)
    assert await scene.rollouts.depth() == Depth(waiting=2, pending=0)
    assert len(await scene.results()) == 2
