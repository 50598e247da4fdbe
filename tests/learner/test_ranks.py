"""The learner's processes among each other, where one of them stands still."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from services.learner.ranks import COMMAND_TIMEOUT, Command, Opcode, Ranks
from shared.config import Environment
from tests.forked import Forked
from tests.integration.rank_processes import free_port

GIVING = timedelta(seconds=0.5)
NOT_YET_SECONDS = 60.0


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
