"""The sentence that says why no batch comes."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from services.learner.culprit import (
    Awaited,
    Situation,
    Station,
    name_culprit,
    name_missing,
    name_redis,
)
from shared.stream import NOBODY, Holder

BATCH = Awaited("batch 41", 3, 8, 0.0)
TWO = ("rollout-0", "rollout-1")
SERVING = {"rollout-0": 9, "rollout-1": 9}


def prompts(waiting: int = 0, *holders: Holder, leases: tuple[str, ...] = TWO) -> Station:
    return Station.of("prompts", waiting=waiting, holders=holders, leases=leases)


def rollouts(
    waiting: int = 0, *holders: Holder, leases: tuple[str, ...] = ("verifier-0", "verifier-2")
) -> Station:
    return Station("rollouts", waiting, holders, leases)


def seen(**given: Any) -> Situation:
    nothing: dict[str, Any] = {
        "awaited": BATCH,
        "waited_seconds": 130.0,
        "prompts": prompts(),
        "rollouts": rollouts(),
        "versions": SERVING,
        "policy_version": 9,
    }
    return Situation(**{**nothing, **given})


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "a verifier has all that is missing": (
        {"rollouts": rollouts(0, Holder("verifier-2", 3, 120.0))},
        "3 of 8 groups are at verifier-2 for 120 s",
    ),
    "more is under way than is missing": (
        {"rollouts": rollouts(0, Holder("verifier-2", 5, 120.0))},
        "3 of 8 groups are missing; 5 are at verifier-2 for 120 s",
    ),
    "one group only": (
        {
            "awaited": Awaited("batch 41", 1, 8, 0.0),
            "rollouts": rollouts(0, Holder("verifier-2", 1, 120.0)),
        },
        "1 of 8 groups is at verifier-2 for 120 s",
    ),
    "the longest holder, wherever it is": (
        {
            "prompts": prompts(0, Holder("rollout-1", 3, 125.0), Holder("rollout-0", 9, 40.0)),
            "rollouts": rollouts(0, Holder("verifier-0", 4, 90.0)),
        },
        "3 of 8 groups are at rollout-1 for 125 s",
    ),
    "nobody samples": (
        {"awaited": Awaited("batch 3", 8, 8, 0.0), "prompts": prompts(8, leases=())},
        "8 of 8 groups wait in `prompts`; no rollout replica holds a lease",
    ),
    "nobody scores": (
        {"rollouts": rollouts(3, leases=())},
        "3 of 8 groups wait in `rollouts`; no verifier holds a lease",
    ),
    "who held groups is gone and so are all others": (
        {"rollouts": rollouts(1, Holder("verifier-2", 2, 99.0), leases=())},
        "3 of 8 groups wait in `rollouts`; no verifier holds a lease",
    ),
    "the deserted station with more groups": (
        {"prompts": prompts(9, leases=()), "rollouts": rollouts(3, leases=())},
        "3 of 8 groups are missing; 9 wait in `prompts`; no rollout replica holds a lease",
    ),
    "nobody is missed where nothing waits": (
        {
            "prompts": prompts(leases=()),
            "rollouts": rollouts(0, Holder("verifier-2", 3, 120.0)),
        },
        "3 of 8 groups are at verifier-2 for 120 s",
    ),
    "a holder without a lease": (
        {"prompts": prompts(0, Holder("rollout-7", 3, 120.0))},
        "3 of 8 groups are at rollout-7 for 120 s, which holds no lease",
    ),
    "a holder that is behind": (
        {
            "prompts": prompts(0, Holder("rollout-0", 5, 300.0)),
            "versions": {**SERVING, "rollout-0": 7},
        },
        "3 of 8 groups are missing; 5 are at rollout-0 for 300 s, which serves version 7 of 9",
    ),
    "a holder that is stale": (
        {
            "prompts": prompts(0, Holder("rollout-0", 5, 300.0)),
            "versions": {**SERVING, "rollout-0": None},
        },
        "3 of 8 groups are missing; 5 are at rollout-0 for 300 s, which is stale",
    ),
    "a holder that the learner has never met": (
        {"prompts": prompts(0, Holder("rollout-0", 3, 300.0)), "versions": {"rollout-1": 9}},
        "3 of 8 groups are at rollout-0 for 300 s, which the learner does not reach",
    ),
    "nobody serves": (
        {"prompts": prompts(3), "versions": {"rollout-0": None}},
        "3 of 8 groups wait in `prompts`; no replica serves, rollout-0 and rollout-1 are stale",
    ),
    "nobody serves, and what they held was given back": (
        {"prompts": prompts(1, Holder(NOBODY, 2, 90.0)), "versions": {"rollout-0": None}},
        "3 of 8 groups wait in `prompts`; no replica serves, rollout-0 and rollout-1 are stale",
    ),
    "the only replica does not serve": (
        {"prompts": prompts(3, leases=("rollout-0",)), "versions": {"rollout-0": None}},
        "3 of 8 groups wait in `prompts`; no replica serves, rollout-0 is stale",
    ),
    "replicas that serve and take nothing": (
        {"prompts": prompts(3)},
        "3 of 8 groups wait in `prompts`; rollout-0 and rollout-1 are there and take none",
    ),
    "a verifier that takes nothing": (
        {"rollouts": rollouts(3, leases=("verifier-0",))},
        "3 of 8 groups wait in `rollouts`; verifier-0 is there and takes none",
    ),
    "a queue before a verifier that is busy but not stuck": (
        {"rollouts": rollouts(30, Holder("verifier-0", 2, 4.0))},
        "3 of 8 groups are missing; 30 wait in `rollouts`; verifier-0 is busy",
    ),
    "a queue, and one of those who take from it is stuck": (
        {"rollouts": rollouts(30, Holder("verifier-0", 2, 100.0), Holder("verifier-2", 2, 1.0))},
        "3 of 8 groups are missing; 2 are at verifier-0 for 100 s",
    ),
    "many names": (
        {"prompts": prompts(3, leases=tuple(f"r{i}" for i in range(9))), "versions": {"r1": 9}},
        "3 of 8 groups wait in `prompts`; r0, r1, r2 and 6 more are there and take none",
    ),
    "the learner is busy and does not take what is there": (
        {
            "num_scored": 3,
            "learner_does": "publishes version 9, 118 s",
            "prompts": prompts(0, Holder("rollout-0", 5, 300.0)),
        },
        "3 of 8 groups wait in `scored`; the learner publishes version 9, 118 s",
    ),
    "the learner is busy but has nothing to take": (
        {
            "learner_does": "publishes version 9, 2 s",
            "rollouts": rollouts(0, Holder("verifier-2", 3, 120.0)),
        },
        "3 of 8 groups are at verifier-2 for 120 s",
    ),
    "scored is full of what was taken": (
        {
            "scored_is_full": True,
            "rollouts": rollouts(0, Holder("verifier-2", 3, 120.0)),
        },
        "3 of 8 groups are missing; `scored` is full of groups that the learner has taken, and"
        " only a checkpoint makes room",
    ),
    "all is there": ({"num_scored": 3}, "3 of 8 groups wait in `scored` for the learner"),
    "dead letters": (
        {"num_dead": 2},
        "3 of 8 groups are in no stream, and 2 in `dead_letter`: `isentrope dead-letters` shows"
        " why",
    ),
    "nothing anywhere": (
        {},
        "3 of 8 groups are in no stream: Redis lost them, and the learner issues them again",
    ),
    "evaluations": (
        {
            "awaited": Awaited("the last evaluations", 12, 100, 0.0),
            "prompts": prompts(0, Holder("rollout-0", 12, 300.0)),
        },
        "12 of 100 groups are at rollout-0 for 300 s",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_one_to_look_at_first_is_named(case: str) -> None:
    given, clause = CASES[case]
    situation = seen(**given)
    assert name_culprit(situation) == f"waits for {situation.awaited.what}: {clause}"


def test_redis_is_named_when_it_does_not_answer() -> None:
    redis = name_redis(12.3, reason="Connection\nrefused")
    assert name_missing(BATCH, redis) == (
        "waits for batch 41: 3 of 8 groups are missing; Redis has not answered for 12 s"
        " (Connection refused)"
    )


def some_situation(draw: random.Random) -> Situation:
    def station(kind: str, stream: Any) -> Station:
        names = [f"{kind}-{i}" for i in range(draw.choice([0, 1, 2, 200]))]
        gone = [*names, f"{kind}-gone", f"{kind}\nodd"]
        holders = [
            Holder(name, draw.randint(1, 9), draw.random() * 500)
            for name in draw.sample(gone, draw.randint(0, len(gone)))
        ]
        return Station(stream, draw.choice([0, 0, 1, 7, 4096]), holders, names)

    wanted = draw.randint(1, 64)
    return seen(
        awaited=Awaited(f"batch {draw.randint(1, 999)}", draw.randint(0, wanted), wanted, 0.0),
        waited_seconds=draw.random() * 1000,
        prompts=station("rollout", "prompts"),
        rollouts=station("verifier", "rollouts"),
        num_scored=draw.choice([0, 0, 5]),
        scored_is_full=draw.random() < 0.2,
        num_dead=draw.choice([0, 0, 3]),
        versions={f"rollout-{i}": draw.choice([None, 3, 7]) for i in range(draw.randint(0, 9))},
        policy_version=7,
        learner_does=draw.choice(["", "publishes version 7, 4 s"]),
    )


def test_whatever_is_seen_the_sentence_is_one_line_with_a_number_and_a_name() -> None:
    draw = random.Random(4)
    for _ in range(500):
        situation = some_situation(draw)
        said = name_culprit(situation)
        awaited = situation.awaited
        assert said.startswith(f"waits for {awaited.what}: {awaited.num_missing} of "), said
        assert said.isprintable() and len(said) < 250, said
        names = r"rollout-|verifier-|rollout odd|verifier odd|no rollout|no verifier|the learner"
        assert re.search(names + r"|`dead_letter`|Redis", said.partition(":")[2]), said


def test_no_groups_are_said_to_be_where_there_are_none() -> None:
    draw = random.Random(5)
    for _ in range(500):
        situation = some_situation(draw)
        said = name_culprit(situation)
        for station in (situation.prompts, situation.rollouts):
            if not station.waiting and not station.holders:
                assert f"in `{station.stream}`" not in said, said
        for name in re.findall(r"(?:is|are) at (\S+) for", said):
            holders = {each.consumer.split()[0] for each in situation.prompts.holders}
            holders |= {each.consumer.split()[0] for each in situation.rollouts.holders}
            assert name in holders | {"odd"}, said
