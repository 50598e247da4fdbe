"""The rule that moves a replica's number of groups, and what it reads of vLLM."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from services.rollout.concurrency import (
    HIGH_WATER,
    MAX_WAITING_SECONDS,
    ROOMY,
    Change,
    Concurrency,
    EngineLoad,
    surely_fitting,
)
from services.rollout.engine_load import PAUSE_SECONDS, LoadRecorder

CALM = EngineLoad(kv_cache_usage=0.3)
PRESSED = [
    (EngineLoad(num_preemptions=1), Change.PREEMPTION),
    (EngineLoad(kv_cache_usage=HIGH_WATER), Change.KV_CACHE),
    (EngineLoad(waiting_seconds=MAX_WAITING_SECONDS + 1), Change.QUEUE),
]


def update(concurrency: Concurrency, load: EngineLoad, *, busy: int | None = None) -> Change | None:
    """A look at the engine with every place in use, or so many."""
    number = concurrency.limit if busy is None else busy
    return concurrency.update(load, num_claimed=number, num_sampling=number)


def test_it_grows_by_one_while_every_place_is_in_use_and_there_is_room() -> None:
    concurrency = Concurrency(initial=2, maximum=4)
    assert [update(concurrency, CALM) for _ in range(3)] == [Change.ROOM, Change.ROOM, None]
    assert concurrency.limit == 4


@pytest.mark.parametrize(("load", "why"), PRESSED, ids=[why.value for _, why in PRESSED])
def test_it_halves_under_pressure(load: EngineLoad, why: Change) -> None:
    concurrency = Concurrency(initial=8, maximum=16)
    assert update(concurrency, load) is why
    assert concurrency.limit == 4


@pytest.mark.parametrize(
    "load",
    [EngineLoad(kv_cache_usage=ROOMY), EngineLoad(kv_cache_usage=0.3, waiting_seconds=0.1)],
    ids=["cache nearly full", "a request waits"],
)
def test_it_stays_between_room_and_pressure(load: EngineLoad) -> None:
    concurrency = Concurrency(initial=8, maximum=16)
    assert update(concurrency, load) is None
    assert concurrency.limit == 8


def test_it_halves_once_until_the_groups_in_work_have_come_down_to_it() -> None:
    concurrency = Concurrency(initial=8, maximum=16)
    full = EngineLoad(kv_cache_usage=1.0)
    assert [update(concurrency, full, busy=busy) for busy in (8, 8, 7, 6, 5)] == [
        Change.KV_CACHE, None, None, None, None,
    ]  # fmt: skip
    assert update(concurrency, full, busy=4) is Change.KV_CACHE
    assert concurrency.limit == 2


def test_preemptions_that_were_seen_are_no_pressure_any_more() -> None:
    concurrency = Concurrency(initial=8, maximum=16)
    load = EngineLoad(kv_cache_usage=0.3, num_preemptions=5)
    assert update(concurrency, load) is Change.PREEMPTION
    assert update(concurrency, load) is Change.ROOM


def test_a_halved_limit_counts_from_the_groups_that_made_the_pressure() -> None:
    concurrency = Concurrency(initial=16, maximum=16)
    assert update(concurrency, EngineLoad(kv_cache_usage=1.0), busy=4) is Change.KV_CACHE
    assert concurrency.limit == 2


def test_groups_that_wait_for_room_in_the_output_raise_nothing() -> None:
    concurrency = Concurrency(initial=4, maximum=16)
    assert concurrency.update(CALM, num_claimed=4, num_sampling=3) is None
    assert concurrency.limit == 4


def test_pressure_without_a_group_in_work_lowers_nothing() -> None:
    concurrency = Concurrency(initial=4, maximum=16)
    assert update(concurrency, EngineLoad(kv_cache_usage=1.0), busy=0) is None
    assert concurrency.limit == 4


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_it_stays_in_its_bounds_and_moves_as_it_says(seed: int) -> None:
    draw = random.Random(seed)
    maximum = draw.randint(1, 40)
    concurrency = Concurrency(initial=draw.randint(-3, 60), maximum=maximum)
    assert 1 <= concurrency.limit <= maximum
    preemptions = 0
    for _ in range(300):
        before = concurrency.limit
        preemptions += draw.random() < 0.1
        load = EngineLoad(draw.random(), preemptions, max(0.0, draw.uniform(-5, 3)))
        claimed = draw.randint(0, before + 3)
        change = concurrency.update(
            load, num_claimed=claimed, num_sampling=draw.randint(0, claimed)
        )
        assert 1 <= concurrency.limit <= maximum
        if change is None:
            assert concurrency.limit == before
        elif change is Change.ROOM:
            assert concurrency.limit == before + 1
        else:
            assert concurrency.limit == max(1, claimed // 2) < before


def test_it_settles_around_what_the_cache_carries_and_comes_back_when_there_is_more() -> None:
    concurrency = Concurrency(initial=1, maximum=64)

    def settled(carries: float) -> list[int]:
        limits = []
        for _ in range(200):
            update(concurrency, EngineLoad(kv_cache_usage=min(1.0, concurrency.limit / carries)))
            limits.append(concurrency.limit)
        return limits[100:]

    assert all(limit <= 10 for limit in settled(10))
    assert max(settled(10)) >= 8
    assert min(settled(40)[50:]) >= 20
    assert max(settled(4)) <= 4


def test_what_surely_fits_leaves_room_for_the_longest_completions() -> None:
    assert surely_fitting(1000, group_size=4, max_tokens=100) == 2
    assert surely_fitting(399, group_size=4, max_tokens=100) == 0


# --- what vLLM reports ---------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def step(
    recorder: LoadRecorder, *, usage: float = 0.0, waiting: int = 0, preempted: int = 0
) -> EngineLoad:
    recorder.record(
        SimpleNamespace(kv_cache_usage=usage, num_waiting_reqs=waiting),
        SimpleNamespace(num_preempted_reqs=preempted),
    )
    return recorder.load


def test_the_last_step_counts_and_preemptions_add_up() -> None:
    recorder = LoadRecorder()
    assert recorder.load == EngineLoad()
    step(recorder, usage=0.2, preempted=2)
    assert step(recorder, usage=0.5, preempted=1) == EngineLoad(0.5, 3, 0.0)
    recorder.record(None, None)
    assert recorder.load == EngineLoad(0.5, 3, 0.0)


def test_the_time_of_a_queue_runs_from_step_to_step_until_nobody_waits() -> None:
    clock = Clock()
    recorder = LoadRecorder(clock)
    step(recorder, waiting=1)
    for _ in range(4):
        clock.now += PAUSE_SECONDS / 2
        load = step(recorder, waiting=3)
    assert load.waiting_seconds == 2 * PAUSE_SECONDS
    clock.now += 100
    assert recorder.load.waiting_seconds == 2 * PAUSE_SECONDS, "no step, no queue"
    assert step(recorder, waiting=0).waiting_seconds == 0


def test_a_pause_for_new_weights_is_no_queue() -> None:
    clock = Clock()
    recorder = LoadRecorder(clock)
    step(recorder, waiting=1)
    clock.now += PAUSE_SECONDS + 10
    assert step(recorder, waiting=1).waiting_seconds == 0
