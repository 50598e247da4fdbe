"""What a stage says of itself."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

import pytest

from shared.activity import REDIS_SECONDS, Activity, Phase, Report
from shared.memory_stream import MemoryStream
from shared.stage import Stage
from shared.stream import Entry


class Scene:
    """A stage's book, and a clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.book = Activity(
            verb="samples", source="prompts", output="rollouts", clock=lambda: self.now
        )

    def after(self, seconds: float) -> Report:
        """So much later, with a Redis that answered all the time."""
        self.now += seconds
        for entry_id, spell in self.book._entries.items():
            self.book.enter(entry_id, spell.phase, spell.note)
        self.book.loop_enters(self.book._loop.phase)
        return self.book.report(standing="stale, has version 3")


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_with_nothing_to_do_it_waits_for_its_input_and_is_well(scene: Scene) -> None:
    assert scene.after(40) == Report("waits for prompts for 40 s", 0.0, 0.0)


def test_idleness_counts_from_the_end_of_the_last_entry(scene: Scene) -> None:
    scene.book.begin("1")
    scene.after(100)
    scene.book.end("1")
    assert scene.after(7).sentence == "waits for prompts for 7 s"


def test_work_is_counted_and_its_oldest_named(scene: Scene) -> None:
    scene.book.begin("1")
    scene.after(8)
    scene.book.begin("2")
    assert scene.after(4) == Report("samples 2 groups, the oldest for 12 s", 12.0, 12.0)


def test_whatever_ends_is_progress_but_not_what_begins(scene: Scene) -> None:
    scene.book.begin("1")
    scene.after(300)
    scene.book.begin("2")
    assert scene.after(0).stuck_seconds == 300
    scene.book.progress()
    assert scene.after(5) == Report("samples 2 groups, the oldest for 305 s", 5.0, 5.0)
    scene.book.end("1")
    assert scene.after(2) == Report("samples 1 group, the oldest for 7 s", 2.0, 2.0)


def test_an_entry_after_a_long_idleness_is_not_stuck_at_once(scene: Scene) -> None:
    scene.after(5000)
    scene.book.begin("1")
    assert scene.after(3).stuck_seconds == 3


@pytest.mark.parametrize(
    ("phase", "note", "sentence"),
    [
        (Phase.ROOM, "", "waits for room on `rollouts` for 500 s"),
        (Phase.HAND_ON, "", "hands them on to `rollouts` for 500 s"),
        (
            Phase.LEARNER,
            "it has not brought version 4",
            "waits for the learner for 500 s: it has not brought version 4",
        ),
    ],
)
def test_a_wait_for_others_is_told_and_is_no_fault_of_its_own(
    scene: Scene, phase: Phase, note: str, sentence: str
) -> None:
    scene.book.begin("1")
    scene.book.begin("2")
    for entry_id in ("1", "2"):
        scene.book.enter(entry_id, phase, note)
    assert scene.after(500) == Report(sentence, 500.0, 0.0)


def test_work_and_a_wait_are_both_told(scene: Scene) -> None:
    for entry_id in ("1", "2", "3"):
        scene.book.begin(entry_id)
    scene.book.enter("3", Phase.ROOM)
    report = scene.after(20)
    assert report.sentence == (
        "samples 2 groups, the oldest for 20 s, and waits for room on `rollouts` for 20 s with 1"
        " more"
    )
    assert report.stuck_seconds == 20


def test_a_replica_that_may_not_serve_waits_for_the_learner_whatever_it_holds(
    scene: Scene,
) -> None:
    scene.book.loop_enters(Phase.LEARNER)
    said = "waits for the learner for 80 s: stale, has version 3"
    assert scene.after(80) == Report(said, 80.0, 0.0)
    scene.book.begin("1")
    assert scene.after(0) == Report(f"{said}, holds 1 group", 80.0, 0.0)


def test_what_waited_for_the_learner_is_at_work_again_afterwards(scene: Scene) -> None:
    scene.book.begin("1")
    with scene.book.waiting("1", Phase.LEARNER, "it has not brought version 4"):
        scene.after(50)
    assert scene.after(2) == Report("samples 1 group, the oldest for 2 s", 2.0, 2.0)


