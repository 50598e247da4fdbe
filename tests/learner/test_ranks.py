"""The learner's processes among each other, where one of them stands still."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import torch.distributed as dist

from services.learner.app import reassuring
from services.learner.engine import LearnerEngine
from services.learner.ranks import COMMAND_TIMEOUT, Command, Opcode, Ranks
from shared.config import Environment
from shared.errors import EngineError
from tests.forked import Forked
from tests.integration.rank_processes import free_port

GIVING = timedelta(seconds=0.5)
NOT_YET_SECONDS = 480.0


def give_to_one_that_takes_nothing(rank: int, port: int) -> None:
    told = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_PORT": str(port)}
    first = replace(Ranks.join(Environment.read(told)), giving=GIVING)
    second = replace(first, commands=dist.new_group(backend="gloo", timeout=COMMAND_TIMEOUT))
    if rank == 1:
        time.sleep(NOT_YET_SECONDS)
    payload = bytes(8 << 20)
    with pytest.raises(RuntimeError):
        first.send(Command(Opcode.SCORE, payload=payload))
    with pytest.raises(RuntimeError):
        second.hand_out([payload])
    os._exit(0)


def test_rank_0_does_not_wait_for_ever_for_a_rank_that_stands_still(tmp_path: Path) -> None:
    port = free_port()
    ranks = [
        Forked(tmp_path / f"printed-{rank}", give_to_one_that_takes_nothing, rank, port)
        for rank in (0, 1)
    ]
    try:
        assert ranks[0].ended(seconds=NOT_YET_SECONDS / 2) == 0, ranks[0].printed
    finally:
        for each in ranks:
            each.close()


PATIENCE = timedelta(seconds=5)


def wait_for_commands(rank: int, port: int) -> None:
    told = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_PORT": str(port)}
    ranks = Ranks.join(Environment.read(told))
    ranks = replace(ranks, commands=dist.new_group(backend="gloo", timeout=PATIENCE))
    if rank == 0:
        until = time.monotonic() + 2 * PATIENCE.total_seconds()
        while time.monotonic() < until:
            ranks.send(Command(Opcode.WAIT))
            time.sleep(PATIENCE.total_seconds() / 8)
        time.sleep(NOT_YET_SECONDS)
    began = time.monotonic()
    with contextlib.suppress(RuntimeError):
        while ranks.receive().opcode is Opcode.WAIT:
            continue
    os._exit(0 if time.monotonic() - began > 2 * PATIENCE.total_seconds() else 1)


def test_a_rank_waits_as_long_as_rank_0_says_so_and_not_much_longer(tmp_path: Path) -> None:
    port = free_port()
    ranks = [Forked(tmp_path / f"printed-{rank}", wait_for_commands, rank, port) for rank in (0, 1)]
    try:
        assert ranks[1].ended(seconds=NOT_YET_SECONDS / 2) == 0, ranks[1].printed
    finally:
        for each in ranks:
            each.close()


async def test_rank_0_says_that_it_is_there_until_it_leads_no_more() -> None:
    said: list[None] = []

    class Engine:
        def reassure(self) -> None:
            said.append(None)
            if len(said) == 3:
                raise EngineError("rank 1 is gone")

    async def on_engine(function: Callable[[], Any]) -> Any:
        return function()

    async with reassuring(cast(LearnerEngine, Engine()), on_engine, seconds=0.001):
        async with asyncio.timeout(30):
            while len(said) < 3:
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
    assert len(said) == 3
