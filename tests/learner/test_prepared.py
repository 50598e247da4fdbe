"""What is made ready for a step before it is known to be wanted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from services.learner.batch import build_batch
from services.learner.prepared import Preparation, Prepared
from shared.records import ScoredGroup
from tests.factories import make_scored
from tests.learner.fakes import run_config

PATIENCE_SECONDS = 30.0


@dataclass
class Maker:
    """Prepares, and knows for what it was asked; waits at each until it may."""

    asked: list[tuple[list[ScoredGroup], int]] = field(default_factory=list)
    may: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.may.set()

    def __call__(self, groups: Sequence[ScoredGroup], policy_version: int) -> Prepared:
        self.asked.append((list(groups), policy_version))
        assert self.may.wait(PATIENCE_SECONDS)
        batch = build_batch(groups, run_config(), policy_version=policy_version)
        return Prepared(batch, (), b"", ())


async def test_a_right_guess_is_made_once_and_before_it_is_asked_for() -> None:
    maker = Maker()
    preparation = Preparation(maker)
    groups = [make_scored(0), make_scored(1)]
    preparation.begin(groups, policy_version=3)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not maker.asked:
            await asyncio.sleep(0.001)
    prepared = await preparation.of(list(groups), policy_version=3)
    assert prepared.batch.groups == tuple(groups)
    assert maker.asked == [(groups, 3)]


async def test_a_guess_serves_one_step() -> None:
    maker = Maker()
    preparation = Preparation(maker)
    groups = [make_scored(0)]
    preparation.begin(groups, policy_version=3)
    first = await preparation.of(groups, policy_version=3)
    second = await preparation.of(groups, policy_version=3)
    assert first is not second
    assert len(maker.asked) == 2


GROUPS = [make_scored(0), make_scored(1)]


@pytest.mark.parametrize(
    ("taken", "policy_version"),
    [
        (GROUPS, 4),
        (GROUPS[::-1], 3),
        (GROUPS[:1], 3),
        ([*GROUPS, make_scored(2)], 3),
        ([GROUPS[0], make_scored(1)], 3),
    ],
    ids=["another version", "another order", "fewer", "more", "an equal group that came again"],
)
async def test_a_wrong_guess_is_not_used(taken: list[ScoredGroup], policy_version: int) -> None:
    maker = Maker()
    maker.may.clear()  # nor waited for
    preparation = Preparation(maker)
    preparation.begin(GROUPS, policy_version=3)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not maker.asked:
            await asyncio.sleep(0.001)
    asking = asyncio.create_task(preparation.of(taken, policy_version=policy_version))
    async with asyncio.timeout(PATIENCE_SECONDS):
        while len(maker.asked) < 2:
            await asyncio.sleep(0.001)
    maker.may.set()
    prepared = await asking
    assert maker.asked[1] == (taken, policy_version)
    assert [id(each) for each in prepared.batch.groups] == [id(each) for each in taken]
    assert int(prepared.batch.staleness.max()) == int(
        build_batch(taken, run_config(), policy_version=policy_version).staleness.max()
    )


async def test_what_cannot_be_prepared_is_told_when_it_is_asked_for() -> None:
    def refuse(*_: Any) -> Prepared:
        raise ValueError("a prompt without tokens")

    preparation = Preparation(refuse)
    preparation.begin(GROUPS, policy_version=3)
    with pytest.raises(ValueError, match="without tokens"):
        await preparation.of(GROUPS, policy_version=3)


async def test_a_dropped_guess_keeps_no_group() -> None:
    maker = Maker()
    preparation = Preparation(maker)
    preparation.begin(GROUPS, policy_version=3)
    preparation.drop()
    preparation.drop()
    assert (await preparation.of(GROUPS, policy_version=3)).batch.groups == tuple(GROUPS)
