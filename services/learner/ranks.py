"""The learner's processes among each other: who there is, what rank 0 asks of the others.

Ranks meet in one process group, NCCL on GPUs and gloo on CPUs. Rank 0 alone is called from
outside; it sends each command to the others before it does its own part, and so all ranks enter
the same collectives in the same order. A command is a header of four numbers and a payload of
bytes; nothing is pickled.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shared.config import Environment
from shared.errors import ConfigError

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Bounds a collective inside a command, where every rank is known to be at work."""

COMMAND_TIMEOUT = timedelta(days=7)
"""Bounds the wait for rank 0's next command, which may wait for data. A rank 0 that dies closes
its sockets, and the wait ends at once."""


class Opcode(IntEnum):
    """What rank 0 asks the other ranks to take part in."""

    TRAIN = 1
    SCORE = 2
    GATHER = 3
    SAVE = 4
    LOAD = 5
    CLOSE = 6


class Command(NamedTuple):
    """Two numbers and bytes, whose meaning the opcode tells."""

    opcode: Opcode
    first: int = 0
    second: int = 0
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the learner's.

    Attributes:
        commands: a group on the host whatever the device, so that a rank that waits occupies no
            GPU; None for a single rank.
    """

    rank: int
    world_size: int
    device: torch.device
    commands: Any

    @classmethod
    def join(cls, environment: Environment) -> Ranks:
        """Wait for the other ranks, and make the process groups.

        Raises:
            ConfigError: several ranks without an address to meet at.
        """
        has_gpu = torch.cuda.is_available()
        device = torch.device("cuda", environment.local_rank) if has_gpu else torch.device("cpu")
        if has_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if has_gpu else "gloo",
            rank=environment.rank,
            world_size=environment.world_size,
            timeout=COLLECTIVE_TIMEOUT,
            **_meeting_place(environment),
        )
        commands = None
        if environment.world_size > 1:
            commands = dist.new_group(backend="gloo", timeout=COMMAND_TIMEOUT)
        return cls(environment.rank, environment.world_size, device, commands)

    def send(self, command: Command) -> None:
        """Rank 0 to all others."""
        assert self.rank == 0, "only rank 0 gives commands"
        if self.commands is None:
            return
        size = len(command.payload)
        header = torch.tensor([command.opcode, command.first, command.second, size])
        dist.broadcast(header, src=0, group=self.commands)
        if size:
            payload = torch.frombuffer(bytearray(command.payload), dtype=torch.uint8)
            dist.broadcast(payload, src=0, group=self.commands)

    def receive(self) -> Command:
        """Wait for rank 0's next command.

        Raises:
            RuntimeError: rank 0 is gone, or sent nothing for COMMAND_TIMEOUT.
        """
        header = torch.zeros(4, dtype=torch.int64)
        dist.broadcast(header, src=0, group=self.commands)
        opcode, first, second, size = header.tolist()
        payload = torch.zeros(size, dtype=torch.uint8)
        if size:
            dist.broadcast(payload, src=0, group=self.commands)
        return Command(Opcode(opcode), first, second, payload.numpy().tobytes())

    def sum_in_place(self, values: Tensor) -> None:
        """Replace values by their sum over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)


def _meeting_place(environment: Environment) -> dict[str, Any]:
    if environment.world_size == 1:
        return {"store": dist.HashStore()}  # type: ignore[attr-defined]
    if environment.master_port == 0:
        raise ConfigError(
            f"MASTER_PORT is not set: {environment.world_size} learner ranks need a port to meet at"
        )
    address = f"tcp://{environment.master_address}:{environment.master_port}"
    return {"init_method": address}