@pytest.mark.parametrize("phase", [Phase.ROOM, Phase.HAND_ON])
def test_a_result_that_redis_does_not_answer_for_waits_for_redis(
    scene: Scene, phase: Phase
) -> None:
    scene.book.loop_enters(Phase.FULL)
    scene.book.begin("1")
    scene.book.enter("1", phase)
    scene.after(60)
    scene.now += REDIS_SECONDS + 9
    assert scene.book.report() == Report("waits for Redis for 12 s with 1 group in hand", 12.0, 0.0)


def test_a_claim_that_redis_does_not_answer_waits_for_redis(scene: Scene) -> None:
    scene.after(60)
    scene.now += 2.5
    scene.book.loop_calls()
    assert scene.book.report().sentence == "waits for prompts for 62 s"
    scene.now += 10
    scene.book.loop_calls()
    assert scene.book.report() == Report("waits for Redis for 12 s", 12.5, 0.0)
    assert scene.after(0).sentence == "waits for prompts for 72 s"


def test_a_full_stage_needs_no_answer_of_redis(scene: Scene) -> None:
    scene.book.begin("1")
    scene.book.loop_enters(Phase.FULL)
    scene.now += 90
    assert scene.book.report() == Report("samples 1 group, the oldest for 90 s", 90.0, 90.0)
    scene.book.loop_calls()
    scene.now += 1
    assert scene.book.report().sentence == "samples 1 group, the oldest for 91 s"


def test_a_chore_that_takes_long_is_told_first_and_is_no_stall_by_itself(scene: Scene) -> None:
    with scene.book.chore("takes version 4"):
        assert scene.after(1.5).sentence == "waits for prompts for 2 s"
        with scene.book.chore("begins to take version 5"):
            said = "takes version 4 for 72 s; waits for prompts for 72 s"
            assert scene.after(70.5) == Report(said, 72.0, 0.0)
    scene.book.begin("1")
    with scene.book.chore("takes version 4"):
        said = "takes version 4 for 80 s; samples 1 group, the oldest for 80 s"
        assert scene.after(80) == Report(said, 80.0, 80.0)
    assert scene.after(0).sentence == "samples 1 group, the oldest for 80 s"


def test_draining_is_told(scene: Scene) -> None:
    scene.book.begin("1")
    scene.book.loop_enters(Phase.ENDED)
    assert scene.after(9).sentence == "drains: samples 1 group, the oldest for 9 s"
    scene.book.end("1")
    assert scene.after(9) == Report("has drained", 0.0)


def test_an_entry_that_ended_twice_or_is_unknown_is_no_error(scene: Scene) -> None:
    scene.book.begin("1")
    for _ in range(2):
        scene.book.end("1")
    scene.book.enter("1", Phase.ROOM)
    assert scene.after(1).sentence == "waits for prompts for 1 s"


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60.0):
        while not holds():
            await asyncio.sleep(0.005)


async def test_a_stage_keeps_its_book_from_claim_to_acknowledgement() -> None:
    source, output, dead = (
        MemoryStream(name=name, capacity=1) for name in ("rollouts", "scored", "dead_letter")
    )
    go_on, stop = asyncio.Event(), asyncio.Event()

    async def work(entry: Entry) -> bytes:
        await go_on.wait()
        return entry.payload

    async def goes_on() -> bool:
        return not stop.is_set()

    stage = Stage(
        name="one", source=source, output=output, dead_letter=dead, work=work, max_in_flight=4,
        max_attempts=3, verb="scores",
    )  # fmt: skip

    def says(pattern: str) -> Callable[[], bool]:
        return lambda: re.match(pattern, stage.activity.report().sentence) is not None

    running = asyncio.create_task(stage.run(goes_on))
    await until(says(r"waits for rollouts for \d+ s"))
    await output.put(b"in the way")
    await source.put(b"a")
    await until(says(r"scores 1 group, the oldest for \d+ s"))
    go_on.set()
    await until(says(r"waits for room on `scored` for \d+ s"))
    (blocking,) = await output.browse()
    await output.acknowledge([blocking.id])
    await until(says(r"waits for rollouts for \d+ s"))
    assert await output.peek() == [b"a"]
    stop.set()
    await running
    assert stage.activity.report().sentence == "has drained"
